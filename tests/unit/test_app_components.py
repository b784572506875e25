"""What the app writes into HTML, and the numbers that it shows."""

import json
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab import show
from saelab.features import live
from saelab.features.read import Example, ExampleGroup, Histogram, Neighbour, TokenShare
from saelab_app import library
from saelab_app.components import charts, numbers, pieces, scores, text
from saelab_app.serve import command

NASTY = [
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "a&b",
    "\n",
    " ",
    "",
    "\x00",
    "'",
    "</b>",
]


class Tags(HTMLParser):
    """Collects the tags, attributes and text of a piece of HTML."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def harmless(html):
    found = Tags(html)
    known = {"span", "div", "b", "s", "i", "table", "tr", "td", "th", "small", "details", "summary",
             "h1", "h2", "a"}  # fmt: skip
    assert found.tags <= known
    assert found.attributes <= {"class", "style", "title", "href", "colspan"}
    return found


def an_example(strings, *, heldout=False):
    return Example(3, 1, 2.5, {1: 2.5, 2: -1.0}, list(strings), heldout, 7, frozenset({0}))


@settings(max_examples=20)
@given(st.lists(st.text(max_size=8), min_size=4, max_size=12))
def test_no_token_can_become_a_tag_or_an_attribute(strings):
    group = ExampleGroup(0, 2.5, 2.5, [an_example([*NASTY, *strings])])
    harmless(text.group(group, peak=2.5, context=40))
    for token in [*NASTY, *strings]:
        harmless(text.chip(token))
        harmless(text.bars([(token, 1.0)]))
        harmless(text.shares([TokenShare(token, 3, 0.5)]))
        harmless(text.near(Neighbour(1, -0.5, token)))
        harmless(pieces.stat(token, token, token) + pieces.badge(token, about=token))
        harmless(pieces.title(token, token) + pieces.heading(token, token) + pieces.note(token))


def test_an_examples_text_is_the_windows_text_with_marks_for_line_ends_and_blanks():
    html = text.example(an_example(["The", " cat", "\n", " ", "sat"]), peak=2.5, context=9)
    assert "The cat↵␣sat" in Tags(html).text


def test_an_example_shows_its_context_first_and_the_whole_window_on_a_click():
    strings = [f" w{i}" for i in range(40)]
    item = Example(3, 20, 2.5, {20: 2.5}, strings, True, 7, frozenset())
    html = text.example(item, peak=2.5, context=2)
    snippet = Tags(html[: html.index("less")]).text
    assert "… " in snippet
    assert "w18 w19 w20 w21 w22" in snippet
    assert "w17" not in snippet
    assert "w0" in Tags(html[html.index("less") :]).text
    assert "held-out" in html
    assert "train" in text.example(an_example(strings), peak=2.5, context=2)


def test_a_token_tells_its_value_position_and_document_when_hovered():
    html = text.example(an_example(["The", " cat", " sat"]), peak=2.5, context=5)
    assert "“␣cat” · 2.50 · position 1 · document 7" in html
    assert "“␣sat” · -1 · position 2" in html
    assert "“The” · masked · position 0" in html


def test_colour_follows_strength_and_sign():
    assert show.colour(2.0, 2.0).endswith("0.72)")
    assert "--sl-neg" in show.colour(-1.0, 2.0)
    assert show.colour(0.0, 0.0).endswith("0.10)")


@pytest.mark.parametrize(
    ("x", "shown"),
    [(None, "–"), (0, "0"), (1, "1"), (12.3456, "12.3"), (0.01234, "0.0123"), (98765.4, "98,765"),
     (-2.5, "-2.50"), (float("nan"), "nan"), (1e-9, "0.000000")],
)  # fmt: skip
def test_values_have_three_digits(x, shown):
    assert numbers.value(x) == shown


@pytest.mark.parametrize(
    ("x", "shown"),
    [(None, "–"), (0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.0123, "1.2 %"), (0.9993, "99.93 %"),
     (1e-7, "< 0.001 %"), (1.02, "102 %"), (0.99999999, "100 %")],
)  # fmt: skip
def test_shares_are_percent_and_never_rounded_to_none(x, shown):
    assert numbers.percent(x) == shown


def test_a_density_is_also_one_in_so_many_tokens():
    assert numbers.one_in(0.0031) == "1 in 323 tokens"
    assert numbers.one_in(0.5) == numbers.one_in(None) == numbers.one_in(0.0) == ""


def test_long_curves_are_thinned_and_keep_their_last_line():
    lines = [{"tokens": i, "loss": 1.0 / (i + 1)} for i in range(10_001)]
    kept = charts.thin(lines)
    assert len(kept) <= 700
    assert kept[-1] == lines[-1]
    assert charts.thin(lines[:1]) == lines[:1]


def test_charts_can_be_drawn_from_edge_cases():
    charts.histogram(Histogram(0.0, 0.0, [0, 0], [0, 0])).to_json()
    charts.curves({"a": [{"tokens": 1, "l0": 2.0}]}, "l0", {"a": "#000"}).to_json()
    point = {"x": 32.0, "y": 0.2, "error": None, "arm": "dictionary", "entry": "a", "name": "<b>"}
    for log in (True, False):
        charts.tradeoff([point | {"own": True}], {"a": "#000"}, log=log).to_json()


def row(name, value, arm="dictionary", error=None):
    return {"name": name, "value": value, "unit": "share", "n": 10, "standard_error": error,
            "metric_version": 1, "arm": arm, "encoder": "own", "evaluator": "core"}  # fmt: skip


def test_the_scorecard_has_a_column_per_arm_and_errors_beside_values():
    html = scores.scorecard([row("fvu", 0.2, error=0.01), row("fvu", 0.3, arm="<pca>")])
    found = harmless(html)
    assert "&lt;pca&gt;" in html
    assert "± 0.010" in found.text


def test_planted_truth_adds_details_but_no_arms_to_the_scorecard():
    truth = [
        row(name, 0.5, arm) | {"evaluator": "truth"}
        for name, arm in (("mcc", "dictionary"), ("dead_share", "dictionary"), ("l0", "oracle"))
    ]
    rows = [row("fvu", 0.2), row("dead_share", 0.25), *truth]
    assert "oracle" not in scores.scorecard(rows)
    assert scores.details(rows).count("dead share") == 1
    assert "mcc" in scores.details(rows)


def test_points_are_the_arms_that_have_both_l0_and_fvu():
    rows = [row("fvu", 0.2), row("l0", 32.0), row("fvu", 0.4, "token_mean"), row("fvu", 0.3, "pca"),
            row("l0", 32.0, "pca")]  # fmt: skip
    entry = library.Entry("a-1", "a", None, {}, "", results=rows)
    assert [(p["arm"], p["own"]) for p in scores.points([entry])] == [
        ("dictionary", True), ("pca", False),
    ]  # fmt: skip


def test_a_torn_last_line_of_a_log_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"tokens": 1}\n{"tokens": 2}\n{"tok')
    entry = library.Entry("a-1", "a", tmp_path, {}, "", running=True)
    assert [line["tokens"] for line in entry.metrics()] == [1, 2]
    assert library.Entry("b-1", "b", None, {}, "").metrics() == []


def test_latents_are_ranked_by_activation_or_by_share_of_their_maximum():
    z = torch.tensor([[9.0, 9.0, 9.0], [4.0, -1.0, 0.0], [0.0, -2.0, 0.0]])
    reading = live.Reading(["a", "b", "c"], z, [0.1, 0.2, 0.3], frozenset({0}), False)
    by_size = [(r.latent, r.value, r.position, r.tokens) for r in live.ranked(reading)]
    assert by_size == [(0, 4.0, 1, 1), (1, -2.0, 2, 2)]
    assert [r.latent for r in live.ranked(reading, [8.0, 2.0, 1.0])] == [1, 0]
    assert live.values(reading, 1) == {1: -1.0, 2: -2.0}
    assert live.strongest(reading, 1, 5) == [(0, 4.0), (1, -1.0)]


def test_the_command_serves_on_localhost_without_reporting_usage(tmp_path):
    line = command(tmp_path, port=8600, headless=True)
    assert "--server.address=localhost" in line
    assert "--server.port=8600" in line
    assert "--server.headless=true" in line
    assert "--browser.gatherUsageStats=false" in line
    assert "--server.showEmailPrompt=false" in line  # which would wait for an answer
    assert line[-2:] == ["--", str(tmp_path.resolve())]


def test_an_index_without_its_dictionary_is_still_an_entry(tmp_path):
    folder = tmp_path / "features" / "alone-12345678"
    folder.mkdir(parents=True)
    manifest = {"schema": 1, "stage": "features", "name": "alone", "key": "1" * 64,
                "content_hash": "2" * 64, "inputs": {}, "parents": [], "files": {},
                "facts": {"d_sae": 4}}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (entry,) = library.entries(tmp_path)
    assert (entry.id, entry.path, entry.features) == ("alone-12345678", None, folder)
