"""What latents tell of documents' labels: dictionaries beside what they are held against.

    python -m saelab_experiments.labelled runs/concepts --against topk --output docs/concepts.md

A table each of what single latents tell, of probes on the largest and on the mean value of latents
in a document, and of what ablating latents does. A row per member of a run that was scored by
`concepts`, `probing`, `tpp` or `scr`, then the arms that do not depend on a member (supervised
directions, raw coordinates, random directions, words). Cells are means over labels with one
standard error over documents; below each stands the difference to the member of `--against` with
its 95 % interval, paired by documents. *Candidates* are the columns that an arm could choose from.
Members whose codes are not k-sparse (semi-NMF) come last and are marked: their latents are chosen
and probed like others', but a row has many.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab_experiments import pages

from saelab import leaderboard
from saelab.errors import ArtifactError, ConfigError, nearest
from saelab.leaderboard import Scored
from saelab.report import pretty

TABLES = {
    "A single latent": {
        "concept_auc[max]": "concept AUC, max",
        "concept_auc[mean]": "mean",
        "snmf_score": "SNMF score",
        "snmf_positive": "above 0",
        "snmf_clamped": "clamped",
        "concept_candidates[max]": "candidates",
    },
    "Probes on each latent's largest value in a document": {
        "probe_auc[k=1,max]": "AUC, k 1",
        "probe_auc[k=2,max]": "k 2",
        "probe_auc[k=5,max]": "k 5",
        "probe_auc[k=20,max]": "k 20",
        "probe_auc[all,max]": "all columns",
    },
    "Probes on each latent's mean over a document": {
        "probe_auc[k=1,mean]": "AUC, k 1",
        "probe_auc[k=2,mean]": "k 2",
        "probe_auc[k=5,mean]": "k 5",
        "probe_auc[k=20,mean]": "k 20",
        "probe_auc[all,mean]": "all columns",
    },
    "What ablating latents does": {
        "tpp[n=1]": "TPP, n 1",
        "tpp[n=20]": "n 20",
        "scr[n=1]": "SCR, n 1",
        "scr[n=20]": "n 20",
    },
}
"""Metrics side by side, with what their columns are called."""
_METRICS = [metric for columns in TABLES.values() for metric in columns]
SHARED = (
    "mean_difference", "linear_probe", "raw", "pca", "random_directions",
    "covariance_directions", "shuffled_labels", "bag_of_words",
)  # fmt: skip
"""Arms that stand in every member's results, the same in all."""


@dataclass(frozen=True)
class Line:
    """A row of the table: an arm of some member's results."""

    label: str
    member: Scored
    arm: str


def lines_of(board: Sequence[Scored], metrics: Collection[str]) -> list[Line]:
    """Return the members that have one of the metrics, in the order of the run's names and those
    that are not k-sparse last, then the arms that all share."""
    ordered = sorted(board, key=lambda one: (not one.is_k_sparse, one.name))
    members = [Line(one.name, one, "dictionary") for one in ordered if any(map(one.row, metrics))]
    arms = {arm for arm, name in ordered[0].cells if name in metrics}
    return members + [Line(arm, ordered[0], arm) for arm in SHARED if arm in arms]


def tables(board: Sequence[Scored], against: str) -> list[str]:
    """Return the Markdown tables of a board. Raises ConfigError if no member is called so."""
    reference = _reference(board, against)
    found = []
    for title, columns in TABLES.items():
        lines = lines_of(board, columns)
        if lines:
            found += [f"### {title}", "", *_table(lines, reference, columns), ""]
    return found


def _reference(board: Sequence[Scored], against: str) -> Line:
    lines = lines_of(board, _METRICS)
    named = [line for line in lines if line.member.type == against or line.label == against]
    if not named:
        known = sorted({line.member.type for line in lines})
        raise ConfigError(f"--against {against}: no member of this run; {nearest(against, known)}")
    return named[0]


def _table(lines: Sequence[Line], reference: Line, columns: Mapping[str, str]) -> list[str]:
    shown = [m for m in columns if any(line.member.row(m, line.arm) for line in lines)]
    heads = ["", *(columns[m] for m in shown)]
    rows = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * len(shown)]
    for line in lines:
        bold, apart = line.arm == "dictionary", "" if line.member.is_k_sparse else ", not k-sparse"
        cells = [f"**{line.label}**{apart}" if bold else line.label]
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
    if line == reference or found is None or not found.paired:
        return text
    return f"{text}<br>{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def page(folders: Sequence[Path], against: str) -> str:
    """Return the page of some runs, a table each. Raises ArtifactError for one without labels."""
    parts: list[str] = []
    for folder in folders:
        members = [s for s in leaderboard.scored(folder) if any(map(s.row, _METRICS))]
        if not members:
            raise ArtifactError(
                f"{folder} holds no scores of labels: evaluate with evals: [concepts, probing, tpp]"
            )
        for board in leaderboard.boards(members, _METRICS[0]):
            parts += [f"## {board[0].results.parent('store').name}, {board[0].site}", ""]
            parts += [_counts(board[0]), "", *tables(board, against)]
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
