"""AuxK: the form that is used against the plain one, and its gradient."""

import pytest
import torch
from doubles import planted_store
from torch.autograd import gradcheck

from saelab import kernels
from saelab.dictionaries import REGISTRY, config_class, create
from saelab.dictionaries.affine import AffineDictionary
from saelab.ops import sparse
from saelab.ops.auxk import _kept, _kept_plain, auxk_loss, auxk_loss_plain
from saelab.train import schedules
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch


def case(n=40, m=24, d=6, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    error, pre, W = (torch.randn(*s, generator=g, dtype=dtype) for s in ((n, d), (n, m), (m, d)))
    return error, pre.requires_grad_(), W.requires_grad_()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("aux_k", [1, 5, 24, 60])
def test_loss_and_gradients_are_those_of_plain_operations(aux_k, signed):
    found = []
    for function in (auxk_loss_plain, auxk_loss):
        error, pre, W = case()
        loss = function(error, pre, W, aux_k, signed=signed)
        (3 * loss).backward()
        found.append((loss.detach(), pre.grad, W.grad))
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_the_gradient_is_the_true_derivative(signed):
    error, pre, W = case(n=5, m=7, d=3, dtype=torch.float64)
    assert gradcheck(lambda p, w: auxk_loss(error, p, w, 3, signed=signed), (pre, W))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("k", [1, 4, 9, 16])
def test_compiled_and_plain_selection_agree(k, signed):
    pre = torch.randn(200, 16, generator=torch.Generator().manual_seed(k))
    torch.testing.assert_close(_kept(pre, k, signed), _kept_plain(pre, k, signed), atol=0, rtol=0)


def test_of_equal_values_no_more_than_k_are_kept():
    pre = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.5], [0.0, 0.0, -1.0, 0.0, 0.0]])
    z = _kept(pre, 2, False)
    assert z.count_nonzero(1).tolist() == [2, 0]
    assert float(z[0].sum()) == 4


@pytest.mark.skipif(kernels.name() != "numba", reason="there is nothing to turn off")
def test_the_form_without_kernels_agrees(monkeypatch):
    error, pre, W = case()
    with_kernels = auxk_loss(error, pre, W, 4).detach()
    monkeypatch.setattr(kernels, "name", lambda: "torch")
    torch.testing.assert_close(auxk_loss(error, pre, W, 4).detach(), with_kernels)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_a_residual_without_use_gives_zero_and_no_gradient(value):
    _, pre, W = case()
    loss = auxk_loss(torch.full((40, 6), value), pre, W, 4)
    assert float(loss.detach()) == 0
    loss.backward()
    assert pre.grad is None or not pre.grad.any()


def test_rows_taken_from_a_table_give_their_gradient_back():
    table = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([7, 0, 3])
    assert torch.equal(sparse.rows_at(table, ids), table[ids])
    assert gradcheck(lambda t: sparse.rows_at(t, ids), (table,))


# ---------------------------------------------------------------------------------- in every type

AFFINE = sorted(name for name, kind in REGISTRY.items() if issubclass(kind, AffineDictionary))
DEAD = torch.arange(24) % 8 == 5


def started(name, **fields):
    """Return a dictionary whose biases matter, in float64, and a batch with gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    chosen = {"aux": "auxk"} if "aux" in config_class(name).model_fields else {}
    d = create(config_class(name).example().model_copy(update=chosen | fields))
    d.init_(x, generator)
    with torch.no_grad():
        d.b_dec.add_(torch.linspace(-2, 2, 8))
        d.b_enc.add_(torch.linspace(-0.3, 0.3, 24))
    x, rows = x.double(), torch.arange(64)
    return d.double(), Batch(x, x, rows, rows, torch.sin(3 * x))


def residual(name, d, batch):
    """Return x less its reconstruction in training, at the start of a run."""
    if name == "gradient_topk":
        return batch.x - d.decode(d.encode_with_gradient(batch.x, batch.grad))
    if not hasattr(d.config, "k") or d.l0_bound is not None:
        return batch.x - d.reconstruct(batch.x)
    pre = (batch.x - d.b_dec) @ d.W_enc.T + d.b_enc
    edge = pre.flatten().sort(descending=True).values[int(d.config.k * len(pre)) - 1]
    return batch.x - d.decode(pre.relu() * (pre >= edge))


@pytest.mark.parametrize("aux_k", [2, 4])
@pytest.mark.parametrize("name", AFFINE)
@torch.no_grad()
def test_every_types_auxk_explains_the_whole_residual_with_dead_latents_and_no_bias(name, aux_k):
    d, batch = started(name, aux_k=aux_k)
    error, left = residual(name, d, batch), 0.0
    for row, e in zip(batch.x, error, strict=True):
        pre = {i: float((row - d.b_dec) @ d.W_enc[i] + d.b_enc[i]) for i in DEAD.nonzero()[:, 0]}
        size = {i: abs(u) if d.signed else u for i, u in pre.items()}
        for i in sorted(pre, key=size.__getitem__, reverse=True)[:aux_k]:
            e = e - (pre[i] if d.signed else max(pre[i], 0.0)) * d.W_dec[i]
        left += float(e.square().sum())
    wanted = left / float((error - error.mean(0)).square().sum()) * min(3 / aux_k, 1)
    found = float(d.loss(batch, 0.0, DEAD).terms["aux"])
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", AFFINE)
def test_no_types_auxk_reaches_the_bias_x_hat_or_a_living_latent(name):
    grads = []
    for weight in (0.0, 1.0):
        d, batch = started(name, aux_weight=weight)
        d.loss(batch, 0.0, DEAD).total.backward()
        grads.append({key: p.grad for key, p in d.named_parameters()})
    for key, without in grads[0].items():
        with_aux = grads[1][key]
        if key in ("W_enc", "b_enc", "W_dec"):
            assert torch.equal(without[~DEAD], with_aux[~DEAD])
            assert not torch.equal(without[DEAD], with_aux[DEAD])
        else:
            assert torch.equal(without, with_aux)


def test_a_window_shorter_than_a_batch_leaves_those_alive_that_fired_in_the_last_one():
    assert schedules.default_dead_window(3) == 1
    config = TrainConfig(batch=64, tokens=64 * 4, dead_window=1, log_every=1)
    d = create({"type": "topk", "d_in": 16, "d_sae": 200, "k": 1})
    (fitted,) = fit([Member("a", d, "site", 1e-3)], planted_store(n=400)[0], config)
    assert all(136 / 200 <= line["dead"] < 1 for line in fitted.metrics)
