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

import torch
from torch import Tensor

from saelab.errors import ArtifactError, ConfigError
from saelab.leaderboard import Scored
from saelab.report import pretty
from saelab.stats import Difference, standard_error

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
    drawn: Tensor | None = field(default=None, compare=False, repr=False)
    """Its bootstrap resamples, which drew the same documents for every member of a board."""


@dataclass(frozen=True)
class Point:
    """What one member, or one of its arms, came to."""

    budget: float
    seed: int
    l0: float
    scores: dict[str, Score]
    seconds: float | None = None
    """Of its own: of its initialisation, where that was kept, and of all of its steps."""
    init_seconds: float | None = None
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
        name: Score(row["value"], row["standard_error"], one.replicates(name, arm))
        for name in (*METRICS, "l0")
        if (row := one.row(name, arm)) is not None and math.isfinite(row["value"])
    }
    own = scores.pop("l0", None) or _l0(one)
    if not scores or own is None:
        return None
    budget = float(one.inputs["dictionary"][_budget_key(one)])
    begun = one.training.get("init_seconds")
    return Point(budget, one.inputs["seed"], own.value, scores, _seconds(one), begun, one.name)


def _l0(one: Scored) -> Score | None:
    row = one.row("l0")
    return None if row is None else Score(row["value"], row["standard_error"])


def _seconds(one: Scored) -> float | None:
    """Return the time of a member's initialisation and of all of its steps, those before it was
    resumed by the mean of the others; None where it was not kept."""
    train, run = one.inputs["train"], one.training
    steps = run.get("steps_taken", train["tokens"] // train["batch"])
    timed, seconds = steps - run.get("resumed_at", 0), run.get("step_seconds")
    if not seconds or timed <= 0:
        return None
    return (run.get("init_seconds") or 0.0) + seconds * steps / timed


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
    counted = _by_seed(line, metric, l0)
    if not counted:
        return None
    values = [score.value for score, _ in counted.values()]
    mean = mean_score([score for score, _ in counted.values()])
    spread = spread_of(values) if len(values) > 1 else None
    inside = all(inside for _, inside in counted.values())
    return Estimate(mean.value, mean.error, spread, len(values), inside)


def lead(line: Line, other: Line, metric: str, l0: float) -> Difference | None:
    """Return line − other at an L0, paired by documents and by the seeds that both have.

    The interval is of a hierarchical bootstrap: a resample draws documents, the same for both, and
    among several seeds seeds. None where there is no common seed, or no resamples were kept.
    """
    mine, theirs = (_by_seed(one, metric, l0) for one in (line, other))
    drawn, values = [], []
    for seed in sorted(mine.keys() & theirs.keys()):
        a, b = mine[seed][0], theirs[seed][0]
        if a.drawn is None or b.drawn is None or len(a.drawn) != len(b.drawn):
            return None
        drawn.append(a.drawn - b.drawn)
        values.append(a.value - b.value)
    if not drawn:
        return None
    table, n = torch.stack(drawn), len(drawn)
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(n, (n, table.shape[1]), generator=generator)
    return Difference.of(statistics.fmean(values), table.gather(0, picked).mean(0))


def _by_seed(line: Line, metric: str, l0: float) -> dict[int, tuple[Score, bool]]:
    """Return by seed (score, inside) of those with half of the weight in members of their own;
    where there are none, of all."""
    points = [point for point in line.points if metric in point.scores and point.l0 > 0]
    found = {s: _of_seed(points, metric, l0, s) for s in sorted({p.seed for p in points})}
    own = {seed: one for seed, (share, *one) in found.items() if share >= 0.5}
    chosen = own or {seed: one for seed, (_, *one) in found.items()}
    return {seed: (score, inside) for seed, (score, inside) in chosen.items()}


def _of_seed(
    points: Sequence[Point], metric: str, l0: float, seed: int
) -> tuple[float, Score, bool]:
    """Return (share of the seed's own points, score, inside) on one seed's line."""
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
    return share, mix([(w, drawn[i][1]) for i, w in parts.items()]), inside


def spread_of(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds; exactly 0 where they differ by rounding only."""
    spread = statistics.stdev(values)
    return spread if spread > 1e-12 * max(map(abs, values)) else 0.0


def mean_score(scores: Sequence[Score]) -> Score:
    """Return the mean of scores on the same documents."""
    return mix([(1 / len(scores), score) for score in scores])


def mix(parts: Sequence[tuple[float, Score]]) -> Score:
    """Return the weighted sum of scores on the same documents.

    Its error is that of the summed resamples; without them the weighted sum of errors, an upper
    bound.
    """
    value = sum(w * score.value for w, score in parts)
    draws = [score.drawn for _, score in parts]
    if all(d is not None for d in draws) and len({len(d) for d in draws if d is not None}) == 1:
        drawn = sum(w * d for (w, _), d in zip(parts, draws, strict=True) if d is not None)
        assert isinstance(drawn, Tensor)
        return Score(value, standard_error(drawn), drawn)
    errors = [score.error for _, score in parts]
    known = [w * error for (w, _), error in zip(parts, errors, strict=True) if error is not None]
    return Score(value, sum(known) if len(known) == len(errors) else None)


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
