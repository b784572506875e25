"""Circuits at their two ends, against running the model by hand, and as files."""

import json
from dataclasses import replace

import pytest
import torch
from circuit_toys import BRANCH, FIRST, LAST, linear_codes, linear_model, random_contrast
from doubles import WordTokenizer

from saelab.circuits.ablation import Faithfulness
from saelab.circuits.attribution import AttributionConfig, attribute, passages, split
from saelab.circuits.bases import neurons
from saelab.circuits.contrast import OUTSIDE, Contrast, clean_metric, contrast_of
from saelab.circuits.curves import CIRCUIT, LATENTS, CurvesConfig, curves
from saelab.circuits.graph import METRIC, Graph, build
from saelab.circuits.nodes import every, keep, ranked, without
from saelab.circuits.tasks import draw
from saelab.errors import ArtifactError, ConfigError, ResourceError, ShapeError

FAST = AttributionConfig(method="attribution", batch=4)


@pytest.fixture(scope="module")
def linear():
    return linear_model()


@pytest.fixture(scope="module")
def contrast(linear):
    """Pairs of which the clean prompt has the larger metric, so that there is a difference."""
    drawn = random_contrast(60)
    better = clean_metric(linear, drawn) > clean_metric(linear, drawn, corrupted=True) + 5
    return drawn.select(better.nonzero()[:, 0])


def dictionaries():
    return {FIRST: linear_codes(1), BRANCH: linear_codes(2, 3), LAST: linear_codes(3, 5)}


@pytest.fixture(scope="module")
def measure(linear, contrast):
    return Faithfulness(linear, contrast, dictionaries(), batch=4)


# --------------------------------------------------------------------------------- the two ends


def test_the_full_circuit_is_the_model_to_the_bit_and_the_empty_one_is_none_of_it(
    linear, contrast, measure
):
    full = measure.metric(measure.everything)
    assert torch.equal(full, clean_metric(linear, contrast, batch=4))
    assert measure.of(measure.everything).value == 1.0
    assert measure.of(without(measure.everything)).value == 0.0
    assert measure.completeness(measure.everything).value == 0.0
    assert measure.of(measure.everything).standard_error == 0.0


def test_the_empty_circuit_holds_each_sites_mean_whatever_the_dictionary(linear, contrast, measure):
    own = Faithfulness(linear, contrast, {s: neurons(6) for s in dictionaries()}, batch=3)
    torch.testing.assert_close(own.empty, measure.empty, atol=1e-3, rtol=1e-3)
    x = linear.capture(contrast.corrupted, [LAST])[LAST]
    mean = x.mean(0)
    expected = contrast.measure(
        linear.logits(contrast.clean, {LAST: lambda y: torch.cat([y[:, :1], mean[1:].expand(
            len(y), -1, -1)], 1)})
    )  # fmt: skip
    torch.testing.assert_close(measure.empty, expected.double(), atol=1e-3, rtol=1e-3)


def test_a_node_outside_takes_the_mean_of_its_own_template(linear, contrast):
    """Two templates with a slot of one name, whose tokens have nothing in common."""
    mixed = replace(contrast, templates=torch.arange(len(contrast)) % 2)
    own = Faithfulness(linear, mixed, {LAST: linear_codes(3, 5)}, batch=4)
    x = linear.capture(contrast.corrupted, [LAST])[LAST]
    mean = torch.stack([x[0::2].mean(0), x[1::2].mean(0)])[mixed.templates]
    put = torch.cat([linear.capture(contrast.clean, [LAST])[LAST][:, :1], mean[:, 1:]], 1)
    expected = contrast.measure(linear.logits(contrast.clean, {LAST: lambda y: put[: len(y)]}))
    torch.testing.assert_close(own.empty, expected.double(), atol=1e-3, rtol=1e-3)
    pooled = Faithfulness(linear, contrast, {LAST: linear_codes(3, 5)}, batch=4)
    assert float((own.empty - pooled.empty).abs().max()) > 0.1
    assert own.means[LAST].f.shape == (2, contrast.n_slots, 5)


