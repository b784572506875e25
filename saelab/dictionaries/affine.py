"""The base of every type with one affine encoder and a linear decoder.

    pre = (x − b_dec) W_encᵀ + b_enc        x_hat = z W_dec + b_dec

Here are the weights, how they start, the error in units of FVU, AuxK and the unit-norm decoder
rows. A type adds the rule that makes codes z of pre-activations (`encode`) and its `loss`.
`linear.py` builds types on it that select latents, `penalty.py` types that pay for firing.
"""

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from saelab.dictionaries.base import BaseDictionary, DictionaryConfig
from saelab.ops import linalg, sparse
from saelab.ops.auxk import auxk_loss
from saelab.protocols import GradientTrained

REVIVED = 0.2
"""Norm of a revived latent's encoder row, where that of the others is 1 on average."""


class AffineConfig(DictionaryConfig):
    """What the configurations of these types share."""

    aux_k: PositiveInt | None = None
    """Dead latents that AuxK lets explain a row's residual; default d_in/2, at most d_sae."""
    aux_weight: Annotated[float, Field(ge=0)] = 1 / 32
    """Weight of AuxK beside the FVU-scaled error; 0 turns it off."""

    @property
    def resolved_aux_k(self) -> int:
        """The number of dead latents AuxK uses per row."""
        return min(self.aux_k or max(self.d_in // 2, 1), self.d_sae)


class AffineDictionary(BaseDictionary, GradientTrained):
    """A gradient-trained dictionary with one affine encoder, without a rule that makes codes."""

    config: Any
    """An `AffineConfig`, which each type narrows."""
    signed: ClassVar[bool] = False
    """Whether codes may be negative, and size means absolute size."""
    encoder_start: ClassVar[float] = 1.0
    """Norm of the encoder's rows at the start, where the decoder's is 1."""

    def __init__(self, config: AffineConfig) -> None:
        """Allocate the weights."""
        super().__init__(config)
        self.unit_decoder = True
        """Whether decoder rows are held at unit norm by the constraints of training."""
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.register_buffer("variance", torch.ones(()))
        self.variance: Tensor
        """Total variance of the sample that the weights were initialised from."""

    def scale_(self, factor: float) -> None:
        """Change the unit of x: biases scale, the variance scales twice."""
        super().scale_(factor)
        self.b_enc.mul_(factor)
        self.variance.mul_(factor**2)

    @torch.no_grad()
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        """Set decoder = random unit rows, encoder = `encoder_start` of them, b_enc = 0, b_dec =
        geometric median."""
        directions = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(linalg.unit_rows(directions))
        self.W_enc.copy_(self.W_dec).mul_(self.encoder_start)
        self.b_enc.zero_()
        self.b_dec.copy_(linalg.geometric_median(sample))
        self.variance.copy_((sample - sample.mean(0)).square().sum(-1).mean())

    @torch.no_grad()
    def revive_(self, ids: Int[Tensor, " m"], rows: Float[Tensor, "m d_in"]) -> None:
        """Point each of these latents at one of these rows, which are reconstructed badly.

        The decoder row becomes the unit direction of x − b_dec, the encoder row the same, short
        beside the other latents', so that the loss does not jump; b_enc becomes 0. A row equal to
        b_dec has no direction and leaves the decoder row. Source: Bricken et al. 2023, "Neuron
        resampling"; optimiser moments of these latents are the trainer's to zero.
        """
        away = rows.to(self.W_dec) - self.b_dec
        size = away.norm(dim=1, keepdim=True)
        direction = torch.where(size > 0, away / size, self.W_dec[ids])
        self.W_dec[ids] = direction
        self.W_enc[ids] = direction * self._revived_norm(ids)
        self.b_enc[ids] = 0

    def _revived_norm(self, ids: Tensor) -> Tensor:
        """Return the norm of a revived latent's encoder row: a share of the other latents'."""
        norms = self.W_enc[self._others(ids)].norm(dim=1)
        mean = norms.mean() if len(norms) else norms.new_tensor(self.encoder_start)
        return REVIVED * mean

    def _others(self, ids: Tensor) -> Tensor:
        """Mark the latents that are not among `ids`."""
        others = torch.ones(self.d_sae, dtype=torch.bool, device=ids.device)
        return others.index_fill(0, ids, False)

    # -------------------------------------------------------------------------- parts of a loss

    def _centred(self, x: Tensor) -> Tensor:
        """Return x − b_dec, where no gradient may reach b_dec."""
        return x - self.b_dec.detach()

    def _fvu(self, error: Tensor) -> Tensor:
        """Return Σ error² per row over the variance of the sample the weights started from."""
        return error.square().sum() / (len(error) * self.variance)

    def _aux(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Return AuxK of the dead latents; 0 where there are none, or where it is off."""
        ids = dead.nonzero()[:, 0]
        if self.config.aux_weight == 0 or len(ids) == 0:
            return error.new_zeros(())
        return self._auxk(x, error, ids)

    def _auxk(self, x: Tensor, error: Tensor, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the share of the residual that the latents `ids` leave; it reaches only them.

        Their pre-activations count `weight` times.
        """
        W_enc, b_enc = sparse.rows_at(self.W_enc, ids), self.b_enc.index_select(0, ids)
        pre = F.linear(self._centred(x), W_enc, b_enc)
        if weight is not None:
            pre = pre * weight
        W_dec = sparse.rows_at(self.W_dec, ids)
        return auxk_loss(error, pre, W_dec, self.config.resolved_aux_k, signed=self.signed)

    # ----------------------------------------------------------------------------- constraints

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
