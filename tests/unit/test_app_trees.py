"""Trees and neurons as HTML and charts."""

import json

from test_app_components import NASTY, Tags, an_example, harmless

from saelab.features.relations import Link, NeuronUse, TreeNode
from saelab.metrics.purity import Purity
from saelab_app.components import charts, text, trees


def a_forest(gist="a · b"):
    """A concept 3 of the latents 1 and 0, and a latent 2 that is part of nothing."""
    first = TreeNode(1, 0, gist, 9, 0.75, (Link(4, 0.5, gist),))
    second = TreeNode(0, 0, "", 0, 0.25, ())
    return [TreeNode(3, 1, gist, 12, None, (), [first, second]), TreeNode(2, 0, gist, 1, None, ())]


def link(node):
    return f"feature?latent={node}"


def test_an_outline_nests_children_and_links_every_node():
    html = trees.outline(a_forest(), {}, link)
    for node in (0, 1, 2, 3):
        assert f'<a href="feature?latent={node}">{node}</a>' in html
    inside = html[html.index("<details>") : html.index("</details>")]
    assert inside.index(">3<") < inside.index(">1<") < inside.index(">0<")
    assert ">2<" not in inside
    found = harmless(html)
    for words in ("2 below", "0.75", "also in 4", "never fires"):
        assert words in found.text


def test_labels_are_tinted_from_twice_their_base_rate_on():
    assert '"sl-badge live"' in trees.label(Purity("sky", 4, 10, 0.2))
    weak = trees.label(Purity("sky", 3, 10, 0.2))
    assert "live" not in weak
    assert "sky 30 %" in weak
    assert "3 of 10" in weak
    assert "base rate 20 %" in weak


def test_no_gist_or_label_can_become_a_tag():
    for token in NASTY:
        harmless(trees.outline(a_forest(token), {3: Purity(token, 1, 2, 0.5)}, link))
        harmless(text.beside(0.5, token, about=token))
        assert "<" not in "".join(charts.icicle(a_forest(token)).data[0].labels)


def test_neurons_show_weight_sign_and_how_many_others_use_them():
    html = trees.neurons([NeuronUse(417, -0.5, 3), NeuronUse(9, 0.25, 1)])
    assert "417-0.50+ 2" in harmless(html).text
    assert "90.25alone" in harmless(html).text
    assert html.count("sl-bar neg") == 1
    assert trees.neurons([]).count("<tr>") == 0


def test_the_icicle_holds_every_node_below_the_one_it_is_drawn_under():
    drawn = json.loads(charts.icicle(a_forest()).to_json())["data"][0]
    place = dict(
        zip(drawn["ids"], zip(drawn["parents"], drawn["values"], strict=True), strict=True)
    )
    assert place == {
        "all": ("", 3), "3": ("all", 2), "1": ("3", 1), "0": ("3", 1), "2": ("all", 1),
    }  # fmt: skip


def test_shared_neurons_are_drawn_from_nothing_to_all():
    drawn = charts.overlap([4, 7], [[1.0, 0.5], [0.5, 1.0]]).data[0]
    assert (list(drawn.x), drawn.zmin, drawn.zmax) == (["4", "7"], 0, 1)


def test_an_example_can_be_open_and_tells_its_documents_label():
    item = an_example(["The", " cat", " sat"])
    assert "<details open>" in text.example(item, peak=1.0, context=2, whole=True)
    assert "<details>" in text.example(item, peak=1.0, context=2)
    labelled = type(item)(**vars(item) | {"label": "<sea>"})
    shown = Tags(text.example(labelled, peak=1.0, context=2)).text
    assert "document 7 (<sea>), window 3" in shown