def test_a_circuit_is_what_running_the_model_node_by_node_gives(linear, contrast, measure):
    own = dictionaries()
    generator = torch.Generator().manual_seed(5)
    kept = {
        site: torch.rand(mask.shape, generator=generator) < 0.5
        for site, mask in measure.everything.items()
    }
    corrupted = linear.capture(contrast.corrupted, list(own))

    def slowly(site):
        def edit(x):
            y = x.clone()
            d = own[site]
            for row in range(len(x)):
                for position in range(1, x.shape[1]):
                    slot = int(contrast.slots[row, position])
                    parts = split(d, x[row : row + 1, position : position + 1])
                    f, error = parts.f[0, 0].clone(), parts.error[0, 0]
                    others = split(d, corrupted[site][:, position : position + 1])
                    for latent in range(d.d_sae):
                        if not kept[site][slot, latent]:
                            f[latent] = others.f[:, 0, latent].mean()
                    if not kept[site][slot, -1]:
                        error = others.error[:, 0].mean(0)
                    y[row, position] = f @ d.W_dec + d.b_dec + error
            return y

        return edit

    logits = linear.logits(contrast.clean, {site: slowly(site) for site in own})
    expected = contrast.measure(logits).double()
    torch.testing.assert_close(measure.metric(kept), expected, atol=1e-3, rtol=1e-3)


def test_faithfulness_with_its_error_does_not_depend_on_the_batch(linear, contrast, measure):
    kept = every(measure.everything, errors=False)
    other = Faithfulness(linear, contrast, dictionaries(), batch=1)
    assert other.of(kept).value == pytest.approx(measure.of(kept).value, abs=1e-4)
    assert measure.of(kept).standard_error > 0
    torch.testing.assert_close(measure.metric(kept), measure.ceiling())


def test_without_errors_what_is_left_goes_from_the_ceiling_to_nothing(measure):
    everything, nothing = measure.everything, without(measure.everything)
    ceiling = measure.share(measure.ceiling()).value
    assert measure.completeness(nothing, errors=False).value == pytest.approx(ceiling)
    assert measure.completeness(everything, errors=False).value == 0.0
    half = {site: mask.clone() for site, mask in nothing.items()}
    half[LAST][:, 0] = True
    others = {site: mask.clone() for site, mask in everything.items()}
    for mask in others.values():
        mask[:, -1] = False
    others[LAST][:, 0] = False
    found = measure.completeness(half, errors=False).value
    assert found == pytest.approx(measure.of(others).value) and found != pytest.approx(ceiling)


def test_a_metric_within_noise_has_no_faithfulness(linear, contrast):
    same = replace(contrast, corrupted=contrast.clean)
    one_prompt = same.select(torch.tensor([0, 0, 0]))
    with pytest.raises(ConfigError, match="no more than noise"):
        Faithfulness(linear, one_prompt, dictionaries())
    with pytest.raises(ConfigError, match="corrupted"):
        Faithfulness(linear, replace(contrast, corrupted=None), dictionaries())


# -------------------------------------------------------------------------------------- curves


def test_curves_reach_one_with_errors_and_the_ceiling_without(linear, contrast, measure):
    between = passages(linear, contrast, dictionaries(), FAST)
    found = curves(measure, contrast, between, CurvesConfig(sizes=[2, 1000], draws=1))
    last = {p.arm: p for p in found.points if p.n_nodes > 2}
    assert set(last) == {CIRCUIT, LATENTS, "by activation", "random 0", "neurons", "pca"}
    assert last[CIRCUIT].faithfulness.value == pytest.approx(1, abs=1e-4)
    assert last[CIRCUIT].completeness.value == pytest.approx(0, abs=1e-4)
    assert last[LATENTS].completeness.value == pytest.approx(0, abs=1e-4)
    assert all(p.completeness is None for p in found.points if p.arm not in (CIRCUIT, LATENTS))
    for arm in (LATENTS, "by activation", "random 0"):
        assert last[arm].faithfulness.value == pytest.approx(found.ceiling.value, abs=1e-4)
        assert last[arm].of_ceiling.value == pytest.approx(1, abs=1e-4)
    for arm in ("neurons", "pca"):
        assert last[arm].faithfulness.value == pytest.approx(1, abs=1e-3)
    assert found.nodes_at(0.99, CIRCUIT) == last[CIRCUIT].n_nodes
    assert found.nodes_at(1.5, CIRCUIT) is None


# --------------------------------------------------------------------------------------- graphs


@pytest.fixture(scope="module")
def graph(linear, contrast):
    return build(linear, contrast, dictionaries(), n_nodes=12, config=FAST, edge_share=0.0)


