"""Effects and edges against patching by hand, finite differences and closed forms."""

import pytest
import torch
from circuit_toys import BRANCH, FIRST, LAST, linear_codes, linear_model, random_contrast

from saelab.circuits.attribution import (
    AttributionConfig,
    attribute,
    passages,
    path_gradient,
    split,
)
from saelab.circuits.bases import neurons, principal_directions
from saelab.circuits.contrast import clean_metric
from saelab.circuits.edges import cost, edges, outflow
from saelab.circuits.graph import build
from saelab.circuits.nodes import Place, every, places, ranked
from saelab.dictionaries.matching_pursuit import MatchingPursuit, MatchingPursuitConfig
from saelab.dictionaries.topk import TopK, TopKConfig
from saelab.errors import ArtifactError, ConfigError, ResourceError, SiteError


@pytest.fixture(scope="module")
def linear():
    return linear_model()


@pytest.fixture(scope="module")
def contrast():
    return random_contrast()


def three_sites():
    return {FIRST: linear_codes(1), BRANCH: linear_codes(2, 3), LAST: linear_codes(3, 5)}


def total_effect(effects):
    return {site: float(found.mean.sum()) for site, found in effects.items()}


# ------------------------------------------------------------------------------------------- paths


def quadratic_gradient(f):
    return 2 * f + f.flip(0)  # of ‖f‖² + f₁ f₂


@pytest.mark.parametrize(("steps", "error"), [(10, -0.925), (20, -0.4625), (40, -0.23125)])
def test_the_left_sum_of_a_quadratic_errs_by_one_over_the_steps(steps, error):
    start, end = torch.tensor([1.0, 2.0]).double(), torch.tensor([-1.0, 0.5]).double()
    exact = 0.75 - 7.0
    mean = path_gradient(quadratic_gradient, start, end, steps=steps, rule="left")
    assert float(mean @ (end - start)) - exact == pytest.approx(error, abs=1e-12)
    middle = path_gradient(quadratic_gradient, start, end, steps=steps, rule="midpoint")
    assert float(middle @ (end - start)) == pytest.approx(exact, abs=1e-12)


def test_one_left_step_is_the_gradient_at_the_start():
    start, end = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5])
    found = path_gradient(quadratic_gradient, start, end, steps=1, rule="left")
    torch.testing.assert_close(found, quadratic_gradient(start))


# ----------------------------------------------------------------------------------------- effects


def patched_effect(model, contrast, dictionary, place):
    """The effect of a node by running the model with only this node corrupted."""
    x, other = (model.capture(t, [place.site])[place.site] for t in
                (contrast.clean, contrast.corrupted))  # fmt: skip
    clean, corrupted = split(dictionary, x), split(dictionary, other)
    here = (contrast.slots == place.slot)[..., None]
    if place.column == dictionary.d_sae:
        change = corrupted.error - clean.error
    else:
        change = (corrupted.f - clean.f)[..., [place.column]] * dictionary.W_dec[place.column]
    logits = model.logits(contrast.clean, {place.site: lambda x: x + here * change})
    return clean_metric(model, contrast) - contrast.measure(logits).double()


@pytest.mark.parametrize("method", ["attribution", "integrated"])
def test_where_all_is_linear_effects_are_exact_and_sum_to_the_whole_site(linear, contrast, method):
    config = AttributionConfig(method=method, steps=3, batch=2)
    dictionaries = three_sites()
    found = attribute(linear, contrast, dictionaries, config)
    for site, effects in found.items():
        for slot in range(1, contrast.n_slots):
            for column in range(dictionaries[site].d_sae + 1):
                exact = patched_effect(
                    linear, contrast, dictionaries[site], Place(site, slot, column)
                )
                assert float(effects.mean[slot, column]) == pytest.approx(
                    float(exact.mean()), abs=2e-4
                )
                assert float(effects.standard_error[slot, column]) == pytest.approx(
                    float(exact.std() / len(exact) ** 0.5), abs=2e-4
                )
        assert not effects.mean[0].any()  # the first position is outside
    clean, corrupted = (clean_metric(linear, contrast, corrupted=c).mean() for c in (False, True))
    for site in (FIRST, LAST):  # the whole stream goes through these
        assert total_effect(found)[site] == pytest.approx(float(clean - corrupted), abs=1e-4)


def test_effects_do_not_depend_on_the_batch_and_come_in_forward_order(linear, contrast):
    backwards = dict(reversed(three_sites().items()))
    found = [
        attribute(linear, contrast, backwards, AttributionConfig(method="attribution", batch=b))
        for b in (1, 4)
    ]
    assert list(found[0]) == [FIRST, BRANCH, LAST]
    for site in found[0]:
        torch.testing.assert_close(found[0][site].mean, found[1][site].mean, atol=1e-5, rtol=1e-5)


