"""Drawing tokens: with the chances of the softmax, each row from a stream of its own."""

import pytest
import torch

from saelab.models.generation import chooser, seeds_of_rows


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_drawn_with_the_chances_of_the_softmax(temperature):
    logits, n = torch.tensor([0.0, 1.0, -1.0, 2.0, -30.0]), 20_000
    drawn = chooser(temperature, seeds_of_rows(0, n))(logits.expand(n, -1))
    wanted = (logits / temperature).softmax(-1)
    found = torch.bincount(drawn, minlength=5) / n
    assert (found - wanted).abs().max() < 4 * (0.25 / n) ** 0.5
    assert found[4] == 0


def test_without_a_temperature_the_likeliest_token_is_taken():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(chooser(0.0, seeds_of_rows(0, 5))(logits), logits.argmax(-1))


def test_like_distributions_mostly_draw_alike():
    """At most 2 v / (1 + v) of the draws differ, v the total variation; independent ones differ
    in 1 − Σ p q of them."""
    logits, n = torch.randn(50, generator=torch.Generator().manual_seed(0)), 2000
    near = logits + 0.1 * torch.randn(50, generator=torch.Generator().manual_seed(1))
    one, other = (chooser(1.0, seeds_of_rows(7, n))(x.expand(n, -1)) for x in (logits, near))
    p, q = logits.softmax(-1), near.softmax(-1)
    apart = float((p - q).abs().sum() / 2)
    assert 0 < (one != other).float().mean() < 2 * apart / (1 + apart) + 0.02 < 0.2
    assert 1 - float(p @ q) > 0.8


def test_impossible_tokens_are_not_drawn_however_many_there_are():
    logits = torch.full((40_000,), -60.0)
    logits[7] = 0.0
    for seed in range(6):
        drawn = chooser(1.0, seeds_of_rows(seed, 40))(logits.expand(40, -1))
        assert (drawn == 7).all()
