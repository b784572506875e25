"""What types share whose latents compete across a whole batch in training.

Rows are selected together only in `loss`. Afterwards each row is coded by itself: z = pre where
pre > threshold, else 0, with thresholds that `calibrate` sets on training rows, weights frozen.
Some types also follow how often each latent fires, and compare it with Zipf's law.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saelab.dictionaries.linear import Code, LinearConfig, LinearDictionary
from saelab.ops import allocate, sparse
from saelab.protocols import Loss
from saelab.types import Batch, SparseLatents

MEMORY = 8
"""Densities are averaged over about the last 1/8 of the batches seen: a share of the run so far."""


class CoupledConfig(LinearConfig):
    """What these types' configurations share."""

    k: Annotated[float, Field(gt=0)]
    """Mean number of latents per row: ⌊k · rows⌋ are kept of a batch."""


class CoupledDictionary(LinearDictionary):
    """In training the ⌊kB⌋ largest pre-activations of a batch; later one threshold."""

    def __init__(self, config: CoupledConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros(()))
        self.threshold: Tensor

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""
        return self._encode_above(x, self.threshold)

    def scale_(self, factor: float) -> None:
        """Change the unit of x: the threshold scales as well."""
        super().scale_(factor)
        self.threshold.mul_(factor)

    def _select(self, x: Tensor, progress: float) -> Code:
        del progress
        total = int(self.config.k * len(x) + 1e-6)
        chosen = allocate.batch_topk(self._centred(x), self.W_enc, self.b_enc, total)
        return self._differentiable(x, chosen)

    def _differentiable(self, x: Tensor, chosen: SparseLatents) -> SparseLatents:
        """Return z = ReLU(pre) at the chosen entries."""
        pre = sparse.encode_ragged_at(x, self.b_dec, self.W_enc, self.b_enc, chosen)
        return replace(pre, values=pre.values.relu())

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Set the threshold above which the batches' mean l0 is k."""
        self.threshold.copy_(self._common_threshold(batches))


class ZipfConfig(CoupledConfig):
    """What types share that hold densities against Zipf's law."""

    exponent: Annotated[float, Field(ge=0)] = 1.0
    """Latent of rank r should fire on a share of rows in proportion to (r + shift)^−exponent."""
    shift: Annotated[float, Field(ge=0)] = 10.0
    """Flattens the law for the most frequent latents."""


class ZipfDictionary(CoupledDictionary):
    """Follows each latent's density; AuxK may go to latents that fire less than they should."""

    def __init__(self, config: ZipfConfig) -> None:
        """Allocate the weights; densities start equal, and the first batch replaces them."""
        super().__init__(config)
        self.register_buffer("density", torch.full((self.d_sae,), config.k / self.d_sae))
        self.register_buffer("batches_seen", torch.zeros(()))
        self.density: Tensor
        self.batches_seen: Tensor

    def _loss_of(self, batch: Batch, code: Code, dead: Tensor) -> Loss:
        """Return the loss of a batch that is coded so, and its densities."""
        loss = super()._loss_of(batch, code, dead)
        counts = torch.bincount(loss.fired, minlength=self.d_sae)
        return replace(loss, observed={"density": counts / max(len(batch), 1)})

    @torch.no_grad()
    def observe_(self, loss: Loss) -> None:
        """Take the batch's densities into the running ones."""
        rate = MEMORY / (self.batches_seen + MEMORY)
        self.density.lerp_(loss.observed["density"].to(self.density), rate)
        self.batches_seen.add_(1)

    def _expected_density(self) -> Tensor:
        """Return what Zipf's law asks of each latent, given its rank by density."""
        config = self.config
        law = allocate.zipf_densities(
            config.k, self.d_sae, exponent=config.exponent, shift=config.shift
        ).to(self.density)
        order = self.density.argsort(descending=True, stable=True)
        return torch.empty_like(law).scatter_(0, order, law)

    def _aux_zipf(self, x: Tensor, error: Tensor) -> Tensor:
        """Return AuxK of the under-used latents, each weighted by the share that it lacks."""
        if self.batches_seen == 0:
            return error.new_zeros(())
        lack = (1 - self.density / self._expected_density()).clamp(min=0)
        ids = lack.nonzero()[:, 0]
        return self._auxk(x, error, ids, lack[ids])