def test_without_corrupted_prompts_nodes_are_compared_with_nothing(linear, contrast):
    from dataclasses import replace

    alone, dictionary = replace(contrast, corrupted=None), linear_codes(1)
    found = attribute(linear, alone, {FIRST: dictionary}, AttributionConfig(method="attribution"))
    x = linear.capture(alone.clean, [FIRST])[FIRST]
    inside = (alone.slots >= 0)[..., None]
    logits = linear.logits(alone.clean, {FIRST: lambda _: torch.where(inside, dictionary.b_dec, x)})
    lost = (clean_metric(linear, alone) - alone.measure(logits)).mean()
    assert total_effect(found)[FIRST] == pytest.approx(float(lost), abs=1e-4)


def test_a_basis_has_no_error_and_effects_that_sum_to_the_same(linear, contrast):
    x = linear.capture(contrast.clean, [LAST])[LAST].flatten(0, 1)
    totals = []
    for basis in (neurons(6), principal_directions(x)):
        torch.testing.assert_close(basis.encode(x) @ basis.W_dec + basis.b_dec, x)
        found = attribute(linear, contrast, {LAST: basis})
        assert float(found[LAST].mean[:, -1].abs().max()) < 1e-4
        totals.append(total_effect(found)[LAST])
    assert totals[0] == pytest.approx(totals[1], abs=1e-4)
    codes = principal_directions(x).encode(x)
    spread = codes.var(0)
    assert bool((spread[:-1] >= spread[1:] - 1e-5).all())
    assert float(codes.mean(0).abs().max()) < 1e-5


# ------------------------------------------------------------------------------------------- edges


def finite_edge(model, contrast, dictionaries, source, target, step=1e-2):
    """The edge by pushing the source a little and holding all sites between at their values."""
    names = list(dictionaries)
    clean = model.capture(contrast.clean, names)
    other = model.capture(contrast.corrupted, names)
    parts = {s: (split(dictionaries[s], clean[s]), split(dictionaries[s], other[s])) for s in names}

    def moved(place, by):
        here, d = (contrast.slots == place.slot)[..., None], dictionaries[place.site]
        a, b = parts[place.site]
        if place.column == d.d_sae:
            return by * here * (a.error - b.error)
        return by * here * (a.f - b.f)[..., [place.column]] * d.W_dec[place.column]

    hold = {s: (lambda x, s=s: clean[s]) for s in names if s != source.site}
    seen = {}

    def run(by, stop):
        edits = {
            k: v for k, v in hold.items() if stop is None or names.index(k) < names.index(stop)
        }
        edits[source.site] = lambda x: clean[source.site] + moved(source, by)
        if stop is not None:
            edits[stop] = lambda x: seen.setdefault(by, x)
        logits = model.logits(contrast.clean, edits)
        return contrast.measure(logits)

    if target is None:
        return float(((run(step, None) - run(-step, None)) / (2 * step)).mean())
    for by in (step, -step):
        run(by, target.site)
    rate = (seen[step] - seen[-step]) / (2 * step)
    d, here = dictionaries[target.site], (contrast.slots == target.slot)[..., None]
    g = model.grad_at(contrast.clean, [target.site], lambda z: contrast.measure(z).sum())
    g = g[target.site][1] * here
    if target.column == d.d_sae:
        code = d.encode(clean[target.site] + rate) - d.encode(clean[target.site])
        return float((g * (rate - code @ d.W_dec)).sum() / len(contrast))
    code = (d.encode(clean[target.site] + rate) - d.encode(clean[target.site]))[..., target.column]
    return float((code * (g @ d.W_dec[target.column])).sum() / len(contrast))


def test_edges_of_a_linear_model_are_finite_differences_past_the_sites_between(linear, contrast):
    dictionaries = three_sites()
    nodes = [
        Place(FIRST, 1, 0), Place(FIRST, 3, 4), Place(FIRST, 2, 2), Place(BRANCH, 3, 1),
        Place(BRANCH, 3, 3), Place(LAST, 3, 0), Place(LAST, 3, 5), Place(LAST, 2, 1),
    ]  # fmt: skip
    config = AttributionConfig(method="attribution", batch=3)
    between = passages(linear, contrast, dictionaries, config)
    found = edges(linear, contrast, dictionaries, nodes, between, batch=2)
    order = [FIRST, BRANCH, LAST]
    for i, source in enumerate(nodes):
        for j, target in enumerate([*nodes, None]):
            later = target is None or order.index(target.site) > order.index(source.site)
            expected = 0.0
            if later:
                expected = finite_edge(linear, contrast, dictionaries, source, target)
            assert float(found[i, j]) == pytest.approx(expected, abs=2e-3, rel=2e-3)
    assert float(found[:4, 3:5].abs().max()) > 0.01  # stream → branch, at the same position
    assert float(found[3:5, 5:7].abs().max()) > 0.01  # branch → stream


def started(dictionary):
    generator = torch.Generator().manual_seed(0)
    dictionary.init_(torch.randn(64, dictionary.d_in, generator=generator), generator)
    return dictionary


