"""JumpReLU: each latent has its own threshold, below which it is silent; L0 is penalised itself.

    pre = (x − b_dec) W_encᵀ + b_enc        z = pre · H(pre − θ)        x_hat = z W_dec + b_dec

    loss = Σ‖x − x_hat‖² / (n · variance) + λ (L0 / target_l0 − 1)² + aux_weight · AuxK

L0 is the batch's mean number of latents with pre > θ. Kept values are not shrunk: the penalty
reaches only θ ≥ 0, by the pseudo-derivatives of `ops.jump`. At the start θ is, for each latent, the
quantile of its pre-activations at which mean L0 is four times the target, and the bandwidth is a
tenth of their standard deviation. After training all θ are scaled by one factor, at which the mean
L0 of training rows is the target. Decoder rows keep unit norm.

Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
Autoencoders", arXiv 2407.14435.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn

from saelab.dictionaries.affine import AffineConfig
from saelab.dictionaries.penalty import DenseDictionary, Share, check_target
from saelab.ops import control, jump, select
from saelab.protocols import Loss
from saelab.types import Batch

log = logging.getLogger(__name__)

START = 4.0
"""Mean L0 at the start, in units of the target."""
SAMPLE_ROWS = 4096
"""Rows from which thresholds and bandwidths are set."""
CHUNK = 1024
"""Latents looked at together while they are set."""
LOWEST = 0.3
"""Smallest factor on the thresholds that calibration may choose."""


class JumpReLUConfig(AffineConfig):
    """A JumpReLU dictionary."""

    type: Literal["jump_relu"] = "jump_relu"
    """Name in the registry."""
    target_l0: PositiveFloat
    """Mean L0 to reach."""
    sparsity_weight: PositiveFloat = 3.0
    """Weight λ of (L0 / target_l0 − 1)² beside the FVU-scaled error."""
    sparsity_warmup: Share = 0.2
    """Share of the run over which the weight rises from 0."""
    bandwidth: PositiveFloat = 0.1
    """Width of the kernel, in standard deviations of each latent's pre-activation at the start."""
    threshold_lr: PositiveFloat = 1.0
    """Learning rate of the thresholds, in units of the member's."""

    @model_validator(mode="after")
    def _reachable(self) -> "JumpReLUConfig":
        check_target(self.target_l0, self.d_sae)
        return self

    @classmethod
    def example(cls) -> "JumpReLUConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls(d_in=8, d_sae=24, target_l0=3)


@final
class JumpReLU(DenseDictionary):
    """The JumpReLU dictionary; see the module's docstring for its equations."""

    config_class = JumpReLUConfig
    config: JumpReLUConfig

    def __init__(self, config: JumpReLUConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))
        self.register_buffer("bandwidth", torch.full((config.d_sae,), config.bandwidth))
        self.bandwidth: Tensor
        """Width of the kernel per latent, in the unit of x."""

    def _codes(self, x: Tensor) -> Tensor:
        return jump.jump(self._pre(x), self.threshold, self.bandwidth)

    def scale_(self, factor: float) -> None:
        """Change the unit of x: thresholds and bandwidths scale like biases."""
        super().scale_(factor)
        self.threshold.mul_(factor)
        self.bandwidth.mul_(factor)

    # ------------------------------------------------------------------------------- training

    @torch.no_grad()
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        """Set the weights as for the other types; thresholds and bandwidths from the sample."""
        super().init_(sample, generator)
        rows = sample[:SAMPLE_ROWS]
        share = START * self.config.target_l0 / self.d_sae
        kept = min(max(round(share * len(rows)), 1), len(rows))
        for some in torch.arange(self.d_sae, device=rows.device).split(CHUNK):
            pre = (rows - self.b_dec) @ self.W_enc[some].T + self.b_enc[some]
            self.threshold[some] = pre.topk(kept, dim=0).values[-1].clamp(min=0)
            self.bandwidth[some] = self.config.bandwidth * pre.std(0, correction=0)

    @torch.no_grad()
    def revive_(self, ids: Int[Tensor, " m"], rows: Float[Tensor, "m d_in"]) -> None:
        """Point each of these latents at one of these rows.

        Its threshold and bandwidth are those of the other latents on average, for an encoder row of
        its norm: it fires as far along its direction as they do along theirs.
        """
        others = self._others(ids)
        norm = self.W_enc[others].norm(dim=1)
        distance = (self.threshold - self.b_enc)[others] / norm
        width = self.bandwidth[others] / norm
        super().revive_(ids, rows)
        if others.any():
            own = self.W_enc[ids].norm(dim=1)
            self.threshold[ids] = (distance.mean() * own).clamp(min=0)
            self.bandwidth[ids] = width.mean() * own

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the FVU-scaled error plus the penalty and AuxK; pure."""
        pre = self._entries(batch.x, self.threshold - self.bandwidth / 2)
        threshold = self.threshold.index_select(0, pre.indices)
        bandwidth = self.bandwidth.index_select(0, pre.indices)
        z = replace(pre, values=jump.jump(pre.values, threshold, bandwidth))
        error = self._error(batch, z)
        fvu, aux = self._fvu(error), self._aux(batch.x, error, dead)
        fires = jump.step(pre.values, threshold, bandwidth)
        l0 = fires.sum() / len(batch)
        penalty = (l0 / self.config.target_l0 - 1).square()
        rise = control.ramp(progress, until=self.config.sparsity_warmup)
        return Loss(
            total=fvu + self.config.sparsity_weight * rise * penalty + self.config.aux_weight * aux,
            terms={"fvu": fvu.detach(), "aux": aux.detach(), "penalty": penalty.detach()},
            fired=z.indices[fires.detach() > 0],
            l0=l0.detach(),
        )

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Scale all thresholds by one factor, at which the batches' mean L0 is the target.

        Warns where none reaches it: latents with threshold 0 alone fire too often, or thresholds
        would have to fall below `LOWEST` of what they are.
        """
        x = torch.cat([batch.x for batch in batches])
        near = select.above(self._centred(x), self.W_enc, self.b_enc, LOWEST * self.threshold)
        ratio = near.values / self.threshold.index_select(0, near.indices)
        ratio = ratio.sort(descending=True).values
        wanted = int(self.config.target_l0 * len(x))
        if wanted < len(ratio) and bool(ratio[wanted].isfinite()):
            self.threshold.mul_(ratio[wanted])
            return
        log.warning(
            "no factor on the thresholds brings the mean L0 to target_l0=%g: they are left as "
            "they are. Train for longer, or choose a target nearer to the L0 of metrics.jsonl",
            self.config.target_l0,
        )

    @torch.no_grad()
    def constrain_(self) -> None:
        """Give every decoder row unit norm again, and keep thresholds from falling below 0."""
        super().constrain_()
        self.threshold.clamp_(min=0)

    def lr_factors(self) -> Mapping[str, float]:
        """Return the thresholds' own factor on the learning rate."""
        return {"threshold": self.config.threshold_lr}
