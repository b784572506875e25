"""ReLU with an L1 penalty: the sparse autoencoder from which the others depart.

    pre = (x − b_dec) W_encᵀ + b_enc        z = ReLU(pre)        x_hat = z W_dec + b_dec

    loss = Σ‖x − x_hat‖² / (n · variance) + λ · penalty / √variance + aux_weight · AuxK

    form "bricken": penalty = mean over rows of Σ_i z_i, decoder rows of unit norm
    form "april":   penalty = mean over rows of Σ_i z_i ‖W_dec,i‖, decoder rows free

With unit variance this is ‖x − x_hat‖² + λ Σ z, so λ is a pure number: it does not depend on the
unit of x. The penalty shrinks every code; `target_l0` steers λ to a mean L0.

Bricken et al. 2023, "Towards Monosemanticity: Decomposing Language Models With Dictionary
Learning"; Anthropic interpretability team, "Update on how we train SAEs", April 2024.
"""

from typing import Literal, final

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.dictionaries.penalty import PenalisedDictionary, PenaltyConfig
from saelab.protocols import Loss
from saelab.types import Batch


class ReLUConfig(PenaltyConfig):
    """A ReLU dictionary."""

    type: Literal["relu"] = "relu"
    """Name in the registry."""
    form: Literal["bricken", "april"] = "april"
    """Unit decoder rows and Σ z; or free rows and Σ z ‖W_dec,i‖."""


@final
class ReLU(PenalisedDictionary):
    """The ReLU dictionary; see the module's docstring for its equations."""

    config_class = ReLUConfig
    config: ReLUConfig

    def __init__(self, config: ReLUConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.unit_decoder = config.form == "bricken"

    def _codes(self, x: Tensor) -> Tensor:
        return self._pre(x).relu()

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the FVU-scaled error plus the penalty and AuxK; pure."""
        z = self._entries(batch.x, torch.zeros_like(self.b_enc))
        error = self._error(batch, z)
        fvu, aux = self._fvu(error), self._aux(batch.x, error, dead)
        per_latent = torch.zeros_like(self.b_enc).index_add(0, z.indices, z.values)
        if not self.unit_decoder:
            per_latent = per_latent * self.W_dec.norm(dim=1)
        penalty = per_latent.sum() / (len(batch) * self.variance.sqrt())
        weight = self._weight(progress)
        return Loss(
            total=fvu + weight * penalty + self.config.aux_weight * aux,
            terms={
                "fvu": fvu.detach(),
                "aux": aux.detach(),
                "penalty": penalty.detach(),
                "weight": weight,
            },
            fired=z.indices,
            l0=z.l0().sum() / len(batch),
            observed={"progress": torch.tensor(progress)},
        )
