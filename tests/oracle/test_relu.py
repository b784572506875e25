"""Known answers for ReLU in both forms (sheet 1.6)."""

import pytest
import torch
from torch.func import functional_call

from saelab.dictionaries import create, fold
from saelab.errors import ConfigError
from saelab.types import Batch

FORMS = ["bricken", "april"]


def batch_of(x):
    return Batch(x, x, torch.arange(len(x)), torch.arange(len(x)))


def some(form, seed=0, **fields):
    """A dictionary in the middle of a run: decoder rows of odd norms, biases moved."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator)
    d = create({"type": "relu", "form": form, "d_in": 4, "d_sae": 7} | fields)
    d.init_(x, generator)
    with torch.no_grad():
        d.W_dec.mul_(0.5 + torch.rand(7, 1, generator=generator))
        d.b_enc.add_(torch.randn(7, generator=generator))
    return d, x


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x", [0.1, 0.3, 1.0, 5.0])
def test_one_unit_latent_settles_at_x_minus_half_the_weight(form, x):
    # minimise (x − z)² + λ z over z = ReLU(x + b): z = max(x − λ/2, 0)
    weight = 0.4
    d = create({"type": "relu", "form": form, "d_in": 1, "d_sae": 1, "sparsity_weight": weight})
    rows = torch.full((1, 1), x)
    d.b_dec.requires_grad_(False)
    optimizer = torch.optim.SGD([d.b_enc], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        d.loss(batch_of(rows), 1.0, torch.zeros(1).bool()).total.backward()
        optimizer.step()
    assert float(d.encode(rows).detach()) == pytest.approx(max(x - weight / 2, 0), abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_loss_is_that_of_plain_loops(form):
    d, x = some(form, sparsity_weight=0.3, aux_weight=0)
    d.variance.fill_(2.5)
    fvu = penalty = 0.0
    for row in x:
        x_hat = d.b_dec.clone()
        for i in range(7):
            z = max(float((row - d.b_dec) @ d.W_enc[i] + d.b_enc[i]), 0.0)
            x_hat = x_hat + z * d.W_dec[i]
            penalty += z * (float(d.W_dec[i].norm()) if form == "april" else 1)
        fvu += float((row - x_hat).square().sum())
    loss = d.loss(batch_of(x), 0.1, torch.zeros(7).bool())
    assert float(loss.terms["weight"]) == pytest.approx(0.15)
    expected = fvu / (12 * 2.5) + 0.15 * penalty / (12 * 2.5**0.5)
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_whole_loss_are_true(form):
    d, x = some(form)
    d, x = d.double(), x.double()
    dead = torch.tensor([True, False, False, True, False, False, False])
    weights = {k: v.detach().clone().requires_grad_() for k, v in d.named_parameters()}
    names = list(weights)
    no_aux = create(d.config.model_copy(update={"aux_weight": 0.0})).double()
    buffers = dict(d.named_buffers())

    def total(*values):
        state = dict(zip(names, values, strict=True)) | buffers
        return functional_call(_Loss(no_aux), {f"d.{k}": v for k, v in state.items()}, (x, dead))

    assert torch.autograd.gradcheck(total, tuple(weights.values()))


class _Loss(torch.nn.Module):
    def __init__(self, d):
        super().__init__()
        self.d = d

    def forward(self, x, dead):
        return self.d.loss(batch_of(x), 0.5, dead).total


def test_the_april_loss_does_not_see_how_code_and_decoder_share_a_norm():
    for form in FORMS:
        d, x = some(form)
        before = float(d.loss(batch_of(x), 0.5, torch.zeros(7).bool()).total.detach())
        with torch.no_grad():
            factor = torch.linspace(0.5, 3, 7)
            d.W_enc.mul_(factor[:, None])
            d.b_enc.mul_(factor)
            d.W_dec.div_(factor[:, None])
        after = float(d.loss(batch_of(x), 0.5, torch.zeros(7).bool()).total.detach())
        assert (after == pytest.approx(before, rel=1e-5)) == (form == "april")


def test_only_the_bricken_form_keeps_the_decoder_on_the_sphere():
    for form in FORMS:
        d, _ = some(form)
        d.constrain_()
        assert torch.allclose(d.W_dec.norm(dim=1), torch.ones(7)) == (form == "bricken")


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_does_not_depend_on_the_unit_of_x(form):
    d, x = some(form)
    dead = torch.arange(7) < 2
    whole = d.loss(batch_of(x), 0.5, dead)
    scaled = fold(d, 0.01).loss(batch_of(x * 100), 0.5, dead)
    torch.testing.assert_close(scaled.total, whole.total)


def test_auxk_reaches_only_dead_latents_and_not_the_bias():
    d, x = some("april")
    dead = torch.arange(7) < 3
    grads = []
    for weight in (0.0, 1.0):
        same = create(d.config.model_copy(update={"aux_weight": weight}))
        same.load_state_dict(d.state_dict())
        same.loss(batch_of(x), 0.5, dead).total.backward()
        grads.append({name: p.grad for name, p in same.named_parameters()})
    assert torch.equal(grads[0]["b_dec"], grads[1]["b_dec"])
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(grads[0][name][~dead], grads[1][name][~dead])
        assert not torch.equal(grads[0][name][dead], grads[1][name][dead])


def test_a_target_that_every_latent_would_have_to_reach_is_refused():
    with pytest.raises(ConfigError, match="target_l0=8 is not below d_sae=8"):
        create({"type": "relu", "d_in": 4, "d_sae": 8, "target_l0": 8})
