"""What steering came to: dictionaries beside what they have to beat, as a page with a figure.

    python -m saelab_experiments.steered runs/sentiment --output docs/sentiment.md \\
        --figure docs/sentiment.svg

A table per label of a run that was scored by `steering`: members that differ in their seed only
stand in one row, with 95 % intervals over prompts and seeds; the others' are over prompts (over
windows for the cross-entropy). Below it, how much each type scores over each control, paired by
prompts. The figure has the chosen latent's dose and response, controls in grey.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab_experiments import pages
from saelab_experiments.dose_plots import figure

from saelab import leaderboard
from saelab.dose_curves import curves_in, labels_in, with_interval
from saelab.errors import ArtifactError
from saelab.leaderboard import Scored
from saelab.stats import Difference
from saelab.steering.curves import DoseCurve

MEASURED = {
    "score": "score", "lift": "concept lift", "fluency": "fluency",
    "ce_change": "ΔCE, neutral text", "others_change": "other labels",
}  # fmt: skip
PLAIN = {
    "dose": "dose", "kl_last_prompt": "KL, last prompt position",
    "directions_reached": "directions at the dose", "non_monotone": "not monotone",
}  # fmt: skip
SHARED = (
    "mean_difference", "linear_probe", "isotropic", "covariance", "shuffled_labels", "prompt",
)  # fmt: skip
"""Arms that stand in every member's results, the same in all."""
MATCHED, OWN, ORACLE = "matched_latents", "dictionary", "oracle"


@dataclass(frozen=True)
class Line:
    """A row of the table: an arm in the results of members that differ in their seed."""

    label: str
    members: tuple[Scored, ...]
    arm: str

    @property
    def folders(self) -> list[Path]:
        """The results."""
        return [member.folder for member in self.members]

    def interval(self, name: str) -> Difference | None:
        """Return a row's mean over the members, with its interval."""
        return with_interval(self.folders, self.arm, name)

    def mean(self, name: str) -> float | None:
        """Return a row's mean over the members that have it."""
        rows = [row for member in self.members if (row := member.row(name, self.arm))]
        return sum(row["value"] for row in rows) / len(rows) if rows else None


def lines_of(board: Sequence[Scored]) -> list[Line]:
    """Return the types of dictionaries, each with its matched latents, then what all share."""
    groups: dict[str, list[Scored]] = {}
    ordered = sorted(board, key=lambda s: s.name)
    for one in ordered:
        groups.setdefault(re.sub(r"-seed\d+$", "", one.name), []).append(one)
    found = []
    for name, members in groups.items():
        found.append(Line(name, tuple(members), OWN))
        found.append(Line(f"latents like those of {name}", tuple(members), MATCHED))
    return found + [Line(arm.replace("_", " "), (ordered[0],), arm) for arm in SHARED]


# ------------------------------------------------------------------------------------------- tables


def table(lines: Sequence[Line], label: str) -> list[str]:
    """Return the table of a label in Markdown."""
    heads = ["", "seeds", *MEASURED.values(), *PLAIN.values(), "oracle", "reached"]
    rows = [_line(heads), "|---|" + "--:|" * (len(heads) - 1)]
    for line in lines:
        reached = line.mean(f"steering_reached({label})")
        if reached is None:
            continue
        own = line.arm == OWN
        cells = [f"**{line.label}**" if own else line.label]
        cells.append(str(len(line.members)) if own else "")
        cells += [_spread(line.interval(f"steering_{name}({label})")) for name in MEASURED]
        cells += [_number(line.mean(f"steering_{name}({label})")) for name in PLAIN]
        oracle = Line("", line.members, ORACLE) if own else None
        cells.append(_number(oracle.mean(f"steering_score({label})")) if oracle else "")
        rows.append(_line([*cells, f"{reached:.0%}"]))
    return rows


