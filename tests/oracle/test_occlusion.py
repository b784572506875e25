"""Occlusion on sums of two attributes, one three times as long as the other."""

import pytest
import torch
from sklearn.metrics import f1_score

from saelab.circuits.attributes import Attributes, Supervised, fit_features
from saelab.circuits.occlusion import lengths, occlusion, shrunk
from saelab.circuits.predicates import mean_f1
from saelab.dictionaries.topk import TopK, TopKConfig

VALUES = Attributes({"short": tuple("wxyz"), "long": tuple("abcd")})
PAIRS = [(s, v) for s in "wxyz" for v in "abcd" for _ in range(2)]
TABLE = VALUES.table({"short": [s for s, _ in PAIRS], "long": [v for _, v in PAIRS]})
FIRST = torch.arange(len(PAIRS)) % 2 == 0
FACTORS = (1.0, 0.5, 0.2, 0.1, 0.0)


def world(size: float) -> tuple[torch.Tensor, Supervised]:
    """x = e[short] + size · e[long], with eight orthogonal directions, and its features."""
    x = TABLE.float() * torch.tensor([1.0] * 4 + [size] * 4)
    return x, fit_features(x, TABLE, "mean_features")


def dictionary(k: int) -> TopK:
    """One that holds all eight directions."""
    d = TopK(TopKConfig(d_in=8, d_sae=8, k=k))
    with torch.no_grad():
        for weight in (d.W_enc, d.W_dec):
            weight.copy_(torch.eye(8))
    return d


def found(size: float, k: int) -> dict[tuple[str, str, float], float]:
    x, features = world(size)
    args = (dictionary(k).encode, x, TABLE, features, VALUES, FACTORS)
    return {
        (r.longer, r.shorter, r.factor): float(score(r))
        for r in occlusion(*args, first=FIRST, signed=False)
    }


def score(revealed) -> torch.Tensor:
    return mean_f1(revealed.tallies.sum(0, keepdim=True))


def test_a_short_attribute_is_found_once_the_long_one_is_small_enough():
    """A latent of the long one has 3/4 + 9/4 α before the code, one of the short one 1. Until then
    the best claim about a short value is a latent of a long one: chance, 2 · 1 / (4 + 4)."""
    expected = {("long", "short", factor): 1 if factor < 1 / 9 else 0.25 for factor in FACTORS}
    assert found(3, k=1) == expected


def test_with_room_for_both_nothing_is_hidden():
    assert set(found(3, k=2).values()) == {1.0}


def test_only_shorter_attributes_are_looked_for():
    assert {key[:2] for key in found(1 / 3, k=1)} == {("short", "long")}
    assert lengths(world(3)[1], VALUES) == pytest.approx({"short": 0.75**0.5, "long": 6.75**0.5})
    equal = Supervised(torch.eye(8), torch.zeros(8))
    x, _ = world(3)
    assert not list(
        occlusion(lambda x: x, x, TABLE, equal, VALUES, FACTORS, first=FIRST, signed=False)
    )  # fmt: skip


def test_it_is_what_loops_and_scikit_learn_say():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(PAIRS), generator=generator)[:26]
    table, u = TABLE[rows], torch.randn(8, 6, generator=generator)
    u[4:] *= 2
    features = Supervised(u, torch.randn(6, generator=generator))
    x = features.code(table).x_hat + torch.randn(26, 6, generator=generator)
    W = torch.randn(9, 6, generator=generator)
    first = torch.rand(26, generator=generator) < 0.5
    args = (lambda x: x @ W.T, x, table, features, VALUES, (1.0, 0.3))
    for r in occlusion(*args, first=first, signed=True):
        scores = []
        z = torch.stack([
            row - (1 - r.factor) * u[4 + table[n, 4:].int().argmax()] for n, row in enumerate(x)
        ]) @ W.T  # fmt: skip
        for value in range(4):
            truth = table[:, value]
            said = [sign * z[:, j] > 0 for sign in (1, -1) for j in range(9)]
            best = max(said, key=lambda s: f1_score(truth[first], s[first], zero_division=0))
            scores.append(f1_score(truth[~first], best[~first], zero_division=0))
        assert (r.longer, r.shorter) == ("long", "short")
        assert float(score(r)) == pytest.approx(sum(scores) / 4)


def test_shrinking_by_one_changes_nothing_and_by_zero_leaves_the_attributes_mean():
    x, features = world(3)
    columns = VALUES.of("long")
    assert torch.equal(shrunk(x, TABLE, features, columns, 1.0), x)
    gone = shrunk(x, TABLE, features, columns, 0.0)
    torch.testing.assert_close(gone[:, 4:], torch.full((len(x), 4), 0.75))
    assert torch.equal(gone[:, :4], x[:, :4])
