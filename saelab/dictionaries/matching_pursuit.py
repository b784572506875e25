"""Matching pursuit (MP-SAE): each row is coded one latent at a time, by what is left of it.

    r_0 = x − b_dec, z = 0        for t = 0 … k − 1:
    j = argmax_i ⟨r_t, W_dec[i]⟩    v = ⟨r_t, W_dec[j]⟩    z_j += v    r_{t+1} = r_t − v W_dec[j]

Encoder and decoder are one: W_dec, with unit rows. A row stops before k steps when no score is
positive (`signed`: the largest |score| is taken instead), or when ‖r‖ ≤ threshold. A latent may be
chosen again; L0 counts distinct ones. Loss: Σ‖r_k‖² / (n · variance) + aux_weight · AuxK, with the
gradient through all steps (`ops.unroll`); AuxK pursues the detached residual with dead latents.
`target_l0` steers the threshold to a mean L0, and sets it after training.

Costa, Fel, Lubana, Tolooshams, Ba 2025, "From Flat to Hierarchical: Extracting Sparse
Representations with Matching Pursuit", arXiv 2506.03093.
"""

from collections.abc import Iterable
from typing import Annotated, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from saelab.dictionaries.base import BaseDictionary, DictionaryConfig
from saelab.ops import control, linalg
from saelab.ops.pursuit import PursuitTrace, pursue, sum_repeats
from saelab.ops.refit import Sign
from saelab.ops.unroll import pursuit_auxk, unroll
from saelab.protocols import GradientTrained, Loss
from saelab.types import Batch, SparseLatents

START = 0.5
"""Threshold that `target_l0` starts from where none is given, as `threshold` is."""
RATE = 0.05
"""Change of the threshold's logarithm per step and unit of log(L0 / target)."""


