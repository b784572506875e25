"""TopK: the k largest pre-activations of each row.

    pre = (x − b_dec) W_encᵀ + b_enc        z = ReLU(TopK_k(pre))        x_hat = z W_dec + b_dec

Loss: Σ‖x − x_hat‖² / (n · variance) + aux_weight · AuxK, where `variance` is the total variance of
the sample that the weights were initialised from. Decoder rows keep unit norm: their gradient is
projected before clipping, and they are renormalised after the step.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093.
"""

from typing import Annotated, Literal, final

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from saelab.dictionaries.base import BaseDictionary, DictionaryConfig
from saelab.ops import linalg, select, sparse
from saelab.ops.auxk import auxk_loss
from saelab.protocols import GradientTrained, Loss
from saelab.types import Batch, SparseLatents


class TopKConfig(DictionaryConfig):
    """A TopK dictionary."""

    type: Literal["topk"] = "topk"
    """Name in the registry."""
    k: PositiveInt
    """Latents kept per row."""
    aux_k: PositiveInt | None = None
    """Dead latents that AuxK lets explain a row's residual; default d_in/2, at most d_sae."""
    aux_weight: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of AuxK beside the FVU-scaled error; 0 turns it off."""

    @model_validator(mode="after")
    def _fits(self) -> "TopKConfig":
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}; choose k ≤ d_sae")
        return self

    @property
    def resolved_aux_k(self) -> int:
        """The number of dead latents AuxK uses per row."""
        return min(self.aux_k or max(self.d_in // 2, 1), self.d_sae)

    @classmethod
    def example(cls) -> "TopKConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls(d_in=8, d_sae=24, k=3)


@final
class TopK(BaseDictionary, GradientTrained):
    """The TopK dictionary; see the module's docstring for its equations."""

    config_class = TopKConfig
    config: TopKConfig

    def __init__(self, config: TopKConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.l0_bound = config.k
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.register_buffer("variance", torch.ones(()))
        self.variance: Tensor

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""
        indices, z = self._code(self._rows(x))
        z = select.scatter(indices, z, self.d_sae)
        return z.reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseLatents:
        """Return the same codes in ragged form, without a dense matrix of codes."""
        indices, z = self._code(self._rows(x))
        return SparseLatents.from_topk(indices, z, self.d_sae)

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (indices, z) of k latents per row; differentiable on the selected ones."""
        W_enc, b_enc, b_dec = self.W_enc, self.b_enc, self.b_dec
        indices, pre = select.linear_topk(x - b_dec.detach(), W_enc, b_enc, self.config.k)
        return indices, sparse.encode_at(x, b_dec, W_enc, b_enc, indices, pre).relu()

    def scale_(self, factor: float) -> None:
        """Change the unit of x: biases scale, the variance scales twice."""
        super().scale_(factor)
        self.b_enc.mul_(factor)
        self.variance.mul_(factor**2)

    # ------------------------------------------------------------------------------- training

    @torch.no_grad()
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        """Set encoder = decoder = random unit rows, b_enc = 0, b_dec = geometric median."""
        directions = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(linalg.unit_rows(directions))
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.copy_(linalg.geometric_median(sample))
        self.variance.copy_((sample - sample.mean(0)).square().sum(-1).mean())

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the FVU-scaled error plus AuxK; pure."""
        del progress
        x = batch.x
        indices, z = self._code(x)
        error = batch.y - (sparse.decode_at(indices, z, self.W_dec) + self.b_dec)
        fvu = error.square().sum() / (len(batch) * self.variance)
        aux = self._auxk(x, error, dead) if self.config.aux_weight > 0 else fvu.new_zeros(())
        fires = z.detach() > 0
        return Loss(
            total=fvu + self.config.aux_weight * aux,
            terms={"fvu": fvu.detach(), "aux": aux.detach()},
            fired=indices[fires],
            l0=fires.sum() / len(batch),
        )

    def _auxk(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        ids = dead.nonzero()[:, 0]
        if len(ids) == 0:
            return error.new_zeros(())
        W_enc, b_enc = self.W_enc.index_select(0, ids), self.b_enc.index_select(0, ids)
        pre = (x - self.b_dec.detach()) @ W_enc.T + b_enc
        return auxk_loss(error, pre, self.W_dec.index_select(0, ids), self.config.resolved_aux_k)

    @torch.no_grad()
    def constrain_grad_(self) -> None:
        """Remove the part of the decoder's gradient that would change its rows' norms."""
        if self.W_dec.grad is not None:
            linalg.remove_parallel_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Give every decoder row unit norm again."""
        linalg.unit_rows_(self.W_dec)
