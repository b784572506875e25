"""Known answers for AbsTopK (sheet 2)."""

import pytest
import torch

from saelab.dictionaries import create
from saelab.metrics.sparsity import Sparsity
from saelab.ops.auxk import auxk_loss
from saelab.types import Batch


def identity(k, n=3):
    d = create({"type": "abs_topk", "d_in": n, "d_sae": n, "k": k})
    with torch.no_grad():
        d.W_enc.copy_(torch.eye(n))
    return d


def batch_of(x):
    return Batch(x, x, torch.arange(len(x)), torch.arange(len(x)))


@pytest.mark.parametrize(("k", "z"), [(1, [0, -5, 0]), (2, [3, -5, 0]), (3, [3, -5, 1])])
def test_the_largest_of_either_sign_are_kept(k, z):
    assert identity(k).encode(torch.tensor([[3.0, -5.0, 1.0]])).tolist() == [z]


def test_the_code_is_odd():
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    d = identity(4, 12)
    assert torch.equal(d.encode(-x), -d.encode(x))


def test_no_other_k_sparse_code_is_nearer_to_the_pre_activations():
    pre = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    left = (pre - identity(4, 12).encode(pre)).square().sum(1)
    torch.testing.assert_close(left, pre.square().sort(1).values[:, :8].sum(1))


def test_it_equals_topk_on_both_signs_of_the_directions():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator)
    signed = create({"type": "abs_topk", "d_in": 8, "d_sae": 24, "k": 3})
    signed.init_(x, generator)
    both = create({"type": "topk", "d_in": 8, "d_sae": 48, "k": 3})
    with torch.no_grad():
        both.W_enc.copy_(torch.cat([signed.W_enc, -signed.W_enc]))
        both.W_dec.copy_(torch.cat([signed.W_dec, -signed.W_dec]))
        both.b_dec.copy_(signed.b_dec)
    z = both.encode(x)
    torch.testing.assert_close(signed.encode(x), z[:, :24] - z[:, 24:])
    torch.testing.assert_close(signed.reconstruct(x), both.reconstruct(x))


def test_a_negative_latent_fires_and_learns():
    d = identity(1)
    loss = d.loss(batch_of(torch.tensor([[3.0, -5.0, 1.0]])), 0.0, torch.zeros(3).bool())
    assert loss.fired.tolist() == [1]
    assert loss.l0 == 1
    loss.total.backward()
    assert d.W_dec.grad[1].abs().sum() > 0
    assert d.W_dec.grad[[0, 2]].abs().sum() == 0


def test_firings_of_opposite_sign_do_not_cancel():
    x = torch.tensor([[3.0, -5.0, 1.0], [-3.0, 5.0, -1.0]])
    loss = identity(1).loss(batch_of(x), 0.0, torch.zeros(3).bool())
    assert set(loss.fired.tolist()) == {1}
    assert loss.l0 == 1
    metric = Sparsity(3)
    metric.update(identity(2).encode_sparse(x), torch.zeros(2, dtype=torch.int64))
    assert metric.counts.tolist() == [2, 2, 0]
    assert metric.dead_share() == pytest.approx(1 / 3)


def test_auxk_ranks_by_size_and_keeps_the_sign():
    error = torch.tensor([[0.0, -2.0], [0.0, 2.0]])
    pre = torch.tensor([[1.0, -2.0], [1.0, 2.0]])
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert auxk_loss(error, pre, W_dec, aux_k=1, signed=True) == 0
    assert auxk_loss(error, pre, W_dec, aux_k=1) > 0
