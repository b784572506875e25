"""Every metric at both ends, under any split into batches, and against outside formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import comb

from saelab.metrics import downstream as down
from saelab.metrics import reconstruction as rec
from saelab.metrics.sparsity import Sparsity, density_histogram, description_length
from saelab.types import SparseLatents


def rows(n: int = 40, d: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) + 5 * torch.randn(d, generator=generator)


# --------------------------------------------------------------------------------- reconstruction


def test_a_perfect_reconstruction_has_the_best_of_every_metric():
    x = rows()
    assert rec.fvu(x, x) == 0
    assert rec.mse(x, x) == 0
    assert rec.cosine(x, x) == pytest.approx(1)
    assert rec.norm_ratio(x, x) == pytest.approx(1)
    assert rec.reconstruction_bias(x, x) == pytest.approx(1)
    assert rec.median_normalised_error(x, x, x.mean(0)) == 0


def test_predicting_the_mean_has_fvu_one_and_median_error_one():
    x = rows().double()
    mean = x.mean(0).expand_as(x)
    assert rec.fvu(x, mean) == pytest.approx(1, abs=1e-12)
    assert rec.median_normalised_error(x, mean, x.mean(0)) == 1


def test_predicting_zero_has_cosine_and_norm_ratio_zero_and_fvu_above_one():
    x = rows()
    zero = torch.zeros_like(x)
    assert rec.cosine(x, zero) == 0
    assert rec.norm_ratio(x, zero) == 0
    assert rec.fvu(x, zero) > 1
    assert rec.cosine(x, -x) == pytest.approx(-1)


def test_a_constant_bias_error_counts_in_fvu_and_shrinkage_in_reconstruction_bias():
    x = rows()
    shift = torch.full((6,), 3.0)
    expected = len(x) * 54 / float((x - x.mean(0)).square().sum())
    assert rec.fvu(x, x + shift) == pytest.approx(expected, rel=1e-6)
    assert rec.reconstruction_bias(x, 0.5 * x) == pytest.approx(0.5)
    assert rec.norm_ratio(x, 0.5 * x) == pytest.approx(0.5)


def test_fvu_is_neither_of_the_two_other_formulas_in_use():
    x = rows(200).double()
    mean = x.mean(0).expand_as(x)
    energy = float(x.square().sum(1).mean())
    saelens_2025 = 1 - float((x - mean).square().sum(1).mean()) / (energy - (energy / 6) ** 2)
    assert abs(saelens_2025) > 0.01
    x_hat = x + 0.3 * rows(200, seed=1).sub(rows(200, seed=1).mean(0)) * x.norm(dim=1)[:, None]
    spread, error = (x - mean).square().sum(1), (x - x_hat).square().sum(1)
    legacy = float((1 - error / spread).mean())
    assert rec.fvu(x, x_hat) == pytest.approx(float(error.sum() / spread.sum()))
    assert abs(1 - rec.fvu(x, x_hat) - legacy) > 0.01


def test_a_far_away_mean_costs_no_precision():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    mean = x.double().mean(0).expand(500, -1)
    assert rec.fvu(x, mean) == pytest.approx(1, abs=1e-6)


def test_rows_of_zeros_have_no_direction_and_are_left_out_of_cosine():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    x_hat = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    assert rec.cosine(x, x_hat) == pytest.approx(1)
    assert rec.norm_ratio(x, x_hat) == pytest.approx(2)


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 9))
def test_any_split_into_batches_in_any_order_gives_the_same_numbers(cuts, seed):
    x = rows()
    x_hat = x + 0.3 * rows(seed=1)
    documents = torch.arange(40) // 7
    z = SparseLatents.from_dense(torch.relu(x_hat - 4))

    def scores(batches: list[torch.Tensor]) -> list[float]:
        fit, sparse = rec.Reconstruction(x[0]), Sparsity(6)
        for b in batches:
            fit.update(x[b], x_hat[b], documents[b])
            sparse.update(SparseLatents.from_dense(z.dense()[b]), documents[b])
        shares = [sparse.dead_share(), sparse.dense_share(), *sparse.density().tolist()]
        return [*fit.compute().values(), fit.median(), *sparse.compute().values(), *shares]

    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    parts = [p for p in order.tensor_split(sorted(cuts)) if len(p)]
    assert scores(parts) == pytest.approx(scores([torch.arange(40)]), rel=1e-12)


def test_sums_per_document_are_those_of_a_loop():
    x, documents = rows(), torch.tensor([9, 2, 9, 5] * 10)
    fit = rec.Reconstruction(torch.zeros(6))
    fit.update(x, 0.9 * x, documents)
    assert fit.sums.documents.tolist() == [2, 5, 9]
    for document, sums in zip(fit.sums.documents, fit.sums.table, strict=True):
        mine = x[documents == document].double()
        assert float(sums[0]) == len(mine)
        torch.testing.assert_close(sums[-6:], mine.sum(0))
        torch.testing.assert_close(sums[2], mine.square().sum())


# --------------------------------------------------------------------------------------- sparsity


def sparsity(z: torch.Tensor) -> Sparsity:
    metric = Sparsity(z.shape[1])
    metric.update(SparseLatents.from_dense(z), torch.zeros(len(z), dtype=torch.int64))
    return metric


def test_values_below_a_share_of_the_rows_largest_count_as_zero_where_a_type_says_so():
    z = torch.tensor([[1.0, 0.0099, 0.01], [0.0, 0.0, 0.0], [-2.0, 0.1, 0.0], [1e-6, 0.0, 0.0]])
    exact, floored = Sparsity(3), Sparsity(3, floor=0.01)
    for metric in (exact, floored):
        for rows in (slice(0, 2), slice(2, 4)):
            metric.update(SparseLatents.from_dense(z[rows]), torch.arange(4)[rows])
    assert exact.compute()["l0"] == 6 / 4
    assert floored.compute()["l0"] == 5 / 4
    assert exact.counts.tolist() == [3, 2, 1]
    assert floored.counts.tolist() == [3, 1, 1]


def test_l0_and_dead_share_at_both_ends():
    silent, loud = sparsity(torch.zeros(5, 8)), sparsity(torch.ones(5, 8))
    assert silent.compute()["l0"] == 0
    assert silent.dead_share() == 1
    assert silent.rare_share() == 1
    assert loud.compute()["l0"] == 8
    assert loud.dead_share() == 0
    assert loud.dense_share() == 1


def test_negative_values_fire_too_and_cost_a_bit():
    z = torch.zeros(10, 8)
    z[:, 0], z[:, 1] = 1.0, -1.0
    metric = sparsity(z)
    assert metric.compute()["l0"] == 2
    assert metric.counts.tolist() == [10, 10, 0, 0, 0, 0, 0, 0]
    assert metric.compute()["description_length"] == pytest.approx(math.log2(28) + 2 * 9)
    assert sparsity(z.abs()).compute()["description_length"] == pytest.approx(math.log2(28) + 16)


def test_description_length_is_its_formula():
    expected = math.log2(comb(4608, 32, exact=True)) + 32 * 8
    assert description_length(4608, 32.0, 8, False) == pytest.approx(expected)
    assert description_length(4608, 32.0, 8, True) == pytest.approx(expected + 32)
    assert description_length(4608, 0.0, 8, True) == 0


def test_the_histogram_puts_each_density_in_its_decade():
    found = density_histogram(torch.tensor([0.0, 1e-7, 2e-6, 0.03, 0.5, 1.0]), lowest=-6)
    assert [(low, high) for low, high, _ in found][:2] == [(-math.inf, -6), (-6, -5)]
    assert [round(6 * share) for *_, share in found] == [2, 1, 0, 0, 0, 1, 2]
    assert sum(share for *_, share in found) == pytest.approx(1)


# ------------------------------------------------------------------------------------- downstream


def test_kl_of_equal_logits_is_exactly_zero_and_never_nan():
    logits = 100 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    p = down.log_probs(logits)
    assert down.kl_divergence(p, p).tolist() == [0] * 5
    q = down.log_probs(logits.flip(1))
    kl = down.kl_divergence(p, q)
    assert bool(kl.isfinite().all())
    assert float(kl.min()) > 0


def test_ce_and_kl_are_those_of_scipy():
    from scipy.stats import entropy

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 9, generator=generator), torch.randn(4, 9, generator=generator)
    targets = torch.tensor([0, 3, 8, 1])
    kl = down.kl_divergence(down.log_probs(a), down.log_probs(b))
    expected = [
        entropy(p, q) for p, q in zip(a.softmax(1).numpy(), b.softmax(1).numpy(), strict=True)
    ]
    assert kl.tolist() == pytest.approx(expected, rel=1e-4)
    ce = down.cross_entropy(down.log_probs(a), targets)
    torch.testing.assert_close(ce, torch.nn.functional.cross_entropy(a, targets, reduction="none"))


def test_recovered_is_one_for_the_clean_loss_and_zero_for_the_ablation():
    assert down.ce_recovered(3.0, ce_clean=3.0, ce_ablated=10.0) == 1
    assert down.ce_recovered(10.0, ce_clean=3.0, ce_ablated=10.0) == 0
    total = down.Downstream(["arm", "zero"])
    clean, zero = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
    arm, none = torch.tensor([2.0, 3.0]), torch.zeros(2)
    documents = torch.tensor([0, 1])
    total.update(clean, {"arm": arm, "zero": zero}, {"arm": none, "zero": none}, documents)
    values = {
        d.name: float(d.of(total.sums.totals())) for d in total.of_arm("arm", {"zero": "zero"})
    }
    assert values == pytest.approx({"ce": 2.5, "delta_ce": 1, "kl": 0, "ce_recovered_zero": 0.75})
