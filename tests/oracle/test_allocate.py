"""Shared budgets and thresholds against sorting whole tables."""

import pytest
import torch

from saelab.ops import allocate


def draw(n, d, d_sae, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * torch.logspace(-1, 1, n)[:, None]
    W, b = torch.randn(d_sae, d, generator=generator), torch.randn(d_sae, generator=generator)
    return x, W, b


@pytest.mark.parametrize("total", [0, 1, 5, 40, 300, 64 * 24, 10**6])
def test_a_batch_keeps_what_sorting_the_whole_table_keeps(total):
    x, W, b = draw(64, 6, 24)
    pre = x @ W.T + b
    best = pre.reshape(-1).sort(descending=True).indices[:total]
    slow = torch.zeros(pre.numel()).index_copy(0, best, pre.reshape(-1)[best]).view(pre.shape)
    found = allocate.batch_topk(x, W, b, total)
    torch.testing.assert_close(found.dense(), slow)
    assert len(found.values) == min(total, pre.numel())


def test_rows_that_take_more_than_the_first_look_saw_are_looked_at_again():
    x, W, b = torch.zeros(32, 4), torch.rand(400, 4), torch.zeros(400)
    x[7] = 1
    kept = allocate.batch_topk(x, W, b, 300).dense()
    assert (kept[7] != 0).sum() == 300
    assert (kept != 0).sum() == 300


def test_columns_keep_their_quotas_largest_positive_entries():
    x, W, b = draw(40, 6, 100)
    pre = x @ W.T + b
    quota = torch.randint(0, 41, (100,), generator=torch.Generator().manual_seed(1))
    mask = allocate.column_topk(pre, quota)
    for i in range(100):
        best = pre[:, i].sort(descending=True).indices[: int(quota[i])]
        expected = {int(row) for row in best if pre[row, i] > 0}
        assert set(mask[:, i].nonzero()[:, 0].tolist()) == expected


def test_forced_picks_are_those_that_size_alone_would_not_have_made():
    pre = torch.tensor([[5.0, 1.0], [4.0, 3.0]])
    mask = allocate.fill(pre, torch.tensor([1, 1]))
    assert pre[mask].tolist() == [5, 3]
    assert allocate.forced_share(pre, mask) == 0.5
    assert allocate.forced_share(pre, allocate.fill(pre, torch.tensor([2, 0]))) == 0
    assert allocate.forced_share(pre, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("uneven", [0.0, 20.0])
def test_the_share_of_forced_picks_is_that_of_sorting_the_whole_table(uneven):
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(50, 64, generator=generator)
    pre[:3] += uneven
    mask = torch.rand(50, 64, generator=generator) < 0.05
    edge = pre.flatten().sort(descending=True).values[int(mask.sum()) - 1]
    expected = (pre[mask] < edge).float().mean()
    torch.testing.assert_close(allocate.forced_share(pre, mask), expected)


def test_what_columns_leave_goes_to_the_largest_left_in_the_table():
    pre = torch.tensor([[5.0, -1.0, 3.0], [4.0, -2.0, 1.0]])
    mask = allocate.fill(pre, torch.tensor([1, 2, 1]))
    assert mask.tolist() == [[True, False, True], [True, False, True]]
    assert allocate.fill(pre, torch.tensor([2, 2, 2])).tolist() == (pre > 0).tolist()


@pytest.mark.parametrize("n", [10, 3000])
@pytest.mark.parametrize("k", [0, 1, 3, 12])
def test_the_common_threshold_keeps_the_asked_number_or_all_positive_ones(n, k):
    x, W, b = draw(n, 6, 24)
    pre = x @ W.T + b
    threshold = allocate.common_threshold(x, W, b, k * n)
    assert threshold >= 0
    assert (pre > threshold).sum() == min(k * n, int((pre > 0).sum()))


def test_each_latents_threshold_keeps_its_count_or_all_its_positive_entries():
    x, W, b = draw(50, 6, 100)
    pre = x @ W.T + b
    counts = torch.randint(0, 51, (100,), generator=torch.Generator().manual_seed(1))
    threshold = allocate.latent_thresholds(x, W, b, counts)
    assert (threshold >= 0).all()
    expected = torch.minimum(counts, (pre > 0).sum(0))
    assert torch.equal((pre > threshold).sum(0), expected)


@pytest.mark.parametrize(("mean_l0", "shift"), [(3.0, 10.0), (32.0, 0.0), (0.5, 1.0), (64.0, 2.0)])
def test_zipf_densities_fall_add_up_and_never_exceed_one(mean_l0, shift):
    density = allocate.zipf_densities(mean_l0, 64, exponent=1.0, shift=shift)
    assert float(density.sum()) == pytest.approx(mean_l0, rel=1e-5)
    assert (density.diff() <= 0).all()
    assert density.min() > 0
    assert density.max() <= 1
    free = (density < 1).nonzero()[:, 0]
    if len(free) > 1:
        ratio = (free[0] + 1 + shift) / (free[-1] + 1 + shift)
        torch.testing.assert_close(density[free[-1]] / density[free[0]], ratio)


def test_an_exponent_of_zero_shares_equally():
    density = allocate.zipf_densities(2.0, 8, exponent=0.0, shift=0.0)
    torch.testing.assert_close(density, torch.full((8,), 0.25))
