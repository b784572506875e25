"""Layers matched by likeness: copies, shuffles, ties, and Spearman's null against scipy."""

import itertools

import pytest
import torch
from scipy.stats import spearmanr

from saelab.errors import ShapeError
from saelab.evals.layers import (
    BASELINES,
    LayerView,
    accuracy,
    compare,
    compare_keys,
    compare_sizes,
    depth_order,
    layer_error,
    matched,
)
from saelab.evals.similarity import PairMoments, linear_cka, regression, relative, svcca

N, L = 600, 4
ANCHORS = torch.arange(0, N, 20)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack(seed=0):
    """Layers that drift: each keeps most of the one before it."""
    layers = [normal(N, 10, seed=seed) * torch.linspace(0.5, 2, 10) + 3]
    for depth in range(1, L):
        layers.append(0.8 * layers[-1] + normal(N, 10, seed=100 * seed + depth))
    return layers


def views(layers):
    return [LayerView(x, ANCHORS) for x in layers]


LAYERS = stack()
OTHERS = [x @ normal(10, 7, seed=9) + 0.5 * normal(N, 7, seed=20 + i) for i, x in enumerate(LAYERS)]
FOUND = compare(views(LAYERS), views(OTHERS))


def test_all_pairs_are_what_the_measures_say_of_each_pair():
    for i, j in itertools.product(range(L), range(L)):
        x, y = LAYERS[i].double(), OTHERS[j].double()
        pair = PairMoments(10, 7).update(x, y).compute()
        expected = {
            "cka": linear_cka(pair), "svcca": svcca(pair), "relative": relative(x, y, ANCHORS),
            "regression": regression(pair),
        }  # fmt: skip
        for name in BASELINES:
            assert float(FOUND[name].forth[i, j]) == pytest.approx(expected[name], abs=1e-9)
        back = float(FOUND["regression"].back[j, i])
        assert back == pytest.approx(regression(pair.swapped()), abs=1e-9)


@pytest.mark.parametrize("name", ["cka", "svcca", "relative"])
def test_measures_without_a_direction_are_transposed(name):
    assert torch.equal(FOUND[name].back, FOUND[name].forth.T)


@pytest.mark.parametrize("name", BASELINES)
def test_a_copy_is_matched_with_itself_and_a_shuffled_copy_with_its_layers(name):
    same = compare(views(LAYERS), views(LAYERS))[name]
    assert accuracy(same.forth) == accuracy(same.back) == 1
    assert layer_error(same.forth, range(L)) == 0
    order = [2, 0, 3, 1]
    turned = compare(views(LAYERS), views([LAYERS[i] for i in order]))[name]
    assert matched(turned.back).argmax(1).tolist() == order
    assert accuracy(turned.forth) == 0


def test_rotated_and_scaled_layers_are_found_by_all():
    rotation = torch.linalg.qr(normal(10, 10, seed=7))[0]
    found = compare(views(LAYERS), views([3 * x @ rotation - 1 for x in LAYERS]))
    assert {name: accuracy(found[name].forth) for name in BASELINES} == dict.fromkeys(BASELINES, 1)


def test_ties_are_shared_so_that_knowing_nothing_scores_chance():
    nothing = torch.zeros(5, 5)
    assert accuracy(nothing) == pytest.approx(1 / 5)
    assert layer_error(nothing, [0, 1, 2, 3, 4]) == pytest.approx(8 / 5)
    assert matched(torch.tensor([[1.0, 2.0, 2.0]])).tolist() == [[0, 0.5, 0.5]]


def test_the_layer_error_is_in_layers_of_the_model():
    reversed_ = torch.eye(3).flip(0)
    assert layer_error(reversed_, [0, 1, 2]) == pytest.approx(4 / 3)
    assert layer_error(reversed_, [0, 10, 20]) == pytest.approx(40 / 3)
    assert accuracy(reversed_) == pytest.approx(1 / 3)


def test_keys_and_sizes():
    found = compare_keys([{1, 2}, {3}], [{2, 3}, {3}])
    torch.testing.assert_close(found.forth, torch.tensor([[1 / 3, 0], [0.5, 1]]).double())
    sizes = compare_sizes([10, 40], [11, 39])
    assert accuracy(sizes.forth) == 1
    assert float(sizes.forth[0, 1]) == pytest.approx(-torch.tensor(3.9).log().item())
    assert accuracy(compare_sizes([5, 5], [5, 5]).forth) == 0.5
    with pytest.raises(ShapeError, match="1 or more"):
        compare_sizes([0, 1], [1, 1])


# ------------------------------------------------------------------------------- order by depth


def likeness_of(matches, m):
    return torch.nn.functional.one_hot(torch.tensor(matches), m).double()


def test_rho_is_spearmans_and_its_p_is_that_of_all_permutations():
    matches = [0, 2, 1, 3, 3]
    depths = [i / 4 for i in range(5)]
    found = depth_order(likeness_of(matches, 5), (depths, depths), permutations=40_000)
    assert found.rho == pytest.approx(spearmanr(range(5), matches).statistic)
    all_of_them = [spearmanr(range(5), p).statistic for p in itertools.permutations(matches)]
    exact = sum(rho >= found.rho - 1e-12 for rho in all_of_them) / len(all_of_them)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.null[0] < -0.8
    assert found.null[1] > 0.8


def test_an_ordered_match_has_rho_one_and_a_turned_one_minus_one():
    depths = [i / 7 for i in range(8)], [i / 11 for i in range(12)]
    up = depth_order(likeness_of([0, 1, 3, 4, 6, 7, 9, 11], 12), depths)
    assert up.rho == pytest.approx(1)
    assert up.p < 1e-3
    down = depth_order(likeness_of([11, 9, 7, 6, 4, 3, 1, 0], 12), depths)
    assert down.rho == pytest.approx(-1)
    assert down.p == 1


def test_one_layer_for_all_or_ties_everywhere_is_no_order():
    depths = [0.0, 0.5, 1.0], [0.0, 0.5, 1.0]
    for likeness in (likeness_of([1, 1, 1], 3), torch.zeros(3, 3)):
        found = depth_order(likeness, depths)
        assert (found.rho, found.p) == (0, 1)


def test_under_the_null_p_is_uniform():
    depths = [i / 9 for i in range(10)]
    order = [torch.randperm(10, generator=torch.Generator().manual_seed(i)) for i in range(200)]
    p = [
        depth_order(likeness_of(o.tolist(), 10), (depths, depths), permutations=200).p
        for o in order
    ]
    assert 0.4 < sum(p) / len(p) < 0.6
    assert sum(x < 0.1 for x in p) < 40


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ShapeError, match="same places of the text"):
        compare(views(LAYERS), [LayerView(LAYERS[0][:-1], ANCHORS)])
    with pytest.raises(ShapeError, match="two rows or more"):
        LayerView(LAYERS[0][:1], ANCHORS[:1])
    with pytest.raises(ShapeError, match="use `depth_order`"):
        accuracy(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="three layers"):
        depth_order(torch.eye(2), ([0.0, 1.0], [0.0, 1.0]))
