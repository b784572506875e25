"""Charts: plain numbers in, Plotly figures out. Points are capped by thinning before they get here."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from saelab.features.read import Histogram

POSITIVE, NEGATIVE, HELD, GREY = "#0f9687", "#d66014", "#5269e0", "#8a94a3"
CYCLE = ("#0f9687", "#d66014", "#5269e0", "#b8487e", "#8a7a10", "#3a8fd0", "#7a5bd0", "#5f6b7a")
PLAIN = {"displayModeBar": False}


def _base(height: int, *, legend: bool = True) -> go.Figure:
    return go.Figure(
        layout=go.Layout(
            height=height, showlegend=legend,
            margin={"l": 8, "r": 8, "t": 8 if not legend else 26, "b": 8},
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "title": None},
            xaxis={"automargin": True}, yaxis={"automargin": True},
            hoverlabel={"namelength": -1},
        )
    )  # fmt: skip


def histogram(data: Histogram) -> go.Figure:
    """Return the counts of a latent's non-zero values, held-out on top of training rows."""
    bins = len(data.train)
    width = (data.high - data.low) / bins
    centres = [data.low + width * (i + 0.5) for i in range(bins)]
    figure = _base(190)
    for counts, name, colour in ((data.train, "train", GREY), (data.heldout, "held-out", HELD)):
        figure.add_bar(
            x=centres, y=counts, name=name, marker={"color": colour, "line": {"width": 0}},
            width=width, hovertemplate="%{x:.3g}: %{y:,} firings<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0)
    figure.update_xaxes(title={"text": "activation", "standoff": 4}, tickformat="~g")
    figure.update_yaxes(
        title={"text": "firings", "standoff": 4}, tickformat="~s", rangemode="tozero"
    )
    return figure


def tradeoff(points: Sequence[Mapping[str, object]], *, log: bool) -> go.Figure:
    """Return FVU against L0; each point is {x, y, error, arm, entry, own}.

    Dictionaries are discs, their controls open marks of the same colour.
    """
    figure = _base(340)
    owners = list(dict.fromkeys(str(p["entry"]) for p in points))
    for number, owner in enumerate(owners):
        colour = CYCLE[number % len(CYCLE)]
        for own in (True, False):
            mine = [p for p in points if p["entry"] == owner and p["own"] == own]
            if not mine:
                continue
            figure.add_scatter(
                x=[p["x"] for p in mine], y=[p["y"] for p in mine],
                error_y={"array": [p["error"] or 0 for p in mine], "thickness": 1, "width": 3},
                mode="markers" if own else "markers+text",
                text=None if own else [str(p["arm"]) for p in mine],
                textposition="top center", textfont={"size": 10},
                name=owner if own else f"{owner}: controls", legendgroup=owner,
                customdata=[[str(p["arm"]), owner] for p in mine],
                marker={
                    "color": colour, "size": 11 if own else 9,
                    "symbol": "circle" if own else "circle-open", "line": {"width": 1.5},
                },
                hovertemplate="%{customdata[0]}<br>L0 %{x:.4g} · FVU %{y:.4f}"
                "<extra>%{customdata[1]}</extra>",
            )  # fmt: skip
    kind = "log" if log else "linear"
    figure.update_xaxes(title="L0: non-zero latents per token", type=kind, rangemode="tozero")
    figure.update_yaxes(title="FVU: lower is better", type=kind, rangemode="tozero")
    return figure


def curves(series: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> go.Figure:
    """Return one logged number over the tokens seen, a line per dictionary."""
    figure = _base(210, legend=False)
    for number, (name, lines) in enumerate(series.items()):
        kept = [line for line in thin(lines) if key in line]
        figure.add_scatter(
            x=[line["tokens"] for line in kept], y=[line[key] for line in kept], name=name,
            mode="lines", line={"color": CYCLE[number % len(CYCLE)], "width": 1.8},
            hovertemplate="%{x:,} tokens: %{y:.4g}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(title={"text": "tokens", "standoff": 4}, tickformat="~s")
    figure.update_yaxes(title=None, tickformat="~g")
    return figure


def thin(lines: Sequence[Mapping[str, float]], limit: int = 600) -> Sequence[Mapping[str, float]]:
    """Return at most about `limit` lines, evenly spread, the last one kept."""
    step = max(1, len(lines) // limit)
    return [*lines[:-1:step], *lines[-1:]]
