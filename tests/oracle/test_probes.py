"""Probes, label directions and rank statistics against brute force and scikit-learn."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from saelab import probes, stats
from saelab.metrics.pooling import Pooling, pooled_words


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some(n=60, m=5, classes=3, levels=4, seed=0):
    """Scores with many ties, and a class for each row."""
    g = generator(seed)
    scores = torch.randint(levels, (n, m), generator=g).float()
    targets = torch.nn.functional.one_hot(torch.arange(n) % classes, classes).bool()
    return scores, targets[torch.randperm(n, generator=g)]


# ---------------------------------------------------------------------------------------------- AUC


def test_auc_counts_pairs_with_ties_half_in_all_its_forms():
    scores, targets = some()
    table = stats.aucs(scores, targets)
    ones = torch.ones(1, len(scores), dtype=torch.float64)
    for c, positive in enumerate(targets.T):
        for m, column in enumerate(scores.T):
            above = (column[positive][:, None] - column[~positive]).sign()
            brute = float((above.double().mean() + 1) / 2)
            assert stats.auc(column, positive) == pytest.approx(brute, abs=1e-12)
            assert float(table[c, m]) == pytest.approx(brute, abs=1e-12)
            assert float(stats.weighted_auc(column, positive, ones)) == pytest.approx(brute)
            assert roc_auc_score(positive, column) == pytest.approx(brute, abs=1e-12)


def test_weights_count_a_document_as_often_as_they_say():
    scores, targets = some(m=1)
    positive, column = targets[:, 0], scores[:, 0]
    weights = torch.randint(4, (6, len(column)), generator=generator(1)).double()
    found = stats.weighted_auc(column, positive, weights)
    right = stats.weighted_balanced_accuracy(column > 1, positive, weights)
    for b, w in enumerate(weights):
        drawn = torch.repeat_interleave(torch.arange(len(column)), w.long())
        truth, values = positive[drawn], column[drawn]
        assert float(found[b]) == pytest.approx(roc_auc_score(truth, values))
        assert float(right[b]) == pytest.approx(balanced_accuracy_score(truth, values > 1))


def test_auc_has_its_ends_and_is_not_a_number_with_one_side():
    positive = torch.arange(10) < 4
    ones = torch.ones(1, 10, dtype=torch.float64)
    for scores, expected in ((positive, 1.0), (~positive, 0.0), (torch.zeros(10), 0.5)):
        assert float(stats.weighted_auc(scores.float(), positive, ones)) == expected
        assert float(stats.aucs(scores.float()[:, None], positive[:, None])) == expected
    assert torch.isnan(stats.weighted_auc(positive.float(), torch.ones(10).bool(), ones)).all()
    assert torch.isnan(stats.aucs(torch.zeros(10, 1), torch.zeros(10, 1).bool())).all()


def test_resamples_by_weights_are_paired_with_resamples_of_sums():
    values = torch.rand(30, 1, generator=generator(), dtype=torch.float64)
    by_sums = stats.bootstrap(values, lambda t: t[:, 0], resamples=50, seed=3)
    by_weights = stats.bootstrap_weights(30, lambda w: w @ values, resamples=50, seed=3)
    torch.testing.assert_close(by_weights[:, 0], by_sums)


# ------------------------------------------------------------------------------------------- probes


def test_a_probe_is_the_logistic_regression_on_standardised_columns():
    g = generator()
    x = 3 * torch.randn(200, 4, generator=g) + 5
    positive = x[:, 1] + torch.randn(200, generator=g) > 6
    columns = torch.tensor([1, 3])
    probe = probes.fit_probe(x, positive, columns, strength=0.5)
    part = x[:, columns].double()
    scaled = (part - part.mean(0)) / part.std(0, correction=0)
    model = LogisticRegression(C=0.5, class_weight="balanced").fit(scaled, positive)
    expected = torch.from_numpy(model.decision_function(scaled))
    torch.testing.assert_close(probe.scores(x), expected, atol=1e-3, rtol=1e-3)


def test_a_probe_on_nothing_that_varies_says_nothing():
    positive = torch.arange(8) < 3
    for columns in (torch.tensor([0]), torch.zeros(0, dtype=torch.int64)):
        probe = probes.fit_probe(torch.full((8, 2), 4.0), positive, columns)
        assert torch.equal(probe.scores(torch.rand(5, 2)), torch.zeros(5).double())


def test_columns_are_ranked_by_the_difference_of_means_and_constant_ones_left_out():
    positive = torch.tensor([True, True, False, False])
    columns = [[0, 0, 3, 3], [1, 1, 0, 0], [7, 7, 7, 7], [2, 2, 0, 0], [1, 0, 1, 0]]
    features = torch.tensor(columns).float().T
    targets = positive[:, None]
    two = probes.ranked_columns(features, targets, two_sided=True)[0]
    one = probes.ranked_columns(features, targets, two_sided=False)[0]
    assert two.tolist() == [0, 3, 1]
    assert one.tolist() == [3, 1]
    noisy = torch.tensor([[9.0, 1, 0, 0], [1, 1, 0, 0]]).T
    scaled = probes.ranked_columns(noisy, targets, rule="standardised_difference")
    assert scaled[0].tolist() == [1, 0]
    assert probes.ranked_columns(noisy, targets)[0].tolist() == [0, 1]
    other = probes.ranked_columns(noisy, torch.stack([positive, ~positive], 1))
    assert torch.equal(other[0], other[1])


# --------------------------------------------------------------------------------------- directions


def attributes(seed=0, copies=2):
    """Every combination of an attribute of three values and one of two: independent, balanced."""
    g = generator(seed)
    first, second = torch.meshgrid(torch.arange(3), torch.arange(2), indexing="ij")
    values = torch.stack([first.flatten(), second.flatten()], 1).repeat(copies, 1)
    one_hot = torch.nn.functional.one_hot
    targets = torch.cat([one_hot(values[:, 0], 3), one_hot(values[:, 1], 2)], 1).bool()
    return targets, torch.randn(5, 8, generator=g, dtype=torch.float64)


def test_mean_features_rebuild_what_is_additive_in_independent_attributes():
    targets, planted = attributes()
    x = targets.double() @ planted + 1.5
    u = probes.mean_features(x, targets)
    torch.testing.assert_close(x.mean(0) + targets.double() @ u, x)
    torch.testing.assert_close(probes.least_squares_features(x, targets), u)


def test_least_squares_rebuild_dependent_attributes_where_means_do_not():
    targets, planted = attributes()
    targets = torch.cat([targets, targets[:1].expand(9, -1)])
    x = targets.double() @ planted
    truth, centre = targets.double(), x.mean(0)
    solved = probes.least_squares_features(x, targets)
    residual = x - centre - truth @ solved
    best = torch.linalg.lstsq(truth, x - centre, driver="gelsd").solution
    torch.testing.assert_close(residual, x - centre - truth @ best, atol=1e-9, rtol=1e-9)
    by_means = x - centre - truth @ probes.mean_features(x, targets)
    assert by_means.square().sum() > 2 * residual.square().sum()


def test_with_one_attribute_least_squares_and_mean_features_agree():
    _, targets = some(n=40)
    x = torch.randn(40, 6, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(
        probes.least_squares_features(x, targets), probes.mean_features(x, targets)
    )


@pytest.mark.parametrize("method", sorted(probes.DIRECTIONS))
def test_every_method_points_from_the_others_to_the_class(method):
    _, targets = some(n=90)
    planted = torch.eye(3, 7)
    noise = 0.1 * torch.randn(90, 7, generator=generator())
    x = targets.float() @ planted * 2 + noise + 3
    found = probes.DIRECTIONS[method](x, targets)
    scores = stats.aucs((x.double() @ found.T).float(), targets)
    assert (scores.diagonal() > 0.999).all()


# ------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("size", [1, 7, 100])
def test_pooling_is_brute_force_under_any_split_and_order(size):
    g = generator()
    z = torch.randn(100, 4, generator=g)
    documents = torch.randint(6, (100,), generator=g) * 2
    pooling = Pooling(torch.tensor([0, 2, 4, 6, 8, 10, 12]), 4)
    for part, of in zip(z.split(size), documents.split(size), strict=True):
        pooling.update(part, of)
    pooled = pooling.compute()
    assert pooling.seen.tolist() == [True] * 6 + [False]
    for place, number in enumerate((0, 2, 4, 6, 8, 10)):
        mine = z[documents == number]
        assert torch.equal(pooled.high[place], mine.amax(0))
        assert torch.equal(pooled.low[place], (-mine).amax(0))
        torch.testing.assert_close(pooled.mean[place], mine.mean(0))


def test_two_sides_put_the_opposite_behind_the_score():
    pooling = Pooling(torch.tensor([0, 1]), 1)
    pooling.update(torch.tensor([[-3.0], [1.0], [2.0]]), torch.tensor([0, 0, 1]))
    pooled = pooling.compute()
    assert pooled.columns("max", "one", opposite=True).tolist() == [[1], [2]]
    assert pooled.columns("max", "two", opposite=True).tolist() == [[1, 3], [2, -2]]
    assert pooled.columns("mean", "two", opposite=True).tolist() == [[-1, 1], [2, -2]]
    assert pooled.columns("mean", "two", opposite=False).tolist() == [[-1], [2]]


def test_a_word_is_a_latent_that_is_one_on_its_own_tokens():
    words = pooled_words(torch.tensor([[0.0, 0.5], [0.25, 0.0]]))
    assert words.high.tolist() == [[0, 1], [1, 0]]
    assert words.mean.tolist() == [[0, 0.5], [0.25, 0]]
    assert not words.low.any()