def test_a_graph_names_its_nodes_and_comes_back_from_json(graph):
    assert len(graph.nodes) == 12
    sizes = [abs(node.effect) for node in graph.nodes]
    assert sizes == sorted(sizes, reverse=True)
    assert all(node.id == f"{node.site}/{node.latent}@{node.slot}" for node in graph.nodes
               if node.kind == "latent")  # fmt: skip
    plain = json.loads(json.dumps(graph.plain()))
    assert Graph.parse(plain) == graph
    assert graph.node(graph.nodes[3].id) == graph.nodes[3]
    assert graph.place(graph.nodes[0]).slot == graph.slots.index(graph.nodes[0].slot)
    ids = {node.id for node in graph.nodes} | {METRIC}
    assert graph.edges and all({e.source, e.target} <= ids for e in graph.edges)
    assert 0 < graph.share < 1


def test_a_graph_of_all_nodes_has_all_of_the_effect(linear, contrast):
    whole = build(linear, contrast, {FIRST: linear_codes(1)}, n_nodes=10_000, config=FAST)
    assert whole.share == pytest.approx(1)
    assert sum(node.effect for node in whole.nodes) == pytest.approx(
        whole.clean - whole.corrupted, abs=1e-3
    )
    with pytest.raises(ResourceError, match="batch"):
        build(linear, contrast, {FIRST: linear_codes(1)}, n_nodes=10, config=FAST, memory_gb=1e-9)


def test_what_is_no_graph_is_refused(graph):
    for data in ([], {"schema": 2}, {"schema": 1, "nodes": []}, graph.plain() | {"odd": 1}):
        with pytest.raises(ArtifactError, match="circuit"):
            Graph.parse(data)
    with pytest.raises(ArtifactError, match="no node 'x'"):
        graph.node("x")


# --------------------------------------------------------------------------------------- prompts


def test_tasks_become_pairs_with_a_slot_for_every_position():
    data = draw("ioi", WordTokenizer(), 8, seed=0)
    contrast = contrast_of(data)
    names = contrast.slot_names
    assert bool((contrast.slots[:, 0] == OUTSIDE).all())
    for row in range(len(data)):
        length = int(data.lengths[row])
        labels = [names[i] for i in contrast.slots[row, 1:length].tolist()]
        assert len(set(labels)) == len(labels) and labels[-1] == "end"
        for slot, at in data.slots.items():
            assert labels[int(at[row]) - 1] == slot
        place = labels.index("s2")
        assert labels[place + 1] == "s2+1"
        assert bool((contrast.slots[row, length:] == OUTSIDE).all())
    logits = torch.randn(*contrast.clean.shape, 400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(contrast.measure(logits), data.measure(data.at_end(logits)))
    some = contrast_of(data.rows(torch.arange(2)), slot_names=names)
    assert torch.equal(some.slots, contrast.slots[:2])
    with pytest.raises(ConfigError, match="those known"):
        contrast_of(data, slot_names=("s2", "end"))
    assert torch.equal(some.template_of, data.templates[:2])
    part = contrast.select(torch.tensor([4, 1])).select(torch.tensor([1]))
    torch.testing.assert_close(part.measure(logits[[1]]), contrast.measure(logits)[[1]])


def test_prompts_that_do_not_fit_are_refused(contrast):
    with pytest.raises(ShapeError, match="equal token length"):
        replace(contrast, corrupted=contrast.clean[:, :-1])
    with pytest.raises(ConfigError, match="no prompt"):
        replace(contrast, slots=torch.full_like(contrast.slots, -1))
    with pytest.raises(ShapeError, match="2 pairs have a template"):
        replace(contrast, templates=torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match="no name"):
        replace(contrast, slot_names=("a",))
    wrong = Contrast(
        contrast.clean, contrast.corrupted, contrast.slots, contrast.slot_names,
        lambda logits, rows: logits[:, -1],
    )  # fmt: skip
    with pytest.raises(ShapeError, match="one number"):
        wrong.measure(torch.zeros(len(contrast), 4, 11))


def test_kept_nodes_are_those_ranked_first(linear, contrast):
    effects = attribute(linear, contrast, dictionaries(), FAST)
    scores = {site: found.mean for site, found in effects.items()}
    order = ranked(scores)
    kept = keep(scores, order[:7])
    cut = float(torch.cat([s.abs().flatten() for s in scores.values()])[order[6]])
    for site, mask in kept.items():
        assert torch.equal(mask, scores[site].abs() >= cut)
