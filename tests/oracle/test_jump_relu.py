"""Known answers for JumpReLU (sheet 1.3), and its pseudo-derivatives against expected losses."""

import pytest
import torch
from doubles import planted_store

from saelab.dictionaries import create, fold
from saelab.dictionaries.jump_relu import JumpReLU
from saelab.errors import ConfigError
from saelab.ops import jump
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch


def batch_of(x):
    return Batch(x, x, torch.arange(len(x)), torch.arange(len(x)))


def gradients(function, u, threshold, bandwidth, weight=None):
    u = torch.tensor(u).requires_grad_()
    threshold = torch.tensor(threshold).requires_grad_()
    out = function(u, threshold, torch.full_like(threshold, bandwidth))
    out.backward(torch.ones_like(out) if weight is None else weight)
    return out.tolist(), u.grad, threshold.grad


def test_jump_of_the_sheet_silences_what_is_not_above_the_threshold():
    z, grad_u, _ = gradients(jump.jump, [[0.5, 1.2, 1.0]], [1.0, 1.0, 1.0], 0.1)
    assert z == [[0, pytest.approx(1.2), 0]]
    assert grad_u.tolist() == [[0, 1, 0]]


def test_the_l0_of_the_sheet_pulls_on_the_threshold_inside_the_kernel_only():
    out, grad_u, grad = gradients(jump.step, [[1.2, 0.4999]], [1.0, 1.0], 1.0)
    assert out == [[1, 0]]
    assert grad.tolist() == [-1, 0]
    assert grad_u is None or not grad_u.any()


def test_the_kernel_sees_values_just_below_the_threshold_too():
    for function, expected in ((jump.step, -1 / 0.5), (jump.jump, -2 / 0.5)):
        _, _, grad = gradients(function, [[1.8, 2.2, 1.7, 2.3]], [2.0] * 4, 0.5)
        assert grad.tolist() == pytest.approx([expected, expected, 0, 0])


def test_pseudo_derivatives_are_the_written_ones_for_any_incoming_gradient():
    generator = torch.Generator().manual_seed(0)
    u, weight = torch.randn(2, 50, 6, generator=generator)
    theta = torch.rand(6, generator=generator)
    for function, size in ((jump.jump, theta), (jump.step, torch.ones(6))):
        _, _, grad = gradients(function, u.tolist(), theta.tolist(), 0.3, weight)
        expected = torch.zeros(6)
        for row, coming in zip(u, weight, strict=True):
            for i in range(6):
                if abs(float(row[i] - theta[i])) / 0.3 < 0.5:
                    expected[i] -= coming[i] * size[i] / 0.3
        torch.testing.assert_close(grad, expected)


CELL = 5e-4


def density():
    """Midpoints of a fine grid with the weights of a shifted normal density."""
    u = torch.arange(-5, 6, CELL, dtype=torch.float64)[:, None] + CELL / 2
    return u, CELL * torch.exp(-((u - 0.4) ** 2) / 2) / (2 * torch.pi) ** 0.5


def expected_losses():
    u, p = density()

    def l0(theta, bandwidth):
        return (p * jump.step(u, theta, bandwidth)).sum()

    def error(theta, bandwidth):
        return (p * (jump.jump(u, theta, bandwidth) - 0.3).square()).sum()

    return {"l0": l0, "squared error": error}


@pytest.mark.parametrize("name", ["l0", "squared error"])
@pytest.mark.parametrize("at", [0.5, 1.0, 2.0])
def test_mean_pseudo_derivative_is_the_finite_difference_of_the_expected_loss(name, at):
    expected = expected_losses()[name]
    step = 20 * CELL
    with torch.no_grad():
        up, down = (
            expected(torch.tensor([at + s * step]).double(), torch.ones(1).double())
            for s in (1, -1)
        )
    slow = float((up - down) / (2 * step))
    misses = []
    for bandwidth in (0.4, 0.1):
        theta = torch.tensor([at], dtype=torch.float64, requires_grad=True)
        expected(theta, torch.tensor([bandwidth], dtype=torch.float64)).backward()
        misses.append(abs(float(theta.grad) - slow))
    assert misses[1] < 0.1 * 0.3 * at
    assert misses[1] < 0.35 * misses[0] + 1e-5, "of the order of the bandwidth"


def started(target=4.0, d_sae=128, **fields):
    store, _ = planted_store(n=6000, d=32, latents=128, active=6)
    x = store.rows("site", torch.arange(4000))
    d = create({"type": "jump_relu", "d_in": 32, "d_sae": d_sae, "target_l0": target} | fields)
    d.init_(x, torch.Generator().manual_seed(0))
    return d, x


@pytest.mark.parametrize("target", [1.0, 3.0, 10.0])
def test_a_run_starts_at_four_times_the_target_with_a_little_inside_the_kernel(target):
    d, x = started(target)
    pre = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    assert float((d.encode(x) != 0).sum(-1).float().mean()) == pytest.approx(4 * target, rel=0.05)
    torch.testing.assert_close(d.bandwidth, 0.1 * pre.std(0), rtol=1e-3, atol=0)
    inside = float(jump.kernel(pre, d.threshold, d.bandwidth).mean().detach())
    assert 0.001 < inside < 0.05


def test_thresholds_do_not_start_or_fall_below_zero():
    d, _ = started(target=20.0, d_sae=40)
    assert float(d.threshold.min().detach()) == 0
    with torch.no_grad():
        d.threshold.sub_(1)
    d.constrain_()
    assert (d.threshold >= 0).all()


