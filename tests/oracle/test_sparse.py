"""The fast products with sparse codes against the obvious dense ones."""

import pytest
import torch
from torch.autograd import gradcheck

from saelab.ops import select, sparse
from saelab.types import SparseLatents


def case(n=12, d=5, d_sae=9, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, b = torch.randn(n, d, generator=g), torch.randn(d, generator=g)
    W, c = torch.randn(d_sae, d, generator=g), torch.randn(d_sae, generator=g)
    x, b, W, c = (t.to(dtype).requires_grad_() for t in (x, b, W, c))
    with torch.no_grad():
        indices, values = select.topk((x - b) @ W.T + c, k)
    return x, b, W, c, indices, values


def test_encode_at_has_the_gradient_of_what_it_computes():
    x, b, W, c, indices, _ = case()

    def encode(x, b, W, c):
        with torch.no_grad():
            values = sparse.encode_at_dense(x, b, W, c, indices)
        return sparse.encode_at(x, b, W, c, indices, values)

    assert gradcheck(encode, (x, b, W, c))


def test_decode_at_has_the_gradient_of_what_it_computes():
    *_, W, _, indices, values = case()
    assert gradcheck(lambda v, W: sparse.decode_at(indices, v, W), (values.requires_grad_(), W))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_whole_reconstruction_has_the_dense_forms_value_and_gradients(dtype, tolerance):
    results = []
    for fast in (False, True):
        x, b, W, c, indices, values = case(64, 16, 40, 5, dtype)
        D = W.detach().flip(0).clone().requires_grad_()
        if fast:
            z = sparse.encode_at(x, b, W, c, indices, values).relu()
            x_hat = sparse.decode_at(indices, z, D)
        else:
            z = sparse.encode_at_dense(x, b, W, c, indices).relu()
            x_hat = sparse.decode_at_dense(indices, z, D)
        (x_hat - x).square().mean().backward()
        results.append((x_hat, *(t.grad for t in (x, b, W, c, D))))
    for dense, quick in zip(*results, strict=True):
        torch.testing.assert_close(quick, dense, atol=tolerance, rtol=tolerance)


def test_the_form_without_sampled_addmm_agrees(monkeypatch):
    x, _, W, _, indices, _ = case(300, 16, 40, 5)
    first = sparse._picked_products(x.detach(), W.detach(), indices)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    second = sparse._picked_products(x.detach(), W.detach(), indices)
    torch.testing.assert_close(first, second, atol=1e-12, rtol=1e-12)


def test_repeated_backward_passes_give_the_same_bits():
    def grads():
        x, b, W, c, indices, values = case(256, 32, 100, 8, torch.float32)
        z = sparse.encode_at(x, b, W, c, indices, values).relu()
        sparse.decode_at(indices, z, W).square().sum().backward()
        return x.grad, b.grad, W.grad, c.grad

    first = grads()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, grads(), strict=True))


def test_no_rows_give_no_rows_and_zero_gradients():
    x, b, W, c, indices, values = case(0)
    z = sparse.encode_at(x, b, W, c, indices, values)
    sparse.decode_at(indices, z, W).sum().backward()
    assert W.grad is not None
    assert not W.grad.any()


def test_ragged_codes_decode_like_dense_ones_also_with_empty_rows():
    z = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, -3.0]])
    W = torch.arange(12.0).reshape(3, 4)
    latents = SparseLatents.from_dense(z)
    torch.testing.assert_close(sparse.decode_ragged(latents, W), z @ W)


@pytest.mark.parametrize(("d_sae", "k"), [(64, 3), (64, 4), (65, 4), (24, 24), (4608, 32)])
def test_topk_by_groups_finds_what_a_plain_topk_finds(d_sae, k):
    pre = torch.randn(20, d_sae, generator=torch.Generator().manual_seed(k))
    indices, values = select.topk(pre, k)
    expected = pre.topk(k)
    assert torch.equal(values.sort(-1, descending=True).values, expected.values)
    assert torch.equal(indices.sort(-1).values, expected.indices.sort(-1).values)


def test_topk_of_tied_values_keeps_k_different_latents():
    indices, values = select.topk(torch.ones(3, 128), 5)
    assert all(len(set(row)) == 5 for row in indices.tolist())
    assert (values == 1).all()


def test_topk_of_a_product_is_that_of_the_whole_matrix_in_any_number_of_chunks():
    g = torch.Generator().manual_seed(0)
    x, W, c = (torch.randn(*shape, generator=g) for shape in ((600, 6), (128, 6), (128,)))
    indices, values = select.linear_topk(x, W, c, 4)
    expected = (x @ W.T + c).topk(4)
    torch.testing.assert_close(values.sort(-1, descending=True).values, expected.values)
    assert torch.equal(indices.sort(-1).values, expected.indices.sort(-1).values)
    assert len(select.linear_topk(x[:0], W, c, 4)[0]) == 0


def ragged_case():
    """The codes of `case`, without some of each row's entries and without all of one row's."""
    x, b, W, c, indices, values = case()
    keep = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[4] = False
    counts = keep.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return x, b, W, c, SparseLatents(offsets, indices[keep], values[keep], len(W))


@pytest.mark.parametrize("dense_share", [0.0, 1.0])
def test_ragged_forms_have_the_dense_forms_value_and_gradients(dense_share, monkeypatch):
    monkeypatch.setattr(sparse, "_DENSE_SHARE", dense_share)
    results = []
    for fast in (False, True):
        x, b, W, c, chosen = ragged_case()
        if fast:
            x_hat = sparse.decode_ragged_at(sparse.encode_ragged_at(x, b, W, c, chosen), W)
        else:
            on = torch.zeros(len(x), len(W), dtype=torch.bool)
            on[chosen.rows(), chosen.indices] = True
            x_hat = torch.where(on, (x - b) @ W.T + c, 0) @ W
        x_hat.square().sum().backward()
        results.append((x_hat.detach(), x.grad, b.grad, W.grad, c.grad))
    for slow, quick in zip(*results, strict=True):
        torch.testing.assert_close(quick, slow, atol=1e-12, rtol=1e-12)


def test_the_ragged_form_without_sampled_addmm_agrees(monkeypatch):
    monkeypatch.setattr(sparse, "_DENSE_SHARE", 1.0)
    x, _, W, _, chosen = ragged_case()
    given = (x.detach(), W.detach(), chosen.indices, chosen.row_offsets)
    first = sparse._picked_products(*given)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    torch.testing.assert_close(sparse._picked_products(*given), first, atol=1e-12, rtol=1e-12)


def test_ragged_codes_without_entries_give_zeros_and_zero_gradients():
    x, b, W, c, _, _ = case()
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = SparseLatents(torch.zeros(13, dtype=torch.int64), nothing, x.new_zeros(0), 9)
    x_hat = sparse.decode_ragged_at(sparse.encode_ragged_at(x, b, W, c, empty), W)
    x_hat.sum().backward()
    assert torch.equal(x_hat, torch.zeros(12, 5, dtype=torch.float64))
    assert all(not t.grad.any() for t in (b, W, c))
