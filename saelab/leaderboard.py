"""Which member of a run is best: all scored members of one site, ranked by one metric.

A board holds what may be compared: members that were scored on the same rows of the same site of
the same store, by the same evaluators. The others get a board of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from saelab import artifacts, report
from saelab.artifacts import Manifest
from saelab.config import digest
from saelab.dictionaries import REGISTRY
from saelab.errors import ArtifactError, ConfigError, nearest
from saelab.results import read_replicates, read_rows
from saelab.stats import Difference

LOWER = (
    "fvu", "median_normalised_error", "mse", "ce", "delta_ce", "kl", "description_length",
    "dead_share", "rare_share", "kl_over_random_error(isotropic)",
    "kl_over_random_error(covariance)",
)  # fmt: skip
"""Metrics that rank members, the smallest first."""
HIGHER = (
    "ce_recovered_zero", "ce_recovered_mean", "cosine", "pca_rank_of_equal_fvu",
    "r2", "mcc", "uniqueness", "precision", "recall", "f1",
    "concept_auc[max]", "concept_auc[mean]", "snmf_score", "snmf_positive",
    *(f"probe_{what}[k={k},{how}]" for what in ("auc", "accuracy") for how in ("max", "mean")
      for k in (1, 2, 5, 20)),
    *(f"{what}[n={n}]" for what in ("tpp", "scr") for n in (1, 2, 5, 10, 20, 50, 100, 500)),
)  # fmt: skip
"""Metrics that rank members, the largest first."""
COLUMNS = ("l0", "fvu", "kl", "ce_recovered_zero", "dead_share")
"""What a board shows beside the metric that it is ranked by."""
DEFAULTS = ("fvu", "r2", "probe_auc[k=1,max]", "concept_auc[max]")
"""What ranks when nothing is said: the first of them that was measured."""
TITLES = {
    "l0": "L0",
    "fvu": "FVU",
    "kl": "KL",
    "ce_recovered_zero": "CE rec. (zero)",
    "dead_share": "dead",
}
Z95 = 1.96


@dataclass(frozen=True)
class Scored:
    """A dictionary with its newest results."""

    name: str
    content_hash: str
    results: Manifest
    folder: Path
    """Of the results."""
    rows: list[dict[str, Any]]
    inputs: dict[str, Any]
    """What the dictionary was made from; empty if it does not lie beside its results."""
    training: dict[str, Any]
    """How its training went: its `run.json`; empty likewise."""
    facts: dict[str, Any]
    """What its manifest says of the finished dictionary; empty likewise."""

    @property
    def site(self) -> str:
        """The site whose activations it was scored on."""
        return self.results.facts["site"]

    @property
    def type(self) -> str:
        """The registered name of its type."""
        return self.inputs.get("dictionary", {}).get("type", "?")

    @property
    def is_k_sparse(self) -> bool:
        """Whether its L0 counts all of its codes; else it leaves out small ones, of which a row
        has many, and there is no L0 at which it could be compared."""
        return not getattr(REGISTRY.get(self.type), "l0_floor", 0.0)

    @cached_property
    def cells(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Result rows by (arm, metric); `core`'s where another evaluator has that name too."""
        rows = sorted(self.rows, key=lambda row: row["evaluator"] == "core")
        return {(row["arm"], row["name"]): row for row in rows}

    def row(self, metric: str, arm: str = "dictionary") -> dict[str, Any] | None:
        """Return a result row, or None if it was not measured."""
        return self.cells.get((arm, metric))

    def replicates(self, metric: str, arm: str = "dictionary") -> Tensor | None:
        """Return the resamples of a row: of the same documents for all members of a board."""
        row = self.row(metric, arm)
        if row is None:
            return None
        return read_replicates(self.folder, row["evaluator"], arm, metric)

    def rank(self, metric: str) -> float:
        """Return what members are sorted by, best first; those without a number go last."""
        row = self.row(metric)
        if row is None or not math.isfinite(row["value"]):
            return math.inf
        return -row["value"] if metric in HIGHER else row["value"]


# --------------------------------------------------------------------------------------- finding


def scored(out: Path) -> list[Scored]:
    """Return every dictionary with results under a run's folder, oldest results first."""
    made = {m.content_hash: (path, m) for path, m in artifacts.find_all(out, "dictionary")}
    newest: dict[str, tuple[Path, Manifest]] = {}
    for path, manifest in artifacts.find_all(out, "results"):
        parent = manifest.parent("dictionary").content_hash
        newest.pop(parent, None)
        newest[parent] = (path, manifest)
    names = [manifest.name for _, manifest in newest.values()]
    found = []
    for parent, (path, manifest) in newest.items():
        folder, dictionary = made.get(parent, (None, None))
        twice = names.count(manifest.name) > 1
        name = f"{manifest.name} {parent[:8]}" if twice else manifest.name
        inputs, facts = (dictionary.inputs, dictionary.facts) if dictionary else ({}, {})
        training = artifacts.read_json(folder / artifacts.RUN) if folder else {}
        found.append(Scored(name, parent, manifest, path, read_rows(path), inputs, training, facts))
    return found


