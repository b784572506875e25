"""Gradient TopK: latents are selected by their size and by how much the model's loss heeds them.

    pre = (x − b_dec) W_encᵀ + b_enc        u = ReLU(pre)        g = ∇L(x) / ‖∇L(x)‖
    a_i = |⟨W_dec[i], g⟩| / mean of these, at most their 99.9 % quantile
    s   = u · (1 + β a)  (additive)    or    s = u · a  (product)
    training: z = u on the k largest s of each row, else 0        x_hat = z W_dec + b_dec
    after:    z = u on the k largest pre of each row, else 0

L is the summed next-token loss of the window that x stands in. Leaving latent i out of x changes
it by about −u_i ⟨W_dec[i], ∇L⟩. Gradients choose, they do not weigh: kept values are u, and a and
s are constants to the loss, which is that of TopK. `encode` needs no gradient;
`encode_with_gradient` selects as training does, by the gradient of a label that x does not know.
Where the gradient is zero, selection is by u. Mean and quantile run over training batches, of all
latents together.

Olmo, Wilson, Forsey, Hepner, Howe, Wingate 2024, "Features that Make a Difference: Leveraging
Gradients for Improved Dictionary Learning", arXiv 2411.10397.
"""

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Annotated, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor

from saelab.dictionaries.linear import LinearConfig, LinearDictionary
from saelab.errors import ArtifactError, ShapeError
from saelab.ops import select
from saelab.protocols import Loss
from saelab.types import Batch, SparseLatents

QUANTILE = 0.999
"""Effects above this quantile count as much as it."""
MEMORY = 8
"""Mean and quantile are averaged over about the last 1/8 of the batches seen."""
SAMPLE_ROWS = 256
"""Rows of a batch that mean and quantile are taken from."""
CHUNK_ROWS = 256
"""Rows whose scores are held at once."""


class GradientTopKConfig(LinearConfig):
    """A gradient-TopK dictionary."""

    needs_grad: ClassVar[bool] = True

    type: Literal["gradient_topk"] = "gradient_topk"
    """Name in the registry."""
    k: PositiveInt
    """Latents kept per row."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight β of the effect in the additive score; 0 is TopK and looks at no gradient."""
    score: Literal["additive", "product"] = "additive"
    """u (1 + β a), or u a."""


@final
class GradientTopK(LinearDictionary):
    """The gradient-TopK dictionary; see the module's docstring for its equations."""

    config_class = GradientTopKConfig
    config: GradientTopKConfig

    def __init__(self, config: GradientTopKConfig) -> None:
        """Allocate the weights; mean and quantile start at those of random unit rows."""
        super().__init__(config)
        self.l0_bound = config.k
        mean = math.sqrt(2 / (math.pi * config.d_in))
        largest = NormalDist().inv_cdf((1 + QUANTILE) / 2) / math.sqrt(config.d_in)
        self.register_buffer("effect_mean", torch.tensor(mean))
        self.register_buffer("effect_max", torch.tensor(largest))
        self.register_buffer("batches_seen", torch.zeros(()))
        self.effect_mean: Tensor
        """Mean of |⟨W_dec[i], g⟩|."""
        self.effect_max: Tensor
        """Their quantile."""
        self.batches_seen: Tensor

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row, without gradients; row-wise, for any leading axes. Raises
        ShapeError."""
        indices, z = self._keep(self._rows(x), self.config.k)
        return select.scatter(indices, z, self.d_sae).reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseLatents:
        """Return the same codes in ragged form, without a dense matrix of codes."""
        indices, z = self._keep(self._rows(x), self.config.k)
        return SparseLatents.from_topk(indices, z, self.d_sae)

    def encode_with_gradient(
        self, x: Float[Tensor, "n d_in"], grad: Float[Tensor, "n_grad d_in"]
    ) -> SparseLatents:
        """Return codes whose latents are selected with the loss's gradient at x, as in training.

        Only the direction of each row's gradient counts. Raises ShapeError.
        """
        if grad.shape != x.shape:
            raise ShapeError(
                f"gradients have shape {tuple(grad.shape)}, but activations {tuple(x.shape)}: "
                "give the gradient at each of these rows"
            )
        indices, z = self._keep_by_score(self._rows(x), self._rows(grad))
        return SparseLatents.from_topk(indices, z, self.d_sae)

    # ------------------------------------------------------------------------------- selection

    def _select(self, x: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        del progress
        return self._keep(x, self.config.k)

    def _keep_by_score(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_topk:
            return self._keep(x, self.config.k)
        chosen = [
            self._choose(*part)
            for part in zip(self._centred(x).split(CHUNK_ROWS), grad.split(CHUNK_ROWS), strict=True)
        ]
        indices = torch.cat([indices for indices, _ in chosen])
        pre = torch.cat([pre for _, pre in chosen])
        return indices, self._at(x, indices, pre).relu()

    @property
    def _is_topk(self) -> bool:
        return self.config.score == "additive" and self.config.beta == 0

    @torch.no_grad()
    def _choose(self, centred: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the k latents of each row with the largest scores, and their pre-activations."""
        pre = F.linear(centred, self.W_enc).to(centred.dtype) + self.b_enc
        effect = self._effect(grad).to(pre.dtype).clamp(max=self.effect_max) / self.effect_mean
        if self.config.score == "product":
            weight = effect.masked_fill(~grad.any(1, keepdim=True), 1)
        else:
            weight = 1 + self.config.beta * effect
        indices, _ = select.topk(pre.relu() * weight, self.config.k)
        return indices, pre.gather(1, indices)

    def _effect(self, grad: Tensor) -> Tensor:
        """Return |⟨W_dec[i], g⟩| of each row and latent."""
        unit = grad / grad.norm(dim=1, keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
        return F.linear(unit, self.W_dec).abs()

    # ------------------------------------------------------------------------------- training

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the FVU-scaled error plus AuxK; pure. Raises ArtifactError without gradients."""
        if self._is_topk:
            return super().loss(batch, progress, dead)
        if batch.grad is None:
            raise ArtifactError(
                "gradient_topk selects latents by the gradient of the model's loss, but these rows "
                "came without: harvest a store with gradients of this site, or set beta=0 for TopK"
            )
        loss = self._loss_of(batch, self._keep_by_score(batch.x, batch.grad), dead)
        return replace(loss, observed=self._statistics(batch.grad))

    @torch.no_grad()
    def _statistics(self, grad: Tensor) -> dict[str, Tensor]:
        """Return mean and quantile of the effects on some rows that have a gradient."""
        some = grad[grad.any(1)][:SAMPLE_ROWS]
        if len(some) == 0:
            return {}
        effect = self._effect(some).float().flatten()
        most = effect.topk(max(1, round((1 - QUANTILE) * len(effect))), sorted=False).values
        return {"mean": effect.mean(), "max": most.min()}

    @torch.no_grad()
    def observe_(self, loss: Loss) -> None:
        """Take the batch's mean and quantile into the running ones."""
        if not loss.observed:
            return
        rate = MEMORY / (self.batches_seen + MEMORY)
        self.effect_mean.lerp_(loss.observed["mean"].to(self.effect_mean), rate)
        self.effect_max.lerp_(loss.observed["max"].to(self.effect_max), rate)
        self.batches_seen.add_(1)
