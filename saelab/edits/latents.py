"""Edits of latents: a change of codes Δz becomes the change Δz @ W_dec of the activation, no more.

With z the dictionary's code of x, and i an edited latent,

    add          Δz_i = s                          x moves by s · W_dec[i]
    set          Δz_i = s − z_i                    a clamp
    scale        Δz_i = (s − 1) z_i
    ablate       Δz_i = −z_i                       set to 0
    cap          Δz_i = min(max(z_i, −s), s) − z_i
    project_out  Δz = −x W_dec[I]⁺                 no component of x is left along the directions I

and x becomes x + Δz @ W_dec. What the dictionary does not reconstruct stays in x: an edit that
changes no code changes no bit. Edits of one site are all computed from the unedited x, and summed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.edits.config import EditConfig
from saelab.errors import ConfigError
from saelab.protocols import Store


@runtime_checkable
class Editable(Protocol):
    """What an edit needs of a dictionary; any `protocols.Dictionary` has it."""

    d_in: int
    d_out: int
    d_sae: int

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        """Row i is the decoder direction of latent i."""
        ...

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row."""
        ...


@final
class Directions:
    """Bare directions as latents, each by itself: z_i = ⟨x, d_i⟩ / ‖d_i‖²."""

    def __init__(self, directions: Float[Tensor, "m d"]) -> None:
        """Take the directions as decoder rows, float32, of the lengths that they have."""
        self.W_dec: Tensor = directions.detach().float()
        self.d_sae, self.d_in = self.W_dec.shape
        self.d_out = self.d_in

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return how often each direction is contained in x."""
        return x.to(self.W_dec) @ self.W_dec.T / self.W_dec.square().sum(1)


@dataclass(frozen=True)
class Scales:
    """How large a dictionary's latents and a site's activations usually are."""

    typical_max: Float[Tensor, " d_sae"]
    """Mean, over the documents in which the latent fires, of its largest |z|; NaN: never fired."""
    mean_norm: float
    """Mean ‖x‖ of the site's kept training rows."""


@dataclass(frozen=True)
class Handle:
    """A dictionary at the site it acts on, under the name by which edits know it."""

    dictionary: Editable
    site: str
    name: str = "dictionary"
    scales: Scales | None = None
    """Needed for strengths in units of `typical_max` or `norm`; see `measure_scales`."""


@torch.no_grad()
def measure_scales(
    dictionary: Editable, store: Store, site: str, *, rows: int = 50_000, batch: int = 4096
) -> Scales:
    """Return the scales of a dictionary's latents over the first kept training rows of a site."""
    largest: dict[int, Tensor] = {}
    seen = 0
    total = torch.zeros(dictionary.d_sae, dtype=torch.float64)
    count = torch.zeros(dictionary.d_sae, dtype=torch.float64)

    def close(documents: Sequence[int]) -> None:
        for document in documents:
            peak = largest.pop(document).double()
            total.add_(peak)
            count.add_(peak > 0)

    for part in store.scan(site, batch=batch, split="train"):
        z = dictionary.encode(part.x.to(dictionary.W_dec)).abs().cpu()
        here = torch.unique(part.documents).tolist()
        close([document for document in largest if document not in here])
        for document in here:
            peak = z[part.documents == document].amax(0)
            largest[document] = torch.maximum(largest.get(document, peak), peak)
        seen += len(part)
        if seen >= rows:
            break
    close(list(largest))
    return Scales((total / count).float(), store.stats(site).mean_norm)


@dataclass(frozen=True)
class LatentEdit:
    """One edit of one dictionary's latents."""

    handle: Handle
    config: EditConfig

    def strengths(self) -> Float[Tensor, " m"]:
        """Return each latent's strength in the latent's own unit.

        Raises ConfigError if the unit's scale is not known.
        """
        config, scales = self.config, self.handle.scales
        raw = torch.tensor(config.strengths)
        if config.unit == "latent":
            return raw
        if scales is None:
            raise ConfigError(
                f"{config}: strengths in units of {config.unit} need to know how large things are "
                f"at {self.handle.site!r}: give the handle `scales=measure_scales(...)`"
            )
        rows = list(config.latents)
        if config.unit == "norm":
            norms = self.handle.dictionary.W_dec[rows].detach().float().norm(dim=1).cpu()
            return raw * scales.mean_norm / norms
        typical = scales.typical_max[rows]
        if bool(typical.isnan().any()):
            silent = [i for i, value in zip(rows, typical.tolist(), strict=True) if value != value]
            raise ConfigError(
                f"{config}: latents {silent} never fired where scales were measured and have no "
                "typical maximum; take another latent, or `unit: latent` or `norm`"
            )
        return raw * typical

    def change(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return Δz @ W_dec of these rows, in the dictionary's dtype and on its device."""
        dictionary, rows = self.handle.dictionary, list(self.config.latents)
        W = dictionary.W_dec[rows].detach()
        x = x.to(W)
        if self.config.operation == "project_out":
            # directions whose length is rounding error are no directions
            return -(x @ torch.linalg.pinv(W)) @ W
        return self._code_change(x, rows) @ W

    def _code_change(self, x: Float[Tensor, "n d"], rows: list[int]) -> Float[Tensor, "n m"]:
        operation = self.config.operation
        s = self.strengths().to(x)
        if operation == "add":
            return s.expand(len(x), -1)
        z = self.handle.dictionary.encode(x)[:, rows]
        if operation == "set":
            return s - z
        if operation == "scale":
            return (s - 1) * z
        if operation == "cap":
            return torch.minimum(torch.maximum(z, -s), s) - z
        assert operation == "ablate"
        return -z
