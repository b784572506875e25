"""Each measure of likeness at both ends, and against its textbook form."""

import numpy as np
import pytest
import torch

from saelab.errors import ShapeError
from saelab.evals.similarity import (
    PairMoments,
    chance_jaccard,
    jaccard,
    linear_cka,
    regression,
    relative,
    svcca,
)

N = 4000


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(N, 12, seed=0) @ normal(12, 12, seed=1) + 7
MAP = normal(12, 12, seed=2)
ROTATION = torch.linalg.qr(MAP)[0]
OTHER = normal(N, 9, seed=3) @ normal(9, 9, seed=4)
NOISY = X[:, :9] + 0.7 * OTHER


def pair(x, y):
    return PairMoments(x.shape[1], y.shape[1]).update(x, y).compute()


def both(measure):
    """A measure that takes the rows themselves."""
    return lambda x, y: measure(pair(x, y))


def anchored(x, y):
    return relative(x, y, torch.arange(0, N, 40))


MEASURES = {
    "cka": both(linear_cka),
    "svcca": both(svcca),
    "regression": both(regression),
    "relative": anchored,
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_rotated_scaled_and_shifted_copy_is_as_alike_as_can_be(name):
    measure = MEASURES[name]
    assert measure(X, X) == pytest.approx(1)
    assert measure(X, 3 * X @ ROTATION - 5) == pytest.approx(1)


@pytest.mark.parametrize("name", MEASURES)
def test_independent_rows_are_not_alike_but_for_chance(name):
    assert abs(MEASURES[name](X, OTHER)) < 0.05


@pytest.mark.parametrize("name", MEASURES)
def test_a_noisy_copy_lies_between(name):
    assert 0.1 < MEASURES[name](X, NOISY) < 0.95


def test_any_invertible_map_leaves_svcca_and_regression_at_one():
    assert svcca(pair(X, X @ MAP), variance=1.0) == pytest.approx(1)
    assert regression(pair(X, X @ MAP)) == pytest.approx(1)
    assert linear_cka(pair(X, X @ MAP)) < 0.999


def test_regression_has_a_direction():
    forth = pair(X, X[:, :3])
    assert regression(forth) == pytest.approx(1)
    assert regression(forth.swapped()) < 0.9


def test_cka_is_that_of_the_centred_matrices():
    x, y = (rows - rows.mean(0) for rows in (X, NOISY))
    expected = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert linear_cka(pair(X, NOISY)) == pytest.approx(float(expected))


def test_regression_is_that_of_least_squares():
    x, y = (np.asarray(rows - rows.mean(0)) for rows in (X, NOISY))
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert regression(pair(X, NOISY)) == pytest.approx(1 - (left**2).sum() / (y**2).sum())


@pytest.mark.parametrize("variance", [0.8, 0.99, 1.0])
def test_svcca_is_that_of_singular_vectors(variance):
    bases = []
    for rows in (X, NOISY):
        u, s, _ = np.linalg.svd(np.asarray(rows - rows.mean(0)), full_matrices=False)
        shares = (s**2).cumsum() / (s**2).sum()
        bases.append(u[:, : int((shares < variance - 1e-12).sum()) + 1])
    expected = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).mean()
    assert svcca(pair(X, NOISY), variance=variance) == pytest.approx(float(expected))


def test_the_split_into_batches_does_not_matter():
    moments = PairMoments(12, 9)
    for x, y in zip(X.split(77), NOISY.split(77), strict=True):
        moments.update(x, y)
    moments.update(X[:0], NOISY[:0])
    whole, parts = pair(X, NOISY), moments.compute()
    torch.testing.assert_close(parts.xy, whole.xy)
    assert linear_cka(parts) == pytest.approx(linear_cka(whole))


def test_directions_without_variance_do_no_harm():
    flat = torch.cat([X[:, :5], torch.zeros(N, 3, dtype=torch.float64), X[:, :2]], 1)
    assert regression(pair(flat, X[:, :5])) == pytest.approx(1)
    assert svcca(pair(flat, X[:, :5]), variance=1.0) == pytest.approx(1)
    nothing = pair(torch.zeros(N, 4, dtype=torch.float64), X)
    assert linear_cka(nothing) == svcca(nothing) == regression(nothing) == 0


def test_rows_that_do_not_belong_together_are_refused():
    with pytest.raises(ShapeError, match="equally many rows"):
        PairMoments(12, 9).update(X, NOISY[:-1])
    with pytest.raises(ShapeError, match="two rows or more"):
        PairMoments(12, 9).compute()


def test_jaccard_counts_common_keys():
    assert jaccard({1, 2, 3}, {1, 2, 3}) == 1
    assert jaccard({1, 2}, {3}) == 0
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert jaccard([], []) == 0


def test_jaccard_of_random_sets_is_what_chance_gives():
    draws = [set(torch.randperm(2000, generator=torch.Generator().manual_seed(i))[:500].tolist())
             for i in range(8)]  # fmt: skip
    found = np.mean([jaccard(a, b) for a in draws for b in draws if a is not b])
    assert found == pytest.approx(chance_jaccard(500, 500, 2000), rel=0.05)
