"""Runs: what was trained here, and how good is it?"""

import streamlit as st

from saelab.errors import SaelabError
from saelab_app import state
from saelab_app.components import charts, pieces, scores
from saelab_app.library import Entry

CARDS, CHARTS = 3, 4
CURVES = {
    "fvu": "FVU",
    "loss": "loss",
    "l0": "L0",
    "dead": "dead share",
    "grad_norm": "gradient norm",
}


def show() -> None:
    st.html(pieces.title("Runs", f"what was trained in {state.folder()}, how good is it?"))
    try:
        entries = state.entries()
    except SaelabError as error:
        st.error(str(error))
        return
    if not entries:
        _empty()
        return
    _cards(entries)
    scored = [entry for entry in entries if entry.results]
    if scored:
        _tradeoff(scored, charts.colours([entry.id for entry in entries]))
        _scorecards(scored)
    running = any(entry.running for entry in entries)
    st.fragment(_curves, run_every=4.0 if running else None)()


def _empty() -> None:
    st.info(
        f"There is no dictionary in `{state.folder()}` yet. `saelab run CONFIG` with this folder "
        "as its `out` trains one; it appears here as soon as training begins.",
        icon=":material/hourglass_empty:",
    )


def _cards(entries: list[Entry]) -> None:
    for first in range(0, len(entries), CARDS):
        columns = st.columns(CARDS)
        for column, entry in zip(columns, entries[first : first + CARDS], strict=False):
            with column, st.container(border=True, height="stretch"):
                st.html(scores.card(entry))
                if entry.features is not None:
                    _links(entry)
                elif not entry.running:
                    st.caption("no feature index yet: `saelab index CONFIG`")


def _links(entry: Entry) -> None:
    query = {"dictionary": entry.id}
    with st.container(horizontal=True):
        st.page_link(
            "pages/feature.py", label="Features", icon=":material/radar:", query_params=query
        )
        if entry.path is not None:
            st.page_link(
                "pages/text.py", label="Try text", icon=":material/edit_note:", query_params=query
            )


@st.fragment
def _tradeoff(scored: list[Entry], colour: dict[str, str]) -> None:
    points = scores.points(scored)
    if not points:
        return
    head, switch = st.columns([5, 1], vertical_alignment="bottom")
    head.html(
        pieces.heading(
            "Error against sparsity",
            "held-out rows; open marks are the controls; bars are one standard error",
        )
    )
    log = switch.toggle("log axes", key="log axes")
    figure = charts.tradeoff(points, colour, log=log)
    st.plotly_chart(figure, config=charts.PLAIN, key="tradeoff")


@st.fragment
def _scorecards(scored: list[Entry]) -> None:
    names = [entry.id for entry in scored]
    st.html(
        pieces.heading(
            "Scorecard",
            "beside the controls that it has to beat; ± is one standard error (over documents)",
        )
    )
    name = names[0]
    if len(names) > 1:
        name = st.selectbox("Scorecard of", names, key="scorecard", label_visibility="collapsed")
    rows = scored[names.index(name)].results
    st.html(scores.scorecard(rows) + scores.details(rows))


def _curves() -> None:
    entries = state.entries()
    colour = charts.colours([entry.id for entry in entries])
    series = {entry.id: lines for entry in entries if (lines := entry.metrics())}
    keys = [key for key in CURVES if any(key in lines[-1] for lines in series.values())]
    if not keys:
        return
    if "fvu" in keys:
        keys.remove("loss")
    shown = {name: colour[name] for name in series}
    st.html(
        pieces.heading("Training", "against tokens seen; also of runs that are still going")
        + pieces.legend(shown)
    )
    for first in range(0, len(keys), CHARTS):
        columns = st.columns(CHARTS)
        for column, key in zip(columns, keys[first : first + CHARTS], strict=False):
            with column:
                st.html(pieces.note(CURVES[key]))
                figure = charts.curves(series, key, colour)
                st.plotly_chart(figure, config=charts.PLAIN, key=f"curve {key}")


show()
