"""AbsTopK: the k pre-activations of each row that are largest in absolute size, with their sign.

    pre = (x − b_dec) W_encᵀ + b_enc    z_i = pre_i where |pre_i| is among the k largest, else 0

One proximal step for "at most k non-zeros" without z ≥ 0: a latent has two directions, ± its
decoder row, and fires where z ≠ 0. Loss: Σ‖x − x_hat‖² / (n · variance) + aux_weight · AuxK, with
dead latents ranked by |pre| and no ReLU.

Zhu, Khalili, Zhu 2025, "AbsTopK: Rethinking Sparse Autoencoders For Bidirectional Features",
arXiv 2510.00404.
"""

from typing import Literal, final

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from saelab.dictionaries.linear import LinearConfig, LinearDictionary
from saelab.ops import select
from saelab.types import SparseLatents


class AbsTopKConfig(LinearConfig):
    """An AbsTopK dictionary."""

    type: Literal["abs_topk"] = "abs_topk"
    """Name in the registry."""
    k: PositiveInt
    """Latents kept per row, of either sign."""


@final
class AbsTopK(LinearDictionary):
    """The AbsTopK dictionary; see the module's docstring for its equations."""

    config_class = AbsTopKConfig
    config: AbsTopKConfig
    signed = True

    def __init__(self, config: AbsTopKConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.l0_bound = config.k

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""
        indices, z = self._keep(self._rows(x), self.config.k)
        return select.scatter(indices, z, self.d_sae).reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseLatents:
        """Return the same codes in ragged form, without a dense matrix of codes."""
        indices, z = self._keep(self._rows(x), self.config.k)
        return SparseLatents.from_topk(indices, z, self.d_sae)

    def _select(self, x: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        del progress
        return self._keep(x, self.config.k)
