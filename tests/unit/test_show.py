"""Text coloured by numbers: what it escapes, how it scales, what it refuses."""

import pytest
import torch

from saelab import show
from saelab.errors import ShapeError
from saelab.features.read import Example


def body(html):
    return html.split("</style>")[-1]


def test_a_heatmap_has_a_token_for_each_string_and_the_largest_in_full_colour():
    html = show.heatmap(["a", " b", "<i>"], [1.0, -2.0, 0.0], caption="<sizes>")
    assert body(html).count("<b") == 3
    assert f'style="{show.colour(1.0, 2.0)}"' in html
    assert f'style="{show.colour(-2.0, 2.0)}"' in html
    assert show.colour(-2.0, 2.0).endswith("0.72)")
    assert "&lt;i&gt;" in html
    assert "&lt;sizes&gt;" in html
    assert html._repr_html_() == html
    assert repr(html) == f"<HTML of {len(html)} characters>"


def test_values_by_position_and_a_given_peak_compare_texts():
    row = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    assert show.heatmap(["a", "b", "c"], row) == show.heatmap(["a", "b", "c"], [0.0, 1.0, 0.0])
    html = show.heatmap(["a", "b", "c"], {1: 1.0}, peak=4.0, at=1, masked=frozenset({0}))
    assert body(html).count("style=") == 1
    assert show.colour(1.0, 4.0) in html
    assert '<b class="at"' in html
    assert "<s " in html
    assert "style=" not in body(show.heatmap(["a"], {}))


def test_values_without_a_token_are_refused():
    with pytest.raises(ShapeError, match="2 tokens came with 1 values"):
        show.heatmap(["a", "b"], [1.0])
    with pytest.raises(ShapeError, match="position 2, but the text has 2 tokens"):
        show.heatmap(["a", "b"], {2: 1.0})


def test_examples_are_lines_with_value_split_and_the_text_around():
    strings = [f" w{i}" for i in range(40)]
    items = [
        Example(3, 20, value, {20: value}, strings, heldout, 7, frozenset())
        for value, heldout in ((4.0, True), (-1.0, False))
    ]
    html = show.examples(items, context=2)
    assert html.count("sl-line") == show.STYLE.count("sl-line") + 2
    assert "w17" not in html
    assert ">w18<" in html
    assert "held-out" in html
    assert "train" in html
    assert show.colour(-1.0, 4.0) in html


def test_blocks_are_put_one_below_the_other():
    first, second = (show.heatmap([token], [1.0]) for token in "ab")
    both = show.stack(first, second)
    assert isinstance(both, show.Html)
    assert both == str(first) + str(second)
    assert show.stack() == ""
