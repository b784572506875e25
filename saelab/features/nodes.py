"""What has a page in the index: a dictionary's latents, then the concepts above them.

    x ≈ z W_dec,  W_dec ≈ T₁ F₁,  F₁ ≈ T₂ F₂, …      so that x ≈ (z T₁ … T_ℓ) F_ℓ

A dictionary with a hierarchy factorises its decoder directions by the features F of a level above,
and those again; the trees T say how much of each concept a node of the level below holds. A
concept's code is the sum of its children's codes by these amounts: it fires where they do. Latents
keep their numbers, and concepts are numbered on from them, level by level.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.protocols import Dictionary
from saelab.types import SparseLatents


@runtime_checkable
class Hierarchical(Protocol):
    """A dictionary whose decoder directions are sums of fewer concepts, and these of fewer yet."""

    @property
    def n_levels(self) -> int:
        """Number of levels, the latents' included."""
        ...

    def features(self, level: int) -> Float[Tensor, "rank d_out"]:
        """Return a level's directions; level 0 is the latents'."""
        ...

    def tree(self, level: int) -> Float[Tensor, "below rank"]:
        """Return how much of each concept of level ≥ 1 a node of the level below holds."""
        ...


@dataclass(frozen=True)
class Nodes:
    """The latents of a dictionary and the concepts above them, coded together."""

    dictionary: Dictionary
    levels: tuple[Float[Tensor, "_ d_out"], ...]
    """Each level's directions; those of the first are the latents'."""
    trees: tuple[Float[Tensor, "_ _"], ...]
    """Between each level and the one before it."""
    floor: float
    """Share of a row's largest value in a level below which a value does not count."""

    @staticmethod
    def of(dictionary: Dictionary) -> "Nodes":
        """Return a dictionary's nodes: only its latents, unless it is `Hierarchical`."""
        levels, trees = [dictionary.W_dec.detach()], []
        if isinstance(dictionary, Hierarchical):
            above = range(1, dictionary.n_levels)
            levels += [dictionary.features(level).detach() for level in above]
            trees = [dictionary.tree(level).detach() for level in above]
        floor = getattr(dictionary, "l0_floor", 0.0)
        return Nodes(dictionary, tuple(levels), tuple(trees), floor)

    @property
    def sizes(self) -> list[int]:
        """Number of nodes of each level; the first is d_sae."""
        return [len(directions) for directions in self.levels]

    def __len__(self) -> int:
        """Return the number of nodes."""
        return sum(self.sizes)

    @property
    def directions(self) -> Float[Tensor, "nodes d_out"]:
        """All nodes' directions, one level after the other."""
        return torch.cat(self.levels)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseLatents:
        """Return the codes of all nodes on some rows, without what does not count."""
        z = self.dictionary.encode_sparse(x)
        if len(self.levels) == 1 and self.floor == 0:
            return z
        codes = [z.dense()]
        for tree in self.trees:
            codes.append(codes[-1] @ tree)
        return SparseLatents.from_dense(torch.cat([self._counted(code) for code in codes], 1))

    def _counted(self, code: Float[Tensor, "n rank"]) -> Float[Tensor, "n rank"]:
        size = code.abs()
        return code.where(size >= self.floor * size.amax(1, keepdim=True), 0)

    def edges(self) -> Iterator[tuple[Int[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"]]]:
        """Yield per level (children, parents, weights): numbers of nodes, where not 0."""
        first = 0
        for below, tree in zip(self.sizes, self.trees, strict=False):
            child, parent = tree.cpu().nonzero(as_tuple=True)
            yield child + first, parent + first + below, tree.cpu()[child, parent]
            first += below
