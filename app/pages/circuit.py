"""Circuit: which latents carry a task, and what is lost without some of them?"""

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from saelab import figures
from saelab.circuit_runs.features import CURVES, Circuit, open_circuit, read_curves
from saelab.circuits.graph import METRIC, Graph, Node
from saelab.errors import SaelabError
from saelab_app import circuits, state
from saelab_app.components import charts, numbers, pieces
from saelab_app.library import Entry

SHOWN = 60


def show() -> None:
    question = "which latents carry a task, and what is lost without some of them?"
    st.html(pieces.title("Circuit", question))
    try:
        found = circuits.folders(state.folder())
        entries = state.entries()
    except SaelabError as error:
        st.error(str(error))
        return
    if not found:
        st.info(
            "There is no circuit here yet. `saelab circuits features CONFIG` finds one.",
            icon=":material/hub:",
        )
        return
    path = _pick(found)
    try:
        circuit = _open(path)
    except SaelabError as error:
        st.error(str(error))
        return
    _facts(circuit)
    _panels(circuit, path, circuits.entries_of(circuit.graph, entries))
    _curves(circuit, path)


@st.cache_resource(show_spinner=False, max_entries=8)
def _open(path: Path) -> Circuit:
    return open_circuit(path)


def _pick(found: Sequence[Path]) -> Path:
    names = [path.name for path in found]
    current = state.chosen("circuit", names[0])
    if current not in names:
        current = names[0]
    if len(names) > 1:
        st.session_state["pick circuit"] = current
        st.selectbox(
            "Circuit", names, key="pick circuit",
            on_change=lambda: state.choose("circuit", st.session_state["pick circuit"]),
        )  # fmt: skip
    state.choose("circuit", current)
    return found[names.index(current)]


def _facts(circuit: Circuit) -> None:
    drawn, facts = circuit.graph, circuit.manifest.facts
    corrupted = "–" if drawn.corrupted is None else numbers.value(drawn.corrupted)
    st.html(
        pieces.stats(
            pieces.stat("task", facts["task"]),
            pieces.stat("metric, clean", numbers.value(drawn.clean), "mean over prompts"),
            pieces.stat("metric, corrupted", corrupted),
            pieces.stat("nodes", str(len(drawn.nodes))),
            pieces.stat("of all effects", numbers.percent(drawn.share), "Σ|effect| of the nodes"),
            pieces.stat(
                "ceiling", numbers.value(facts["ceiling"]),
                "faithfulness of all latents together, without error nodes",
            ),
        )
    )  # fmt: skip


@st.fragment
def _panels(circuit: Circuit, path: Path, entries: dict[str, Entry]) -> None:
    drawn = circuit.graph
    limit = min(SHOWN, len(drawn.nodes))
    if len(drawn.nodes) > 1:
        limit = st.slider("Nodes shown", 1, len(drawn.nodes), limit, key="nodes shown")
    nodes, edges = circuits.largest(drawn, limit)
    off: set[str] = st.session_state.setdefault(f"off {path.name}", set())
    picked = _picked(path, drawn)
    event = st.plotly_chart(
        figures.circuit(drawn, nodes, edges, off=off, picked=picked), config=charts.PLAIN,
        key=f"graph {path.name}", on_select="rerun", selection_mode="points",
    )  # fmt: skip
    clicked = [p["customdata"][0] for p in event["selection"]["points"] if p.get("customdata")]
    if clicked and clicked[0] != st.session_state.get(f"clicked {path.name}"):
        st.session_state[f"clicked {path.name}"] = clicked[0]
        state.choose("node", clicked[0])
        st.rerun(scope="fragment")
    st.html(
        pieces.legend(
            {"helps": figures.HELPS, "hinders": figures.HINDERS, "switched off": figures.OFF}
        )
        + pieces.note("discs are latents, diamonds dictionaries' errors; click one")
    )
    left, right = st.columns([1.4, 1])
    with left:
        _node(circuit, path, picked, off, entries)
    with right:
        _switched(circuit, off, entries)


