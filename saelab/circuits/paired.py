"""Do codes rank heads better than what is as easily had? Draw by draw, on the same examples.

In each draw of examples the agreement of a score with a truth is taken beside that of the best
observational baseline *of this draw*, with the same negatives and as many examples. This is the
strictest reading: the best of many baselines is also the luckiest. The mean of the differences has
a t interval over draws, since a bootstrap of so few values is too narrow.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import Field, PositiveInt

from saelab.circuits.heads import Negatives
from saelab.circuits.patching import Direction
from saelab.config import Config
from saelab.errors import ConfigError

FEWEST = 3
"""Draws below which nothing is decided."""
Row = Mapping[str, Any]
"""A row of a heads artifact: a score's agreements with a truth (`heads.compare`)."""


class ClaimConfig(Config):
    """The claim that a score ranks heads better than the best observational baseline."""

    score: str = "codes_normalised"
    """Which one of the scores by codes."""
    agreement: Literal["kendall", "spearman"] = "kendall"
    """What better means."""
    position: str = "end"
    """Of the truth."""
    direction: Direction = "noising"
    """Of the truth."""
    negatives: Negatives = "unpredictable"
    """Kind of negative examples."""
    examples: PositiveInt = 10
    """Number of positives."""
    smallest: float = Field(default=0.05, ge=0)
    """Smallest difference of interest."""


@dataclass(frozen=True)
class Paired:
    """A score's agreement minus that of the best observational baseline, draw by draw."""

    differences: tuple[float, ...]
    best: tuple[str, ...]
    """The best baseline of each draw."""

    @property
    def mean(self) -> float:
        """The mean difference."""
        return fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval over draws, by Student's t; without ends for a single draw."""
        from scipy.stats import t

        n = len(self.differences)
        if n < 2:
            return -math.inf, math.inf
        half = float(t.ppf(0.975, n - 1)) * stdev(self.differences) / n**0.5
        return self.mean - half, self.mean + half

    def verdict(self, smallest: float) -> str:
        """Return supported (better in every draw, and by the interval), refuted (worse, likewise)
        or undecided."""
        low, high = self.interval
        if len(self.differences) < FEWEST:
            return "undecided (too few draws)"
        if min(self.differences) > 0 and low > 0:
            return "supported" + (", but smaller than of interest" if self.mean < smallest else "")
        return "refuted" if max(self.differences) < 0 and high < 0 else "undecided"


def against_best(rows: Iterable[Row], claim: ClaimConfig) -> Paired:
    """Return what a claim compares; seeds of one draw are averaged.

    Raises ConfigError if no row is of the score, or of a baseline, at the claim's place.
    """
    place = ("position", "direction", "negatives", "examples")
    here = [row for row in rows if all(row[key] == getattr(claim, key) for key in place)]
    own, others = _by_draw(here, "codes"), _by_draw(here, "observational")
    draws = [draw for draw in sorted(own) if claim.score in own[draw] and others[draw]]
    if not draws:
        raise ConfigError(
            f"no draw has {claim.score} and a baseline at {claim.examples} examples, negatives "
            f"{claim.negatives}, {claim.direction}, position {claim.position}; claim what is run"
        )

    def agreement(draw: int, method: str) -> float:
        values = (own if method == claim.score else others)[draw][method]
        return fmean(row[claim.agreement] for row in values)

    best = [max(others[draw], key=lambda method, d=draw: agreement(d, method)) for draw in draws]
    differences = [
        agreement(draw, claim.score) - agreement(draw, method)
        for draw, method in zip(draws, best, strict=True)
    ]
    return Paired(tuple(differences), tuple(best))


def _by_draw(rows: Iterable[Row], group: str) -> dict[int, dict[str, list[Row]]]:
    """Return a group's rows by draw and method."""
    found: dict[int, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["group"] == group:
            found[row["draw"]][row["method"]].append(row)
    return found
