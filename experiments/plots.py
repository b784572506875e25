"""Figures of curves: error against sparsity as SVG, the same bytes from the same results."""

import io
import math
from collections.abc import Sequence
from typing import Any

from saelab_experiments.lines import Line, at, controls, lines_of, mean_score

from saelab.errors import SaelabError
from saelab.leaderboard import Scored

PANELS = {"fvu": "FVU", "kl": "KL (nats)"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#222222")
"""Okabe and Ito's, told apart by most colour-blind readers; without yellow, too pale on white."""
MARKERS = "os^vD<>PXph*d8"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "saelab",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def figure(board: Sequence[Scored], l0: float) -> bytes:
    """Return a board's figure: FVU, and KL if it was measured, against L0.

    Raises SaelabError where matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise SaelabError("figures need matplotlib: pip install 'saelab[plots]'") from None
    lines = lines_of(board)
    panels = [m for m in PANELS if any(m in p.scores for line in lines for p in line.points)]
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        drawn = Figure(figsize=(4.2 * len(panels) + 2.4, 4.2), layout="constrained")
        axes = drawn.subplots(1, len(panels), squeeze=False)[0]
        for metric, ax in zip(panels, axes, strict=True):
            _panel(ax, metric, lines, [c for c in controls(board, lines, l0) if _is_curve(c)])
            ax.axvline(l0, color="#999999", linewidth=0.8, linestyle=":")
        drawn.suptitle(board[0].site)
        _legend(drawn, axes[0], lines, l0)
        out = io.BytesIO()
        drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _is_curve(control: Line) -> bool:
    return control.label.startswith("random_atoms")


def _panel(ax: Any, metric: str, lines: Sequence[Line], others: Sequence[Line]) -> None:
    from matplotlib import ticker

    for number, line in enumerate(lines):
        _draw(ax, metric, line, _look(number))
    for control in others:
        _draw(ax, metric, control, {"color": "#999999", "linestyle": "--", "linewidth": 1.2})
    ax.set_xscale("log", base=2)
    budgets = sorted({p.budget for line in lines for p in line.points})
    inside = [b for b in budgets if math.isfinite(b) and _spans(lines, b)]
    if inside:
        ax.set_xticks(inside)
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.set(xlabel="L0, measured", ylabel=PANELS[metric])
    ax.grid(color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)


def _spans(lines: Sequence[Line], budget: float) -> bool:
    l0s = [p.l0 for line in lines for p in line.points if p.l0 > 0]
    return bool(l0s) and min(l0s) / 1.5 <= budget <= max(l0s) * 1.5


def _look(number: int) -> dict[str, Any]:
    dashed = number >= len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": (0, (4, 1.5)) if dashed else "-",
        "markersize": 5,
        "linewidth": 1.3,
    }


def _draw(ax: Any, metric: str, line: Line, look: dict[str, Any]) -> None:
    """Draw the mean over seeds with its error over documents, and each seed as a dot."""
    places = []
    for budget in sorted({p.budget for p in line.points}):
        points = [p for p in line.of_budget(budget) if metric in p.scores and p.l0 > 0]
        if not points:
            continue
        score = mean_score([p.scores[metric] for p in points])
        places.append((sum(p.l0 for p in points) / len(points), score.value, score.error or 0.0))
        if len(points) > 1:
            xs, ys = [p.l0 for p in points], [p.scores[metric].value for p in points]
            ax.plot(xs, ys, ".", color=look["color"], markersize=3)
    if places:
        xs, ys, errors = zip(*sorted(places), strict=True)
        ax.errorbar(xs, ys, yerr=errors, elinewidth=0.8, label=line.label, **look)


def _legend(drawn: Any, ax: Any, lines: Sequence[Line], l0: float) -> None:
    """Name the lines beside the panels, in the order of their FVU at the L0 asked for."""
    found = {line.label: at(line, "fvu", l0) for line in lines}
    handles, labels = ax.get_legend_handles_labels()

    def place(pair: tuple[Any, str]) -> float:
        estimate = found.get(pair[1])
        return -estimate.value if estimate else math.inf

    ordered = sorted(zip(handles, labels, strict=True), key=place)
    drawn.legend(*zip(*ordered, strict=True), loc="outside right upper", frameon=False, fontsize=8)
