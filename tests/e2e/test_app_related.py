"""Concept trees, shared neurons and the sentences that atoms come from, in the app on a toy run."""

import pytest
from app_fixture import make_related_run
from test_app import open_page, pytestmark  # noqa: F401

from saelab import api, artifacts
from saelab_app import library, serve, state

AppTest = pytest.importorskip("streamlit.testing.v1").AppTest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_related_run(tmp_path_factory.mktemp("related"))


@pytest.fixture
def home(run, monkeypatch):
    monkeypatch.setenv(state.DIRECTORY, str(run))
    return AppTest.from_file(str(serve.HOME), default_timeout=60)


def named(run, kind):
    """The entry of the dictionary of this type."""
    return next(entry for entry in library.entries(run) if entry.facts["type"] == kind)


def test_the_tree_page_draws_every_node_once_with_a_link_and_its_label(home, run):
    html = open_page(home, "tree")
    entry = named(run, "semi_nmf")
    assert entry.levels == [12, 5, 2]
    features = api.open_features(entry.features)
    for node in range(features.n_nodes):
        link = state.link("feature", dictionary=entry.id, latent=str(node))
        assert html.count(f'<a href="{link}">{node}</a>') >= 1
    assert "base rate" in html
    assert "<sea>" not in html and "<script" not in html
    assert len(home.get("plotly_chart")) == 2
    features.close()


def test_a_folder_without_a_hierarchy_says_how_to_get_one(home, tmp_path, monkeypatch):
    monkeypatch.setenv(state.DIRECTORY, str(tmp_path))
    open_page(home, "tree")
    assert "levels" in home.info[0].value


def test_a_concepts_page_leads_to_its_children_and_theirs_back(home, run):
    entry = named(run, "semi_nmf")
    html = open_page(home, "feature", dictionary=entry.id, latent="12")
    assert "Concept 12 · level 1" in html
    assert "Strongest" in html
    children = [b for b in home.button if str(b.key).startswith("child")]
    assert children
    assert not [link for link in home.get("page_link") if "text" in link.proto.page]
    child = children[0].label
    children[0].click().run()
    assert home.query_params["latent"] in (child, [child])
    assert any(b.key == "parent 12" for b in home.button)


def test_a_latent_of_neurons_shows_them_and_who_shares_them(home, run):
    entry = named(run, "semi_nmf")
    html = open_page(home, "feature", dictionary=entry.id, latent="3")
    assert "Neurons" in html
    assert "Shares neurons with" in html
    others = [b for b in home.button if str(b.key).startswith("overlap")]
    assert others
    assert not home.exception
    others[0].click().run()
    assert home.query_params["latent"] in (others[0].label, [others[0].label])


def test_an_atoms_page_opens_on_its_own_sentence(home, run):
    entry = named(run, "itda")
    atoms = api.load(entry.path)
    features = api.open_features(entry.features)
    for latent in (0, atoms.d_sae - 1):
        html = open_page(home, "feature", dictionary=entry.id, latent=str(latent))
        assert html.index("Where it comes from") < html.index("Strongest")
        origin = features.latent(latent).origin
        assert origin.position == int(atoms.positions[latent])
        assert origin.document == int(atoms.documents[latent])
        assert f"position {origin.position}" in html
        assert f"store {features.meta['store'][:8]}" in html
        assert "<details open>" in html
    features.close()
    assert artifacts.read_manifest(entry.features).facts["levels"] == [atoms.d_sae]


def test_a_learnt_direction_comes_from_nowhere(home, run):
    html = open_page(home, "feature", dictionary=named(run, "semi_nmf").id, latent="3")
    assert "Where it comes from" not in html
