"""Try your text: which latents fire on a sentence, and where does the dictionary fail?"""

import time
from html import escape
from typing import Any

import streamlit as st

from saelab.errors import SaelabError
from saelab.features import live
from saelab.features.read import Features
from saelab.show import plain, tokens
from saelab_app import state
from saelab_app.components import numbers, pieces, text
from saelab_app.library import Entry

START = "The minister said on Tuesday that the talks in Geneva had not failed, but would go on."
SHOWN = 40
PER_TOKEN = 5
COLUMNS = {
    "activation": st.column_config.NumberColumn(format="%.2f"),
    "of its maximum": st.column_config.ProgressColumn(min_value=0, max_value=1, format="percent"),
    "density %": st.column_config.NumberColumn(format="%.2f"),
}


def show() -> None:
    question = "which latents fire, and where does the dictionary fail?"
    st.html(pieces.title("Try your text", question))
    try:
        candidates = [entry for entry in state.entries() if entry.features and entry.path]
    except SaelabError as error:
        st.error(str(error))
        return
    live_ones = [entry for entry in candidates if entry.facts.get("model")]
    if not live_ones:
        st.info(
            "No dictionary here has both a feature index and a language model: text can be tried "
            "on dictionaries that `saelab run` trained on a model's activations.",
            icon=":material/edit_note:",
        )
        return
    left, right = st.columns([2.6, 1])
    with right:
        entry = state.pick_entry(live_ones)
    with left:
        written = _box()
    if not written.strip():
        st.html(
            pieces.note(
                "Type a sentence and press the button (or Ctrl + Enter). The language model is "
                "loaded for the first one."
            )
        )
        return
    try:
        reading, seconds = _read(entry, written)
    except SaelabError as error:
        st.error(str(error))
        return
    assert entry.features is not None
    _panels(entry, state.features(entry.features), reading, seconds)


def _box() -> str:
    """Draw the box; return the text to read: the one in the URL, until another is sent."""
    current = state.chosen("text", "")
    # set through the session, not by `value`: a changed `value` would make it another box
    st.session_state.setdefault("text box", current or START)
    with st.form("text", border=False):
        written = st.text_area("Text", height=92, placeholder="Type a sentence", key="text box")
        sent = st.form_submit_button("Read it", type="primary", icon=":material/play_arrow:")
    if sent:
        state.choose("text", written)
    elif current:
        state.choose("text", current)
    return written if sent else current


def _read(entry: Entry, written: str) -> tuple[live.Reading, float]:
    assert entry.path is not None and entry.features is not None
    source: dict[str, Any] = entry.facts["model"]
    model = state.model(source["source"], source["dtype"])
    dictionary = state.dictionary(entry.path)
    began = time.perf_counter()
    meta = state.features(entry.features).meta
    reading = live.read(model, dictionary, entry.facts["site"], written, meta.get("mean"))
    return reading, time.perf_counter() - began


@st.fragment
def _panels(entry: Entry, features: Features, reading: live.Reading, seconds: float) -> None:
    if reading.cut:
        st.warning(f"Only the first {len(reading.strings)} tokens were read.")
    how, by = st.columns([1, 1])
    shown = how.segmented_control(
        "Colour by", ["one latent", "what is lost"], default="one latent", key="colour by",
        help="What is lost: the share of each token's squared distance from the mean activation "
        "that the reconstruction misses.",
    )  # fmt: skip
    order = by.segmented_control(
        "Rank latents by", ["share of own maximum", "activation"],
        default="share of own maximum", key="rank by",
    )  # fmt: skip
    peaks = features.column("peak")
    ranks = live.ranked(reading, None if order == "activation" else peaks)
    strip = st.container()
    latent = _ranking(features, ranks, reading, peaks)
    with strip:
        if shown == "what is lost":
            _lost(reading)
        elif latent is not None:
            _coloured(entry, features, reading, latent)
    st.html(
        pieces.heading(
            "Token by token",
            f"the {PER_TOKEN} strongest latents of each, numbers link to their pages; "
            f"read in {seconds:.2f} s",
        )
        + _by_token(entry, features, reading)
    )