def named(paths: Sequence[Path]) -> list[Scored]:
    """Return the scored dictionaries that are meant: each a dictionary's folder, or all of a run's.

    Raises ArtifactError for another artifact, and where there are no results.
    """
    found: dict[str, Scored] = {}
    for path in paths:
        if not (path / artifacts.MANIFEST).exists():
            some = scored(path)
        else:
            manifest = artifacts.read_manifest(path)
            if manifest.stage != "dictionary":
                raise ArtifactError(
                    f"{path} is a {manifest.stage}; compare takes dictionaries, or a run's folder"
                )
            beside = scored(path.resolve().parents[1])
            some = [s for s in beside if s.content_hash == manifest.content_hash]
        if not some:
            raise ArtifactError(f"{path} holds no results; `saelab evaluate CONFIG` makes some")
        found |= {s.content_hash: s for s in some}
    return list(found.values())


def metric_of(members: Sequence[Scored], by: str | None) -> str:
    """Return the metric that ranks; raises ConfigError naming the nearest if `by` cannot."""
    measured = {name for s in members for arm, name in s.cells if arm == "dictionary"}
    known = [name for name in (*LOWER, *HIGHER) if name in measured]
    if by is None:
        by = next((name for name in DEFAULTS if name in measured), DEFAULTS[0])
    if by not in known:
        raise ConfigError(
            f"these dictionaries cannot be ranked by {by!r}: it was not measured, or neither end "
            f"of it is the better one; {nearest(by, known)}"
        )
    return by


def boards(members: Sequence[Scored], metric: str) -> list[list[Scored]]:
    """Return the members that may be compared with each other, each board best first."""
    found: dict[tuple[str, str, str], list[Scored]] = {}
    for one in members:
        store = one.results.parent("store").content_hash
        found.setdefault((one.site, store, digest(one.results.inputs)), []).append(one)
    return [sorted(board, key=lambda s: s.rank(metric)) for _, board in sorted(found.items())]


# ---------------------------------------------------------------------------------------- showing


def _columns(board: Sequence[Scored], metric: str) -> list[str]:
    columns = COLUMNS if metric in COLUMNS else (metric, *COLUMNS)
    return [name for name in columns if any(s.row(name) for s in board)]


def _head(name: str, metric: str) -> str:
    arrow = (" ↑" if metric in HIGHER else " ↓") if name == metric else ""
    return TITLES.get(name, name) + arrow


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else report.pretty(row["value"], row["standard_error"])


def _lines(board: Sequence[Scored], metric: str) -> list[list[str]]:
    """Return a board's rows as text, after the first column, best first."""
    columns = _columns(board, metric)
    return [[s.name, s.type, *(_cell(s.row(name)) for name in columns)] for s in board]


def _blocks(members: Sequence[Scored], metric: str) -> list[list[Scored]]:
    """Return the boards, those of members that are not k-sparse apart."""
    halves = (
        [one for one in board if one.is_k_sparse == sparse]
        for board in boards(members, metric)
        for sparse in (True, False)
    )
    return [half for half in halves if half]


def _title(board: Sequence[Scored]) -> str:
    best, apart = board[0], "" if board[0].is_k_sparse else ", codes that are not k-sparse"
    return f"{best.site}, {len(board)} members on {best.results.parent('store').name}{apart}"


def _note(board: Sequence[Scored], metric: str) -> str:
    """Return what has to be known to read a board."""
    title = TITLES.get(metric, metric)
    note = (
        f"★ the best of {len(board)} by {title}, chosen on the rows that it is scored on; "
        "± is one standard error over documents and says nothing about another seed."
    )
    sparsities = [row["value"] for s in board if (row := s.row("l0")) and row["value"] > 0]
    if sparsities and max(sparsities) > 1.1 * min(sparsities):
        note += (
            f" L0 goes from {min(sparsities):.3g} to {max(sparsities):.3g}, and more latents per "
            "row reconstruct better: compare members of like L0, or curves "
            "(python -m saelab_experiments.curves)."
        )
    return note


def summary(members: Sequence[Scored], by: str | None) -> Group:
    """Return one board per site. Raises ConfigError if `by` cannot rank."""
    metric, parts = metric_of(members, by), []
    for board in _blocks(members, metric):
        table = report.table("", "type", *(_head(n, metric) for n in _columns(board, metric)))
        table.columns[1].justify = "left"
        for place, line in enumerate(_lines(board, metric)):
            table.add_row(_mark(place, line[0]), *line[1:], style="" if place else "bold")
        note = Text(_note(board, metric), style="dim")
        parts += [Text(_title(board), style="bold"), Text(), table, Text(), note, Text()]
    return Group(*parts)


def _mark(place: int, name: str) -> str:
    return f"  {name}" if place else f"★ {name}"


