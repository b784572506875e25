"""Metrics against planted truth: hand cases, both ends, and the ceilings."""

import math

import pytest
import torch
from torch.testing import assert_close

from saelab.metrics.reconstruction import Reconstruction
from saelab.metrics.truth import (
    Firing,
    absorption,
    assignment,
    best_thresholds,
    cosines,
    matched_children,
    matched_share,
    mcc,
    overlap,
    partners,
    uniqueness,
)


def directions(n: int = 30, d: int = 12, seed: int = 0) -> torch.Tensor:
    W = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return W / W.norm(dim=1, keepdim=True)


def matched_mcc(C: torch.Tensor) -> float:
    return mcc(C, assignment(C))


# -------------------------------------------------------------------------------------- directions


def test_the_planted_dictionary_scores_one_in_any_order_sign_and_length():
    W = directions()
    g = torch.Generator().manual_seed(1)
    other = W[torch.randperm(30, generator=g)] * torch.randn(30, 1, generator=g) * 7
    C = cosines(other, W)
    assert matched_mcc(C) == pytest.approx(1)
    assert uniqueness(C) == 1
    assert matched_share(C, assignment(C)) == 1


def test_a_random_dictionary_has_the_mcc_of_chance_far_below_one():
    scores = [matched_mcc(cosines(directions(32, 64, 1 + i), directions(32, 64))) for i in range(5)]
    chance = sum(scores) / 5
    # the best of about 32 half-normal cosines of size 1/√64, less what the matching takes
    assert 1.5 / 8 < chance < math.sqrt(2 * math.log(32)) / 8 + 0.02
    assert max(scores) - min(scores) < 0.05
    C = cosines(directions(32, 64, 1), directions(32, 64))
    assert matched_share(C, assignment(C)) == 0


def test_the_matching_is_the_best_one_and_not_the_greedy_one():
    C = torch.tensor([[0.9, 0.8], [0.85, 0.1]], dtype=torch.float64)
    assert matched_mcc(C) == pytest.approx(0.825)
    assert matched_mcc(-C) == pytest.approx(0.825)
    assert uniqueness(C) == 0.5


def test_two_latents_on_one_feature_halve_the_uniqueness():
    W = directions()
    assert uniqueness(cosines(W[[1, 1]], W)) == 0.5


def test_of_opposite_planted_directions_the_one_that_points_the_same_way_is_taken():
    line = directions(1)
    planted = torch.cat([line, -line])
    assert partners(cosines(torch.cat([-line, line]), planted)).tolist() == [1, 0]
    assert assignment(cosines(torch.cat([-line, line]), planted))[1].tolist() == [1, 0]
    assert partners(cosines(-line, line)).tolist() == [0]


def test_matching_takes_as_many_pairs_as_the_smaller_side():
    W = directions(30)
    assert matched_mcc(cosines(W[:4], W)) == pytest.approx(1)
    assert matched_mcc(cosines(W, W[:4])) == pytest.approx(1)


def test_absorption_is_the_childs_part_along_its_parent():
    W, parents = torch.eye(6)[:3], torch.tensor([-1, 0, 0])

    def score(V, above=parents):
        C = cosines(V, W)
        return absorption(C, assignment(C), above)

    assert score(W) == 0
    absorbed = torch.stack([W[0], W[1] + W[0], W[2] + W[0]])
    assert score(absorbed) == pytest.approx(math.sqrt(0.5))
    assert score(-absorbed) == pytest.approx(math.sqrt(0.5))
    assert score(W, torch.full((3,), -1)) is None


def test_matched_children_counts_the_children_that_have_a_latent():
    W, parents = torch.eye(6)[:3], torch.tensor([-1, 0, 0])

    def share(V, above=parents):
        C = cosines(V, W)
        return matched_children(C, assignment(C), above)

    assert share(W) == 1
    assert share(-W[[2, 0, 1]]) == 1
    assert share(torch.stack([W[0], W[1] + W[0], W[2]])) == 0.5
    assert share(W[:2]) == 0.5  # a child without a latent is not found
    assert share(torch.eye(6)[3:]) == 0
    assert share(W, torch.full((3,), -1)) is None


def test_overlap_is_the_mean_of_each_rows_largest_cosine():
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
    assert overlap(W) == pytest.approx(math.sqrt(0.5))
    assert overlap(torch.eye(4)) == 0


# ------------------------------------------------------------------------------------------ firing


def random_bits(n: int, m: int, p: float, seed: int) -> torch.Tensor:
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) < p


