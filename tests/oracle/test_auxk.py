"""AuxK: the form that is used against the plain one, and its gradient."""

import pytest
import torch
from torch.autograd import gradcheck

from saelab import kernels
from saelab.ops import sparse
from saelab.ops.auxk import _kept, _kept_plain, auxk_loss, auxk_loss_plain


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
