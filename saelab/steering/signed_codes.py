"""What a dictionary's codes tell of a concept by their sign, without steering.

Does a document's signed code tell the concept from its absence; and how many latents fire with both
signs, on texts that the label tells apart?
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.metrics.pooling import Pooled
from saelab.stats import aucs, benjamini_hochberg

LEAST_DENSITY = 1e-3
"""Share of positions on which a sign has to be seen to count."""
_LEVEL = 0.05


def best_signed(
    scores: Float[Tensor, "documents m"], positive: Bool[Tensor, " documents"]
) -> tuple[int, int]:
    """Return the column that tells documents apart best, and the sign with which it is the higher
    where the concept is."""
    apart = (aucs(scores, positive[:, None])[0] - 0.5).nan_to_num(0.0)
    best = int(apart.abs().argmax())
    return best, 1 if apart[best] >= 0 else -1


def two_sided(
    up: Float[Tensor, " m"], down: Float[Tensor, " m"], least: float = LEAST_DENSITY
) -> Bool[Tensor, " m"]:
    """Return which latents fire often enough with both signs, from the density of each sign."""
    return (up >= least) & (down >= least)


def separated(
    codes: Pooled,
    positive: Bool[Tensor, " documents"],
    asked: Bool[Tensor, " m"],
    level: float = _LEVEL,
) -> Bool[Tensor, " m"]:
    """Return which of the latents asked about fire with one sign and with the other in documents
    of which different shares have the concept.

    By a two-sided test of two shares for each latent, with a false discovery rate of at most
    `level` among those asked about. A document in which both signs fire stands on both sides, which
    makes the two more alike.
    """
    sides = (torch.stack([codes.high, codes.low]) > 0).double()
    counts, hits = sides.sum(1), positive.double() @ sides
    share = hits.sum(0) / counts.sum(0)
    error = (share * (1 - share) * (1 / counts).sum(0)).sqrt()
    z = (hits / counts).diff(dim=0)[0] / error
    p = torch.erfc(z.abs() / 2**0.5).nan_to_num(1.0)
    found = torch.zeros_like(asked)
    if bool(asked.any()):
        found[asked] = benjamini_hochberg(p[asked]) < level
    return found
