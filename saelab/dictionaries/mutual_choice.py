"""Mutual choice: rows and latents compete for one budget, and rare latents are helped by Zipf.

    training: z = ReLU(pre) on the ⌊kB⌋ largest entries of the (B, d_sae) table, else 0
    after:    z = pre where pre > θ, else 0           θ: mean l0 = k on training rows

The selection is that of BatchTopK; the auxiliary loss differs. With densities ρ and the law
η_i = k (rank_i + shift)^−exponent / Σ, ranks by ρ, a latent lacks w_i = max(0, 1 − ρ_i / η_i), and

    aux_zipf = Σ‖e − Σ_i w_i ReLU(pre_i) W_dec[i]‖² / Σ‖e − mean(e)‖² · min(n_lacking / aux_k, 1)

over the aux_k largest w_i pre_i of each row. AuxK is the case of w in {0, 1} on dead latents. The
paper gives no formulas that we could read: law, running densities and weights are our reading.

Ayonrinde 2024, "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse
Autoencoders", arXiv 2411.02124.
"""

from typing import Literal, final

from torch import Tensor

from saelab.dictionaries.coupled import ZipfConfig, ZipfDictionary


class MutualChoiceConfig(ZipfConfig):
    """A mutual-choice dictionary."""

    type: Literal["mutual_choice"] = "mutual_choice"
    """Name in the registry."""
    aux: Literal["zipf", "auxk"] = "zipf"
    """Whom the auxiliary loss helps: latents below Zipf's law, or dead ones (then: BatchTopK)."""


@final
class MutualChoice(ZipfDictionary):
    """The mutual-choice dictionary; see the module's docstring for its equations."""

    config_class = MutualChoiceConfig
    config: MutualChoiceConfig

    def _aux(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        if self.config.aux == "auxk":
            return super()._aux(x, error, dead)
        return self._aux_zipf(x, error)
