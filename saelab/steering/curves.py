"""Dose and response as curves: a line per arm, controls in grey, with their bands.

The figure is drawn with Plotly, for notebooks; `saelab.dose_curves` reads the same curves out of
finished results.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saelab.errors import ConfigError, SaelabError
from saelab.stats import Difference
from saelab.steering.trial import Measure, Response

CONTROLS = frozenset({"isotropic", "covariance", "shuffled_labels", "matched_latents"})
"""Arms that know nothing of the concept."""
TITLES: dict[Measure, str] = {
    "lift": "concept lift", "fluency": "fluency", "score": "harmonic mean",
}  # fmt: skip
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#222222")
"""Okabe and Ito's, told apart by most colour-blind readers; without yellow, too pale on white."""
GREY = "#9a9a9a"
DASHES = ("solid", "dash", "dot", "dashdot")
"""Styles of controls, which share one colour."""


@dataclass(frozen=True)
class DoseCurve:
    """What an arm does at each dose it reaches; one without doses is drawn as a level."""

    arm: str
    is_control: bool
    doses: tuple[float, ...]
    """Nats; empty for an instruction."""
    measures: Mapping[Measure, tuple[Difference, ...]]
    """With 95 % intervals, one per dose."""
    reached: tuple[float, ...] = ()
    """Share of the directions that reach each dose, where it is known."""
    non_monotone: tuple[float, ...] = ()
    """Share of those whose dose falls somewhere as the strength grows, where it is known."""

    @property
    def flagged(self) -> tuple[bool, ...]:
        """At each dose, whether some direction misses it, or is not monotone: a hollow point."""
        missed = [share < 1 for share in self.reached] or [False] * len(self.doses)
        bent = [share > 0 for share in self.non_monotone] or [False] * len(self.doses)
        return tuple(a or b for a, b in zip(missed, bent, strict=True))


def curves_of(
    responses: Sequence[Response],
    *,
    controls: Collection[str] = CONTROLS,
    resamples: int = 1000,
    seed: int = 0,
) -> list[DoseCurve]:
    """Return a curve per arm of what a `Trial` gave, intervals over prompts.

    Doses that were not reached are left out, and arms that reached none.
    """
    by_arm: dict[str, list[Response]] = {}
    for response in responses:
        if response.written:
            by_arm.setdefault(response.arm, []).append(response)
    found = []
    for arm, own in by_arm.items():
        own = sorted(own, key=lambda one: one.target or 0.0)
        measures: dict[Measure, tuple[Difference, ...]] = {
            measure: tuple(one.interval(measure, resamples=resamples, seed=seed) for one in own)
            for measure in TITLES
        }
        dosed = [one for one in own if one.target is not None and one.matched]
        doses = tuple(one.target for one in own if one.target is not None)
        shares = (
            tuple(one.directions_reached for one in dosed),
            tuple(one.non_monotone for one in dosed),
        )
        found.append(DoseCurve(arm, arm in controls, doses, measures, *shares))
    return found


def dose_figure(curves: Sequence[DoseCurve], *, title: str = "") -> Any:
    """Return the Plotly figure: lift, fluency and their harmonic mean against the dose in nats.

    Points are hollow where some direction misses the dose, or is not monotone.

    Raises ConfigError without a curve, SaelabError where plotly is missing.
    """
    try:
        from plotly.subplots import make_subplots
    except ImportError:
        raise SaelabError("figures need plotly: pip install 'saelab[plots]'") from None
    if not curves:
        raise ConfigError("no arm reached a dose, so there is nothing to draw; take smaller doses")
    figure = make_subplots(rows=1, cols=len(TITLES), subplot_titles=list(TITLES.values()))
    doses = [dose for curve in curves for dose in curve.doses]
    looks = looks_of(curves)
    for column, measure in enumerate(TITLES, start=1):
        for curve in curves:
            _draw(figure, column, curve, measure, looks[curve.arm], doses)
    figure.update_xaxes(type="log", title="KL(clean ‖ steered), nats", tickvals=sorted(set(doses)))
    figure.update_layout(title=title, height=360, margin={"l": 8, "r": 8, "t": 48, "b": 8})
    return figure


def looks_of(curves: Sequence[DoseCurve]) -> dict[str, tuple[str, str]]:
    """Return the colour and dash of each arm: controls are grey, and told apart by their dash."""
    looks: dict[str, tuple[str, str]] = {}
    for is_control in (False, True):
        arms = dict.fromkeys(c.arm for c in curves if c.is_control == is_control)
        for number, arm in enumerate(arms):
            if is_control:
                looks[arm] = GREY, DASHES[number % len(DASHES)]
            else:
                dash = DASHES[number // len(COLOURS) % len(DASHES)]
                looks[arm] = COLOURS[number % len(COLOURS)], dash
    return looks


def _draw(
    figure: Any,
    column: int,
    curve: DoseCurve,
    measure: Measure,
    look: tuple[str, str],
    doses: Sequence[float],
) -> None:
    """Draw one arm in one panel: its band, then its line."""
    xs, points = list(curve.doses), list(curve.measures[measure])
    if not xs and doses:  # an instruction has no dose
        xs, points = [min(doses), max(doses)], 2 * points
    colour, dash = look
    place: dict[str, Any] = {"row": 1, "col": column}
    if not curve.is_control:
        figure.add_scatter(
            x=xs + xs[::-1], y=[p.high for p in points] + [p.low for p in points[::-1]],
            fill="toself", fillcolor=colour, opacity=0.12, line={"width": 0}, mode="lines",
            hoverinfo="skip", showlegend=False, legendgroup=curve.arm, **place,
        )  # fmt: skip
    figure.add_scatter(
        x=xs, y=[p.value for p in points], name=curve.arm, legendgroup=curve.arm,
        mode="lines+markers" if curve.doses else "lines", showlegend=column == 1,
        line={"color": colour, "dash": dash, "width": 1.2 if curve.is_control else 2},
        marker={
            "size": 4 if curve.is_control else 6,
            "symbol": ["circle-open" if flag else "circle" for flag in curve.flagged],
        },
        customdata=[[p.low, p.high] for p in points],
        hovertemplate="%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra>"
        + curve.arm + "</extra>", **place,
    )  # fmt: skip
