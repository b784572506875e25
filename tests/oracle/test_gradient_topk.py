"""Known answers for gradient TopK (sheet 3, section 10 of how we measure)."""

import math

import pytest
import torch
from doubles import ArrayStore, planted_store

from saelab.dictionaries import create, fold
from saelab.dictionaries.gradient_topk import QUANTILE
from saelab.errors import ArtifactError, ConfigError, ShapeError
from saelab.evals.encoders import GradientEncoder
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch

SCORES = ("additive", "product")


def batch_of(x, grad=None):
    return Batch(x, x, torch.arange(len(x)), torch.arange(len(x)), grad)


def ready(seed=0, *, d_in=8, d_sae=24, n=64, **fields):
    """Return an initialised dictionary, rows, and gradients at them."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(n, d_in, generator=generator) for _ in range(2))
    d = create({"type": "gradient_topk", "d_in": d_in, "d_sae": d_sae, "k": 3} | fields)
    d.init_(x, generator)
    return d, x, grad


def of_the_sheet(**fields):
    """u = (2, 1), and with the gradient (0, 1) effects a = (0, 10)."""
    d = create({"type": "gradient_topk", "d_in": 2, "d_sae": 2, "k": 1} | fields)
    with torch.no_grad():
        d.W_enc.copy_(torch.eye(2))
        d.effect_mean.fill_(0.1)
        d.effect_max.fill_(1.0)
    return d, torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 1.0]])


@pytest.mark.parametrize(
    "fields", [{"beta": 0.2}, {"score": "product"}], ids=["additive", "product"]
)
def test_a_smaller_latent_with_more_effect_is_kept_with_its_own_value(fields):
    d, x, grad = of_the_sheet(**fields)
    assert d.encode_with_gradient(x, grad).dense().tolist() == [[0, 1]]
    assert d.encode(x).tolist() == [[2, 0]]


def test_a_weak_weight_of_the_effect_leaves_the_larger_latent():
    d, x, grad = of_the_sheet(beta=0.05)
    assert d.encode_with_gradient(x, grad).dense().tolist() == [[2, 0]]


def test_effects_above_the_quantile_count_as_much_as_it():
    d, x, grad = of_the_sheet(beta=0.2)
    d.effect_max.fill_(0.4)
    assert d.encode_with_gradient(x, grad).dense().tolist() == [[2, 0]]
    d.effect_max.fill_(0.6)
    assert d.encode_with_gradient(x, grad).dense().tolist() == [[0, 1]]


@pytest.mark.parametrize("fields", [{"beta": 0.3}, {"beta": 10}, {"score": "product"}])
def test_selection_is_that_of_the_written_score(fields):
    d, x, grad = ready(n=600, **fields)
    pre = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    effect = (grad / grad.norm(dim=1, keepdim=True) @ d.W_dec.T).abs().clamp(max=d.effect_max)
    effect = effect / d.effect_mean
    factor = 1 + fields["beta"] * effect if "beta" in fields else effect
    for row, code in zip(pre.relu() * factor, d.encode_with_gradient(x, grad).dense(), strict=True):
        best = row.argsort(descending=True)[:3]
        assert set(code.nonzero()[:, 0].tolist()) == set(best[row[best] > 0].tolist())
    z = d.encode_with_gradient(x, grad).dense()
    torch.testing.assert_close(z[z != 0], pre.relu()[z != 0])


@pytest.mark.parametrize("score", SCORES)
def test_rows_without_gradient_are_coded_as_topk_does(score):
    d, x, grad = ready(score=score, beta=10)
    grad[::2] = 0
    z = d.encode_with_gradient(x, grad).dense()
    assert torch.equal(z[::2], d.encode(x)[::2])
    assert not torch.equal(z[1::2], d.encode(x)[1::2])


@pytest.mark.parametrize("score", SCORES)
def test_only_the_direction_of_a_gradient_counts_and_folding_keeps_the_choice(score):
    d, x, grad = ready(score=score)
    z = d.encode_with_gradient(x, grad).dense()
    sizes = torch.logspace(-6, 6, len(x))[:, None]
    assert torch.equal(d.encode_with_gradient(x, sizes * grad).dense() != 0, z != 0)
    folded = fold(d, 4.0).encode_with_gradient(x / 4, 4 * grad).dense()
    torch.testing.assert_close(folded, z / 4)


@pytest.mark.parametrize("score", SCORES)
def test_a_gradient_and_its_opposite_choose_alike(score):
    d, x, grad = ready(score=score)
    z = d.encode_with_gradient(x, grad).dense()
    assert torch.equal(d.encode_with_gradient(x, -grad).dense(), z)


def test_the_product_is_the_limit_of_a_large_weight_of_the_effect():
    product, x, grad = ready(score="product")
    wanted = product.encode_with_gradient(x, grad).dense()
    for beta, same in ((1e6, True), (1.0, False)):
        d = create(product.config.model_copy(update={"score": "additive", "beta": beta}))
        d.load_state_dict(product.state_dict())
        assert torch.equal(d.encode_with_gradient(x, grad).dense(), wanted) == same


def test_without_weight_of_the_effect_it_is_topk_to_the_bit():
    x = planted_store(n=1000)[0].rows("site", torch.arange(1000))
    store = ArrayStore({"site": x}, grads={"site": torch.sin(3 * x)})
    common = {"d_in": 16, "d_sae": 32, "k": 2}
    configs = [{"type": "topk"} | common, {"type": "gradient_topk", "beta": 0} | common]
    members = [Member(c["type"], create(c), "site", 1e-2) for c in configs]
    topk, ours = fit(members, store, TrainConfig(batch=64, tokens=64 * 40, dead_window=128))
    assert topk.metrics == ours.metrics
    weights = ours.dictionary.state_dict()
    for name, tensor in topk.dictionary.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert torch.equal(topk.dictionary.encode(x), ours.dictionary.encode(x))


def test_dropping_a_latent_changes_a_linear_loss_by_its_value_times_its_effect():
    d, x, _ = ready(k=4)
    w = torch.randn(8, generator=torch.Generator().manual_seed(1))
    z = d.encode(x)
    for i in range(d.d_sae):
        without = z.clone()
        without[:, i] = 0
        change = (d.decode(without) - d.decode(z)) @ w
        torch.testing.assert_close(change, -z[:, i] * (d.W_dec[i] @ w), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("score", SCORES)
def test_scores_and_effects_are_constants_to_the_loss(score):
    d, x, grad = ready(score=score, aux_weight=0)
    alive = torch.zeros(d.d_sae).bool()
    d.loss(batch_of(x, grad), 0.5, alive).total.backward()
    chosen = d.encode_with_gradient(x, grad).dense() != 0
    W_enc, W_dec, b_dec = (t.detach().clone().requires_grad_() for t in (d.W_enc, d.W_dec, d.b_dec))
    z = ((x - b_dec) @ W_enc.T + d.b_enc.detach()).relu() * chosen
    error = x - z @ W_dec - b_dec
    (error.square().sum() / (len(x) * d.variance)).backward()
    for mine, expected in ((d.W_enc, W_enc), (d.W_dec, W_dec), (d.b_dec, b_dec)):
        torch.testing.assert_close(mine.grad, expected.grad, atol=1e-5, rtol=1e-4)


def test_mean_and_quantile_start_at_those_of_random_directions():
    d, _, grad = ready(d_in=64, d_sae=512, n=256)
    seen = d.loss(batch_of(grad.flip(1), grad), 0.5, torch.zeros(512).bool()).observed
    assert float(d.effect_mean) == pytest.approx(float(seen["mean"]), rel=0.02)
    assert float(d.effect_max) == pytest.approx(float(seen["max"]), rel=0.1)


def test_mean_and_quantile_are_those_of_the_batch_and_run_on():
    d, x, grad = ready(n=100)
    grad[::3] = 0
    alive = torch.zeros(d.d_sae).bool()
    d.observe_(d.loss(batch_of(x, grad), 0.5, alive))
    kept = grad[grad.any(1)]
    effect = (kept / kept.norm(dim=1, keepdim=True) @ d.W_dec.detach().T).abs().flatten()
    assert float(d.effect_mean) == pytest.approx(float(effect.mean()))
    above = int((effect >= d.effect_max).sum())
    assert above == math.ceil((1 - QUANTILE) * len(effect))
    before = d.effect_mean.clone()
    d.observe_(d.loss(batch_of(x, torch.zeros_like(x)), 0.5, alive))
    assert torch.equal(d.effect_mean, before)


def test_missing_or_misplaced_gradients_are_named():
    d, x, grad = ready()
    alive = torch.zeros(d.d_sae).bool()
    assert type(d.config).needs_grad
    with pytest.raises(ArtifactError, match="came without: harvest a store with gradients"):
        d.loss(batch_of(x), 0.5, alive)
    with pytest.raises(ShapeError, match=r"shape \(3, 8\), but activations \(64, 8\)"):
        d.encode_with_gradient(x, grad[:3])
    with pytest.raises(ArtifactError, match=r"gradient\(data\) needs"):
        GradientEncoder(d, "data")(batch_of(x))
    with pytest.raises(ConfigError, match="topk dictionary does not select by gradients"):
        GradientEncoder(create({"type": "topk", "d_in": 8, "d_sae": 24, "k": 3}), "data")


def test_the_gradient_aware_encoder_says_what_labels_its_gradients_know():
    d, x, grad = ready()
    encoder = GradientEncoder(d, "sampled")
    assert encoder.name == "gradient(sampled)"
    expected = d.encode_with_gradient(x, grad).dense()
    assert torch.equal(encoder(batch_of(x, grad)).dense(), expected)
