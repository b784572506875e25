"""Feature: what does one latent respond to, and what does it do?"""

import random
from collections.abc import Iterable

import streamlit as st

from saelab.errors import SaelabError
from saelab.features import relations
from saelab.features.read import ExampleGroup, Features, LatentPage, LatentStats
from saelab.show import plain
from saelab_app import state
from saelab_app.components import charts, numbers, pieces, text, trees
from saelab_app.library import Entry

EXPLAINED = {
    "dead": "it never fires on this store",
    "too few to score": "fewer than 50 firings on held-out rows",
    "dense": "it fires on more than 10 % of the held-out tokens",
    "position-only": "nearly all of its firings are at one position of the window",
    "duplicate": "another decoder direction is almost the same",
}
RELATED = 12
"""Most nodes in a list of children, parents or others with the same neurons."""


def show() -> None:
    try:
        candidates = [entry for entry in state.entries() if entry.features is not None]
    except SaelabError as error:
        st.error(str(error))
        return
    if not candidates:
        st.info(
            "No dictionary here has a feature index yet. `saelab index CONFIG` makes one.",
            icon=":material/radar:",
        )
        return
    pick, number, step, find = st.columns([2.4, 1.1, 1.9, 2.1], vertical_alignment="bottom")
    with pick:
        entry = state.pick_entry(candidates)
    assert entry.features is not None
    try:
        features = state.features(entry.features)
    except SaelabError as error:
        st.error(str(error))
        return
    latent = _latent(features)
    with number:
        _number(latent, features.n_nodes)
    with step:
        _steps(latent, features.n_nodes)
    with find:
        words = st.text_input("Search", key="search", placeholder='token or text, e.g. " not"')
    if words:
        _results(features, words)
    if st.session_state.get("browse"):
        _browse(features)
    _page(entry, features, latent)


def _latent(features: Features) -> int:
    """Return the latent in the URL; at first one that nothing has to be warned about."""
    given = state.chosen("latent", "")
    if given.isdigit():
        latent = min(int(given), features.n_nodes - 1)
    else:
        sound = (s.id for s in features.table("id", 300) if not s.warnings)
        latent = next(sound, 0)
    state.choose("latent", str(latent))
    return latent


def _go(latent: int) -> None:
    state.choose("latent", str(latent))


def _number(latent: int, n: int) -> None:
    st.session_state["latent number"] = latent
    st.number_input(
        "Latent", 0, n - 1, step=1, key="latent number",
        on_change=lambda: _go(st.session_state["latent number"]),
    )  # fmt: skip


def _steps(latent: int, n: int) -> None:
    with st.container(horizontal=True, gap="small"):
        for icon, target, name in (
            (":material/chevron_left:", (latent - 1) % n, "previous"),
            (":material/chevron_right:", (latent + 1) % n, "next"),
            (":material/casino:", random.randrange(n), "random"),  # noqa: S311 (a dice button)
        ):
            st.button("", icon=icon, key=name, help=f"{name} latent", on_click=_go, args=(target,))
        st.button("", icon=":material/list:", key="all", help="all latents", on_click=_toggle)


def _toggle() -> None:
    st.session_state["browse"] = not st.session_state.get("browse", False)


def _results(features: Features, words: str) -> None:
    hits = features.search(words, limit=12)
    with st.container(border=True):
        if not hits:
            st.html(pieces.note("No latent fires on it, promotes it or has it near."))
        for where in ("fires on", "promotes", "context"):
            mine = [hit for hit in hits if hit.where == where]
            if not mine:
                continue
            st.html(pieces.note(where))
            with st.container(horizontal=True, gap="small"):
                for hit in mine[:12]:
                    share = f" · {numbers.percent(hit.share)}" if hit.share else ""
                    word = _safe(hit.stats.gist.split(" · ")[0])
                    st.button(
                        f"**{hit.stats.id}** {word}{share}", key=f"hit {where} {hit.stats.id}",
                        help=_safe(hit.stats.gist), on_click=_go, args=(hit.stats.id,),
                    )  # fmt: skip


@st.fragment
def _browse(features: Features) -> None:
    """Draw all latents as a table that can be sorted; a chosen line is opened."""
    stats = features.table("id", features.n_nodes)
    picked = st.dataframe(
        {
            "latent": [s.id for s in stats],
            "fires on": [s.gist for s in stats],
            "density %": [None if s.density is None else 100 * s.density for s in stats],
            "strongest": [s.peak for s in stats],
            "mean when firing": [s.mean for s in stats],
            "nearest cosine": [s.cosine for s in stats],
            "warnings": [", ".join(s.warnings) for s in stats],
        },
        column_config={
            name: st.column_config.NumberColumn(format="%.3f")
            for name in ("density %", "strongest", "mean when firing", "nearest cosine")
        },
        hide_index=True, height=320, key="all latents", on_select="rerun",
        selection_mode="single-row",
    )  # fmt: skip
    rows = picked["selection"]["rows"]
    if rows and st.session_state.get("opened row") != rows[0]:
        st.session_state["opened row"] = rows[0]
        _go(stats[rows[0]].id)
        st.rerun()


def _safe(label: str) -> str:
    """Escape what Streamlit would read as Markdown in a label or a tooltip."""
    shown = plain(label)
    return "".join(f"\\{c}" if c in "\\`*_{}[]()<>#+-.!|~$:^&" else c for c in shown)