def test_firing_exactly_with_the_partner_scores_one():
    active = random_bits(400, 8, 0.2, 0)
    counts = Firing(torch.arange(8))
    counts.update(active, active)
    assert counts.scores() == {"precision": 1, "recall": 1, "f1": 1}
    assert counts.dead_share() == 0


def test_firing_always_has_the_base_rate_as_precision_and_full_recall():
    active = random_bits(400, 1, 0.2, 0)
    rate = float(active.double().mean())
    counts = Firing(torch.zeros(1, dtype=torch.int64))
    counts.update(torch.ones_like(active), active)
    assert counts.scores()["precision"] == pytest.approx(rate)
    assert counts.scores()["recall"] == 1
    assert counts.scores()["f1"] == pytest.approx(2 * rate / (1 + rate))


def test_silence_scores_zero_and_is_dead():
    active = random_bits(100, 3, 0.5, 0)
    counts = Firing(torch.arange(3))
    counts.update(torch.zeros_like(active), active)
    assert counts.scores() == {"precision": 0, "recall": 0, "f1": 0}
    assert counts.dead_share() == 1


def test_firing_agrees_with_a_loop_under_any_split():
    fires, active = random_bits(500, 6, 0.3, 1), random_bits(500, 9, 0.3, 2)
    partner = torch.tensor([4, 4, 0, 8, 1, 2])
    whole, split = Firing(partner), Firing(partner)
    whole.update(fires, active)
    for start in range(0, 500, 7):
        split.update(fires[start : start + 7], active[start : start + 7])
    assert whole.scores() == split.scores()
    f1 = []
    for j in range(6):
        pairs = list(zip(fires[:, j].tolist(), active[:, partner[j]].tolist(), strict=True))
        tp, fp, fn = (pairs.count(p) for p in ((True, True), (True, False), (False, True)))
        f1.append(2 * tp / (2 * tp + fp + fn))
    assert whole.scores()["f1"] == pytest.approx(sum(f1) / 6)


def test_an_absorbing_pair_loses_the_parents_recall():
    """One root, two exclusive children; the root's latent is silent when a child is on."""
    g = torch.Generator().manual_seed(0)
    root = torch.rand(4000, generator=g) < 0.5
    which = torch.randint(3, (4000,), generator=g)
    children = [root & (which == i) for i in (0, 1)]
    active = torch.stack([root, *children], 1)
    fires = torch.stack([root & (which == 2), *children], 1)
    counts = Firing(torch.arange(3))
    counts.update(fires, active)
    recall = counts.both / counts.true
    alone = float((which[root] == 2).double().mean())
    assert_close(recall, torch.tensor([alone, 1, 1], dtype=torch.float64))
    W = torch.eye(3)
    absorbed = torch.stack([W[0], (W[0] + W[1]) / math.sqrt(2), (W[0] + W[2]) / math.sqrt(2)])
    C = cosines(absorbed, W)
    assert matched_mcc(C[1:, 1:]) == pytest.approx(0.7071, abs=1e-4)


def test_the_best_threshold_is_the_one_a_search_over_all_finds():
    scores = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    active = (scores + random_bits(60, 5, 0.5, 1)) > 1
    active[:, 4] = False
    found = best_thresholds(scores, active)
    assert found[4] == math.inf

    def f1(j, t):
        fires = scores[:, j] > t
        return 2 * int((fires & active[:, j]).sum()) / int(fires.sum() + active[:, j].sum())

    for j in range(4):
        candidates = [float(s) for s in scores[:, j]] + [-10.0]
        assert f1(j, found[j]) == pytest.approx(max(f1(j, t) for t in candidates))


# ---------------------------------------------------------------------------------------------- R²


def r2(x: torch.Tensor, x_hat: torch.Tensor, batch: int) -> float:
    sums = Reconstruction(x.double().mean(0))
    for a, b in zip(x.split(batch), x_hat.split(batch), strict=True):
        sums.update(a, b, torch.zeros(len(a), dtype=torch.int64))
    return 1 - sums.compute()["fvu"]


def test_r2_is_pooled_and_survives_a_large_constant():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 6, generator=g, dtype=torch.float64)
    x_hat = x + 0.3 * torch.randn(1000, 6, generator=g, dtype=torch.float64)
    whole = r2(x, x_hat, 1000)
    assert r2(x, x_hat, 7) == pytest.approx(whole, abs=1e-9)
    assert r2(x + 1e3, x_hat + 1e3, 1000) == pytest.approx(whole, abs=1e-6)
    assert r2(x, x, 1000) == 1
    assert r2(x, x.mean(0).expand_as(x), 1000) == pytest.approx(0, abs=1e-12)
