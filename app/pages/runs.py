"""Runs: what was trained here, and how good is it?"""

import streamlit as st

from saelab.errors import SaelabError
from saelab_app import state
from saelab_app.components import charts, scores
from saelab_app.library import Entry

COLUMNS = 3
CURVES = {
    "fvu": "FVU",
    "loss": "loss",
    "l0": "L0",
    "dead": "dead share",
    "grad_norm": "gradient norm",
}


def show() -> None:
    st.html('<h1 class="sl-h1">Runs<small>what was trained here, and how good is it?</small></h1>')
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
        _tradeoff(scored)
        _scorecards(scored)
    _curves()


def _empty() -> None:
    st.info(
        f"There is no dictionary in `{state.folder()}` yet. `saelab run CONFIG` with this folder as its "
        "`out` trains one; it appears here as soon as training begins.",
        icon=":material/hourglass_empty:",
    )


def _cards(entries: list[Entry]) -> None:
    for first in range(0, len(entries), COLUMNS):
        columns = st.columns(COLUMNS)
        for column, entry in zip(columns, entries[first : first + COLUMNS], strict=False):
            with column, st.container(border=True):
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
def _tradeoff(scored: list[Entry]) -> None:
    points = scores.points(scored)
    if not points:
        return
    head, switch = st.columns([4, 1], vertical_alignment="bottom")
    head.html('<h2 class="sl-h2">Error against sparsity<small>held-out rows; open marks are controls; '
              "bars are one standard error</small></h2>")  # fmt: skip
    log = switch.toggle("log axes", key="log axes")
    st.plotly_chart(charts.tradeoff(points, log=log), config=charts.PLAIN, key="tradeoff")


@st.fragment
def _scorecards(scored: list[Entry]) -> None:
    names = [entry.id for entry in scored]
    st.html('<h2 class="sl-h2">Scorecard<small>beside the controls that it has to beat; '
            "± is one standard error (bootstrap over documents)</small></h2>")  # fmt: skip
    name = names[0]
    if len(names) > 1:
        name = st.selectbox("Scorecard of", names, key="scorecard", label_visibility="collapsed")
    st.html(scores.scorecard(scored[names.index(name)].results))


def _curves() -> None:
    running = any(entry.running for entry in state.entries())
    st.fragment(_draw_curves, run_every=4.0 if running else None)()


def _draw_curves() -> None:
    series = {entry.id: entry.metrics() for entry in state.entries()}
    series = {name: lines for name, lines in series.items() if lines}
    keys = [key for key in CURVES if any(key in lines[-1] for lines in series.values())]
    if not keys:
        return
    st.html('<h2 class="sl-h2">Training<small>also of runs that are still going</small></h2>')
    for first in range(0, len(keys), COLUMNS):
        columns = st.columns(COLUMNS)
        for column, key in zip(columns, keys[first : first + COLUMNS], strict=False):
            with column:
                st.html(f'<div class="sl-note">{CURVES[key]}</div>')
                st.plotly_chart(charts.curves(series, key), config=charts.PLAIN, key=f"curve {key}")


show()