@pytest.mark.parametrize("kind", ["topk", "pursuit"])
def test_in_a_stream_edges_out_of_a_node_sum_to_its_effect(toy_model, kind):
    """Whatever the type: the support of a code is held fixed."""
    sites = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    pursuit = MatchingPursuitConfig(d_in=32, d_sae=8, k=3, signed=True)
    kinds = {"topk": TopK(TopKConfig(d_in=32, d_sae=8, k=3)), "pursuit": MatchingPursuit(pursuit)}
    first = started(TopK(TopKConfig(d_in=32, d_sae=8, k=3)))
    dictionaries = dict(zip(sites, (first, started(kinds[kind])), strict=True))
    contrast = random_contrast(3, 4, toy_model.d_vocab)
    config = AttributionConfig(method="attribution", batch=2)
    effects = attribute(toy_model, contrast, dictionaries, config)
    scores = {site: found.mean for site, found in effects.items()}
    numbers = every(scores)
    all_places = [
        Place(site, slot, column)
        for site in sites
        for slot in range(1, contrast.n_slots)
        for column in range(numbers[site].shape[1])
    ]
    between = passages(toy_model, contrast, dictionaries, config)
    found = edges(toy_model, contrast, dictionaries, all_places, between, batch=2)
    sent = outflow(toy_model, contrast, dictionaries, all_places, between, batch=1)
    torch.testing.assert_close(sent, found.sum(1), atol=1e-3, rtol=1e-3)
    for i, place in enumerate(all_places):
        effect = float(scores[place.site][place.slot, place.column])
        out = found[i, :-1].sum() if place.site == sites[0] else found[i, -1]
        assert float(out) == pytest.approx(effect, abs=1e-3, rel=1e-3)


def test_edges_add_up_to_clean_effects_and_only_roughly_to_integrated_ones(toy_model):
    """The gradient at a target is the mean over a line, what leads to it the clean prompt's."""
    sites = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    dictionaries = {site: started(TopK(TopKConfig(d_in=32, d_sae=8, k=3))) for site in sites}
    contrast = random_contrast(6, 5, toy_model.d_vocab)
    off = {}
    for method in ("attribution", "integrated"):
        config = AttributionConfig(method=method, steps=5, batch=4)
        found = build(toy_model, contrast, dictionaries, n_nodes=20, config=config)
        by_hand = sum(abs(n.outflow - n.effect) for n in found.nodes)
        off[method] = by_hand / sum(abs(n.effect) for n in found.nodes)
        assert found.mismatch == pytest.approx(off[method])
    assert off["attribution"] < 1e-3
    assert off["integrated"] == pytest.approx(0.92, abs=0.05)


# ----------------------------------------------------------------------------------------- choices


def test_nodes_are_ranked_by_size_and_found_again_by_number():
    scores = {"a": torch.tensor([[0.0, -3.0], [1.0, 2.0]]), "b": torch.tensor([[4.0, 0.5, 0.0]])}
    numbers = ranked(scores)
    assert places(scores, numbers) == [
        ("b", 0, 0), ("a", 0, 1), ("a", 1, 1), ("a", 1, 0), ("b", 0, 1),
    ]  # fmt: skip
    assert places(scores, ranked(scores, errors=False)) == [("b", 0, 0), ("a", 1, 0), ("b", 0, 1)]


# --------------------------------------------------------------------------------------- bad input


def test_dictionaries_of_another_width_or_site_are_refused(linear, contrast):
    with pytest.raises(ArtifactError, match="width 7"):
        attribute(linear, contrast, {FIRST: linear_codes(0, d=7)})
    with pytest.raises(SiteError, match="hook_resid_post"):
        attribute(linear, contrast, {"blocks.0.hook_resid_pst": linear_codes(0)})
    with pytest.raises(ConfigError, match="dictionary"):
        attribute(linear, contrast, {})
    with pytest.raises(ConfigError, match="no node"):
        edges(linear, contrast, {FIRST: linear_codes(0)}, [Place(FIRST, 1, 9)], {})


def test_a_graph_over_its_budget_is_refused_with_the_budget_that_fits(linear, contrast):
    dictionaries = three_sites()
    least = cost(linear, contrast, dictionaries, 0, batch=16).fixed
    room = least + 24 * 7 * 8 + 1
    nodes = [Place(FIRST, 1, 0)] * 9
    with pytest.raises(ResourceError, match="7 nodes fit"):
        edges(linear, contrast, dictionaries, nodes, {}, memory_gb=room / 1e9)
    with pytest.raises(ResourceError, match="smaller batch"):
        edges(linear, contrast, dictionaries, nodes, {}, memory_gb=least / 2e9)
    between = passages(linear, contrast, dictionaries, AttributionConfig(method="attribution"))
    edges(linear, contrast, dictionaries, nodes[:7], between, memory_gb=room / 1e9)