class MatchingPursuitConfig(DictionaryConfig):
    """A matching-pursuit dictionary."""

    type: Literal["matching_pursuit"] = "matching_pursuit"
    """Name in the registry."""
    k: PositiveInt
    """Most steps per row, so most latents as well."""
    signed: bool = False
    """Choose the largest |score|, of either sign, instead of the largest positive score."""
    threshold: NonNegativeFloat = 0.0
    """A row is done when its residual's norm is at most this many √variance; 0: after k steps."""
    target_l0: PositiveFloat | None = None
    """Mean number of distinct latents that the threshold is steered to; None keeps it."""
    aux_k: PositiveInt | None = None
    """Steps with dead latents that AuxK lets explain a row's residual; default k."""
    aux_weight: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of AuxK beside the FVU-scaled error; 0 turns it off."""

    @model_validator(mode="after")
    def _reachable(self) -> "MatchingPursuitConfig":
        if self.target_l0 is not None and self.target_l0 >= self.k:
            raise ValueError(
                f"target_l0={self.target_l0:g} is not below k={self.k}, the most steps per row; "
                "choose a larger k"
            )
        return self

    @classmethod
    def example(cls) -> "MatchingPursuitConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls.parse({"d_in": 8, "d_sae": 24, "k": 3})


@final
class MatchingPursuit(BaseDictionary, GradientTrained):
    """The matching-pursuit dictionary; see the module's docstring for its equations."""

    config_class = MatchingPursuitConfig
    config: MatchingPursuitConfig

    def __init__(self, config: MatchingPursuitConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.l0_bound = config.k
        self.sign: Sign = "abs" if config.signed else "nonneg"
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("threshold", torch.zeros(()))
        self.variance: Tensor
        """Total variance of the sample that the weights were initialised from."""
        self.threshold: Tensor
        """Norm of the residual at which a row is done."""

    # --------------------------------------------------------------------------------- codes

    def trace(
        self, x: Float[Tensor, "n d_in"], *, k: int | None = None, threshold: float | None = None
    ) -> PursuitTrace:
        """Return the whole pursuit of x − b_dec: order, coefficients, residual; no gradient.

        `k` and `threshold` (in the unit of x) replace the dictionary's own: codes are sequential,
        so one dictionary serves any number of steps.
        """
        steps = self.config.k if k is None else k
        tol = float(self.threshold) if threshold is None else threshold
        rows = self._rows(x).detach() - self.b_dec.detach()
        return pursue(rows, self.W_dec.detach(), steps, sign=self.sign, tol=tol)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""
        return self.encode_sparse(self._rows(x)).dense().reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseLatents:
        """Return the same codes in ragged form."""
        order, coefficients, _ = self._pursue(self._rows(x))
        return sum_repeats(order, coefficients, self.d_sae)

    def _pursue(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (order, coefficients, residual), differentiable through all steps."""
        trace = self.trace(x)
        coefficients, residual = unroll(
            x - self.b_dec, self.W_dec, trace.order, trace.coefficients, trace.residual
        )
        return trace.order, coefficients, residual

    def scale_(self, factor: float) -> None:
        """Change the unit of x: bias and threshold scale, the variance scales twice."""
        super().scale_(factor)
        self.threshold.mul_(factor)
        self.variance.mul_(factor**2)

    # ------------------------------------------------------------------------------- training

    @torch.no_grad()
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        """Set W_dec = random unit rows, b_dec = geometric median, and the threshold."""
        directions = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(linalg.unit_rows(directions))
        self.b_dec.copy_(linalg.geometric_median(sample))
        self.variance.copy_((sample - sample.mean(0)).square().sum(-1).mean())
        steered = self.config.target_l0 is not None
        share = self.config.threshold or (START if steered else 0.0)
        self.threshold.copy_(share * self.variance.sqrt())

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the FVU-scaled error plus AuxK; pure."""
        del progress
        order, coefficients, residual = self._pursue(batch.x)
        error = residual + (batch.y - batch.x)
        fvu = error.square().sum() / (len(error) * self.variance)
        aux = self._aux(error, dead)
        codes = sum_repeats(order, coefficients.detach(), self.d_sae)
        return Loss(
            total=fvu + self.config.aux_weight * aux,
            terms={"fvu": fvu.detach(), "aux": aux.detach()},
            fired=codes.indices,
            l0=codes.l0().sum() / max(len(batch), 1),
        )

    def _aux(self, error: Tensor, dead: Tensor) -> Tensor:
        ids = dead.nonzero()[:, 0]
        if self.config.aux_weight == 0 or len(ids) == 0:
            return error.new_zeros(())
        steps = self.config.aux_k or self.config.k
        return pursuit_auxk(error, self.W_dec.index_select(0, ids), steps, self.sign)

    @torch.no_grad()
    def constrain_grad_(self) -> None:
        """Remove the part of the gradient that would change the rows' norms."""
        if self.W_dec.grad is not None:
            linalg.remove_parallel_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Give every row unit norm again."""
        linalg.unit_rows_(self.W_dec)

    @torch.no_grad()
    def revive_(self, ids: Int[Tensor, " m"], rows: Float[Tensor, "m d_in"]) -> None:
        """Point each of these latents at one of these rows, which are reconstructed badly.

        A row equal to b_dec has no direction and leaves the latent as it is.
        """
        away = rows.to(self.W_dec) - self.b_dec
        size = away.norm(dim=1, keepdim=True)
        self.W_dec[ids] = torch.where(size > 0, away / size, self.W_dec[ids])

    @torch.no_grad()
    def observe_(self, loss: Loss) -> None:
        """Steer the threshold, where there is a target."""
        if self.config.target_l0 is not None:
            error = control.l0_error(loss.l0.to(self.threshold), self.config.target_l0)
            self.threshold.mul_((RATE * error).exp())

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Set the threshold at which the batches' mean L0 is the target, where there is one."""
        if self.config.target_l0 is None:
            return
        x = torch.cat([batch.x for batch in batches])
        norms = (
            _norms_before_new(x - self.b_dec, self.trace(x, threshold=0.0))
            .sort(descending=True)
            .values
        )
        place = int(self.config.target_l0 * len(x))
        self.threshold.fill_(float(norms[place]) if place < len(norms) else 0.0)


def _norms_before_new(x: Tensor, trace: PursuitTrace) -> Tensor:
    """Return the residual's norm before each step that takes a latent not yet in the row's code.

    As many latents are in the codes at threshold τ as there are such norms above τ.
    """
    order, taken = trace.order, trace.coefficients.square()
    left = (x.square().sum(1, keepdim=True) - taken.cumsum(1) + taken).clamp(min=0)
    new = order >= 0
    for step in range(1, order.shape[1]):
        new[:, step] &= (order[:, step, None] != order[:, :step]).all(1)
    return left.sqrt()[new]
