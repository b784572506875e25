"""Members of a run as lines of error against sparsity, and their values at one L0.

A line is every member of a type that differs from the others only in its budget (k or target L0)
and its seed; the docstring of `curves.py` has the rules of interpolation and of the two errors.
"""

import bisect
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from saelab.errors import ArtifactError, ConfigError
from saelab.leaderboard import Scored
from saelab.report import pretty

METRICS = {
    "fvu": "FVU ↓",
    "kl": "KL ↓",
    "ce_recovered_zero": "CE rec. (zero) ↑",
    "dead_share": "dead ↓",
    "description_length": "bits per row",
}
BUDGETS = ("target_l0", "k", "sparsity_weight")
"""What sets a member's L0: the first of these that its type has."""


@dataclass(frozen=True)
class Score:
    """A number with its standard error over documents, if it has one."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Point:
    """What one member, or one of its arms, came to."""

    budget: float
    seed: int
    l0: float
    scores: dict[str, Score]
    seconds: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Line:
    """Points that differ in budget and seed only."""

    label: str
    points: list[Point] = field(default_factory=list)

    def of_budget(self, budget: float) -> list[Point]:
        """Return the points of a budget, one per seed."""
        return [point for point in self.points if point.budget == budget]


@dataclass(frozen=True)
class Estimate:
    """A metric of a line at some L0: mean over seeds, and its two errors."""

    value: float
    error: float | None
    """Standard error over documents."""
    spread: float | None
    """Standard deviation over seeds; None with one."""
    n_seeds: int
    inside: bool = True
    """Whether the L0 lay within the measured ones, for every seed."""

    def __str__(self) -> str:
        text = pretty(self.value, self.error)
        text += "" if self.spread is None else f"; seeds {self.spread:.2g}"
        return text + ("" if self.inside else " †")


# ------------------------------------------------------------------------------------------ lines


def lines_of(board: Sequence[Scored], arm: str = "dictionary") -> list[Line]:
    """Return the lines of a board, sorted by label; those without the arm are left out.

    Raises ArtifactError if a dictionary is missing, ConfigError if two members share their place.
    """
    groups: dict[str, list[Scored]] = {}
    for one in board:
        if not one.inputs:
            raise ArtifactError(f"{one.name} has results, but its dictionary is not in this folder")
        groups.setdefault(repr(sorted(_identity(one).items())), []).append(one)
    found = []
    labelled = zip(_labels(list(groups.values())), groups.values(), strict=True)
    for label, members in sorted(labelled, key=lambda pair: pair[0]):
        points: dict[tuple[float, int], Point] = {}
        for one in members:
            point = _point(one, arm)
            if point is None:
                continue
            place = point.budget, point.seed
            if place in points:
                raise ConfigError(
                    f"{points[place].name} and {one.name} have the same type, width, rate, tokens, "
                    "budget and seed; give a folder that holds one of them"
                )
            points[place] = point
        if points:
            found.append(Line(label, [points[place] for place in sorted(points)]))
    return found


def _identity(one: Scored) -> dict[str, Any]:
    fields = {k: v for k, v in one.inputs["dictionary"].items() if k not in ("d_in", *BUDGETS[:2])}
    if _budget_key(one) == "sparsity_weight":
        del fields["sparsity_weight"]
    return fields | {"lr": one.inputs["lr"], "tokens": one.inputs["train"]["tokens"]}


def _budget_key(one: Scored) -> str:
    fields = one.inputs["dictionary"]
    return next((key for key in BUDGETS if fields.get(key) is not None), "d_sae")


def _labels(groups: Sequence[Sequence[Scored]]) -> list[str]:
    """Return what each line is called: its type, and what sets it apart from the type's others."""
    identities = [_identity(members[0]) for members in groups]
    labels = []
    for mine in identities:
        others = [other for other in identities if other["type"] == mine["type"]]
        apart = [k for k in mine if any(mine[k] != other.get(k) for other in others)]
        labels.append(", ".join([mine["type"], *(f"{k} {mine[k]}" for k in sorted(apart))]))
    return labels


def _point(one: Scored, arm: str) -> Point | None:
    """Return an arm's point; where it has no L0 of its own, it stands at its dictionary's."""
    scores = {
        name: Score(row["value"], row["standard_error"])
        for name in (*METRICS, "l0")
        if (row := one.row(name, arm)) is not None and math.isfinite(row["value"])
    }
    own = scores.pop("l0", None) or _l0(one)
    if not scores or own is None:
        return None
    budget = float(one.inputs["dictionary"][_budget_key(one)])
    return Point(budget, one.inputs["seed"], own.value, scores, _seconds(one), one.name)


def _l0(one: Scored) -> Score | None:
    row = one.row("l0")
    return None if row is None else Score(row["value"], row["standard_error"])


def _seconds(one: Scored) -> float | None:
    """Return the time of all of a member's own steps; None where it was not kept."""
    train, run = one.inputs["train"], one.training
    steps = train["tokens"] // train["batch"]
    taken = steps - run.get("resumed_at", 0)
    seconds = run.get("step_seconds")
    return None if not seconds or taken <= 0 else seconds * steps / taken


