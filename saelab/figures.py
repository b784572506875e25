"""Pictures of a circuit, for the app and for notebooks: the graph, and its curves.

Plotly comes with the extras `app` and `notebooks`; nothing else of the library needs this module.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from saelab.circuit_runs.features import CurvePoint
from saelab.circuits.graph import METRIC, Edge, Graph, Node

HELPS, HINDERS, OFF, PICKED = "#0f9687", "#d66014", "#8a94a3", "#5269e0"
ROW = 6
"""Nodes beside each other in one cell; more are stacked."""
WIDEST = 7.0
"""Width of the heaviest edge, in pixels."""


def places(graph: Graph, nodes: Sequence[Node]) -> dict[str, tuple[float, float]]:
    """Return where each node is drawn: in the cell of its slot and site, spread out in it."""
    sites = [site.name for site in graph.sites]
    slots = used_slots(graph, nodes)
    cells: dict[tuple[str, str], list[Node]] = defaultdict(list)
    for node in nodes:
        cells[node.site, node.slot].append(node)
    found = {}
    for (site, slot), inside in cells.items():
        rows = -(-len(inside) // ROW)
        for i, node in enumerate(inside):
            row, column = divmod(i, ROW)
            width = min(ROW, len(inside) - row * ROW)
            x = slots.index(slot) + 0.13 * (column - (width - 1) / 2)
            y = sites.index(site) + 0.16 * (row - (rows - 1) / 2)
            found[node.id] = (x, y)
    return found


def used_slots(graph: Graph, nodes: Sequence[Node]) -> list[str]:
    """Return the slots that have a node, in the order of the prompt."""
    used = {node.slot for node in nodes}
    return [slot for slot in graph.slots if slot in used]


def circuit(
    graph: Graph,
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    *,
    off: Collection[str] = (),
    picked: str | None = None,
) -> go.Figure:
    """Return the graph: sites upwards, slots to the right, edges as wide as they weigh.

    `nodes` and `edges` are those of the graph that are drawn, `off` and `picked` ids of nodes. A
    point's customdata is the node's id. Edges into the metric are not drawn.
    """
    at = places(graph, nodes)
    sites, slots = [site.name for site in graph.sites], used_slots(graph, nodes)
    drawn = go.Figure(
        layout=go.Layout(
            height=150 + 130 * len(sites), showlegend=False, clickmode="event+select",
            margin={"l": 4, "r": 8, "t": 8, "b": 4}, hoverlabel={"namelength": -1}, dragmode=False,
        )
    )  # fmt: skip
    heaviest = max((abs(edge.weight) for edge in edges), default=1.0)
    for edge in sorted(edges, key=lambda edge: abs(edge.weight)):
        if edge.target != METRIC:
            drawn.add_trace(_line(edge, at, heaviest, picked))
    drawn.add_trace(_points(nodes, at, off, picked))
    drawn.update_xaxes(
        tickvals=list(range(len(slots))), ticktext=slots, range=[-0.6, len(slots) - 0.4],
        showgrid=False, zeroline=False, automargin=True,
    )  # fmt: skip
    drawn.update_yaxes(
        tickvals=list(range(len(sites))), ticktext=[_short(site) for site in sites],
        range=[-0.6, len(sites) - 0.4], showgrid=False, zeroline=False, automargin=True,
    )  # fmt: skip
    return drawn


def _line(
    edge: Edge, at: Mapping[str, tuple[float, float]], heaviest: float, picked: str | None
) -> go.Scatter:
    (x0, y0), (x1, y1) = at[edge.source], at[edge.target]
    mine = picked in (edge.source, edge.target)
    return go.Scatter(
        x=[x0, x1], y=[y0, y1], mode="lines", hoverinfo="skip",
        opacity=0.85 if mine else 0.3,
        line={
            "width": 0.4 + WIDEST * abs(edge.weight) / heaviest,
            "color": HELPS if edge.weight > 0 else HINDERS,
        },
    )  # fmt: skip


def _points(
    nodes: Sequence[Node],
    at: Mapping[str, tuple[float, float]],
    off: Collection[str],
    picked: str | None,
) -> go.Scatter:
    largest = max((abs(node.effect) for node in nodes), default=1.0) or 1.0
    return go.Scatter(
        x=[at[node.id][0] for node in nodes], y=[at[node.id][1] for node in nodes],
        mode="markers", customdata=[[node.id] for node in nodes],
        text=[_hover(node, node.id in off) for node in nodes],
        hovertemplate="%{text}<extra></extra>",
        marker={
            "size": [9 + 15 * (abs(node.effect) / largest) ** 0.5 for node in nodes],
            "symbol": [_symbol(node, off) for node in nodes],
            "color": [_colour(node, off) for node in nodes], "opacity": 1.0,
            "line": {
                "width": [3 if node.id == picked else 1 for node in nodes],
                "color": [PICKED if node.id == picked else "white" for node in nodes],
            },
        },
        selected={"marker": {"opacity": 1.0}}, unselected={"marker": {"opacity": 1.0}},
    )  # fmt: skip


def _symbol(node: Node, off: Collection[str]) -> str:
    shape = "circle" if node.kind == "latent" else "diamond"
    return f"{shape}-open" if node.id in off else shape


def _colour(node: Node, off: Collection[str]) -> str:
    if node.id in off:
        return OFF
    return HELPS if node.effect > 0 else HINDERS


def _hover(node: Node, is_off: bool) -> str:
    what = "error" if node.latent is None else f"latent {node.latent}"
    state = " · switched off" if is_off else ""
    return (
        f"{what} at {node.slot}{state}<br>{node.site}<br>effect {node.effect:.3g} ± "
        f"{node.standard_error:.2g}"
    )


def _short(site: str) -> str:
    """Return a site's name without what all sites have."""
    return site.removeprefix("blocks.").replace("hook_", "")


def curves(
    found: Mapping[str, Sequence[CurvePoint]],
    title: str = "faithfulness",
    *,
    ceiling: float | None = None,
    colour: Mapping[str, str] | None = None,
) -> go.Figure:
    """Return a number of circuits against how many nodes they have, an arm a line.

    `ceiling` draws a line at what all latents reach together.

    Without colours by arm Plotly's own are taken, and a legend says whose they are.
    """
    drawn = go.Figure(
        layout=go.Layout(
            height=300, showlegend=colour is None, margin={"l": 4, "r": 8, "t": 8, "b": 4}
        )
    )
    for arm, points in found.items():
        errors: list[Any] = [point.standard_error or 0.0 for point in points]
        drawn.add_scatter(
            x=[p.n_nodes for p in points], y=[p.value for p in points], name=arm,
            error_y={"array": errors, "thickness": 1, "width": 3}, mode="lines+markers",
            line={"color": None if colour is None else colour[arm], "width": 1.8},
            hovertemplate="%{x} nodes: %{y:.3f}<extra>" + arm + "</extra>",
        )  # fmt: skip
    if ceiling is not None:
        line = {"dash": "dot", "width": 1}
        drawn.add_hline(y=ceiling, line=line, annotation_text="all latents")
    drawn.update_xaxes(type="log", title="nodes", automargin=True)
    drawn.update_yaxes(title=title, automargin=True)
    return drawn
