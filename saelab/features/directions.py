"""What decoder directions say by themselves: effect on the logits, neighbours, neurons."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.protocols import LanguageModel

CHUNK = 256
"""Directions per matrix product: bounds memory at `CHUNK × d_vocab`."""


@dataclass(frozen=True)
class LogitEffect:
    """The tokens that a chunk of directions pushes up and down most."""

    first: int
    up: Int[Tensor, "c shown"]
    up_values: Float[Tensor, "c shown"]
    down: Int[Tensor, "c shown"]
    down_values: Float[Tensor, "c shown"]
    spread: Float[Tensor, " c"]
    """Standard deviation over the vocabulary."""


@torch.no_grad()
def logit_effects(
    model: LanguageModel, site: str, W_dec: Float[Tensor, "d_sae d_out"], shown: int
) -> Iterator[LogitEffect]:
    """Yield the direct logit effect of each decoder direction, chunk by chunk.

    What is done about the model's final norm is the model's matter: see its `logit_effect`.
    """
    for first in range(0, len(W_dec), CHUNK):
        effect = model.logit_effect(site, W_dec[first : first + CHUNK]).float().cpu()
        up = effect.topk(min(shown, effect.shape[1]), dim=1)
        down = effect.topk(min(shown, effect.shape[1]), dim=1, largest=False)
        yield LogitEffect(
            first, up.indices, up.values, down.indices, down.values, effect.std(dim=1)
        )


@torch.no_grad()
def nearest(
    W_dec: Float[Tensor, "d_sae d_out"], shown: int
) -> tuple[Int[Tensor, "d_sae shown"], Float[Tensor, "d_sae shown"]]:
    """Return ids and cosines of each direction's nearest others, nearest first; never itself."""
    W = torch.nn.functional.normalize(W_dec.float().cpu(), dim=1)
    shown = min(shown, len(W) - 1)
    ids, cosines = [], []
    for first in range(0, len(W), 4 * CHUNK):
        cosine = W[first : first + 4 * CHUNK] @ W.T
        own = torch.arange(len(cosine))
        cosine[own, first + own] = -torch.inf
        best = cosine.topk(shown, dim=1)
        ids.append(best.indices)
        cosines.append(best.values)
    return torch.cat(ids), torch.cat(cosines)


def largest(
    W: Float[Tensor, "n d"], shown: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"], Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Return (direction, rank, coordinate, value) of each direction's largest entries by size.

    At most `shown` of each, and none that is 0; of equals the first coordinates.
    """
    W = W.float().cpu()
    order = W.abs().sort(dim=1, descending=True, stable=True).indices[:, :shown]
    values = W.gather(1, order)
    direction, rank = values.nonzero(as_tuple=True)
    return direction, rank, order[direction, rank], values[direction, rank]
