"""The bootstrap over documents against simulation, a slow loop, and formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab import stats
from saelab.metrics.reconstruction import Reconstruction


def mean(t: torch.Tensor) -> torch.Tensor:
    return t[:, 1] / t[:, 0]


def world(n_documents: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that share a document's effect (variance 1) beside their own noise (variance 4)."""
    generator = torch.Generator().manual_seed(seed)
    documents = torch.arange(n_documents).repeat_interleave(10)
    effect = torch.randn(n_documents, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(documents), generator=generator, dtype=torch.float64)
    return effect[documents] + 2 * noise, documents


def sums_of(values: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    table = torch.zeros(int(documents.max()) + 1, 2, dtype=torch.float64)
    return table.index_add_(0, documents, torch.stack([torch.ones_like(values), values], 1))


def test_the_error_of_a_mean_is_that_of_its_documents_not_of_its_rows():
    values, documents = world(100, 0)
    found = stats.standard_error(stats.over_documents(sums_of(values, documents), mean))
    per_document = values.view(100, 10).mean(1)
    assert found == pytest.approx(float(per_document.std()) / 10, rel=0.07)
    assert found > 1.5 * float(values.std()) / 1000**0.5


def test_intervals_of_two_errors_cover_the_truth_about_as_often_as_they_should():
    covered = 0
    for seed in range(100):
        sums = sums_of(*world(40, seed))
        error = stats.standard_error(stats.over_documents(sums, mean, resamples=200, seed=seed))
        assert error is not None
        covered += abs(float(mean(sums.sum(0, keepdim=True)))) < 2 * error
    assert 88 <= covered <= 99


def test_fvu_resamples_recompute_the_mean_as_a_slow_loop_does():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    x_hat, documents = 0.8 * x + 0.1, torch.arange(60) // 5
    fit = Reconstruction(torch.zeros(3))
    fit.update(x, x_hat, documents)
    fvu = fit.definitions[0].of
    found = stats.bootstrap(fit.sums.table, fvu, resamples=20, seed=3)
    weights = torch.cat(list(stats._draws(12, 20, 3, 1)))
    for one, weight in zip(found, weights, strict=True):
        drawn = torch.repeat_interleave(torch.arange(60), weight.long()[documents])
        part, hat = x[drawn], x_hat[drawn]
        slow = (part - hat).square().sum() / (part - part.mean(0)).square().sum()
        torch.testing.assert_close(one, slow)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), n=st.integers(1, 40))
def test_the_median_of_each_resample_is_that_of_the_drawn_rows(seed, n):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 9, (n,), generator=generator).double()
    documents = torch.randint(0, 6, (n,), generator=generator)
    known, place = torch.unique(documents, return_inverse=True)
    found = stats.bootstrap_median(values, documents, resamples=10, seed=1)
    weights = torch.cat(list(stats._draws(len(known), 10, 1, 1)))
    for one, weight in zip(found, weights, strict=True):
        assert one == torch.repeat_interleave(values, weight.long()[place]).median()


def test_the_error_of_a_median_is_that_of_simulation():
    medians = torch.stack([world(60, seed)[0].median() for seed in range(300)])
    values, documents = world(60, 1000)
    error = stats.standard_error(stats.bootstrap_median(values, documents))
    assert error == pytest.approx(float(medians.std()), rel=0.35)


def test_the_same_seed_draws_the_same_documents_whatever_the_width(monkeypatch):
    sums = sums_of(*world(30, 0))
    wide = torch.cat([sums, torch.zeros(30, 50)], 1)
    first = stats.bootstrap(sums, mean, resamples=50)
    assert torch.equal(first, stats.bootstrap(sums, mean, resamples=50))
    monkeypatch.setattr(stats, "_CHUNK", 400)
    torch.testing.assert_close(stats.bootstrap(wide, mean, resamples=50), first)
    assert not torch.equal(stats.bootstrap(sums, mean, resamples=50, seed=1), first)


def test_a_paired_difference_is_surer_than_its_parts():
    values, documents = world(50, 0)
    a, b = sums_of(values, documents), sums_of(values + 0.01 * values.abs(), documents)
    difference = stats.paired_difference(b, a, mean)
    alone = stats.standard_error(stats.over_documents(a, mean))
    assert difference.value == pytest.approx(float(0.01 * values.abs().mean()))
    assert difference.low < difference.value < difference.high
    assert difference.standard_error is not None
    assert alone is not None
    assert difference.standard_error < alone / 10


