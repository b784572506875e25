"""Damaged weights: none at amount zero, the amount that was asked for, few values per row."""

import pytest
import torch
from saelab_experiments.damage import change_matrices_, noisy, rounded, tune_
from saelab_experiments.tiny import TinyConfig, loss_on, new_network, unigram_loss
from torch import nn

from saelab.errors import ConfigError

W = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
TINY = TinyConfig(vocabulary=260, n_layers=2, d_model=16, heads=2, context=8, steps=20)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_no_noise_changes_nothing_and_more_has_the_norm_asked_for():
    assert torch.equal(noisy(W, 0.0, seeded()), W)
    for share in (0.01, 0.3):
        assert float((noisy(W, share, seeded()) - W).norm() / W.norm()) == pytest.approx(share)
    assert torch.equal(noisy(W, 0.1, seeded(1)), noisy(W, 0.1, seeded(1)))
    assert not torch.equal(noisy(W, 0.1, seeded(1)), noisy(W, 0.1, seeded(2)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_rounded_row_has_at_most_two_to_the_bits_values_each_the_nearest(bits):
    found = rounded(W, bits)
    step = (W.amax(1) - W.amin(1)) / (2**bits - 1)
    for row, mine, width in zip(found, W, step, strict=True):
        levels = row.unique()
        assert len(levels) <= 2**bits
        nearest = levels[(mine[:, None] - levels).abs().argmin(1)]
        torch.testing.assert_close((row - mine).abs(), (nearest - mine).abs())
        assert float((row - mine).abs().max()) <= float(width) / 2 + 1e-6
    torch.testing.assert_close(found.amax(1), W.amax(1))
    torch.testing.assert_close(rounded(found, bits), found)


def test_many_bits_change_little_and_a_flat_row_not_at_all():
    torch.testing.assert_close(rounded(W, 16), W, atol=1e-4, rtol=0)
    flat = torch.full((2, 5), 3.0)
    assert torch.equal(rounded(flat, 2), flat)
    with pytest.raises(ConfigError, match="1 or more"):
        rounded(W, 0)


def test_matrices_are_changed_once_each_and_vectors_stay():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    network, before = nn.Sequential(first, second, nn.LayerNorm(3)), first.weight.clone()
    biases = first.bias.clone()
    change_matrices_(network, lambda weight: 2 * weight)
    assert torch.equal(first.weight, 2 * before)
    assert torch.equal(first.bias, biases)


def test_networks_are_made_of_their_seed_and_tuning_lowers_the_loss_repeatably():
    windows = torch.arange(64).remainder(5).reshape(8, 8)
    states = []
    for seed in (0, 0, 1):
        network = new_network(TINY, 260, seed)
        before = loss_on(network, windows)
        losses = tune_(network, windows, steps=20, batch=4, lr=1e-2, seed=0)
        assert len(losses) == 20
        assert loss_on(network, windows) < before - 1
        assert not network.training
        states.append(network.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    with pytest.raises(ConfigError, match="no windows"):
        tune_(network, windows[:0], steps=1, batch=1, lr=1e-3, seed=0)


def test_the_unigram_loss_is_the_entropy_of_frequent_tokens():
    windows = torch.tensor([[0, 1] * 500])
    assert unigram_loss(windows, windows, 2) == pytest.approx(torch.tensor(2.0).log().item())
    assert unigram_loss(windows, windows[:, :2], 4) > torch.tensor(2.0).log().item()
