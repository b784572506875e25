"""TopK: the k largest pre-activations of each row.

    pre = (x − b_dec) W_encᵀ + b_enc        z = ReLU(TopK_k(pre))        x_hat = z W_dec + b_dec

Loss: fvu(k) + multi_weight · fvu(4k) + aux_weight · AuxK, where fvu is Σ‖x − x_hat‖² / (n ·
variance). The second term (Multi-TopK) is off by default; it keeps a dictionary usable at other k.
With `threshold`, rows are coded as pre where pre > θ, with one θ for all latents at which the mean
l0 of training rows is k; else 0.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093.
"""

from collections.abc import Iterable
from typing import Annotated, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from saelab.dictionaries.linear import Code, LinearConfig, LinearDictionary
from saelab.ops import select
from saelab.types import Batch, SparseLatents

MULTI = 4
"""How many times k the second term of Multi-TopK keeps."""


class TopKConfig(LinearConfig):
    """A TopK dictionary."""

    type: Literal["topk"] = "topk"
    """Name in the registry."""
    k: PositiveInt
    """Latents kept per row."""
    multi_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the error at 4k latents per row beside that at k (1/8 in the paper); 0: off."""
    threshold: bool = False
    """Code rows by one threshold with mean l0 = k, calibrated after training, instead of by k."""


@final
class TopK(LinearDictionary):
    """The TopK dictionary; see the module's docstring for its equations."""

    config_class = TopKConfig
    config: TopKConfig

    def __init__(self, config: TopKConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.l0_bound = None if config.threshold else config.k
        if config.threshold:
            self.register_buffer("threshold", torch.zeros(()))
            self.threshold: Tensor

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""
        if self.config.threshold:
            return self._encode_above(x, self.threshold)
        indices, z = self._keep(self._rows(x), self.config.k)
        return select.scatter(indices, z, self.d_sae).reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseLatents:
        """Return the same codes in ragged form, without a dense matrix of codes."""
        if self.config.threshold:
            return super().encode_sparse(x)
        indices, z = self._keep(self._rows(x), self.config.k)
        return SparseLatents.from_topk(indices, z, self.d_sae)

    def scale_(self, factor: float) -> None:
        """Change the unit of x: the threshold scales as well."""
        super().scale_(factor)
        if self.config.threshold:
            self.threshold.mul_(factor)

    def _select(self, x: Tensor, progress: float) -> Code:
        del progress
        return self._keep(x, self.config.k)

    def _error(self, batch: Batch, code: Code) -> tuple[Tensor, Tensor]:
        error, fvu = super()._error(batch, code)
        if self.config.multi_weight > 0:
            more = self._keep(batch.x, min(MULTI * self.config.k, self.d_sae))
            fvu = fvu + self.config.multi_weight * super()._error(batch, more)[1]
        return error, fvu

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Set the threshold, where rows are coded by one."""
        if self.config.threshold:
            self.threshold.copy_(self._common_threshold(batches))