def markdown(members: Sequence[Scored], by: str | None) -> str:
    """Return the boards as Markdown. Raises ConfigError if `by` cannot rank."""
    metric, lines = metric_of(members, by), []
    for board in _blocks(members, metric):
        columns = _columns(board, metric)
        heads = " | ".join(_head(name, metric) for name in columns)
        lines += [f"## {_title(board)}", "", f"| member | type | {heads} |"]
        lines.append("|---|---|" + "--:|" * len(columns))
        for place, (name, *rest) in enumerate(_lines(board, metric)):
            shown = name if place else f"★ **{name}**"
            lines.append("| " + " | ".join([shown, *rest]) + " |")
        lines += ["", _note(board, metric), ""]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- comparing


def compare(paths: Sequence[Path], by: str | None) -> Group:
    """Return which of some dictionaries, or of a run's, is best, and by how much.

    Two dictionaries are also shown side by side: how they were made, all their scores. Raises
    ArtifactError for fewer than two, ConfigError if `by` cannot rank.
    """
    parts: list[Any] = []
    if len(paths) == 2 and all((path / artifacts.MANIFEST).exists() for path in paths):
        parts = [report.comparison(*paths), Text()]
    members = named(paths)
    if len(members) < 2:
        raise ArtifactError(
            f"{paths[0]} is one scored dictionary; compare takes two or more, or a run's folder "
            "that holds as many"
        )
    metric = metric_of(members, by)
    found = boards(members, metric)
    alone = [board[0] for board in found if len(board) == 1]
    for board in found:
        if len(board) > 1:
            parts += [_differences(board, metric), Text(), Text(_says(board, metric)), Text()]
    if alone:
        names = ", ".join(f"{s.name} ({s.site})" for s in alone)
        parts.append(Text(f"Scored on rows that no other one was scored on: {names}."))
    if len(found) > len(alone):
        paired = all(
            gap is None or gap.paired
            for board in found
            for one in board[1:]
            for gap in [gap_of(one, board[0], metric)]
        )
        parts.append(Text(_PAIRED if paired else _UPPER_BOUND, style="dim"))
    return Group(*parts)


_PAIRED = (
    "Differences are to the best one, from resamples that drew the same documents for both. "
    "Another seed is not in them."
)
_UPPER_BOUND = (
    "Differences are to the best one. Not all could be paired: some of these results hold no "
    "resamples, or the metric has none. Errors are then taken as if the two were independent; "
    "scores on the same documents are positively related, so this is an upper bound. Another seed "
    "is not in it."
)


@dataclass(frozen=True)
class Gap:
    """A difference of two members of a board."""

    value: float
    low: float | None
    """2.5 %; None where no error is known."""
    high: float | None
    paired: bool
    """Whether both were resampled with the same documents."""


def gap_of(
    one: Scored,
    other: Scored,
    metric: str,
    *,
    arms: tuple[str, str] = ("dictionary", "dictionary"),
) -> Gap | None:
    """Return one − other with its 95 % interval, of an arm of each; None where not measured."""
    a, b = one.row(metric, arms[0]), other.row(metric, arms[1])
    if a is None or b is None:
        return None
    value = a["value"] - b["value"]
    mine, theirs = one.replicates(metric, arms[0]), other.replicates(metric, arms[1])
    if mine is not None and theirs is not None and len(mine) == len(theirs):
        found = Difference.of(value, mine - theirs)
        return Gap(value, found.low, found.high, paired=True)
    errors = a["standard_error"], b["standard_error"]
    if None in errors:
        return Gap(value, None, None, paired=False)
    reach = Z95 * math.hypot(*errors)
    return Gap(value, value - reach, value + reach, paired=False)


def _differences(board: Sequence[Scored], metric: str) -> Table:
    table = report.table(board[0].site, "type", "L0", _head(metric, metric), "difference", "95 %")
    table.columns[1].justify = "left"
    for place, one in enumerate(board):
        gap = gap_of(one, board[0], metric) if place else None
        shown = ("", "") if gap is None else (f"{gap.value:+.4g}", _interval(gap))
        cells = one.type, _cell(one.row("l0")), _cell(one.row(metric))
        table.add_row(_mark(place, one.name), *cells, *shown, style="" if place else "bold")
    return table


def _interval(gap: Gap) -> str:
    if gap.low is None:
        return "no error known"
    return f"{gap.low:+.4g} to {gap.high:+.4g}"


def _says(board: Sequence[Scored], metric: str) -> str:
    """Return the answer in one sentence, and which others it does not rule out."""
    best, title = board[0], TITLES.get(metric, metric)
    answer = f"Best by {title} at {best.site}: {best.name}, {_cell(best.row(metric))}."
    open_ones, unknown = [], False
    for one in board[1:]:
        gap = gap_of(one, best, metric)
        if gap is None or gap.low is None or gap.high is None:
            unknown = True
        elif gap.low <= 0 <= gap.high:
            open_ones.append(one.name)
    if unknown:
        return f"{answer} Not every difference has an error, so no more can be said."
    if not open_ones:
        return f"{answer} The 95 % interval of every difference to it leaves out 0."
    listed = ", ".join(open_ones[:5]) + (", …" if len(open_ones) > 5 else "")
    return f"{answer} Not told apart from it: {len(open_ones)} of {len(board) - 1} ({listed})."
