"""What types share that pay for firing: all latents may fire, and a penalty keeps most silent.

A training step holds only the pre-activations above a floor (`_entries`), so it costs the less the
sparser the codes have become. The penalty's weight rises at the start of a run; where there is a
target, a controller moves it until L0 is there.
"""

from abc import abstractmethod
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from saelab.dictionaries.affine import AffineConfig, AffineDictionary
from saelab.ops import control, select, sparse
from saelab.protocols import Loss
from saelab.types import Batch, SparseLatents

Share = Annotated[float, Field(ge=0, le=1)]


def check_target(target_l0: float, d_sae: int) -> None:
    """Raise ValueError for a mean L0 that no sparse code can have."""
    if target_l0 >= d_sae:
        raise ValueError(
            f"target_l0={target_l0:g} is not below d_sae={d_sae}; choose a smaller target"
        )


class DenseDictionary(AffineDictionary):
    """A type whose codes come from all pre-activations of a row."""

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""
        return self._codes(self._rows(x)).reshape(*x.shape[:-1], self.d_sae)

    @abstractmethod
    def _codes(self, x: Tensor) -> Tensor:
        """Return the codes (n, d_sae) of rows (n, d_in)."""

    def _entries(self, x: Tensor, floor: Tensor) -> SparseLatents:
        """Return the pre-activations of x above their latent's floor; differentiable."""
        found = select.above(self._centred(x), self.W_enc, self.b_enc, floor.detach())
        return sparse.encode_ragged_at(x, self.b_dec, self.W_enc, self.b_enc, found)

    def _error(self, batch: Batch, z: SparseLatents) -> Tensor:
        """Return each row's residual."""
        return batch.y - (sparse.decode_ragged_at(z, self.W_dec) + self.b_dec)

    def _product(self, x: Tensor) -> Tensor:
        return ((x - self.b_dec) @ self.W_enc.T).to(x.dtype)

    def _pre(self, x: Tensor) -> Tensor:
        return self._product(x) + self.b_enc


class PenaltyConfig(AffineConfig):
    """What the configurations of types with a sparsity penalty hold."""

    sparsity_weight: PositiveFloat = 0.1
    """Weight λ of the penalty beside the FVU-scaled error; where `target_l0` steers, its start."""
    sparsity_warmup: Share = 0.2
    """Share of the run over which the weight rises from 0."""
    target_l0: PositiveFloat | None = None
    """Mean L0 that the weight is steered to after its rise; None keeps the weight."""

    @model_validator(mode="after")
    def _reachable(self) -> "PenaltyConfig":
        if self.target_l0 is not None:
            check_target(self.target_l0, self.d_sae)
        return self

    @classmethod
    def example(cls) -> "PenaltyConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls.parse({"d_in": 8, "d_sae": 24, "target_l0": 3})


class PenalisedDictionary(DenseDictionary):
    """A type whose loss has a penalty times a weight that may be steered.

    The state of the controller are buffers, so an interrupted run goes on with the same bits.
    """

    def __init__(self, config: PenaltyConfig) -> None:
        """Allocate the weights and the controller's state."""
        super().__init__(config)
        self.target_l0 = config.target_l0
        self.sparsity_warmup = config.sparsity_warmup
        self.register_buffer("log_weight", torch.tensor(config.sparsity_weight).log())
        self.register_buffer("l0_error", torch.zeros(()))
        self.register_buffer("progress", torch.zeros(()))
        self.log_weight: Tensor
        """Logarithm of the weight that keeps the L0 where it is."""
        self.l0_error: Tensor
        """log(L0 / target) at the last step."""
        self.progress: Tensor
        """Share of the run at the last step."""

    def _weight(self, progress: float) -> Tensor:
        """Return the penalty's weight at this share of the run."""
        rise = control.ramp(progress, until=self.sparsity_warmup)
        return (self.log_weight + self.l0_error).exp() * rise

    @torch.no_grad()
    def observe_(self, loss: Loss) -> None:
        """Steer the weight, once it has risen, by the L0 of the step."""
        target, progress = self.target_l0, loss.observed["progress"].to(self.progress)
        share = (progress - self.progress).clamp(min=0)  # a second training begins again at 0
        self.progress.copy_(progress)
        if target is not None and progress > self.sparsity_warmup:
            self.l0_error.copy_(control.l0_error(loss.l0.to(self.l0_error), target))
            self.log_weight.copy_(control.integrate(self.log_weight, self.l0_error, share))
