"""Metrics against planted truth: hand cases, both ends, and the ceilings."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.testing import assert_close

from saelab.metrics.reconstruction import Reconstruction
from saelab.metrics.truth import (
    Firing,
    Support,
    absorption,
    assignment,
    average_precision,
    best_thresholds,
    cosines,
    coverage,
    gram_errors,
    matched_children,
    matched_share,
    mcc,
    mcc_signed,
    overlap,
    overlaps,
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


def test_weights_say_how_much_each_matched_feature_counts():
    C = torch.tensor([[0.8, 0.1, 0.0], [0.2, 0.0, -0.4]])
    pairs = assignment(C)
    assert mcc(C, pairs, torch.tensor([3.0, 7.0, 1.0])) == pytest.approx((3 * 0.8 + 0.4) / 4)
    assert mcc(C, pairs, torch.ones(3)) == pytest.approx(mcc(C, pairs))
    W, weights = directions(), torch.arange(30.0)
    C = cosines(-W, W)
    assert mcc(C, assignment(C), weights) == pytest.approx(1)
    C = cosines(directions(32, 64, 1), directions(32, 64))
    assert mcc(C, assignment(C), torch.ones(32)) < 0.4


def test_the_signed_mcc_counts_what_points_the_other_way_against():
    C = torch.tensor([[0.8, 0.1], [0.0, -0.4]])
    assert mcc_signed(C, assignment(C)) == pytest.approx(0.2)
    W = directions()
    C = cosines(W, W)
    assert mcc_signed(C, assignment(C)) == pytest.approx(1)
    assert mcc_signed(-C, assignment(-C)) == pytest.approx(-1)
    scores = [
        mcc_signed(C, assignment(C))
        for C in (cosines(directions(32, 64, 1 + i), directions(32, 64)) for i in range(5))
    ]
    assert abs(sum(scores) / 5) < 0.06


def test_coverage_counts_the_features_that_some_latent_points_at():
    C = torch.tensor([[0.95, -0.91, 0.0], [0.3, 0.2, 0.89]])
    assert coverage(C, torch.arange(3)) == pytest.approx(2 / 3)
    assert coverage(C, torch.tensor([1])) == 1
    assert coverage(C, torch.tensor([2])) == 0
    W = directions()
    assert coverage(cosines(-W, W), torch.arange(30)) == 1
    assert coverage(cosines(W[:6], W), torch.arange(30)) == pytest.approx(0.2)
    assert coverage(cosines(directions(32, 64, 1), directions(32, 64)), torch.arange(32)) == 0


def test_gram_errors_are_mean_squared_within_a_level_and_across():
    W, levels = torch.eye(6)[:4], torch.tensor([0, 0, 1, 1])

    def errors(V, of=levels):
        return gram_errors(V, W, assignment(cosines(V, W)), of)

    assert errors(W) == (0, 0)
    assert errors(-5 * W[[2, 0, 3, 1]]) == (0, 0)
    # each child takes a share of the first parent: cosine 1/√2 with it, 1/2 with each other
    absorbed = torch.stack([W[0], W[1], W[2] + W[0], -W[3] - W[0]])
    within, across = errors(absorbed)
    assert within == pytest.approx(0.25 / 2)  # of two pairs of one level
    assert across == pytest.approx(2 * 0.5 / 4)  # of four
    within, across = errors(W, torch.zeros(4, dtype=torch.int64))
    assert within == 0
    assert math.isnan(across)
    within, across = gram_errors(directions(32, 64, 1), directions(32, 64), *_all(32))
    assert within == pytest.approx(2 / 64, rel=0.2)  # squared cosines of both, 1/d each
    assert across == pytest.approx(2 / 64, rel=0.2)


def _all(n: int):
    return (torch.arange(n), torch.arange(n)), torch.arange(n) % 2


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


def test_overlaps_are_mean_and_percentiles_over_pairs():
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
    half = math.sqrt(0.5)
    found = overlaps(W)
    assert found == pytest.approx({"mean": 2 * half / 3, "p95": half, "p99": half})
    assert overlaps(torch.eye(4)) == {"mean": 0, "p95": 0, "p99": 0}
    assert overlaps(torch.eye(4)[:1]) == {}
    assert overlaps(directions(300), rows=100)["p99"] == pytest.approx(
        overlaps(directions(300))["p99"], rel=0.02
    )


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
    counts.update(active & torch.tensor([True, True, False]), active)  # dead ones stay in the mean
    assert counts.scores()["precision"] == pytest.approx(2 / 3)
    assert counts.dead_share() == pytest.approx(1 / 3)


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


def test_balanced_f1_is_f1_with_the_feature_on_in_half_of_the_rows():
    active = torch.tensor([True] * 2 + [False] * 8)[:, None]
    fires = torch.tensor([True, False] + [True] * 2 + [False] * 6)[:, None]

    def balanced(fires, active):
        counts = Firing(torch.arange(active.shape[1]))
        for a, b in zip(fires.split(3), active.split(3), strict=True):
            counts.update(a, b)
        return counts.f1_balanced()

    # recall 1/2, false alarms 1/4
    assert balanced(fires, active) == pytest.approx(2 * 0.5 / (1 + 0.5 + 0.25))
    weighed = torch.cat([torch.arange(2).repeat(4), torch.arange(2, 10)])  # each on-row four times
    counts = Firing(torch.zeros(1, dtype=torch.int64))
    counts.update(fires[weighed], active[weighed])
    assert balanced(fires, active) == pytest.approx(counts.scores()["f1"])
    assert balanced(active, active) == 1
    assert balanced(torch.zeros_like(active), active) == 0
    assert balanced(torch.ones_like(active), active) == pytest.approx(2 / 3)
    always = torch.cat([active, torch.ones_like(active), torch.zeros_like(active)], 1)
    assert balanced(always, always) == 1  # what is always or never on does not count


def test_support_counts_all_firings_and_all_features_that_are_on():
    pairs = (torch.tensor([0, 1]), torch.tensor([2, 0]))  # latent 2 and feature 1 have no match
    fires = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    active = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
    documents = torch.tensor([5, 5, 9])
    whole, split = Support(pairs), Support(pairs)
    whole.update(fires, active, documents)
    for row in range(3):
        split.update(fires[row : row + 1], active[row : row + 1], documents[row : row + 1])
    assert whole.compute() == pytest.approx(
        {"support_precision": 2 / 4, "support_recall": 2 / 5, "support_f1": 4 / 9}
    )
    assert_close(whole.sums.table, split.sums.table)
    assert whole.sums.table.tolist() == [[2, 4, 3], [0, 0, 2]]


def test_support_is_one_for_the_truth_and_zero_for_silence_or_for_others():
    active, pairs = random_bits(300, 6, 0.2, 0), (torch.arange(6), torch.arange(6))
    names = ("support_precision", "support_recall", "support_f1")

    def score(fires, of=pairs):
        sums = Support(of)
        sums.update(fires, active, torch.zeros(300, dtype=torch.int64))
        return sums.compute()

    assert score(active) == dict.fromkeys(names, 1)
    assert score(active[:, [2, 0, 1, 3, 4, 5]], (pairs[0], torch.tensor([2, 0, 1, 3, 4, 5]))) == (
        dict.fromkeys(names, 1)
    )
    assert score(torch.zeros_like(active)) == dict.fromkeys(names, 0)
    assert score(~active)["support_f1"] == 0
    chance = score(torch.ones_like(active))
    assert chance["support_precision"] == pytest.approx(float(active.double().mean()))
    assert chance["support_recall"] == 1


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


def test_the_best_balanced_threshold_is_the_one_a_search_over_all_finds():
    scores = torch.randn(80, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    active = (scores + random_bits(80, 3, 0.3, 1)) > 1.2
    found = best_thresholds(scores, active, balanced=True)

    def f1(j, t):
        counts = Firing(torch.zeros(1, dtype=torch.int64))
        counts.update(scores[:, [j]] > t, active[:, [j]])
        return counts.f1_balanced()

    for j in range(3):
        candidates = [float(s) for s in scores[:, j]] + [-10.0]
        assert f1(j, found[j]) == pytest.approx(max(f1(j, t) for t in candidates))


def test_average_precision_is_that_of_scikit_learn_ties_included():
    scores = torch.randn(90, 4, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    active = random_bits(90, 4, 0.3, 1)
    active[:, 3] = False
    found = average_precision(scores, active)
    for j in range(3):
        wanted = average_precision_score(active[:, j].numpy(), scores[:, j].numpy())
        assert float(found[j]) == pytest.approx(wanted)
    assert math.isnan(found[3])
    assert average_precision(active.float(), active)[:3].tolist() == [1, 1, 1]
    constant = average_precision(torch.zeros(90, 4), active)
    assert_close(constant[:3], active.double().mean(0)[:3])
    order = torch.randperm(90, generator=torch.Generator().manual_seed(2))
    assert_close(average_precision(scores[order], active[order]), found, equal_nan=True)


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