def _page(entry: Entry, features: Features, latent: int) -> None:
    page = features.latent(latent)
    _header(page.stats, features)
    left, right = st.columns([1, 1.85], gap="large")
    with left:
        _about(page)
        _related(features, latent)
        if entry.path is not None and latent < features.n_latents:
            _try(entry, latent)
    with right:
        _origin(page, features)
        _examples(page, features.meta["index"]["context"])


def _header(stats: LatentStats, features: Features) -> None:
    gist = text.chips(stats.gist) if stats.gist else ""
    warnings = "".join(pieces.badge(w, "warn", EXPLAINED[w]) for w in stats.warnings)
    level = features.level_of(stats.id)
    name = f"Concept {stats.id} · level {level}" if level else f"Latent {stats.id}"
    heldout = features.meta["n_heldout"]
    st.html(
        f'<h1 class="sl-h1">{name}<small>{gist}</small></h1>{warnings}'
        + pieces.stats(
            pieces.stat(
                f"density · {numbers.one_in(stats.density)}".rstrip(" ·"),
                numbers.percent(stats.density),
                f"share of {heldout:,} held-out tokens on which it fires",
            ),
            pieces.stat("strongest", numbers.value(stats.peak), "on any kept row"),
            pieces.stat(
                "mean when firing", numbers.value(stats.mean), "mean of |z|, held-out rows"
            ),
            pieces.stat("firings · all rows", f"{stats.fires:,}"),
            pieces.stat("firings · held-out", f"{stats.fires_heldout:,}"),
            pieces.stat("decoder norm", numbers.value(stats.norm)),
        )
    )


def _about(page: LatentPage) -> None:
    if page.stats.fires:
        st.html(pieces.heading("Activations", "firings by value; blue: held-out, grey: train"))
        st.plotly_chart(charts.histogram(page.histogram), config=charts.PLAIN, key="histogram")
        st.html(
            pieces.heading("Fires on", "share of its activation, all rows")
            + text.shares(page.tokens)
        )
    if page.logits is not None:
        st.html(
            pieces.heading("Effect on the logits", "direct, per unit of activation")
            + f'<div class="sl-two">{text.bars(page.logits.up)}'
            f"{text.bars(page.logits.down, negative=True)}</div>"
        )
    st.html(pieces.heading("Nearest decoder directions", "cosine"))
    _buttons("near", ((other.id, text.near(other)) for other in page.neighbours))


def _buttons(kind: str, others: Iterable[tuple[int, str]]) -> None:
    """Draw a line for each of some other nodes: a button that opens it, and what there is to say.

    `kind` tells the buttons of one list from those of another.
    """
    with st.container(gap=None):
        for node, about in others:
            button, line = st.columns([1, 4], gap="small", vertical_alignment="center")
            button.button(
                str(node), key=f"{kind} {node}", on_click=_go, args=(node,),
                type="tertiary", width="stretch",
            )  # fmt: skip
            line.html(about)


def _related(features: Features, node: int) -> None:
    """Draw the node's place in the tree, and the neurons it shares, where there are any."""
    for kind, heading, links in (
        ("parent", "Part of", relations.parents(features, node)),
        ("child", "Made of", relations.children(features, node)),
    ):
        if links:
            most = links[0].weight
            st.html(pieces.heading(heading, _how_many(len(links))))
            _buttons(
                kind, ((x.id, text.beside(x.weight, x.gist, most=most)) for x in links[:RELATED])
            )
    uses = relations.neurons(features, node)
    if not uses:
        return
    st.html(
        pieces.heading("Neurons", f"weight, others that use it; {_how_many(len(uses))}")
        + trees.neurons(uses[:RELATED])
    )
    others = relations.overlapping(features, node, RELATED)
    if others:
        st.html(pieces.heading("Shares neurons with", "share of the neurons of either"))
        _buttons(
            "overlap", ((o.id, text.beside(o.jaccard, o.gist, about=_shared(o))) for o in others)
        )


def _how_many(n: int) -> str:
    return f"the first {RELATED} of {n}" if n > RELATED else f"{n} in all"


def _shared(other: relations.Overlap) -> str:
    return f"{other.shared} neurons in common, cosine {other.cosine:.2f}"


def _try(entry: Entry, latent: int) -> None:
    st.page_link(
        "pages/text.py", label="Try your own text on this latent", icon=":material/edit_note:",
        query_params={"dictionary": entry.id, "latent": str(latent)},
    )  # fmt: skip


def _origin(page: LatentPage, features: Features) -> None:
    """Draw the place in the text that the latent is the activation of, if it is one."""
    origin = page.origin
    if origin is None:
        return
    token = plain(origin.strings[origin.position])
    st.html(
        pieces.heading("Where it comes from", "it is the activation at the underlined token")
        + text.example(
            origin, peak=abs(page.stats.peak), context=features.meta["index"]["context"], whole=True
        )
        + pieces.note(f"“{token}” in store {features.meta['store'][:8]}")
    )


def _examples(page: LatentPage, context: int) -> None:
    if not page.groups:
        st.info("This latent never fires on this store: there are no examples.")
        return
    for group in page.groups:
        st.html(
            pieces.heading(*_group_name(group, len(page.groups) - 1))
            + text.group(group, peak=abs(page.stats.peak), context=context)
        )


def _group_name(group: ExampleGroup, quantiles: int) -> tuple[str, str]:
    if group.number == 0:
        return "Strongest", "one per window; click a line for the whole window"
    high, low = 100 - 100 * (group.number - 1) // quantiles, 100 - 100 * group.number // quantiles
    span = f"between {numbers.value(group.low)} and {numbers.value(group.high)}"
    return f"{low}–{high} % of its firings", f"{span}, drawn at random"


show()