def test_one_document_or_undefined_resamples_have_no_error():
    assert stats.over_documents(torch.ones(1, 2), mean) is None
    assert stats.standard_error(torch.tensor([1.0, float("nan")])) is None
    assert stats.standard_error(stats.over_documents(torch.ones(5, 2), mean)) == 0


def test_the_median_error_of_a_row_is_relative_to_the_centre():
    metric = Reconstruction(torch.zeros(1))
    metric.update(torch.tensor([[1.0], [2.0], [4.0]]), torch.zeros(3, 1), torch.arange(3))
    assert metric.errors()[0].tolist() == [1, 1, 1]


@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_auc_is_the_share_of_pairs_won_with_ties_counting_half(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (12,), generator=generator).double()
    positive = torch.tensor([True, False] * 6)
    gaps = scores[positive][:, None] - scores[~positive][None]
    won = ((gaps > 0).double() + 0.5 * (gaps == 0).double()).mean()
    assert stats.auc(scores, positive) == pytest.approx(float(won))
    assert stats.auc(-scores, positive) == pytest.approx(1 - float(won))
    assert math.isnan(stats.auc(scores, torch.ones(12, dtype=torch.bool)))


def test_benjamini_hochberg_is_its_definition():
    p = torch.tensor([0.01, 0.04, 0.03, 0.5], dtype=torch.float64)
    expected = [0.04, 0.04 * 4 / 3, 0.04 * 4 / 3, 0.5]
    assert stats.benjamini_hochberg(p).tolist() == pytest.approx(expected)


def test_the_difference_of_two_methods_resamples_is_the_paired_difference():
    first, second = sums_of(*world(40, 0)), sums_of(*world(40, 1))
    second = 0.9 * first + 0.1 * second
    found = stats.paired_difference(first, second, mean, seed=5)
    drawn = [stats.bootstrap(sums, mean, seed=5) for sums in (first, second)]
    again = stats.Difference.of(found.value, drawn[0] - drawn[1])
    assert again.standard_error == pytest.approx(found.standard_error)
    assert (again.low, again.high) == (pytest.approx(found.low), pytest.approx(found.high))


# ----------------------------------------------------------------------------------- over seeds too


def test_one_seed_adds_nothing_and_equal_seeds_neither():
    drawn = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(stats.over_seeds(drawn), drawn[0])
    torch.testing.assert_close(stats.over_seeds(drawn.expand(4, -1)), drawn[0])


def test_seeds_that_differ_alone_are_drawn_with_replacement():
    values = torch.tensor([0.0, 3.0, 9.0])
    found = stats.over_seeds(values[:, None].expand(3, 20_000))
    wanted = float(values.var(correction=0) / 3) ** 0.5  # of a mean of three draws of three
    assert float(found.std()) == pytest.approx(wanted, rel=0.03)
    assert float(found.mean()) == pytest.approx(4.0, rel=0.02)
    assert found.unique().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]


def test_resamples_of_both_sides_of_a_table_have_both_spreads():
    """With effects of 20 rows (variance 4) and of 30 columns (variance 1), the error of the mean is
    √(4 / 20 + 1 / 30); over columns alone it would be √(1 / 30)."""
    errors, columns = [], []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        row = 2 * torch.randn(20, 1, generator=generator, dtype=torch.float64)
        values = row + torch.randn(30, generator=generator, dtype=torch.float64)
        cells = torch.stack([torch.ones_like(values), values], 2)
        drawn = stats.crossed_bootstrap(cells, mean, resamples=200, seed=seed)
        errors.append(float(drawn.std()))
        columns.append(float(stats.bootstrap(cells.sum(0), mean, resamples=200, seed=seed).std()))
    assert sum(errors) / 30 == pytest.approx((4 / 20 + 1 / 30) ** 0.5, rel=0.1)
    assert sum(columns) / 30 == pytest.approx((1 / 30) ** 0.5, rel=0.1)


def test_resamples_of_one_row_are_those_of_its_columns_whatever_the_chunks(monkeypatch):
    cells = torch.rand(1, 12, 2, generator=torch.Generator().manual_seed(0)) + 1
    alone = stats.bootstrap(cells[0], mean, resamples=50, seed=3)
    torch.testing.assert_close(stats.crossed_bootstrap(cells, mean, resamples=50, seed=3), alone)
    several = torch.rand(4, 12, 2, generator=torch.Generator().manual_seed(1)) + 1
    whole = stats.crossed_bootstrap(several, mean, resamples=50, seed=3)
    monkeypatch.setattr(stats, "_CHUNK", 100)
    torch.testing.assert_close(stats.crossed_bootstrap(several, mean, resamples=50, seed=3), whole)
