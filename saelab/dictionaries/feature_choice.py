"""Feature choice: each latent takes its quota of a batch's rows, so none is left unused.

    training: latent i keeps the m_i largest positive entries of its column of the (B, d_sae) table
              m_i = B · η_i,   η_i = k (rank_i + shift)^−exponent / Σ,   η_i ≤ 1,   Σ m_i = kB
    after:    z_i = pre_i where pre_i > θ_i, else 0   θ_i: its density is that of training

Ranks are by running density; fractions of m_i are carried from batch to batch, from a random start.
Where a column has too few positive entries, the largest ones left in the table take the rest. The
first share `mutual` of the run selects as mutual choice does: latents that mean nothing yet should
not be forced on rows. Loss: Σ‖x − x_hat‖² / (n · variance) + aux_weight · aux_zipf (see mutual
choice). `forced` in the log is the share of picks that are not among as many largest entries of the
table: mutual choice would not have made them. All beyond the idea is our reading: the paper gives
no formulas that we could read.

Ayonrinde 2024, "Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse
Autoencoders", arXiv 2411.02124.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from saelab.dictionaries.coupled import ZipfConfig, ZipfDictionary
from saelab.dictionaries.linear import Code
from saelab.ops import allocate
from saelab.protocols import Loss
from saelab.types import Batch


class FeatureChoiceConfig(ZipfConfig):
    """A feature-choice dictionary."""

    type: Literal["feature_choice"] = "feature_choice"
    """Name in the registry."""
    mutual: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the run, at its start, that selects by mutual choice."""
    aux: Literal["zipf", "auxk"] = "zipf"
    """Whom the auxiliary loss helps: latents below Zipf's law, or dead ones."""


@final
class FeatureChoice(ZipfDictionary):
    """The feature-choice dictionary; see the module's docstring for its equations."""

    config_class = FeatureChoiceConfig
    config: FeatureChoiceConfig

    def __init__(self, config: FeatureChoiceConfig) -> None:
        """Allocate the weights, one threshold per latent."""
        super().__init__(config)
        self.threshold = torch.zeros(self.d_sae)
        self.register_buffer("carry", torch.zeros(self.d_sae))
        self.carry: Tensor

    @torch.no_grad()
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        """Initialise as TopK does, and draw the fractions of quotas carried at the start."""
        super().init_(sample, generator)
        self.carry.copy_(torch.rand(self.d_sae, generator=generator))

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the FVU-scaled error plus the auxiliary loss; pure."""
        if progress < self.config.mutual:
            loss = super().loss(batch, progress, dead)
            return replace(loss, terms=loss.terms | {"forced": torch.zeros(())})
        quota, carry = self._quota(len(batch))
        code, forced = self._by_quota(batch.x, quota)
        loss = self._loss_of(batch, code, dead)
        return replace(
            loss, terms=loss.terms | {"forced": forced}, observed=loss.observed | {"carry": carry}
        )

    def observe_(self, loss: Loss) -> None:
        """Take in the batch's densities, and what its quotas left over."""
        super().observe_(loss)
        if "carry" in loss.observed:
            self.carry.copy_(loss.observed["carry"])

    @torch.no_grad()
    def _quota(self, n: int) -> tuple[Tensor, Tensor]:
        """Return how many of n rows each latent takes, and the fractions that it carries on."""
        wanted = n * self._expected_density() + self.carry
        quota = wanted.floor()
        return quota.long().clamp(max=n), wanted - quota

    def _select(self, x: Tensor, progress: float) -> Code:
        if progress < self.config.mutual:
            return super()._select(x, progress)
        return self._by_quota(x, self._quota(len(x))[0])[0]

    def _by_quota(self, x: Tensor, quota: Tensor) -> tuple[Code, Tensor]:
        """Return the code in which latents take their quotas, and the share of forced picks."""
        with torch.no_grad():
            pre = F.linear(self._centred(x), self.W_enc).to(x.dtype) + self.b_enc
            mask = allocate.fill(pre, quota)
            chosen, forced = allocate.ragged(pre, mask), allocate.forced_share(pre, mask)
        return self._differentiable(x, chosen), forced

    def _aux(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        if self.config.aux == "auxk":
            return super()._aux(x, error, dead)
        return self._aux_zipf(x, error)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Set each latent's threshold to where its density is its density in training."""
        x = torch.cat([batch.x for batch in batches])
        counts = (self.density * len(x)).round().long()
        found = allocate.latent_thresholds(self._centred(x), self.W_enc, self.b_enc, counts)
        self.threshold.copy_(found)
