"""Known answers for TopK and AuxK (sheet 1.1)."""

import pytest
import torch
from doubles import ArrayStore, planted_store

from saelab.dictionaries import REGISTRY, config_class, create
from saelab.errors import ConfigError
from saelab.ops.auxk import auxk_loss
from saelab.protocols import GradientTrained
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch


def identity(k: int, **fields):
    d = create({"type": "topk", "d_in": 3, "d_sae": 3, "k": k, **fields})
    with torch.no_grad():
        d.W_enc.copy_(torch.eye(3))
    return d


def batch_of(x):
    return Batch(x, x, torch.arange(len(x)), torch.arange(len(x)))


@pytest.mark.parametrize("k", [2, 3])
def test_topk_of_the_sheet_keeps_three_and_one_and_never_a_negative(k):
    d = identity(k)
    x = torch.tensor([[3.0, -2.0, 1.0]])
    z = d.encode(x)
    assert z.tolist() == [[3, 0, 1]]
    assert d.decode(z).tolist() == [[3, 0, 1]]
    assert (x - d.reconstruct(x)).tolist() == [[0, -2, 0]]


def test_a_selected_latent_of_value_zero_has_not_fired():
    d = identity(3)
    loss = d.loss(batch_of(torch.tensor([[3.0, -2.0, 1.0]])), 0.0, torch.zeros(3).bool())
    assert sorted(loss.fired.tolist()) == [0, 2]
    assert loss.l0 == 2


def test_loss_is_the_squared_error_over_the_variance_of_the_initial_sample():
    d = identity(1, aux_weight=0)
    d.variance.fill_(5.0)
    x = torch.tensor([[3.0, -2.0, 1.0], [0.0, 4.0, 2.0]])
    loss = d.loss(batch_of(x), 0.0, torch.zeros(3).bool())
    torch.testing.assert_close(loss.total, torch.tensor((4 + 1 + 4.0) / (2 * 5)))


