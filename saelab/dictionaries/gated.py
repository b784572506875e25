"""Gated: one affine map decides which latents fire, a rescaled copy of it says how much.

    gate  = (x − b_dec) W_encᵀ + b_enc
    z     = H(gate) · ReLU(exp(r_mag) · (x − b_dec) W_encᵀ + b_mag)        x_hat = z W_dec + b_dec

    loss  = (Σ‖x − x_hat‖² + Σ‖x − x_gate‖²) / (n · variance)
            + λ · mean over rows of Σ ReLU(gate) / √variance + aux_weight · AuxK
    x_gate = ReLU(gate) W_dec + b_dec with frozen W_dec and b_dec

The penalty shrinks only the gate; the second error is what trains it, since no gradient passes the
step H. Decoder rows keep unit norm; `target_l0` steers λ to a mean L0.

Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders",
arXiv 2404.16014.
"""

from dataclasses import replace
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelab.dictionaries.penalty import PenalisedDictionary, PenaltyConfig
from saelab.ops import sparse
from saelab.protocols import Loss
from saelab.types import Batch


class GatedConfig(PenaltyConfig):
    """A gated dictionary."""

    type: Literal["gated"] = "gated"
    """Name in the registry."""


@final
class Gated(PenalisedDictionary):
    """The gated dictionary; see the module's docstring for its equations."""

    config_class = GatedConfig
    config: GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def _codes(self, x: Tensor) -> Tensor:
        product = self._product(x)
        amount = (self.r_mag.exp() * product + self.b_mag).relu()
        return amount * (product + self.b_enc > 0)

    def scale_(self, factor: float) -> None:
        """Change the unit of x: both encoder biases scale, the ratio r_mag does not."""
        super().scale_(factor)
        self.b_mag.mul_(factor)

    @torch.no_grad()
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        """Set the weights as for the other types; both paths start equal."""
        super().init_(sample, generator)
        self.r_mag.zero_()
        self.b_mag.zero_()

    @torch.no_grad()
    def revive_(self, ids: Int[Tensor, " m"], rows: Float[Tensor, "m d_in"]) -> None:
        """Point each of these latents at one of these rows; both paths are equal again."""
        super().revive_(ids, rows)
        self.r_mag[ids] = 0
        self.b_mag[ids] = 0

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return both FVU-scaled errors plus the penalty and AuxK; pure."""
        gate = self._entries(batch.x, torch.zeros_like(self.b_enc))
        b_enc, r_mag, b_mag = (
            p.index_select(0, gate.indices) for p in (self.b_enc, self.r_mag, self.b_mag)
        )
        z = replace(gate, values=(r_mag.exp() * (gate.values - b_enc) + b_mag).relu())
        error = self._error(batch, z)
        x_gate = sparse.decode_ragged_at(gate, self.W_dec.detach()) + self.b_dec.detach()
        fvu, fvu_gate = self._fvu(error), self._fvu(batch.y - x_gate)
        aux = self._aux(batch.x, error, dead)
        penalty = gate.values.sum() / (len(batch) * self.variance.sqrt())
        weight = self._weight(progress)
        fires = z.values.detach() > 0
        return Loss(
            total=fvu + fvu_gate + weight * penalty + self.config.aux_weight * aux,
            terms={
                "fvu": fvu.detach(),
                "fvu_gate": fvu_gate.detach(),
                "aux": aux.detach(),
                "penalty": penalty.detach(),
                "weight": weight,
            },
            fired=z.indices[fires],
            l0=fires.sum() / len(batch),
            observed={"progress": torch.tensor(progress)},
        )
