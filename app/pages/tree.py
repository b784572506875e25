"""Concept tree: how do latents group into concepts?"""

import streamlit as st

from saelab.errors import SaelabError
from saelab.features import relations
from saelab.features.read import Features
from saelab.features.relations import TreeNode
from saelab_app import state
from saelab_app.components import charts, pieces, trees
from saelab_app.library import Entry

SHOWN = 300
"""Most latents in the picture of shared neurons."""


def show() -> None:
    st.html(pieces.title("Concept tree", "how do latents group into concepts?"))
    try:
        candidates = [entry for entry in state.entries() if len(entry.levels) > 1]
    except SaelabError as error:
        st.error(str(error))
        return
    if not candidates:
        st.info(
            "No dictionary here has a hierarchy in its feature index. A `semi_nmf` dictionary with "
            "`levels` has one; `saelab index CONFIG` indexes it.",
            icon=":material/account_tree:",
        )
        return
    entry = state.pick_entry(candidates)
    assert entry.features is not None
    try:
        features = state.features(entry.features)
    except SaelabError as error:
        st.error(str(error))
        return
    roots = relations.forest(features)
    _sizes(features, roots)
    st.plotly_chart(charts.icicle(roots), config=charts.PLAIN, key="icicle")
    _outline(entry, features, roots)
    _overlap(features, roots)


def _sizes(features: Features, roots: list[TreeNode]) -> None:
    latents, *concepts = features.levels
    names = [f"concepts · level {level}" for level, _ in enumerate(concepts, start=1)]
    alone = sum(not root.children for root in roots)
    st.html(
        pieces.stats(
            pieces.stat("latents", f"{latents:,}", "level 0: what the dictionary codes with"),
            *(pieces.stat(name, f"{n:,}") for name, n in zip(names, concepts, strict=True)),
            pieces.stat("alone", f"{alone:,}", "nodes with nothing above or below them"),
        )
        + pieces.note("The highest concepts are at the left. A click opens a branch.")
    )


def _outline(entry: Entry, features: Features, roots: list[TreeNode]) -> None:
    remark = "a node stands below the concept that it holds most of; numbers lead to pages"
    if features.meta["labels"]:
        remark += "; labels: the share of its strongest examples that have it"
    st.html(
        pieces.heading("Branch by branch", remark)
        + trees.outline(
            roots, relations.purities(features),
            lambda node: state.link("feature", dictionary=entry.id, latent=str(node)),
        )
    )  # fmt: skip


def _overlap(features: Features, roots: list[TreeNode]) -> None:
    latents = [node.id for root in roots for node in root.walk() if node.level == 0][:SHOWN]
    jaccard = relations.overlaps(features, latents)
    if jaccard is None:
        return
    more = f"the first {SHOWN} " if features.n_latents > SHOWN else ""
    st.html(
        pieces.heading(
            "Shared neurons",
            f"{more}latents in the order of the tree; share of the neurons of either that both use",
        )
    )
    st.plotly_chart(charts.overlap(latents, jaccard), config=charts.PLAIN, key="overlap")


show()
