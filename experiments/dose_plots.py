"""Figures of dose and response as SVG, the same bytes from the same results."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from saelab_experiments.plots import STYLE

from saelab.errors import SaelabError
from saelab.steering.curves import TITLES, DoseCurve, looks_of
from saelab.steering.trial import Measure

LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}


def figure(boards: Mapping[str, Sequence[DoseCurve]]) -> bytes:
    """Return the figure: a row per board, with lift, fluency and their harmonic mean by dose.

    Points are hollow where some direction misses the dose, or is not monotone.

    Raises SaelabError where matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise SaelabError("figures need matplotlib: pip install 'saelab[plots]'") from None
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        drawn = Figure(figsize=(12.5, 3.6 * len(boards)), layout="constrained")
        axes = drawn.subplots(len(boards), len(TITLES), squeeze=False)
        for row, (title, curves) in zip(axes, boards.items(), strict=True):
            for ax, (measure, name) in zip(row, TITLES.items(), strict=True):
                _panel(ax, curves, measure)
                ax.set(xlabel="KL(clean ‖ steered), nats", ylabel=name)
            row[0].set_title(title, loc="left")
            row[-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False, fontsize=8)
        out = io.BytesIO()
        drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _panel(ax: Any, curves: Sequence[DoseCurve], measure: Measure) -> None:
    looks, doses = looks_of(curves), sorted({dose for curve in curves for dose in curve.doses})
    for curve in curves:
        points = curve.measures[measure]
        colour, dash = looks[curve.arm]
        if not curve.doses:  # an instruction has no dose
            ax.axhline(points[0].value, color=colour, linestyle=LINES[dash], label=curve.arm)
            continue
        if not curve.is_control:
            low, high = ([getattr(p, end) for p in points] for end in ("low", "high"))
            ax.fill_between(curve.doses, low, high, color=colour, alpha=0.1, linewidth=0)
        ax.plot(
            curve.doses, [p.value for p in points], color=colour, linestyle=LINES[dash],
            marker="." if curve.is_control else "o", markersize=4,
            linewidth=1.0 if curve.is_control else 1.6, label=curve.arm.replace("_", " "),
        )  # fmt: skip
        hollow = [at for at in zip(curve.doses, points, curve.flagged, strict=True) if at[2]]
        ax.plot(
            [dose for dose, _, _ in hollow], [point.value for _, point, _ in hollow], color=colour,
            linestyle="", marker="o", markersize=4, markerfacecolor="white", markeredgewidth=0.8,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xticks(doses, [f"{dose:g}" for dose in doses])
    ax.minorticks_off()
    ax.grid(color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
