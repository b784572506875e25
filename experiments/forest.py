"""A figure of what claims came to, as SVG: the same bytes from the same verdicts."""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saelab_experiments.plots import STYLE

from saelab.errors import SaelabError

if TYPE_CHECKING:
    from saelab_experiments.verdicts import Verdict

COLOURS = {"supported": "#009E73", "refuted": "#D55E00", "undecided": "#777777"}
WIDTH = 62
"""Characters of a claim in a line."""


def figure(verdicts: Sequence["Verdict"]) -> bytes:
    """Return the figure: each claim's difference and interval, in smallest differences of interest.

    A claim whose smallest difference is 0 is shown in its metric's own unit, and says so. Raises
    SaelabError where matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise SaelabError("figures need matplotlib: pip install 'saelab[plots]'") from None
    labels = [_label(verdict) for verdict in verdicts]
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        height = 1.1 + 0.17 * sum(label.count("\n") + 2 for label in labels)
        drawn = Figure(figsize=(9.5, height), layout="constrained")
        ax = drawn.subplots()
        for place, verdict in enumerate(verdicts):
            _draw(ax, place, verdict)
        ax.axvline(0, color="#222222", linewidth=0.8)
        ax.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.4, -0.6)
        ax.set_xlabel("difference the claimed way, in smallest differences of interest; 95 %")
        ax.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        ax.set_axisbelow(True)
        out = io.BytesIO()
        drawn.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _label(verdict: "Verdict") -> str:
    unit = "" if verdict.claim.smallest else ", in its own unit"
    return textwrap.fill(f"{verdict.claim.says} ({verdict.claim.metric}{unit})", WIDTH)


def _draw(ax: Any, place: int, verdict: "Verdict") -> None:
    """Draw the interval, the mean as a dot, and each run as a tick."""
    unit = verdict.claim.smallest or 1.0
    word = verdict.word.split()[0].rstrip(",")
    low, high = (end / unit for end in verdict.interval)
    ax.plot([low, high], [place, place], color=COLOURS[word], linewidth=2)
    ax.plot(verdict.mean / unit, place, "o", color=COLOURS[word], markersize=5.5)
    runs = [d / unit for d in verdict.differences]
    ax.plot(runs, [place + 0.22] * len(runs), "|", color=COLOURS[word], markersize=5)
    note = f"  {word}"
    ax.annotate(note, (high, place), va="center", color=COLOURS[word], fontsize=8)
