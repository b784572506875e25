"""What a graph's nodes are coordinates in: a dictionary's latents, neurons, principal directions.

Attribution asks little of a dictionary: codes, and the affine map that carries them back. So the
coordinates of a site, and its principal directions, are handled by the same code as dictionaries,
for the curves that every circuit is held against. Their error node is 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ArtifactError, ConfigError
from saelab.protocols import LanguageModel


@runtime_checkable
class Directions(Protocol):
    """Codes and the directions that they weigh: every `Dictionary`, and every `Basis`."""

    @property
    def d_in(self) -> int:
        """Width of what is coded."""
        ...

    @property
    def d_out(self) -> int:
        """Width of what codes are carried back to."""
        ...

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        """Row i is the direction of latent i."""
        ...

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        """What is added to `z @ W_dec`."""
        ...

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row, differentiable with the support held fixed."""
        ...


@final
@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of a site: x = z W_dec + b_dec without error."""

    W_dec: Float[Tensor, "d d"]
    """Row i is the i-th direction."""
    b_dec: Float[Tensor, " d"]

    @property
    def d_in(self) -> int:
        """Width of the site."""
        return self.W_dec.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the site."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of directions."""
        return self.W_dec.shape[0]

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return the coordinates of each row."""
        return (x.to(self.W_dec) - self.b_dec) @ self.W_dec.T


def neurons(width: int) -> Basis:
    """Return a site's own coordinates."""
    return Basis(torch.eye(width), torch.zeros(width))


def principal_directions(x: Float[Tensor, "n d"]) -> Basis:
    """Return the principal directions of rows about their mean, largest variance first."""
    rows = x.double()
    mean = rows.mean(0)
    _, basis = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    return Basis(basis.flip(1).T.contiguous().to(x.dtype), mean.to(x.dtype))


def in_forward_order(
    model: LanguageModel, dictionaries: Mapping[str, Directions]
) -> dict[str, Directions]:
    """Return the dictionaries by site, in the order of the forward pass.

    Raises SiteError for an unknown site, ArtifactError for a dictionary of another width, or of
    another site to write than to read, and ConfigError without any.
    """
    if not dictionaries:
        raise ConfigError("a circuit needs a dictionary for at least one site; give some")
    for site, dictionary in dictionaries.items():
        width = model.site(site).width
        if (dictionary.d_in, dictionary.d_out) != (width, width):
            raise ArtifactError(
                f"the dictionary for {site} takes vectors of width {dictionary.d_in} and gives "
                f"{dictionary.d_out}, but the site of {model.name} has width {width}: it was "
                "trained on another site or model"
            )
    return {s.name: dictionaries[s.name] for s in model.sites() if s.name in dictionaries}
