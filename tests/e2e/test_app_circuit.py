"""The page of a circuit on the toy: by itself, and clicked through in a real browser."""

import circuit_prompts
import pytest
from app_fixture import SITE, TextStore, _index

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest
from test_app import CHROMIUM, no_exception, open_page, served  # noqa: F401 (a fixture)

from saelab import artifacts
from saelab.circuit_runs import features as circuits_features
from saelab.circuit_runs.config import FeaturesConfig
from saelab.dictionaries import load
from saelab_app import circuits, library, serve, state

pytestmark = [
    pytest.mark.app,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
FIRST = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy_model):
    out = tmp_path_factory.mktemp("run")
    paths = [circuit_prompts.save_dictionary(out, toy_model, site) for site in (FIRST, SITE)]
    _index(out, artifacts.parent_of(paths[1]), load(paths[1]), TextStore(toy_model), toy_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circuits_features, "draw", circuit_prompts.draw)
        patch.setenv("SAELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = {
            "name": "toy-ioi", "model": {"source": "toy"}, "dictionaries": paths, "out": out,
            "task": {"name": "ioi", "pairs": 8, "test_pairs": 12, "force": True},
            "attribution": {"method": "attribution"}, "graph": {"nodes": 12},
            "curves": {"sizes": [4], "draws": 0, "bases": False},
        }  # fmt: skip
        circuits_features.features(FeaturesConfig.parse(config))
    return out


@pytest.fixture
def home(run, monkeypatch):
    monkeypatch.setenv(state.DIRECTORY, str(run))
    return AppTest.from_file(str(serve.HOME), default_timeout=60)


def test_the_page_draws_the_graph_and_switches_a_node_off(home):
    html = open_page(home, "circuit")
    assert "of all effects" in html and "ceiling" in html
    assert len(home.get("plotly_chart")) == 4
    picked = home.selectbox[0].value
    assert picked in html and "the metric" in html
    home.button(key=next(b.key for b in home.button if "switch" in str(b.key))).click().run()
    assert not home.exception
    html = "".join(h.proto.body for h in home.get("html"))
    assert "1 nodes switched off" in html and "without them" in html
    home.button(key="switch all").click().run()
    assert "0 nodes switched off" in "".join(h.proto.body for h in home.get("html"))


def test_a_node_links_to_its_feature_page_where_there_is_one(home):
    graph = circuits_features.open_circuit(circuits.folders(state.folder())[0]).graph
    node = next(n for n in graph.nodes if n.site == SITE and n.latent is not None)
    open_page(home, "circuit", node=node.id)
    assert any(node.id == box.value for box in home.selectbox)
    links = [link.proto.label for link in home.get("page_link")]
    assert f"Open latent {node.latent}" in links


def test_a_folder_without_circuits_explains_itself(home, tmp_path, monkeypatch):
    monkeypatch.setenv(state.DIRECTORY, str(tmp_path))
    open_page(home, "circuit")
    assert "saelab circuits features" in home.info[0].value


def test_nodes_that_are_off_take_their_means(run, toy_model):
    circuit = circuits_features.open_circuit(circuits.folders(run)[0])
    entries = circuits.entries_of(circuit.graph, library.entries(run))
    assert set(entries) == {FIRST, SITE}
    own = {site: load(entry.path) for site, entry in entries.items()}
    same = circuits.switched_off(toy_model, own, circuit, [])
    assert (same.before == same.after).all() and len(same.before) == circuits.PROMPTS
    off = circuits.switched_off(toy_model, own, circuit, [n.id for n in circuit.graph.nodes])
    assert float((off.before - off.after).mean()) != 0


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium: see tests/SKIPS.md")
def test_in_a_browser_a_node_is_clicked_and_switched_off_and_the_metric_moves(served):  # noqa: F811
    sync_api = pytest.importorskip("playwright.sync_api")
    address, log = served
    errors = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1400})
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_test_id("stTopNavLink").get_by_text("Circuit").click()
        page.locator(".js-plotly-plot .points path").first.wait_for()
        first = page.locator("h2.sl-h2").first.inner_text()
        points = page.locator(".js-plotly-plot").first.locator(".points path")
        points.nth(1).click(force=True)  # the strongest but one: the strongest is picked
        page.wait_for_function(
            "old => document.querySelector('h2.sl-h2').innerText != old", arg=first
        )
        no_exception(page)
        page.get_by_role("button", name="Switch off").click()
        page.get_by_text("1 nodes switched off").wait_for()
        page.get_by_text("without them", exact=True).wait_for()
        numbers = page.locator(".sl-stats").last.locator("b").all_inner_texts()
        assert numbers[0] != numbers[1]
        no_exception(page)
        browser.close()
    assert errors == []
    assert "Traceback" not in log.read_text()