# ---------------------------------------------------------------------------------- interpolation


def weights(l0s: Sequence[float], l0: float) -> tuple[dict[int, float], bool]:
    """Return the weight of each point that makes up the value at an L0, and if it lies inside.

    `l0s` ascend and are positive. Outside of them, the nearest point has all the weight.
    """
    exact = [i for i, x in enumerate(l0s) if x == l0]
    if exact:
        return {i: 1 / len(exact) for i in exact}, True
    right = bisect.bisect_left(l0s, l0)
    if right in (0, len(l0s)):
        return {max(right - 1, 0): 1.0}, False
    low, high = l0s[right - 1], l0s[right]
    share = math.log(l0 / low) / math.log(high / low)
    return {right - 1: 1 - share, right: share}, True


def at(line: Line, metric: str, l0: float) -> Estimate | None:
    """Return a line's value of a metric at an L0; None if it was not measured on it."""
    points = [point for point in line.points if metric in point.scores and point.l0 > 0]
    if not points:
        return None
    found = [_of_seed(points, metric, l0, seed) for seed in sorted({p.seed for p in points})]
    counted = [one for share, *one in found if share >= 0.5] or [one for _, *one in found]
    values = [value for value, _, _ in counted]
    errors = [error for _, error, _ in counted]
    known = None if None in errors else statistics.fmean(errors)
    spread = spread_of(values) if len(values) > 1 else None
    inside = all(inside for *_, inside in counted)
    return Estimate(statistics.fmean(values), known, spread, len(values), inside)


def _of_seed(points: Sequence[Point], metric: str, l0: float, seed: int) -> tuple[Any, ...]:
    """Return (share of the seed's own points, value, error, inside) on one seed's line."""
    drawn: list[tuple[float, Score, bool]] = []
    for budget in sorted({point.budget for point in points}):
        here = [point for point in points if point.budget == budget]
        own = [point for point in here if point.seed == seed]
        used = own or here
        mean = statistics.fmean(point.l0 for point in used)
        drawn.append((mean, mean_score([p.scores[metric] for p in used]), bool(own)))
    drawn.sort(key=lambda one: one[0])
    parts, inside = weights([one[0] for one in drawn], l0)
    share = sum(w for i, w in parts.items() if drawn[i][2])
    value = sum(w * drawn[i][1].value for i, w in parts.items())
    errors = [drawn[i][1].error for i in parts]
    total = None if None in errors else sum(w * (drawn[i][1].error or 0) for i, w in parts.items())
    return share, value, total, inside


def spread_of(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds; exactly 0 where they differ by rounding only."""
    spread = statistics.stdev(values)
    return spread if spread > 1e-12 * max(map(abs, values)) else 0.0


def mean_score(scores: Sequence[Score]) -> Score:
    """Return the mean of scores on the same documents, with the upper bound of its error."""
    errors = [score.error for score in scores if score.error is not None]
    error = statistics.fmean(errors) if len(errors) == len(scores) else None
    return Score(statistics.fmean(score.value for score in scores), error)


# --------------------------------------------------------------------------------------- controls


def controls(board: Sequence[Scored], lines: Sequence[Line], l0: float) -> list[Line]:
    """Return the controls as lines; where they belong to a member's line, of the best one."""
    arms = sorted({arm for one in board for arm, _ in one.cells})
    found = [_shared(board, arm) for arm in _pca(arms, l0)]
    found += [_shared(board, arm) for arm in arms if arm.startswith("random_atoms")]
    found += [_shared(board, arm) for arm in arms if arm == "token_mean"]
    encoded = _best(lines_of(board, "re-encoded"), l0)
    found += [Line(f"re-encoded: best of all, {encoded.label}", encoded.points)] if encoded else []
    best = _best(lines, l0)
    for arm in (arm for arm in arms if arm.startswith("random_error")):
        found += [
            Line(f"{arm}, as large as the error of {line.label}", line.points)
            for line in lines_of(board, arm)
            if best is not None and line.label == best.label
        ]
    for arm in (arm for arm in arms if arm.startswith("gradient_")):
        found += [
            Line(f"{line.label} told a gradient: {arm}", line.points)
            for line in lines_of(board, arm)
        ]
    return found


def _pca(arms: Sequence[str], l0: float) -> list[str]:
    """Return the arm of PCA with the number of components nearest to an L0."""
    ks = {arm: float(found[1]) for arm in arms if (found := re.fullmatch(r"pca\(k=(\d+)\)", arm))}
    return [min(ks, key=lambda arm: abs(math.log(ks[arm] / l0)))] if ks else []


def _shared(board: Sequence[Scored], arm: str) -> Line:
    """Return a control that depends on a member's L0 at most: each of its L0s once."""
    points = [point for one in board if (point := _point(one, arm)) is not None]
    if arm.startswith(("token_mean", "pca")):
        return Line(arm, points[:1])
    once = {point.l0: Point(point.l0, 0, point.l0, point.scores) for point in points}
    return Line(arm, [once[value] for value in sorted(once)])


def _best(lines: Sequence[Line], l0: float) -> Line | None:
    ranked = [(found.value, line) for line in lines if (found := at(line, "fvu", l0))]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None
