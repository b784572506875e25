"""What latents tell of documents' labels: dictionaries beside what they are held against.

    python -m saelab_experiments.labelled runs/concepts --against topk --output docs/concepts.md

A row per member of a run that was scored by `concepts`, `probing`, `tpp` or `scr`, then the arms
that do not depend on a member (supervised directions, raw coordinates, random directions, words).
Cells are means over labels with one standard error over documents; below each stands the
difference to the member of `--against` with its 95 % interval, paired by documents.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab_experiments import pages

from saelab import leaderboard
from saelab.errors import ArtifactError, ConfigError, nearest
from saelab.leaderboard import Scored
from saelab.report import pretty

COLUMNS = {
    "concept_auc[max]": "concept AUC, max",
    "concept_auc[mean]": "concept AUC, mean",
    "snmf_score": "SNMF score",
    "probe_auc[k=1,max]": "probe AUC, k 1",
    "probe_auc[k=5,max]": "k 5",
    "probe_auc[k=20,max]": "k 20",
    "probe_auc[all,max]": "all columns",
    "tpp[n=1]": "TPP, n 1",
    "tpp[n=20]": "n 20",
    "scr[n=1]": "SCR, n 1",
    "scr[n=20]": "n 20",
}
SHARED = (
    "mean_difference", "linear_probe", "raw", "pca", "random_directions", "bag_of_words",
)  # fmt: skip
"""Arms that stand in every member's results, the same in all."""


@dataclass(frozen=True)
class Line:
    """A row of the table: an arm of some member's results."""

    label: str
    member: Scored
    arm: str


def lines_of(board: Sequence[Scored]) -> list[Line]:
    """Return the members in the order of the run's names, then the arms that all share."""
    members = [Line(one.name, one, "dictionary") for one in sorted(board, key=lambda s: s.name)]
    first = members[0].member
    arms = {arm for arm, name in first.cells if name in COLUMNS}
    return members + [Line(arm, first, arm) for arm in SHARED if arm in arms]


def table(board: Sequence[Scored], against: str) -> list[str]:
    """Return the Markdown table of a board. Raises ConfigError if no member is called so."""
    lines = lines_of(board)
    named = [line for line in lines if line.member.type == against or line.label == against]
    if not named:
        known = sorted({line.member.type for line in lines})
        raise ConfigError(f"--against {against}: no member of this run; {nearest(against, known)}")
    reference = named[0]
    shown = [m for m in COLUMNS if any(line.member.row(m, line.arm) for line in lines)]
    heads = ["", *(COLUMNS[m] for m in shown)]
    rows = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * len(shown)]
    for line in lines:
        bold = line.arm == "dictionary"
        cells = [f"**{line.label}**" if bold else line.label]
        cells += [_cell(line, reference, metric) for metric in shown]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _cell(line: Line, reference: Line, metric: str) -> str:
    row = line.member.row(metric, line.arm)
    if row is None:
        return ""
    text = pretty(row["value"], row["standard_error"])
    arms = line.arm, reference.arm
    found = leaderboard.gap_of(line.member, reference.member, metric, arms=arms)
    if line is reference or found is None or not found.paired:
        return text
    return f"{text}<br>{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def page(folders: Sequence[Path], against: str) -> str:
    """Return the page of some runs, a table each. Raises ArtifactError for one without labels."""
    parts: list[str] = []
    for folder in folders:
        members = [s for s in leaderboard.scored(folder) if any(map(s.row, COLUMNS))]
        if not members:
            raise ArtifactError(
                f"{folder} holds no scores of labels: evaluate with evals: [concepts, probing, tpp]"
            )
        for board in leaderboard.boards(members, next(iter(COLUMNS))):
            parts += [f"## {board[0].results.parent('store').name}, {board[0].site}", ""]
            parts += [_counts(board[0]), "", *table(board, against), ""]
    return "\n".join(parts)


def _counts(one: Scored) -> str:
    """Say what each evaluator scored; they may have taken different documents."""
    said = []
    for name in ("concepts", "probing", "tpp", "scr"):
        labels, documents = (
            one.row(f"{name}_{what}", "corpus") for what in ("labels", "documents")
        )
        if labels is not None and documents is not None:
            counted = f"{labels['value']:.0f} labels, {documents['value']:,.0f} documents"
            said.append(f"`{name}`: {counted}")
    return "; ".join(said) + "."


def main(argv: list[str], say: Callable[[str], Any] = sys.stdout.write) -> None:
    """Print the tables, or write them to `--output`."""
    parser = argparse.ArgumentParser(prog="python -m saelab_experiments.labelled")
    parser.add_argument("runs", type=Path, nargs="+", help="runs' `out` folders")
    parser.add_argument("--against", default="topk", help="type or name of a member (topk)")
    parser.add_argument("--output", type=Path, help="Markdown file; printed if left out")
    given = parser.parse_args(argv)
    text = page(given.runs, given.against)
    pages.put(text, given.output, say)


if __name__ == "__main__":
    pages.run(main)