def test_loss_is_error_plus_the_squared_miss_of_the_target():
    d, x = started(aux_weight=0, sparsity_weight=2.0)
    with torch.no_grad():
        z = d.encode(x)
        fvu = (x - d.decode(z)).square().sum() / (len(x) * d.variance)
        l0 = (z != 0).sum() / len(x)
        for progress, rise in ((0.0, 0.0), (0.1, 0.5), (0.9, 1.0)):
            loss = d.loss(batch_of(x), progress, torch.zeros(128).bool())
            torch.testing.assert_close(loss.total, fvu + 2 * rise * (l0 / 4 - 1) ** 2)


def test_the_penalty_reaches_thresholds_only():
    d, x = started(aux_weight=0)
    grads = []
    for weight in (1e-12, 5.0):
        same = create(d.config.model_copy(update={"sparsity_weight": weight}))
        same.load_state_dict(d.state_dict())
        same.loss(batch_of(x), 1.0, torch.zeros(128).bool()).total.backward()
        grads.append({name: p.grad for name, p in same.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]) == (name != "threshold")


@pytest.mark.parametrize("weight", [1e-12, 3.0])
def test_gradients_of_the_loss_are_those_of_the_dense_form_where_the_kernel_sees_silent_units(
    weight,
):
    d, x = started(aux_weight=0, sparsity_weight=weight)
    d, x = d.double(), x[:300].double()
    d.loss(batch_of(x), 1.0, torch.zeros(128).bool()).total.backward()
    fast = {name: p.grad.clone() for name, p in d.named_parameters()}
    d.zero_grad()
    pre = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    z = jump.jump(pre, d.threshold, d.bandwidth)
    l0 = jump.step(pre, d.threshold, d.bandwidth).sum() / len(x)
    fvu = (x - z @ d.W_dec - d.b_dec).square().sum() / (len(x) * d.variance)
    (fvu + weight * (l0 / 4 - 1) ** 2).backward()
    for name, p in d.named_parameters():
        torch.testing.assert_close(fast[name], p.grad)
    silent = jump.kernel(pre, d.threshold, d.bandwidth) * (pre <= d.threshold)
    assert silent.sum() > 100


def test_the_loss_does_not_depend_on_the_unit_of_x():
    d, x = started()
    dead = torch.arange(128) < 2
    whole = d.loss(batch_of(x), 0.5, dead).total
    torch.testing.assert_close(fold(d, 1 / 128).loss(batch_of(x * 128), 0.5, dead).total, whole)


@pytest.mark.parametrize("target", [3.0, 30.0])
def test_the_held_out_l0_comes_within_a_twentieth_of_the_target(target):
    store, _ = planted_store(n=24_000, d=32, latents=128, active=6)
    d = create({"type": "jump_relu", "d_in": 32, "d_sae": 160, "target_l0": target})
    config = TrainConfig(batch=128, tokens=128 * 200)
    (fitted,) = fit([Member("a", d, "site", 1e-2)], store, config)
    d = fitted.dictionary
    x = torch.cat([batch.x for batch in store.scan("site", batch=512, split="heldout")])
    assert float((d.encode(x) != 0).sum(-1).float().mean()) == pytest.approx(target, rel=0.05)
    pre = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    inside = float(jump.kernel(pre, d.threshold, d.bandwidth).mean().detach())
    assert 0.001 < inside < 0.05


@pytest.mark.parametrize("target", [1.0, 6.0])
def test_calibration_scales_thresholds_alike_until_the_l0_is_the_target(target):
    d, x = started(target)
    before = d.threshold.detach().clone()
    d.calibrate([batch_of(x[:2500]), batch_of(x[2500:])])
    assert float((d.encode(x) != 0).sum() / len(x)) == pytest.approx(target, abs=1 / len(x))
    factors = d.threshold.detach() / before
    torch.testing.assert_close(factors, factors[:1].expand(len(factors)))


@pytest.mark.parametrize(("d_sae", "factor"), [(8, 1.0), (128, 6.0)])
def test_calibration_says_where_no_factor_reaches_the_target(d_sae, factor, caplog):
    d, x = started(target=1.0, d_sae=d_sae)
    with torch.no_grad():
        d.threshold.mul_(0.0 if d_sae == 8 else factor)
    before = d.threshold.detach().clone()
    d.calibrate([batch_of(x)])
    assert "no factor on the thresholds" in caplog.text
    assert torch.equal(d.threshold, before)


def test_a_threshold_moves_at_its_own_rate(monkeypatch):
    monkeypatch.setattr(JumpReLU, "calibrate", lambda *_: None)
    store, _ = planted_store(n=400)
    moved = []
    for factor in (1.0, 4.0):
        d = create(
            {"type": "jump_relu", "d_in": 16, "d_sae": 24, "target_l0": 2}
            | {"threshold_lr": factor}
        )
        (fitted,) = fit([Member("a", d, "site", 1e-5)], store, TrainConfig(batch=64, tokens=128))
        moved.append(fitted.dictionary.state_dict())
    start = moved[0]["threshold"] - (moved[1]["threshold"] - moved[0]["threshold"]) / 3
    steps = [(some["threshold"] - start).abs().max() for some in moved]
    assert float(steps[1] / steps[0]) == pytest.approx(4, rel=1e-3)
    assert torch.equal(moved[0]["b_dec"], moved[1]["b_dec"])


def test_a_target_is_needed_and_must_be_below_d_sae():
    with pytest.raises(ConfigError, match="target_l0"):
        create({"type": "jump_relu", "d_in": 4, "d_sae": 8})
    with pytest.raises(ConfigError, match="target_l0=9 is not below d_sae=8"):
        create({"type": "jump_relu", "d_in": 4, "d_sae": 8, "target_l0": 9})
