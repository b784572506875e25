"""Metrics along the edges of planted trees: hand cases, both ends, any split into batches."""

import math

import pytest
import torch
from torch.testing import assert_close

from saelab.metrics.trees import FEWEST_ALONE, Edges, hedging, latents_of, splitting
from saelab.metrics.truth import absorption, assignment, cosines, matched_children, matched_share
from saelab.ops.linalg import unit_rows
from saelab.store.hierarchy import HierarchyConfig, HierarchyWorld

PARENTS = torch.tensor([-1, 0, 0])
W = torch.eye(6)[:3]


def test_a_features_latent_is_its_match_if_near_enough():
    C = torch.tensor([[0.0, -0.6, 0.1], [0.49, 0.2, 0.3]])
    assert latents_of(C, assignment(C)).tolist() == [-1, 0, -1]
    assert latents_of(cosines(-W, W), (torch.arange(3), torch.arange(3))).tolist() == [0, 1, 2]


# -------------------------------------------------------------------------------------- directions


def hedged(V: torch.Tensor, parents: torch.Tensor = PARENTS) -> float | None:
    C = cosines(V, W)
    return hedging(C, assignment(C), parents)


def test_hedging_is_the_parents_part_along_its_children():
    assert hedged(W) == 0
    assert hedged(-W) == 0
    mixed = torch.stack(
        [2 * W[0] + W[1], W[1], W[2]]
    )  # cosine 1/√5 with one child, 0 with the other
    assert hedged(mixed) == pytest.approx(0.5 / math.sqrt(5))
    assert hedged(-mixed) == pytest.approx(0.5 / math.sqrt(5))
    away = torch.stack([2 * W[0] - W[1] - W[2], W[1], W[2]])
    assert hedged(away) == pytest.approx(-1 / math.sqrt(6))
    absorbed = torch.stack([W[0], W[1] + W[0], W[2] + W[0]])  # children's latents do not count
    assert hedged(absorbed) == 0


def test_hedging_is_not_defined_without_a_matched_parent():
    assert hedged(W, torch.full((3,), -1)) is None
    assert hedged(W[1:]) is None


def test_hedging_of_random_directions_is_zero_on_average():
    parents = torch.cat([torch.full((20,), -1), torch.arange(20).repeat(3)])
    found = []
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        planted, V = (unit_rows(torch.randn(80, 40, generator=g)) for _ in range(2))
        C = cosines(V, planted)
        found.append(hedging(C, assignment(C), parents))
    assert abs(sum(found) / 10) < 0.02


def test_absorption_of_random_directions_is_zero_on_average_and_spreads_as_measured():
    """A random dictionary scores −.003 ± .074: a score near 0 proves nothing by itself."""
    truth = HierarchyWorld(HierarchyConfig(kind="hierarchy")).truth
    found = []
    for seed in range(150):
        g = torch.Generator().manual_seed(seed)
        C = cosines(torch.randn(20, 20, generator=g), truth.directions)
        found.append(absorption(C, assignment(C), truth.parents))
    scores = torch.tensor(found)
    assert abs(float(scores.mean())) < 0.025
    assert float(scores.std()) == pytest.approx(0.074, abs=0.015)


def test_a_child_is_found_from_a_cosine_of_nine_tenths():
    for cosine, share in ((0.89, 0.0), (0.91, 1.0)):
        C = torch.tensor([[cosine, 0.0], [0.0, 0.99]])
        assert matched_children(C, assignment(C), torch.tensor([1, -1])) == share
        assert matched_share(C, assignment(C)) == (share + 1) / 2


def test_splitting_counts_latents_per_feature_that_some_latent_points_at():
    assert splitting(cosines(W, W)) == 1
    assert splitting(cosines(-W[[0, 0, 0, 1]], W)) == 2
    far = torch.eye(6)[3:] + 0.3 * W  # cosine .29: points at nothing
    assert splitting(cosines(torch.cat([W[[0, 0]], far]), W)) == 2
    assert splitting(cosines(far, W)) is None


# ------------------------------------------------------------------------------------------- edges


def family(n: int) -> torch.Tensor:
    """A root that is on in half of the rows, with one of two children in two thirds of them."""
    g = torch.Generator().manual_seed(0)
    root = torch.rand(n, generator=g) < 0.5
    which = torch.randint(3, (n,), generator=g)
    return torch.stack([root, root & (which == 0), root & (which == 1)], 1)


def edges_of(fires: torch.Tensor, active: torch.Tensor, batch: int = 4000) -> Edges:
    edges = Edges(torch.arange(3), PARENTS)
    for a, b in zip(fires.split(batch), active.split(batch), strict=True):
        edges.update(a, b)
    return edges


def test_the_truth_has_full_recall_along_edges_and_no_absorption():
    edges = edges_of(active := family(4000), active)
    assert edges.children.tolist() == [1, 2]
    assert edges.recall().tolist() == [1, 1]
    assert edges.absorption().tolist() == [0, 0]


def test_a_parent_that_is_silent_under_a_child_is_absorbed_there():
    active = family(4000)
    fires = active.clone()
    fires[:, 0] &= ~active[:, 1]
    edges = edges_of(fires, active)
    assert edges.recall().tolist() == [0, 1]
    assert edges.absorption().tolist() == [1, 0]


def test_silence_is_no_absorption_but_has_no_recall():
    active = family(4000)
    edges = edges_of(torch.zeros_like(active), active)
    assert edges.recall().tolist() == [0, 0]
    assert edges.absorption().tolist() == [0, 0]


def test_edges_agree_with_a_loop_under_any_split():
    active = family(3000)
    fires = torch.rand(3000, 3, generator=torch.Generator().manual_seed(1)) < 0.4
    whole, split = edges_of(fires, active), edges_of(fires, active, 7)
    assert_close(whole.recall(), split.recall())
    assert_close(whole.absorption(), split.absorption())
    rows = list(zip(fires[:, 0].tolist(), active.tolist(), strict=True))
    alone = [not fired for fired, on in rows if on == [True, False, False]]
    for place, child in enumerate((1, 2)):
        silent = [not fired for fired, on in rows if on[0] and on[child]]
        share = sum(silent) / len(silent)
        assert float(whole.recall()[place]) == pytest.approx(1 - share)
        wanted = share - sum(alone) / len(alone)
        assert float(whole.absorption()[place]) == pytest.approx(wanted)


def test_absorption_needs_enough_rows_with_the_parent_alone():
    active = torch.tensor([[True, False, False]] * (FEWEST_ALONE - 1) + [[True, True, False]])
    edges = edges_of(active, active)
    assert edges.recall()[0] == 1
    assert edges.absorption().isnan().all()
    assert edges.recall()[1].isnan()  # the second child is never on
    edges.update(active[:1], active[:1])
    assert edges.absorption()[0] == 0


def test_edges_whose_parent_has_no_latent_are_left_out():
    edges = Edges(torch.tensor([-1, 0, 1]), PARENTS)
    edges.update(active := family(10)[:, :2], torch.cat([active, active[:, :1]], 1))
    assert len(edges.children) == len(edges.recall()) == len(edges.absorption()) == 0
