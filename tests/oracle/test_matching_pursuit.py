"""Known answers for matching pursuit (sheet 4), and the gradient through its steps (sheet 0.8)."""

import itertools
import math
from unittest.mock import patch

import pytest
import torch
from doubles import planted_store
from torch.autograd import gradcheck

from saelab import dictionaries, kernels
from saelab.dictionaries import create
from saelab.errors import ConfigError
from saelab.ops.pursuit import pursue
from saelab.ops.unroll import pursuit_auxk, unroll
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch

FORMS = [
    "torch",
    pytest.param(
        "numba",
        marks=pytest.mark.skipif(kernels.name() != "numba", reason="numba is missing or off"),
    ),
]


def using(form):
    return patch.object(kernels, "name", lambda: form)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, seed=0, dtype=torch.float32):
    rows = normal(*shape, seed=seed, dtype=dtype)
    return rows / rows.norm(dim=1, keepdim=True)


def batch_of(x):
    return Batch(x, x, torch.arange(len(x)), torch.arange(len(x)))


def holding(atoms, k, **fields):
    """Return the dictionary with these atoms and no bias."""
    d = create({"type": "matching_pursuit", "d_in": atoms.shape[1], "d_sae": len(atoms), "k": k}
               | fields).to(atoms.dtype)  # fmt: skip
    with torch.no_grad():
        d.W_dec.copy_(atoms)
    return d


def started(k=3, d_sae=24, d_in=8, **fields):
    d = create({"type": "matching_pursuit", "d_in": d_in, "d_sae": d_sae, "k": k} | fields)
    d.init_(normal(256, d_in, seed=1) + 0.3, torch.Generator().manual_seed(0))
    return d


# ----------------------------------------------------------------------------------- known answers


def test_the_sheets_two_atoms_stall_without_signs_and_converge_with_them():
    atoms = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    x = (2 * atoms[0] + atoms[1])[None]
    trace = holding(atoms, 6).trace(x)
    assert trace.codes.dense()[0].tolist() == pytest.approx([2.5, 0.75])
    assert float(trace.residual.square().sum()) == pytest.approx(0.1875)
    z = holding(atoms, 6, signed=True).encode(x)
    assert z[0].tolist() == pytest.approx([2.03125, 0.984375])


def test_one_step_equals_topk_with_k_1_tied_weights_and_no_bias():
    atoms, x = unit(24, 8), normal(50, 8, seed=1)
    topk = create({"type": "topk", "d_in": 8, "d_sae": 24, "k": 1})
    with torch.no_grad():
        topk.W_enc.copy_(atoms)
        topk.W_dec.copy_(atoms)
    mine = holding(atoms, 1)
    torch.testing.assert_close(mine.encode(x), topk.encode(x))
    losses = [d.loss(batch_of(x), 0.0, torch.zeros(24).bool()).total for d in (mine, topk)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("signed", [False, True])
def test_more_steps_never_increase_the_error_and_keep_the_order(signed):
    d, x = started(signed=signed), normal(60, 8, seed=2)
    traces = [d.trace(x, k=k) for k in (2, 4, 8, 16)]
    for few, many in itertools.pairwise(traces):
        assert torch.equal(many.order[:, : few.order.shape[1]], few.order)
        less, more = (t.residual.square().sum(1) for t in (many, few))
        assert (less <= more + 1e-5).all()


def test_a_tree_of_two_orthonormal_levels_is_solved_exactly_with_its_own_directions():
    directions = torch.linalg.qr(normal(20, 20, dtype=torch.float64))[0]
    generator = torch.Generator().manual_seed(1)
    parent = torch.randint(3, (200,), generator=generator)
    child = 3 + 3 * parent + torch.randint(3, (200,), generator=generator)
    truth = torch.zeros(200, 20, dtype=torch.float64)
    truth.scatter_(1, parent[:, None], normal(200, 1, seed=2, dtype=torch.float64).abs() + 1)
    truth.scatter_(1, child[:, None], normal(200, 1, seed=3, dtype=torch.float64).abs() + 0.1)
    z = holding(directions, 4).encode(truth @ directions)
    torch.testing.assert_close(z, truth, atol=1e-12, rtol=0)


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", ["abs", "nonneg"])
def test_unroll_has_the_gradient_of_what_it_computes(form, sign):
    # more steps than dimensions, few atoms of odd norm: repeats; and rows that stop
    atoms = (0.9 * unit(5, 4, dtype=torch.float64)).requires_grad_()
    x = normal(6, 4, seed=1, dtype=torch.float64).requires_grad_()
    order = pursue(x, atoms, 9, sign=sign).order
    order[2, 5:] = order[4] = -1
    assert any(len(set(row)) < len(row) for row in order.tolist())

    def again(x, atoms):
        """Follow the given order, then make what it finds differentiable."""
        with torch.no_grad():
            values, residual = [], x
            for step in range(order.shape[1]):
                chosen = atoms[order[:, step].clamp(min=0)] * (order[:, step, None] >= 0)
                values.append((residual * chosen).sum(1))
                residual = residual - values[-1][:, None] * chosen
        return unroll(x, atoms, order, torch.stack(values, 1), residual)

    with using(form):
        assert gradcheck(again, (x, atoms))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-11)])
