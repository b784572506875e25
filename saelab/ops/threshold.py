"""The threshold at which a greedy construction ends with a wanted number of atoms."""

import logging
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.ops.construct import Constructed, Rule, construct

TRIALS = 12
"""Most constructions of the sample."""
TRIAL_ROWS = 16_384
"""Most rows of a trial."""
NEAR = 0.02
"""A size this close to the wanted one, as a share of it, is near enough."""
LEAST = 1e-6
"""Smallest threshold tried, as a share of the largest that can fire."""

log = logging.getLogger(__name__)


def threshold_for(
    sample: Float[Tensor, "n d"], rule: Callable[[float], Rule], top: float, n_rows: int
) -> float:
    """Return the threshold at which `n_rows` rows like those of the sample give `rule.limit` atoms.

    The size is found by constructing from the sample, once per trial, and where more rows are to
    come it is carried on along the power law that the sample's second half shows. The thresholds
    lie between 0 and `top`, which lets no row through; each trial halves what is left of them, or
    does better by taking the logarithm of the size as linear in that of the threshold.
    """
    target = rule(top).limit
    low, high = None, (math.log(top), 0.0)
    guess, sample = high[0] - math.log(2), sample[:TRIAL_ROWS]
    for _ in range(TRIALS):
        size = _size(construct(sample, sample[:0], rule(math.exp(guess))), target, n_rows)
        if abs(size - target) <= NEAR * target:
            break
        place = guess, math.log(max(size, 1.0))
        low, high = (place, high) if size > target else (low, place)
        if low is None and guess <= math.log(LEAST * top):
            log.warning(
                "no threshold comes to %d atoms: even %.3g leaves about %d", target,
                math.exp(guess), size,
            )  # fmt: skip
            break
        guess = _between(low, high, math.log(target))
    return math.exp(guess)


def _size(made: Constructed, target: int, n_rows: int) -> float:
    """Return how many atoms there will be after `n_rows` rows; more than `target` is infinity."""
    taken, seen = made.taken, len(made.errors)
    if len(taken) >= target and seen < n_rows:
        return math.inf
    if seen >= n_rows or seen < 2:
        return float(len(taken))
    half = int(torch.searchsorted(taken, seen // 2))
    slope = math.log2(max(len(taken), 1) / max(half, 1))
    return len(taken) * (n_rows / seen) ** min(slope, 1.0)


def _between(low: tuple[float, float] | None, high: tuple[float, float], target: float) -> float:
    """Return the next threshold to try, as a logarithm: well inside the bracket, if any."""
    if low is None:
        return high[0] - math.log(4)
    width = high[0] - low[0]
    share = 0.5
    if math.isfinite(low[1]) and low[1] > high[1]:
        share = (low[1] - target) / (low[1] - high[1])
    return low[0] + width * min(max(share, 0.1), 0.9)