def test_a_dead_latent_along_the_residual_brings_auxk_to_zero():
    error = torch.tensor([[0.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    pre = torch.tensor([[2.0], [-1.0]])
    assert auxk_loss(error, pre, torch.tensor([[0.0, -1.0, 0.0]]), aux_k=1) == 0


def test_auxk_of_silent_dead_latents_is_their_share_of_the_residual():
    error = torch.tensor([[0.0, -2.0, 0.0], [0.0, 2.0, 0.0]])
    pre = torch.full((2, 1), -1.0)
    W_dec = torch.tensor([[0.0, -1.0, 0.0]])
    assert auxk_loss(error, pre, W_dec, aux_k=1) == 1
    assert auxk_loss(error, pre, W_dec, aux_k=4) == 0.25


def test_auxk_of_a_residual_without_variance_is_zero():
    same = torch.ones(4, 3)
    assert auxk_loss(same, torch.ones(4, 2), torch.eye(3)[:2], aux_k=2) == 0
    assert auxk_loss(torch.zeros(4, 3), torch.ones(4, 2), torch.eye(3)[:2], aux_k=2) == 0
    assert auxk_loss(same, torch.ones(4, 0), torch.eye(3)[:0], aux_k=2) == 0


def test_auxk_sends_no_gradient_to_the_bias_to_x_hat_or_to_living_latents():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    d = create({"type": "topk", "d_in": 8, "d_sae": 24, "k": 3, "aux_k": 4})
    d.init_(x, generator)
    dead = torch.arange(24) % 3 == 0
    grads = []
    for weight in (0.0, 1.0):
        same = create(d.config.model_copy(update={"aux_weight": weight}))
        same.load_state_dict(d.state_dict())
        same.loss(batch_of(x), 0.0, dead).total.backward()
        grads.append({name: p.grad for name, p in same.named_parameters()})
    without, with_aux = grads
    assert torch.equal(without["b_dec"], with_aux["b_dec"])
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(without[name][~dead], with_aux[name][~dead])
        assert not torch.equal(without[name][dead], with_aux[name][dead])


def test_the_default_aux_k_is_half_the_width_and_at_most_d_sae():
    config = create({"type": "topk", "d_in": 576, "d_sae": 4608, "k": 32}).config
    assert config.resolved_aux_k == 288
    assert create({"type": "topk", "d_in": 64, "d_sae": 8, "k": 2}).config.resolved_aux_k == 8


def test_init_sets_unit_norm_decoder_half_as_encoder_and_the_median():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + 3
    d = create({"type": "topk", "d_in": 8, "d_sae": 24, "k": 3})
    d.init_(x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(24))
    assert torch.equal(d.W_enc, d.W_dec / 2)
    torch.testing.assert_close(d.b_dec, x.median(0).values, atol=0.2, rtol=0)
    torch.testing.assert_close(d.variance, x.var(0, correction=0).sum())


def test_k_above_d_sae_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="k=9 exceeds d_sae=8"):
        create({"type": "topk", "d_in": 4, "d_sae": 8, "k": 9})


def test_multi_topk_adds_an_eighth_of_the_error_at_four_times_k():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    config = {"type": "topk", "d_in": 8, "d_sae": 24, "k": 2, "aux_weight": 0}
    d = create({**config, "multi_weight": 1 / 8})
    d.init_(x, generator)
    single, fourfold = create(config), create({**config, "k": 8})
    for other in (single, fourfold):
        other.load_state_dict(d.state_dict())
    nothing = torch.zeros(24).bool()
    loss, at_k, at_4k = (m.loss(batch_of(x), 0.0, nothing) for m in (d, single, fourfold))
    torch.testing.assert_close(loss.total, at_k.total + at_4k.total / 8)
    assert torch.equal(loss.l0, at_k.l0)
    assert torch.equal(d.encode(x), single.encode(x))


def test_multi_topk_never_asks_for_more_than_all_latents():
    d = identity(2, multi_weight=1.0)
    assert d.loss(batch_of(torch.ones(2, 3)), 0.0, torch.zeros(3).bool()).total > 0


def test_threshold_inference_has_mean_l0_k_and_no_bound_per_row():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator) * torch.rand(4000, 1, generator=generator)
    d = create({"type": "topk", "d_in": 8, "d_sae": 24, "k": 3, "threshold": True})
    d.init_(x, generator)
    d.calibrate([batch_of(x[:1000]), batch_of(x[1000:3000])])
    assert d.l0_bound is None
    l0 = (d.encode(x[:3000]) != 0).sum(1).float()
    assert float(l0.mean()) == 3
    assert l0.max() > 3
    assert float((d.encode(x[3000:]) != 0).sum(1).float().mean()) == pytest.approx(3, rel=0.05)
    assert torch.equal(d.encode_sparse(x[:50]).dense(), d.encode(x[:50]))
    folded = d.folded(10.0)
    torch.testing.assert_close(folded.encode(x / 10), d.encode(x) / 10, atol=1e-5, rtol=1e-5)


UNIT_ROWS = sorted(n for n, t in REGISTRY.items() if issubclass(t, GradientTrained) and n != "relu")


@pytest.mark.parametrize("name", UNIT_ROWS)
def test_a_run_in_bfloat16_leaves_decoder_rows_at_unit_norm_in_float32(name, monkeypatch):
    monkeypatch.setattr("saelab.train.fit.CALIBRATION_ROWS", 200)
    x = planted_store(n=300, d=8, latents=12)[0].rows("site", torch.arange(300))
    store = ArrayStore({"site": x}, grads={"site": torch.sin(3 * x)})
    config = TrainConfig(batch=32, tokens=32 * 8, autocast="bfloat16")
    d = create(config_class(name).example())
    (fitted,) = fit([Member("a", d, "site", 1e-2)], store, config)
    assert {p.dtype for p in fitted.dictionary.parameters()} == {torch.float32}
    norms = fitted.dictionary.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(24), atol=1e-6, rtol=0)
