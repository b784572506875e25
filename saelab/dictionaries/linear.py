"""What types with one linear encoder share: weights, initialisation, error, AuxK, thresholds.

    pre = (x − b_dec) W_encᵀ + b_enc        x_hat = z W_dec + b_dec

A type says which pre-activations of a batch become codes (`_select`), and how rows are coded
afterwards (`encode`). Loss: Σ‖x − x_hat‖² / (n · variance) + aux_weight · AuxK, where `variance`
is the total variance of the sample that the weights were initialised from. Decoder rows keep unit
norm: their gradient is projected before clipping, and they are renormalised after the step.
"""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from saelab.dictionaries.base import BaseDictionary, DictionaryConfig
from saelab.ops import allocate, linalg, sparse
from saelab.ops.auxk import auxk_loss
from saelab.protocols import GradientTrained, Loss
from saelab.types import Batch, SparseLatents

Code = tuple[Tensor, Tensor] | SparseLatents
"""A batch's code in training: (indices, z) of equal width in all rows, or ragged."""

ENCODER_SCALE = 0.5
"""Norm of the encoder's rows at the start, where the decoder's is 1."""


class LinearConfig(DictionaryConfig):
    """What these types' configurations share."""

    k: Any
    """Latents per row: exactly, at most, or on average, as the type says."""
    aux_k: PositiveInt | None = None
    """Dead latents that AuxK lets explain a row's residual; default d_in/2, at most d_sae."""
    aux_weight: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of AuxK beside the FVU-scaled error; 0 turns it off."""

    @model_validator(mode="after")
    def _fits(self) -> "LinearConfig":
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}; choose k ≤ d_sae")
        return self

    @property
    def resolved_aux_k(self) -> int:
        """The number of dead latents AuxK uses per row."""
        return min(self.aux_k or max(self.d_in // 2, 1), self.d_sae)

    @classmethod
    def example(cls) -> "LinearConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls.parse({"d_in": 8, "d_sae": 24, "k": 3})


class LinearDictionary(BaseDictionary, GradientTrained):
    """A dictionary with one linear encoder and unit-norm decoder rows, without a selection rule."""

    config: Any
    """A `LinearConfig`, which each type narrows."""
    signed: ClassVar[bool] = False
    """Whether codes may be negative, and size means absolute size."""

    def __init__(self, config: LinearConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.register_buffer("variance", torch.ones(()))
        self.variance: Tensor

    @abstractmethod
    def _select(self, x: Tensor, progress: float) -> Code:
        """Return the batch's code in training, differentiable on the selected entries."""

    def _centred(self, x: Tensor) -> Tensor:
        return x - self.b_dec.detach()

    def _at(self, x: Tensor, indices: Tensor, pre: Tensor) -> Tensor:
        """Return chosen pre-activations, found without gradient, as differentiable ones."""
        return sparse.encode_at(x, self.b_dec, self.W_enc, self.b_enc, indices, pre)

    def scale_(self, factor: float) -> None:
        """Change the unit of x: biases scale, the variance scales twice."""
        super().scale_(factor)
        self.b_enc.mul_(factor)
        self.variance.mul_(factor**2)

    # ---------------------------------------------------------------------------- thresholds

    def _encode_above(self, x: Tensor, threshold: Tensor) -> Tensor:
        """Return the dense code of each row: pre where pre > threshold ≥ 0, else 0."""
        pre = F.linear(self._rows(x) - self.b_dec, self.W_enc, self.b_enc)
        z = torch.where(pre > threshold, pre, 0)
        return z.reshape(*x.shape[:-1], self.d_sae)

    @torch.no_grad()
    def _common_threshold(self, batches: Iterable[Batch]) -> Tensor:
        """Return the threshold above which the batches' mean l0 is k; 0 if no k are positive."""
        x = torch.cat([batch.x for batch in batches])
        total = int(self.config.k * len(x))
        return allocate.common_threshold(self._centred(x), self.W_enc, self.b_enc, total)

    # ------------------------------------------------------------------------------- training

    @torch.no_grad()
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        """Set decoder = random unit rows, encoder = half, b_enc = 0, b_dec = geometric median.

        k unit-norm directions that are chosen for their overlap with x overlap with each other, so
        a tied encoder of full size overshoots: docs/methods/topk.md has the comparison.
        """
        directions = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(linalg.unit_rows(directions))
        self.W_enc.copy_(self.W_dec).mul_(ENCODER_SCALE)
        self.b_enc.zero_()
        self.b_dec.copy_(linalg.geometric_median(sample))
        self.variance.copy_((sample - sample.mean(0)).square().sum(-1).mean())

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the FVU-scaled error plus AuxK; pure."""
        code = self._select(batch.x, progress)
        error, fvu = self._error(batch, code)
        aux = fvu.new_zeros(())
        if self.config.aux_weight > 0:
            aux = self._aux(batch.x, error, dead)
        indices, z = (code.indices, code.values) if isinstance(code, SparseLatents) else code
        fires = z.detach() != 0
        return Loss(
            total=fvu + self.config.aux_weight * aux,
            terms={"fvu": fvu.detach(), "aux": aux.detach()},
            fired=indices[fires],
            l0=fires.sum() / max(len(batch), 1),
        )

    def _error(self, batch: Batch, code: Code) -> tuple[Tensor, Tensor]:
        """Return each row's residual, and the batch's loss of reconstruction in units of FVU."""
        error = batch.y - (self._sum(code) + self.b_dec)
        return error, self._fvu(error)

    def _sum(self, code: Code) -> Tensor:
        """Return each row's z W_dec, with gradients that cost only the code's entries."""
        if isinstance(code, SparseLatents):
            return sparse.decode_ragged_at(code, self.W_dec)
        return sparse.decode_at(*code, self.W_dec)

    def _fvu(self, error: Tensor) -> Tensor:
        return error.square().sum() / (len(error) * self.variance)

    def _aux(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Return AuxK of the dead latents."""
        ids = dead.nonzero()[:, 0]
        if len(ids) == 0:
            return error.new_zeros(())
        return self._auxk(x, error, ids)

    def _auxk(self, x: Tensor, error: Tensor, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return AuxK of the latents `ids`, their pre-activations times `weight`."""
        W_enc, b_enc = self.W_enc.index_select(0, ids), self.b_enc.index_select(0, ids)
        pre = self._centred(x) @ W_enc.T + b_enc
        if weight is not None:
            pre = pre * weight
        W_dec = self.W_dec.index_select(0, ids)
        return auxk_loss(error, pre, W_dec, self.config.resolved_aux_k, signed=self.signed)

    @torch.no_grad()
    def constrain_grad_(self) -> None:
        """Remove the part of the decoder's gradient that would change its rows' norms."""
        if self.W_dec.grad is not None:
            linalg.remove_parallel_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Give every decoder row unit norm again."""
        linalg.unit_rows_(self.W_dec)