def _coloured(entry: Entry, features: Features, reading: live.Reading, latent: int) -> None:
    stats = features.stats(latent)
    found = live.values(reading, latent)
    strip = tokens(reading.strings, found, peak=abs(stats.peak), masked=reading.masked)
    st.html(
        pieces.note(
            f"latent {latent} · {stats.gist} · fires on {len(found)} of {len(reading.strings)} "
            f"tokens · full colour is its maximum on the store, {numbers.value(stats.peak)}"
        )
        + f'<div class="sl-text sl-big">{strip}</div>'
    )
    st.page_link(
        "pages/feature.py", label=f"Open latent {latent}", icon=":material/radar:",
        query_params={"dictionary": entry.id, "latent": str(latent)},
    )  # fmt: skip


def _lost(reading: live.Reading) -> None:
    kept = {p: e for p, e in enumerate(reading.error) if p not in reading.masked}
    titles = {
        p: f"“{plain(reading.strings[p])}” · {numbers.percent(e)} lost" for p, e in kept.items()
    }
    mean = sum(kept.values()) / len(kept) if kept else None
    # drawn in the colour of negative values, so that it cannot be taken for an activation
    orange = {p: -e for p, e in kept.items()}
    strip = tokens(reading.strings, orange, peak=1.0, masked=reading.masked, titles=titles)
    st.html(
        pieces.note(
            f"share of each token that the reconstruction misses · mean {numbers.percent(mean)}"
        )
        + f'<div class="sl-text sl-big">{strip}</div>'
    )


def _ranking(
    features: Features, ranks: list[live.Rank], reading: live.Reading, peaks: list[float]
) -> int | None:
    """Draw the table of latents; return the one that colours the text."""
    if not ranks:
        st.html(pieces.note("No latent fires on this text."))
        return None
    asked = state.chosen("latent", "")
    current = int(asked) if asked.isdigit() and int(asked) < features.n_latents else -1
    stats = [features.stats(rank.latent) for rank in ranks[:SHOWN]]
    picked = st.dataframe(
        {
            "latent": [s.id for s in stats],
            "fires on": [s.gist for s in stats],
            "at token": [plain(reading.strings[r.position]) for r in ranks[:SHOWN]],
            "activation": [r.value for r in ranks[:SHOWN]],
            "of its maximum": [min(1.0, abs(r.value / peaks[r.latent])) if peaks[r.latent] else 1.0
                               for r in ranks[:SHOWN]],
            "tokens": [r.tokens for r in ranks[:SHOWN]],
            "density %": [None if s.density is None else 100 * s.density for s in stats],
        },
        column_config=COLUMNS,
        hide_index=True, height=245, key="ranking", on_select="rerun", selection_mode="single-row",
    )  # fmt: skip
    rows = picked["selection"]["rows"]
    if rows and rows[0] < len(stats):
        current = stats[rows[0]].id
        state.choose("latent", str(current))
    return current if current >= 0 else stats[0].id


def _by_token(entry: Entry, features: Features, reading: live.Reading) -> str:
    found = [live.strongest(reading, p, PER_TOKEN) for p in range(len(reading.strings))]
    gists = features.gists(sorted({i for tops in found for i, _ in tops}))
    rows = []
    for position, tops in enumerate(found):
        cells = "".join(_cell(entry, latent, value, gists[latent]) for latent, value in tops)
        cells += "<td></td>" * (PER_TOKEN - len(tops))
        lost = "masked" if position in reading.masked else numbers.percent(reading.error[position])
        rows.append(
            f"<tr><td>{text.chip(reading.strings[position])}</td><td>{lost}</td>{cells}</tr>"
        )
    head = f'<th class="left" colspan="{PER_TOKEN}">strongest latents</th>'
    return (
        '<div class="sl-scroll"><table class="sl-table"><tr><th>token</th><th>lost</th>'
        f"{head}</tr>{''.join(rows)}</table></div>"
    )


def _cell(entry: Entry, latent: int, value: float, gist: str) -> str:
    link = state.link("feature", dictionary=entry.id, latent=str(latent))
    return (
        f'<td class="left" title="{escape(gist)}"><a href="{link}">{latent}</a> '
        f"{escape(gist.split(' · ')[0])} <small>{numbers.value(value)}</small></td>"
    )


show()
