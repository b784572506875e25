"""Two ways to write the vectors of a slot as sums of directions: a dictionary's codes, and labels.

Both give a `Coding`, so that everything measured about one can be measured about the other.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.circuits.attributes import Coding, Supervised
from saelab.circuits.bases import Directions
from saelab.circuits.tasks import TaskData


@final
@dataclass(frozen=True)
class ByDictionary:
    """A dictionary's own codes."""

    dictionary: Directions
    signed: bool
    """Whether z < 0 says something too."""

    @classmethod
    @torch.no_grad()
    def of(cls, dictionary: Directions, x: Float[Tensor, "n slots d"]) -> "ByDictionary":
        """Return a dictionary's coder, signed if any code of these vectors is negative."""
        return cls(dictionary, bool((dictionary.encode(x.flatten(0, 1)) < 0).any()))

    @torch.no_grad()
    def code(self, x: Float[Tensor, "n d"], table: Bool[Tensor, "n columns"], slot: int) -> Coding:
        """Return the codes; labels are not looked at."""
        del table, slot
        d = self.dictionary
        return Coding(d.encode(x), d.W_dec.detach(), d.b_dec.detach())


@final
@dataclass(frozen=True)
class ByLabels:
    """The codes that labels give, with features per slot."""

    slots: tuple[Supervised, ...]
    signed: bool = False

    def code(self, x: Float[Tensor, "n d"], table: Bool[Tensor, "n columns"], slot: int) -> Coding:
        """Return the codes; x is not looked at."""
        del x
        return self.slots[slot].code(table)


Coder = ByDictionary | ByLabels
"""A way to write the vectors of one slot as sums."""


@dataclass(frozen=True)
class Labelled:
    """Prompts, the vectors of their slots, and their labels."""

    data: TaskData
    x: Float[Tensor, "n slots d"]
    table: Bool[Tensor, "n columns"]
