"""Rows of the supervised evaluation: single numbers, and ratios of sums over prompts."""

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.circuits.ability import mean_error
from saelab.stats import ResultRow, Statistic, over_documents, standard_error

VERSION = 2
"""Bumped when the numbers of the same prompts change."""
SUPERVISED, NONE = "supervised", "none"
"""Arms: the labels' own dictionary, and no edit at all."""

_ERRORS = 3
"""Standard errors that a mean has to be away from 0 before shares of it are reported."""


def is_clear(values: Float[Tensor, " n"]) -> bool:
    """Return whether a mean over prompts can be told from 0: a share of another says nothing."""
    return abs(float(values.mean())) > _ERRORS * mean_error(values)


def row(
    name: str, value: float, error: float | None, arm: str, *, n: int, unit: str = "share"
) -> ResultRow:
    """Return a number over `n` prompts."""
    return ResultRow(name, value, unit, n, error, VERSION, arm, evaluator="supervised")


def ratio(
    name: str, top: Float[Tensor, " n"], bottom: Float[Tensor, " n"], arm: str, *, seed: int
) -> ResultRow:
    """Return Σ top / Σ bottom over prompts, with its bootstrap error."""
    sums = torch.stack([top, bottom], 1).double()
    return over_prompts(name, sums, lambda s: s[:, 0] / s[:, 1], arm, seed=seed)


def over_prompts(
    name: str, sums: Float[Tensor, "n q"], statistic: Statistic, arm: str, *, seed: int
) -> ResultRow:
    """Return a statistic of sums over prompts, with its bootstrap error."""
    value = float(statistic(sums.sum(0, keepdim=True)))
    drawn = over_documents(sums, statistic, seed=seed)
    return row(name, value, standard_error(drawn), arm, n=len(sums))


def mean(name: str, values: Float[Tensor, " n"], arm: str, *, seed: int) -> ResultRow:
    """Return a mean over prompts, with its bootstrap error."""
    return ratio(name, values, torch.ones_like(values), arm, seed=seed)