def test_the_losss_gradient_is_that_of_the_obvious_loop(form, dtype, tolerance):
    d = started(k=6, aux_weight=0).to(dtype)
    x = normal(40, 8, seed=3, dtype=dtype)
    with using(form):
        d.loss(batch_of(x), 0.0, torch.zeros(24).bool()).total.backward()
    W, b = (p.detach().clone().requires_grad_() for p in (d.W_dec, d.b_dec))
    residual = x - b
    for _ in range(6):
        score, atom = (residual @ W.T).relu().max(1)
        residual = residual - score[:, None] * W[atom]
    (residual.square().sum() / (40 * d.variance)).backward()
    torch.testing.assert_close(d.W_dec.grad, W.grad, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(d.b_dec.grad, b.grad, atol=tolerance, rtol=tolerance)


def test_what_the_backward_pass_keeps_holds_nothing_per_latent_and_step():
    def kept(k, d_sae):
        sizes: dict[int, int] = {}
        d = started(k=k, d_sae=d_sae, aux_weight=0)

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = d.loss(batch_of(normal(50, 8, seed=4)), 0.0, torch.zeros(d_sae).bool())
        loss.total.backward()
        return sum(sizes.values()) - d.W_dec.numel()

    base = kept(4, 24)
    assert kept(4, 240) == base
    assert kept(14, 24) - base == 2 * 50 * 10


# -------------------------------------------------------------------------------------------- AuxK


@pytest.mark.parametrize("sign", ["abs", "nonneg"])
def test_auxk_leaves_at_most_the_residuals_energy(sign):
    error = normal(60, 8, seed=5) + 0.2
    total = error.square().sum() / (error - error.mean(0)).square().sum()
    shares = [float(pursuit_auxk(error, unit(9, 8), k, sign)) for k in (1, 2, 4, 8)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] <= total
    assert float(pursuit_auxk(error, unit(2, 8), 4, sign)) < 0.5 * float(total)


def test_auxk_of_orthonormal_dead_latents_is_what_they_cannot_reach():
    error = torch.tensor([[1.0, -2.0, 0.0], [-1.0, 2.0, 0.0]])
    x_only = torch.eye(3)[:1]
    assert float(pursuit_auxk(error, x_only, 1, "abs")) == pytest.approx(0.8)
    assert float(pursuit_auxk(error, x_only, 1, "nonneg")) == pytest.approx(0.9)
    assert float(pursuit_auxk(error, x_only, 2, "abs")) == pytest.approx(0.4)
    same, none = torch.ones(4, 3), torch.zeros(0, 3)
    assert pursuit_auxk(same, torch.eye(3), 2) == pursuit_auxk(error, none, 2) == 0


def test_auxk_sends_no_gradient_to_the_bias_or_to_living_latents():
    x, grads = normal(64, 8, seed=6), []
    dead = torch.arange(24) % 3 == 0
    for weight in (0.0, 1.0):
        d = started(aux_weight=weight)
        d.loss(batch_of(x), 0.0, dead).total.backward()
        grads.append((d.W_dec.grad, d.b_dec.grad))
    (plain, plain_b), (both, both_b) = grads
    assert torch.equal(plain_b, both_b)
    torch.testing.assert_close(plain[~dead], both[~dead], atol=1e-7, rtol=1e-6)
    assert (plain[dead] != both[dead]).any(1).all()


# --------------------------------------------------------------------------------------- threshold


@torch.no_grad()
def test_rows_stop_at_the_threshold_and_not_before():
    d = started(k=12, threshold=0.5)
    x = normal(80, 8, seed=7)
    trace, tol = d.trace(x), float(d.threshold)
    assert tol == pytest.approx(0.5 * float(d.variance.sqrt()))
    norms = trace.residual.norm(dim=1)
    done = norms <= tol
    assert (done | (trace.n_steps == 12)).all()
    assert 0 < trace.n_steps.float().mean() < 12
    for row in range(80):
        steps = int(trace.n_steps[row])
        if steps > 0:
            before = d.trace(x[row][None], k=steps, threshold=0.0)
            last = before.residual + before.coefficients[:, -1:] * d.W_dec[before.order[:, -1]]
            assert float(last.norm()) > tol


@pytest.mark.parametrize("signed", [False, True])
def test_calibration_brings_other_rows_to_the_target(signed):
    d = started(k=8, target_l0=2.5, signed=signed)
    d.calibrate([batch_of(normal(2000, 8, seed=s)) for s in (8, 9)])
    l0 = d.encode_sparse(normal(4000, 8, seed=10)).l0().float().mean()
    assert float(l0) == pytest.approx(2.5, rel=0.05)
    exact = d.encode_sparse(torch.cat([normal(2000, 8, seed=s) for s in (8, 9)])).l0().sum()
    assert int(exact) == pytest.approx(10_000, abs=2)


def test_training_steers_the_threshold_to_the_target_and_keeps_unit_rows():
    store, _ = planted_store(n=3000)
    config = {"type": "matching_pursuit", "d_in": 16, "d_sae": 24, "k": 10}
    config |= {"target_l0": 2.0, "threshold": 0.9}
    (fitted,) = fit(
        [Member("m", create(config), "site", 1e-2)],
        store,
        TrainConfig(batch=256, tokens=256 * 80, log_every=5),
    )
    assert fitted.metrics[0]["l0"] < 1.5
    assert fitted.metrics[-1]["l0"] == pytest.approx(2.0, rel=0.05)
    assert fitted.metrics[-1]["fvu"] < 0.3 * fitted.metrics[0]["fvu"]
    norms = fitted.dictionary.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(24))
    folded = dictionaries.fold(fitted.dictionary, 3.0)
    assert float(folded.threshold) == pytest.approx(float(fitted.dictionary.threshold) / 3)


def test_a_target_that_the_steps_cannot_reach_is_refused():
    with pytest.raises(ConfigError, match=r"target_l0=4 is not below k=4.*larger k"):
        create({"type": "matching_pursuit", "d_in": 8, "d_sae": 24, "k": 4, "target_l0": 4})


@pytest.mark.skipif(kernels.name() != "numba", reason="numba is missing or off")
def test_kernels_and_torch_train_the_same_dictionary():
    store, _ = planted_store(n=500)
    config = {"type": "matching_pursuit", "d_in": 16, "d_sae": 24, "k": 3}
    weights = []
    for form in ("torch", "numba"):
        with using(form):
            (fitted,) = fit(
                [Member("m", create(config), "site", 1e-2)],
                store,
                TrainConfig(batch=64, tokens=64 * 20),
            )
        weights.append(fitted.dictionary.W_dec)
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-4)