def _picked(path: Path, drawn: Graph) -> str:
    """Return the chosen node, at first the strongest; the box and the picture share it."""
    ids = [node.id for node in drawn.nodes]
    current = state.chosen("node", ids[0])
    current = current if current in ids else ids[0]
    key = f"pick node {path.name}"
    st.session_state[key] = current
    st.selectbox(
        "Node", ids, key=key, on_change=lambda: state.choose("node", st.session_state[key])
    )
    return current


def _node(
    circuit: Circuit, path: Path, picked: str, off: set[str], entries: dict[str, Entry]
) -> None:
    node = circuit.graph.node(picked)
    st.html(
        pieces.heading(node.id)
        + pieces.stats(
            pieces.stat("effect", f"{node.effect:.3g} ± {node.standard_error:.2g}"),
            pieces.stat("activation", numbers.value(node.activation)),
        )
        + _neighbours(circuit.graph, node)
    )
    with st.container(horizontal=True):
        switch = "Switch on" if picked in off else "Switch off"
        st.button(
            switch, key=f"switch {path.name}", icon=":material/power_settings_new:",
            on_click=lambda: off.symmetric_difference_update({picked}),
        )  # fmt: skip
        entry = entries.get(node.site)
        if entry is not None and entry.features is not None and node.latent is not None:
            st.page_link(
                "pages/feature.py", label=f"Open latent {node.latent}", icon=":material/radar:",
                query_params={"dictionary": entry.id, "latent": str(node.latent)},
            )  # fmt: skip


def _neighbours(drawn: Graph, node: Node, limit: int = 6) -> str:
    """Return the heaviest edges into and out of a node."""
    parts = []
    for title, edges in (
        ("from", [(e.source, e.weight) for e in drawn.edges if e.target == node.id]),
        ("to", [(e.target, e.weight) for e in drawn.edges if e.source == node.id]),
    ):
        edges.sort(key=lambda edge: -abs(edge[1]))
        shown = ", ".join(
            f"{'the metric' if name == METRIC else name} ({numbers.value(weight)})"
            for name, weight in edges[:limit]
        )
        parts.append(pieces.note(f"{title}: {shown or 'no edge'}"))
    return "".join(parts)


def _switched(circuit: Circuit, off: set[str], entries: dict[str, Entry]) -> None:
    """Draw what the live model makes of the prompts without the nodes that are off."""
    st.html(pieces.heading("Without them", f"{len(off)} nodes switched off, at their means"))
    missing = [site.name for site in circuit.graph.sites if site.name not in entries]
    if missing:
        st.info(f"The dictionary of {', '.join(missing)} is not in this folder.")
        return
    if not off:
        st.html(pieces.note("Switch nodes off to see the metric move; the model is loaded then."))
        return
    source = circuit.manifest.facts["model"]
    try:
        model = state.model(source["source"], source["dtype"])
        loaded = {
            site: state.dictionary(entry.path)
            for site, entry in entries.items()
            if entry.path is not None
        }
        found = circuits.switched_off(model, loaded, circuit, off)
    except SaelabError as error:
        st.error(str(error))
        return
    before, after = float(found.before.mean()), float(found.after.mean())
    st.html(
        pieces.stats(
            pieces.stat("metric, whole model", numbers.value(before)),
            pieces.stat("without them", numbers.value(after)),
            pieces.stat("lost", numbers.value(before - after), f"{len(found.before)} prompts"),
        )
    )
    st.button("Switch all on", key="switch all", on_click=off.clear)


def _curves(circuit: Circuit, path: Path) -> None:
    colour = charts.colours(list(read_curves(path)))
    st.html(
        pieces.heading("Faithfulness", "of circuits of growing size, on other prompts")
        + pieces.legend(colour)
    )
    for column, (name, title) in zip(st.columns(len(CURVES)), CURVES.items(), strict=True):
        ceiling = None if name == "faithfulness_of_ceiling" else circuit.manifest.facts["ceiling"]
        figure = figures.curves(read_curves(path, name), title, ceiling=ceiling, colour=colour)
        with column:
            st.plotly_chart(figure, config=charts.PLAIN, key=name)


show()
