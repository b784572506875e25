"""What types with one dense affine encoder share: weights, initialisation, error, AuxK.

pre = (x − b_dec) W_encᵀ + b_enc
"""

from abc import abstractmethod
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from saelab.dictionaries.base import BaseDictionary, DictionaryConfig
from saelab.ops import linalg
from saelab.ops.auxk import auxk_loss
from saelab.protocols import GradientTrained


class AffineConfig(DictionaryConfig):
    """What the configurations of these types hold."""

    aux_k: PositiveInt | None = None
    """Dead latents that AuxK lets explain a row's residual; default d_in/2, at most d_sae."""
    aux_weight: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of AuxK beside the FVU-scaled error; 0 turns it off."""

    @property
    def resolved_aux_k(self) -> int:
        """The number of dead latents AuxK uses per row."""
        return min(self.aux_k or max(self.d_in // 2, 1), self.d_sae)


def check_target(target_l0: float, d_sae: int) -> None:
    """Raise ValueError for a mean L0 that no sparse code can have."""
    if target_l0 >= d_sae:
        raise ValueError(
            f"target_l0={target_l0:g} is not below d_sae={d_sae}; choose a smaller target"
        )


class AffineDictionary(BaseDictionary, GradientTrained):
    """A gradient-trained dictionary whose codes start from one affine map of x.

    A type gives `_codes`. Its decoder rows keep unit norm unless `unit_decoder` is False.
    """

    def __init__(self, config: AffineConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.unit_decoder = True
        self.aux_k = config.resolved_aux_k
        self.aux_weight = config.aux_weight
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.register_buffer("variance", torch.ones(()))
        self.variance: Tensor

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""
        return self._codes(self._rows(x)).reshape(*x.shape[:-1], self.d_sae)

    def _product(self, x: Tensor) -> Tensor:
        return ((x - self.b_dec) @ self.W_enc.T).to(x.dtype)

    def _pre(self, x: Tensor) -> Tensor:
        return self._product(x) + self.b_enc

    @abstractmethod
    def _codes(self, x: Tensor) -> Tensor:
        """Return the codes (n, d_sae) of rows (n, d_in)."""

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

    def _fvu(self, error: Tensor) -> Tensor:
        """Return Σ error² per row over the variance of the sample the weights started from."""
        return error.square().sum() / (len(error) * self.variance)

    def _auxk(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Return the share of the residual that dead latents leave; it reaches only them."""
        ids = dead.nonzero()[:, 0]
        if self.aux_weight == 0 or len(ids) == 0:
            return error.new_zeros(())
        W_enc, b_enc = self.W_enc.index_select(0, ids), self.b_enc.index_select(0, ids)
        pre = (x - self.b_dec.detach()) @ W_enc.T + b_enc
        return auxk_loss(error, pre, self.W_dec.index_select(0, ids), self.aux_k)

    @torch.no_grad()
    def constrain_grad_(self) -> None:
        """Remove the part of the decoder's gradient that would change its rows' norms."""
        if self.unit_decoder and self.W_dec.grad is not None:
            linalg.remove_parallel_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Give every decoder row unit norm again."""
        if self.unit_decoder:
            linalg.unit_rows_(self.W_dec)
