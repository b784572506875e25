"""Known answers for the gated dictionary (sheet 1.5)."""

import pytest
import torch
from torch.func import functional_call

from saelab.dictionaries import create, fold
from saelab.types import Batch

ALIVE = torch.zeros(7).bool()


def batch_of(x):
    return Batch(x, x, torch.arange(len(x)), torch.arange(len(x)))


def some(**fields):
    """A dictionary in the middle of a run: every bias moved."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator)
    d = create({"type": "gated", "d_in": 4, "d_sae": 7} | fields)
    d.init_(x, generator)
    with torch.no_grad():
        for parameter in (d.b_enc, d.r_mag, d.b_mag):
            parameter.add_(0.5 * torch.randn(7, generator=generator))
    return d, x


def test_equal_paths_are_a_plain_relu():
    d, x = some()
    with torch.no_grad():
        d.r_mag.zero_()
        d.b_mag.copy_(d.b_enc)
        expected = ((x - d.b_dec) @ d.W_enc.T + d.b_enc).relu()
        assert torch.equal(d.encode(x), expected)


def test_the_gate_decides_and_the_other_path_measures():
    d = create({"type": "gated", "d_in": 2, "d_sae": 2})
    with torch.no_grad():
        d.b_enc.copy_(torch.tensor([-1.0, 1.0]))
        d.r_mag.copy_(torch.tensor([2.0, 3.0]).log())
        d.b_mag.copy_(torch.tensor([0.5, -4.0]))
        z = d.encode(torch.tensor([[0.9, 1.0], [1.5, 2.0]]))
    torch.testing.assert_close(z, torch.tensor([[0.0, 0.0], [3.5, 2.0]]))


@torch.no_grad()
def test_loss_is_that_of_plain_loops():
    d, x = some(sparsity_weight=0.3, aux_weight=0)
    d.variance.fill_(2.5)
    squares = penalty = 0.0
    for row in x:
        x_hat, x_gate = d.b_dec.clone(), d.b_dec.clone()
        for i in range(7):
            product = float((row - d.b_dec) @ d.W_enc[i])
            gate = product + float(d.b_enc[i])
            if gate > 0:
                amount = product * float(d.r_mag[i].exp()) + float(d.b_mag[i])
                x_hat = x_hat + max(amount, 0.0) * d.W_dec[i]
                x_gate = x_gate + gate * d.W_dec[i]
                penalty += gate
        squares += float((row - x_hat).square().sum() + (row - x_gate).square().sum())
    loss = d.loss(batch_of(x), 0.1, ALIVE)
    expected = squares / (12 * 2.5) + 0.15 * penalty / (12 * 2.5**0.5)
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)


class _Loss(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, x):
        return self.d.loss(batch_of(x), 0.5, ALIVE).total


def test_gradients_of_both_paths_are_true():
    d, x = some()
    d, x = d.double(), x.double()
    names = ["W_enc", "b_enc", "r_mag", "b_mag"]
    fixed = {k: v.detach() for k, v in d.state_dict().items() if k not in names}

    def total(*values):
        state = fixed | dict(zip(names, values, strict=True))
        return functional_call(_Loss(d), {f"d.{k}": v for k, v in state.items()}, (x,))

    values = tuple(getattr(d, k).detach().clone().requires_grad_() for k in names)
    assert torch.autograd.gradcheck(total, values)


def test_the_decoder_learns_from_the_true_reconstruction_only():
    d, x = some(sparsity_weight=5.0)
    d.loss(batch_of(x), 1.0, ALIVE).total.backward()
    z = d.encode(x).detach()
    W_dec = d.W_dec.detach().clone().requires_grad_()
    fvu = (x - (z @ W_dec + d.b_dec.detach())).square().sum() / (len(x) * d.variance)
    fvu.backward()
    torch.testing.assert_close(d.W_dec.grad, W_dec.grad)


def test_the_gates_error_reaches_b_dec_through_the_encoder_only():
    d, x = some(sparsity_weight=0.1)
    grads = {}
    for name in ("whole", "gate shut out"):
        d.zero_grad()
        loss = d.loss(batch_of(x), 0.0, ALIVE).total
        if name != "whole":
            gate = ((x - d.b_dec) @ d.W_enc.T + d.b_enc).relu()
            x_gate = gate @ d.W_dec.detach() + d.b_dec.detach()
            loss = loss - (x - x_gate).square().sum() / (len(x) * d.variance)
        loss.backward()
        grads[name] = d.b_dec.grad.clone()
    fvu = (x - d.reconstruct(x)).square().sum() / (len(x) * d.variance)
    (alone,) = torch.autograd.grad(fvu, d.b_dec)
    torch.testing.assert_close(grads["gate shut out"], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(grads["whole"], alone)


def test_the_penalty_does_not_touch_the_amounts():
    grads = []
    for weight in (1e-12, 5.0):
        d, x = some(sparsity_weight=weight)
        d.loss(batch_of(x), 1.0, ALIVE).total.backward()
        grads.append({name: p.grad for name, p in d.named_parameters()})
    for name in ("r_mag", "b_mag", "W_dec"):
        assert torch.equal(grads[0][name], grads[1][name])
    assert not torch.equal(grads[0]["b_enc"], grads[1]["b_enc"])


def test_the_loss_does_not_depend_on_the_unit_of_x():
    d, x = some()
    dead = torch.arange(7) < 2
    whole = d.loss(batch_of(x), 0.5, dead).total
    torch.testing.assert_close(fold(d, 1 / 128).loss(batch_of(x * 128), 0.5, dead).total, whole)


def test_decoder_rows_keep_unit_norm():
    d, _ = some()
    with torch.no_grad():
        d.W_dec.mul_(3)
    d.constrain_()
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(7))
