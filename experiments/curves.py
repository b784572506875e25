"""Compare the members of a run at one L0, and draw error against sparsity.

    python -m saelab_experiments.curves runs/family --output docs/family.md --figure docs/family

A *line* is every member of a type that differs from the others only in its budget (k or target L0)
and its seed; a line of another width or rate is called by that too. Per site there is

1. a table at the L0 asked for (`--l0`, 32). A metric is interpolated along the line, linearly in
   the logarithm of the *measured* L0, between the two neighbours of that L0. Nothing is
   extrapolated: of a line that does not reach as far, the nearest point stands, marked †;
2. the controls at the same L0, types whose codes are not k-sparse (semi-NMF) in a table of their
   own as they were measured, and every member as it was measured;
3. with `--figure`, FVU and KL against L0 as SVG (extra `plots`), the same bytes each time.

*Seeds.* Each seed is interpolated on a line of its own. Where it has no member at a budget, the
mean of the other seeds' stands in, so that a line with seeds at one L0 only will do; a seed counts
if its own members have at least half of the weight. The value is the mean over seeds.

*Intervals.* Two sources are told apart: `0.1783 ± 0.0045; seeds 0.0006`. After ± stands one
standard error over held-out documents, from the resamples that results keep. After "seeds" stands
the standard deviation over seeds (not of their mean). Most of the documents' part is common to all
types: to tell two apart, read "FVU − best". It is the difference to the best line with a 95 %
interval, paired by documents and seeds (a hierarchical bootstrap over both).

*Seconds* are a member's own: its training steps (`step_seconds` of its `run.json`, scaled to all
steps if it was resumed) and what came before them (`init_seconds`). Reading is shared, and left
out.
"""

import argparse
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from saelab_experiments import pages
from saelab_experiments.lines import (
    METRICS,
    Estimate,
    Line,
    at,
    controls,
    lead,
    lines_of,
    spread_of,
)

from saelab import artifacts, leaderboard
from saelab.errors import ArtifactError, ConfigError
from saelab.leaderboard import Scored
from saelab.report import pretty
from saelab.stats import Difference

PAIRED = {"fvu": "FVU", "kl": "KL"}
"""Metrics whose difference to the best line is shown."""

# ----------------------------------------------------------------------------------------- tables


def at_table(board: Sequence[Scored], l0: float) -> list[str]:
    """Return the table at one L0: lines by FVU, then controls."""
    lines = lines_of(board)
    shown = [m for m in METRICS if any(m in p.scores for line in lines for p in line.points)]
    lines.sort(key=lambda line: found.value if (found := at(line, "fvu", l0)) else math.inf)
    leads = [m for m in PAIRED if m in shown]
    heads = ["", "seeds", *(METRICS[m] for m in shown), *(f"{PAIRED[m]} − best" for m in leads)]
    heads += [f"L0 at budget {l0:g}", "seconds"]
    table = [_row(heads), "|---|" + "--:|" * (len(heads) - 1)]
    for line in lines:
        there = line.of_budget(l0)
        seeds = max((e.n_seeds for m in shown if (e := at(line, m, l0))), default=0)
        cells = [_cell(at(line, m, l0)) for m in shown]
        reached = over_seeds(p.l0 for p in there)
        seconds = over_seeds(p.seconds for p in there)
        gaps = ["" if line is lines[0] else _gap(lead(line, lines[0], m, l0)) for m in leads]
        table.append(_row([f"**{line.label}**", str(seeds), *cells, *gaps, reached, seconds]))
    for line in controls(board, lines, l0):
        alone = line.label.startswith(("token_mean", "pca"))
        cells = [_cell(at(line, m, line.points[0].l0 if alone else l0)) for m in shown]
        table.append(_row([line.label, "", *cells, *("" for _ in leads), "", ""]))
    return table


def apart_table(board: Sequence[Scored]) -> list[str]:
    """Return the table of lines that have no L0 to be compared at: as they were measured."""
    lines = lines_of(board)
    shown = [m for m in METRICS if any(m in p.scores for line in lines for p in line.points)]
    heads = ["", "seeds", *(METRICS[m] for m in shown), "L0", "seconds"]
    table = [_row(heads), "|---|" + "--:|" * (len(heads) - 1)]
    for line in lines:
        for budget in sorted({point.budget for point in line.points}):
            there = line.of_budget(budget)
            cells = [_cell(at(Line(line.label, there), m, there[0].l0)) for m in shown]
            tail = over_seeds(p.l0 for p in there), over_seeds(p.seconds for p in there)
            table.append(_row([f"**{line.label}**", str(len(there)), *cells, *tail]))
    return table


