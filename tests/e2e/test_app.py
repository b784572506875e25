"""The app on a toy run: each page by itself, and a walk through all of them in a real browser."""

import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from app_fixture import make_run

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

from saelab_app import serve, state

pytestmark = [
    pytest.mark.app,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def home(run, monkeypatch):
    monkeypatch.setenv(state.DIRECTORY, str(run))
    return AppTest.from_file(str(serve.HOME), default_timeout=60)


def open_page(home, page, **query):
    """Run one page with these choices in the URL; it must not fail."""
    home.switch_page(f"pages/{page}.py")
    for key, value in query.items():
        home.query_params[key] = value
    home.run()
    assert [e.value for e in home.exception] == []
    assert [e.value for e in home.error] == []
    return "".join(h.proto.body for h in home.get("html"))


def test_runs_shows_cards_scores_and_curves_of_finished_and_unfinished_dictionaries(home):
    html = open_page(home, "runs")
    assert all(f"toy-topk-{width}" in html for width in (48, 96, 192))
    assert "unfinished" in html
    assert "0.2100" in html
    assert "pca(k=6)" in html
    assert len(home.get("plotly_chart")) >= 4


def test_an_empty_folder_explains_itself(home, tmp_path, monkeypatch):
    monkeypatch.setenv(state.DIRECTORY, str(tmp_path))
    for page in ("runs", "feature", "tree", "text"):
        open_page(home, page)
        assert home.info


def test_an_artifact_of_another_schema_gives_one_clear_message(home, tmp_path, monkeypatch):
    folder = tmp_path / "dictionary" / "old-12345678"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"schema": 99}')
    monkeypatch.setenv(state.DIRECTORY, str(tmp_path))
    for page in ("runs", "feature", "tree", "text"):
        home.switch_page(f"pages/{page}.py")
        home.run()
        assert not home.exception
        assert "schema 99" in home.error[0].value


def test_feature_shows_the_latent_of_the_url_with_examples_of_both_splits(home):
    html = open_page(home, "feature", latent="5")
    assert "Latent 5" in html
    assert "held-out" in html
    assert "train" in html
    assert "Strongest" in html
    assert "0–20 % of its firings" in html
    assert "<script" not in html


def test_feature_steps_to_other_latents_and_keeps_the_choice_in_the_url(home):
    open_page(home, "feature", latent="5")
    home.button(key="next").click().run()
    assert home.query_params["latent"] in ("6", ["6"])
    home.number_input(key="latent number").set_value(11).run()
    assert home.query_params["latent"] in ("11", ["11"])
    home.button(key="random").click().run()
    assert not home.exception


def test_feature_survives_a_nonsense_url(home):
    for latent in ("999999", "-1", "abc", ""):
        assert "Latent" in open_page(home, "feature", latent=latent, dictionary="no-such")


def test_feature_search_offers_latents_and_opens_one(home):
    open_page(home, "feature", latent="5")
    home.text_input(key="search").set_value(" said").run()
    hits = [b for b in home.button if str(b.key).startswith("hit")]
    assert hits
    hits[0].click().run()
    assert not home.exception
    home.text_input(key="search").set_value("zzzz").run()
    assert not home.exception


def test_every_latent_can_be_shown(home):
    for latent in range(0, 96, 8):
        open_page(home, "feature", latent=str(latent))


def test_text_reads_a_sentence_and_ranks_latents(home):
    html = open_page(home, "text", text="It was <script>alert(1)</script> not so.", latent="3")
    assert "Token by token" in html
    assert "<script" not in html
    assert len(home.dataframe) == 1
    assert home.dataframe[0].value["latent"].nunique() == len(home.dataframe[0].value)
    home.segmented_control(key="colour by").set_value("what is lost").run()
    assert any("reconstruction misses" in h.proto.body for h in home.get("html"))
    home.segmented_control(key="rank by").set_value("activation").run()
    sizes = home.dataframe[0].value["activation"].abs()
    assert sizes.is_monotonic_decreasing


def test_text_can_be_sent_again_and_again(home):
    open_page(home, "text")
    for words in ("They had made it.", "Some other people said so.", "It was not the same."):
        home.text_area(key="text box").set_value(words)
        home.button[0].click().run()
        assert not home.exception
        strip = next(h.proto.body for h in home.get("html") if "sl-big" in h.proto.body)
        assert words.split()[1] in strip
        assert home.query_params["text"] in (words, [words])


def test_a_feature_page_is_drawn_within_its_budget(home):
    open_page(home, "feature", latent="5")
    began = time.perf_counter()
    open_page(home, "feature", latent="6")
    assert time.perf_counter() - began < 1.0


# ------------------------------------------------------------------------------- in a real browser


@pytest.fixture
def served(run, tmp_path):
    """Serve the run; yield (address, log)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            serve.command(run, port=port, headless=True), stdout=file, stderr=file
        )
        try:
            _await(f"http://localhost:{port}/_stcore/health")
            yield f"http://localhost:{port}", log
        finally:
            process.terminate()
            process.wait()


def _await(address, seconds=60):
    for _ in range(10 * seconds):
        try:
            urllib.request.urlopen(address)
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(address)


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium: see tests/SKIPS.md")
def test_a_walk_from_runs_to_features_to_a_typed_sentence_shows_no_error(served):
    sync_api = pytest.importorskip("playwright.sync_api")
    address, log = served
    errors = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        walk(page, address)
        browser.close()
    assert errors == []
    said = log.read_text()
    assert not any(word in said for word in ("Traceback", "ERROR", "WARNING", "deprecated"))


def walk(page, address):
    page.goto(address)
    page.get_by_text("Scorecard", exact=False).first.wait_for()
    no_exception(page)
    page.get_by_test_id("stPageLink").get_by_text("Features").first.click()
    page.get_by_text("Strongest", exact=False).first.wait_for()
    no_exception(page)
    first = page.get_by_role("heading", name="Latent").inner_text()
    page.get_by_test_id("stMain").locator(".sl-near").first.wait_for()
    page.locator("[data-testid=stBaseButton-tertiary]").first.click()
    page.wait_for_function("old => document.querySelector('h1.sl-h1').innerText != old", arg=first)
    no_exception(page)
    assert "latent=" in page.url
    page.get_by_test_id("stTopNavLink").get_by_text("Try your text").click()
    box = page.get_by_role("textbox", name="Text")
    box.wait_for()
    for words in ("Some people said that it was <b>not</b> so.", "They made the same one."):
        box.fill(words)
        page.get_by_role("button", name="Read it").click()
        page.wait_for_function(
            "end => document.querySelector('.sl-big')?.innerText.endsWith(end)",
            arg=words[-8:], timeout=60_000,
        )  # fmt: skip
        page.get_by_text("Token by token", exact=False).first.wait_for()
        no_exception(page)


def no_exception(page):
    assert page.get_by_test_id("stException").count() == 0
