"""Charts: plain numbers in, Plotly figures out; long series are thinned before they are sent."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from saelab.features.read import Histogram
from saelab.features.relations import TreeNode

HELD, GREY = "#5269e0", "#8a94a3"
CYCLE = ("#0f9687", "#d66014", "#5269e0", "#b8487e", "#8a7a10", "#3a8fd0", "#7a5bd0", "#5f6b7a")
SYMBOLS = (
    "diamond-open",
    "square-open",
    "triangle-up-open",
    "cross-open",
    "star-open",
    "hexagon-open",
)
PLAIN = {"displayModeBar": False}
LABELLED = 9
"""Up to so many points carry their names; more would run into each other."""


def colours(names: Sequence[str]) -> dict[str, str]:
    """Give each dictionary its colour: the same in every chart of the page."""
    return {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(names)}


def _base(height: int) -> go.Figure:
    return go.Figure(
        layout=go.Layout(
            height=height, showlegend=False, margin={"l": 4, "r": 8, "t": 8, "b": 4},
            xaxis={"automargin": True}, yaxis={"automargin": True}, hoverlabel={"namelength": -1},
        )
    )  # fmt: skip


def histogram(data: Histogram) -> go.Figure:
    """Return the counts of a latent's non-zero values, held-out rows on top of training rows."""
    bins = len(data.train)
    width = (data.high - data.low) / bins
    centres = [data.low + width * (i + 0.5) for i in range(bins)]
    figure = _base(170)
    for counts, name, colour in ((data.train, "train", GREY), (data.heldout, "held-out", HELD)):
        figure.add_bar(
            x=centres, y=counts, width=width, name=name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{x:.3g}: %{y:,} firings<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0)
    figure.update_xaxes(tickformat="~g")
    figure.update_yaxes(tickformat="~s", rangemode="tozero", nticks=4)
    return figure


def tradeoff(
    points: Sequence[Mapping[str, Any]], colour: Mapping[str, str], *, log: bool
) -> go.Figure:
    """Return FVU against L0; each point is {x, y, error, arm, entry, own}.

    Dictionaries are discs; their controls are open marks of the same colour, a shape per control.
    """
    figure = _base(360)
    arms = list(dict.fromkeys(str(p["arm"]) for p in points if not p["own"]))
    labelled = len(points) <= LABELLED
    for point in points:
        arm = str(point["arm"])
        symbol = "circle" if point["own"] else SYMBOLS[arms.index(arm) % len(SYMBOLS)]
        label = str(point["name"]) if point["own"] else arm
        figure.add_scatter(
            x=[point["x"]], y=[point["y"]], name=label,
            error_y={"array": [point["error"] or 0], "thickness": 1, "width": 3},
            mode="markers+text" if labelled else "markers", text=[label],
            textposition="middle right", textfont={"size": 11},
            marker={"color": colour[point["entry"]], "size": 11, "symbol": symbol},
            hovertemplate=label + "<br>L0 %{x:.4g} · FVU %{y:.4f}<extra>%{text}</extra>",
        )  # fmt: skip
    kind = "log" if log else "linear"
    low, high = min(p["x"] for p in points), max(p["x"] for p in points)
    pad = 0.1 * (high - low) + 0.05 * high
    span = None if log else [max(0.0, low - pad), high + (1.5 * pad if labelled else pad)]
    figure.update_xaxes(title="L0, non-zero latents per token", type=kind, range=span)
    figure.update_yaxes(title="FVU, lower is better", type=kind, rangemode="tozero")
    return figure


def curves(
    series: Mapping[str, Sequence[Mapping[str, float]]], key: str, colour: Mapping[str, str]
) -> go.Figure:
    """Return one logged number over the tokens seen, a line per dictionary."""
    figure = _base(180)
    for name, lines in series.items():
        kept = [line for line in thin(lines) if key in line]
        figure.add_scatter(
            x=[line["tokens"] for line in kept], y=[line[key] for line in kept], name=name,
            mode="lines", line={"color": colour[name], "width": 1.8},
            hovertemplate="%{x:,} tokens: %{y:.4g}<extra>" + name + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(tickformat="~s", nticks=5)
    figure.update_yaxes(tickformat="~g", nticks=5)
    return figure


def icicle(roots: Sequence[TreeNode]) -> go.Figure:
    """Return the trees side by side, the highest concepts at the left; a click opens a branch.

    A node is as high as the nodes without children below it are many.
    """
    figure = _base(560)
    nodes = [node for root in roots for node in root.walk()]
    above = {child.id: str(node.id) for node in nodes for child in node.children}
    labels = [escape(f"{node.id}  {node.gist or 'never fires'}") for node in nodes]
    figure.add_icicle(
        ids=["all", *(str(node.id) for node in nodes)],
        labels=["all", *labels],
        parents=["", *(above.get(node.id, "all") for node in nodes)],
        values=[sum(root.n_leaves for root in roots), *(node.n_leaves for node in nodes)],
        branchvalues="total", sort=False, root={"color": "rgba(0,0,0,0)"},
        tiling={"orientation": "h", "pad": 1}, textposition="middle left",
        hovertemplate="%{label}<br>%{value} below<extra></extra>",
    )  # fmt: skip
    figure.update_layout(iciclecolorway=CYCLE)
    return figure


def overlap(nodes: Sequence[int], jaccard: Sequence[Sequence[float]]) -> go.Figure:
    """Return the share of neurons that nodes have in common, a row and a column for each."""
    names = [str(node) for node in nodes]
    figure = _base(620)
    figure.add_heatmap(
        x=names, y=names, z=jaccard, zmin=0, zmax=1, colorscale=[[0, "rgba(0,0,0,0)"], [1, HELD]],
        hovertemplate="%{y} and %{x}: %{z:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(type="category", showticklabels=False, constrain="domain")
    figure.update_yaxes(
        type="category", showticklabels=False, autorange="reversed", scaleanchor="x"
    )
    return figure


def thin(lines: Sequence[Mapping[str, float]], limit: int = 600) -> Sequence[Mapping[str, float]]:
    """Return at most about `limit` lines, evenly spread, the last one kept."""
    step = max(1, len(lines) // limit)
    return [*lines[:-1:step], *lines[-1:]]