def leads(lines: Sequence[Line], label: str) -> list[str]:
    """Return how much each type of dictionary scores over each other arm."""
    own = [line for line in lines if line.arm == OWN]
    others = [
        arm
        for arm in (*SHARED, MATCHED)
        if any(line.interval(f"steering_score_over({arm})({label})") for line in own)
    ]
    rows = [_line(["score over", *(arm.replace("_", " ") for arm in others)])]
    rows.append("|---|" + "--:|" * len(others))
    for line in own:
        names = (f"steering_score_over({arm})({label})" for arm in others)
        rows.append(_line([line.label, *(_spread(line.interval(name)) for name in names)]))
    return rows


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _spread(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _judged(one: Scored, label: str) -> str:
    """Return who judged, and how well it tells texts apart that no edit has touched."""
    held, generated, own = (
        one.row(f"steering_judge_{side}_auroc({label})", "judge")
        for side in ("heldout", "generated", "own")
    )
    reached = one.row(f"steering_reached({label})", OWN)
    assert reached is not None
    name = reached["encoder"].removesuffix(", unvalidated")
    validated = name == reached["encoder"]
    verdict = "both are at least .8" if validated else "unvalidated: one is not at least .8"
    at_home = f" It has {own['value']:.3f} on held-out text of its own corpus." if own else ""
    areas = [f"{row['value']:.3f}" if row else "unknown" for row in (held, generated)]
    return (
        f"Judge: `{name}`, AUROC {areas[0]} on held-out text and "
        f"{areas[1]} on unsteered generations ({verdict}).{at_home} "
        f"{reached['n']} prompts."
    )


# --------------------------------------------------------------------------------------------- page


def boards_of(folders: Sequence[Path]) -> list[list[Scored]]:
    """Return the members that may be compared. Raises ArtifactError for a run without steering."""
    boards = []
    for folder in folders:
        members = [s for s in leaderboard.scored(folder) if labels_in(s.folder)]
        if not members:
            raise ArtifactError(f"{folder} holds no steering: evaluate with evals: [steering]")
        boards += leaderboard.boards(members, "steering_score")
    return boards


def page(boards: Sequence[Sequence[Scored]], picture: str | None) -> str:
    """Return the page of some boards; `picture` is the figure's address, if there is one."""
    parts: list[str] = []
    for board in boards:
        lines = lines_of(board)
        for label in labels_in(board[0].folder):
            parts += [f"## {board[0].results.parent('store').name}, {board[0].site}: {label}", ""]
            parts += [_judged(board[0], label), "", *table(lines, label), ""]
            parts += [*leads(lines, label), ""]
    if picture is not None:
        parts += [f"![Lift, fluency and score at each dose]({picture})", ""]
        parts += [
            "Hollow: some direction misses the dose, or its dose falls somewhere on the way.",
            "",
        ]
    return "\n".join(parts)


def curves(boards: Sequence[Sequence[Scored]]) -> dict[str, list[DoseCurve]]:
    """Return the curves of each board and label: every type, and what all share."""
    found: dict[str, list[DoseCurve]] = {}
    for board in boards:
        own = [line for line in lines_of(board) if line.arm == OWN]
        for label in labels_in(board[0].folder):
            several = [curves_in(line.folders, label, name=line.label) for line in own]
            types = [one for some in several for one in some if one.arm in {o.label for o in own}]
            shared = [one for one in several[0] if one.arm in (*SHARED, MATCHED)]
            found[f"{board[0].site}: {label}"] = types + shared
    return found


def main(argv: list[str], say: Callable[[str], Any] = sys.stdout.write) -> None:
    """Print the page, or write it to `--output`; draw the figure where `--figure` says."""
    parser = argparse.ArgumentParser(prog="python -m saelab_experiments.steered")
    parser.add_argument("runs", type=Path, nargs="+", help="runs' `out` folders")
    parser.add_argument("--output", type=Path, help="Markdown file; printed if left out")
    parser.add_argument("--figure", type=Path, help="SVG file; none if left out")
    given = parser.parse_args(argv)
    boards = boards_of(given.runs)
    if given.figure is not None:
        pages.put(figure(curves(boards)).decode(), given.figure, say)
    picture = None if given.figure is None else given.figure.name
    pages.put(page(boards, picture), given.output, say)


if __name__ == "__main__":
    pages.run(main)