def member_table(board: Sequence[Scored]) -> list[str]:
    """Return the table of every member as it was measured."""
    heads = ["", "budget", "seed", "L0", METRICS["fvu"], METRICS["kl"], "dead ↓", "seconds"]
    table = [_row(heads), "|---|" + "--:|" * (len(heads) - 1)]
    for line in lines_of(board):
        for point in line.points:
            cells = [point.scores.get(m) for m in ("fvu", "kl", "dead_share")]
            texts = ["" if s is None else pretty(s.value, s.error) for s in cells]
            seconds = "" if point.seconds is None else f"{point.seconds:.4g}"
            where = f"{point.budget:g}", str(point.seed), f"{point.l0:.4g}"
            table.append(_row([line.label, *where, *texts, seconds]))
    return table


def over_seeds(values: Iterable[float | None]) -> str:
    """Return the mean and the spread of plain numbers; empty if one is missing."""
    known = list(values)
    if not known or None in known:
        return ""
    numbers = [float(value) for value in known if value is not None]
    spread = f"; seeds {spread_of(numbers):.2g}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.4g}{spread}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _gap(found: Difference | None) -> str:
    return "" if found is None else f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _cell(found: Estimate | None) -> str:
    return "" if found is None else str(found)


def page(
    boards: Sequence[Sequence[Scored]], l0: float, figures: Sequence[str], command: str
) -> str:
    """Return the whole page; `figures` are what each board's figure is linked by, or empty."""
    parts = [f"# Types at L0 {l0:g}", "", f"Made by `{command}`. {_READING}", ""]
    for board, figure in zip(boards, figures or [""] * len(boards), strict=True):
        store = board[0].results.parent("store").name
        n = next(row["n"] for row in board[0].rows if row["name"] == "fvu")
        parts += [
            f"## {board[0].site}",
            "",
            f"{len(board)} members on {store}, {n:,} held-out rows.",
        ]
        sparse = [one for one in board if one.is_k_sparse]
        apart = [one for one in board if not one.is_k_sparse]
        parts += ["", *at_table(sparse, l0), ""] if sparse else [""]
        if apart:
            parts += ["### Codes that are not k-sparse", "", _APART, "", *apart_table(apart), ""]
        parts += [f"![FVU and KL against L0]({figure})", ""] if figure else []
        parts += ["### Every member", "", *member_table(board), ""]
    return "\n".join(parts)


_APART = (
    "Non-negative least squares gives a row many small codes: L0 counts those of at least a "
    "hundredth of its largest, reconstructions use all. Not to be ranked beside types with a k."
)
_READING = (
    "Values are interpolated linearly in the "
    "logarithm of the measured L0; † marks the nearest point of a line that does not reach this "
    "L0. After ± stands one standard error over held-out documents, after “seeds” the standard "
    "deviation over seeds; “− best” is the difference to the first line with a 95 % interval, "
    "paired by documents and seeds. Seconds are a member's own, before and in its training steps. "
    "The controls follow the lines; the best re-encoded one was chosen on these rows."
)


# --------------------------------------------------------------------------------------- the page


def read(folder: Path) -> list[list[Scored]]:
    """Return a run's boards. Raises ArtifactError if no member has FVU and L0."""
    members = [s for s in leaderboard.scored(folder) if s.row("fvu") and s.row("l0")]
    if not members:
        raise ArtifactError(f"{folder} holds no results with FVU and L0: `saelab evaluate CONFIG`")
    return leaderboard.boards(members, "fvu")


def main(argv: list[str], say: Callable[[str], Any] = sys.stdout.write) -> None:
    """Write the page and the figures; without `--output` the page is printed."""
    parser = argparse.ArgumentParser(prog="python -m saelab_experiments.curves")
    parser.add_argument("run", type=Path, help="a run's `out` folder")
    parser.add_argument("--output", type=Path, help="Markdown file; printed if left out")
    parser.add_argument("--figure", type=Path, help="start of the SVG files' names")
    parser.add_argument("--l0", type=float, default=32.0, help="where types are compared (32)")
    given = parser.parse_args(argv)
    if given.l0 <= 0:
        raise ConfigError(f"--l0 should be above 0, not {given.l0:g}")
    boards, links = read(given.run), []
    if given.figure is not None:
        from saelab_experiments import plots

        for path, board in zip(_names(given.figure, boards), boards, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_file(path, plots.figure(board, given.l0))
            base = given.output.parent if given.output else Path()
            links.append(Path(os.path.relpath(path, base)).as_posix())
    command = shlex.join([*parser.prog.split(), str(given.run), "--l0", f"{given.l0:g}"])
    text = page(boards, given.l0, links, command)
    pages.put(text, given.output, say)


def _names(start: Path, boards: Sequence[Sequence[Scored]]) -> list[Path]:
    """Return each board's SVG file; a site's second board gets a number."""
    names: list[str] = []
    for board in boards:
        short = board[0].site.replace("blocks.", "").replace("hook_", "")
        name = f"{start.name}-{re.sub(r'[^A-Za-z0-9_]+', '-', short).strip('-')}"
        taken = sum(
            re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in names
        )
        names.append(f"{name}-{taken + 1}" if taken else name)
    return [start.with_name(f"{name}.svg") for name in names]


if __name__ == "__main__":
    pages.run(main)
