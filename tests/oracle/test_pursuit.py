"""Pursuit against known answers, its own laws, and the obvious loop."""

import itertools
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab import dictionaries, kernels
from saelab.errors import ShapeError
from saelab.evals.encoders import PursuitEncoder, decode
from saelab.ops.pursuit import gram_of, pursue, pursue_plainly
from saelab.ops.refit import gradient_coefficients, residual_energies
from saelab.types import Batch

ATOMS = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
X = (2 * ATOMS[0] + ATOMS[1])[None]

needs_numba = pytest.mark.skipif(kernels.name() != "numba", reason="numba is missing or turned off")


def unit(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return rows / rows.norm(dim=1, keepdim=True)


FORMS = ["torch", pytest.param("numba", marks=needs_numba)]


def using(form: str):
    """Use the compiled kernel, or the torch form."""
    return patch.object(kernels, "name", lambda: form)


def energies(k: int, **rule) -> list[float]:
    return [float(pursue(X, ATOMS, t, **rule).residual.square().sum()) for t in range(1, k + 1)]


def test_signed_matching_pursuit_quarters_the_residual_at_each_step():
    assert float(X.square().sum()) == pytest.approx(7)
    assert energies(5) == pytest.approx([0.75, 0.1875, 0.046875, 0.01171875, 0.0029296875])
    trace = pursue(X, ATOMS, 6)
    assert trace.order.tolist() == [[0, 1, 0, 1, 0, 1]]
    assert trace.codes.dense()[0].tolist() == pytest.approx([2.03125, 0.984375])
    assert trace.codes.l0().tolist() == [2]


def test_non_negative_matching_pursuit_stalls_and_stops():
    trace = pursue(X, ATOMS, 6, sign="nonneg")
    assert trace.codes.dense()[0].tolist() == pytest.approx([2.5, 0.75])
    assert float(trace.residual.square().sum()) == pytest.approx(0.1875)
    assert trace.n_steps.tolist() == [2]
    assert trace.order.tolist() == [[0, 1, -1, -1, -1, -1]]


def test_orthogonal_matching_pursuit_is_exact_in_two_steps():
    trace = pursue(X, ATOMS, 2, refit="omp")
    assert trace.codes.dense()[0].tolist() == pytest.approx([2.0, 1.0])
    assert float(trace.residual.abs().max()) < 1e-12


def test_a_raw_score_may_be_negative():
    trace = pursue(-X, ATOMS, 1, sign="raw")
    assert trace.order.tolist() == [[1]]
    assert trace.coefficients.tolist()[0] == pytest.approx([-2.0])
    assert pursue(-X, ATOMS, 1, sign="nonneg").n_steps.tolist() == [0]


@pytest.mark.parametrize("refit", ["mp", "omp", "gp"])
def test_orthonormal_atoms_are_recovered_in_order_of_magnitude_and_then_it_stops(refit):
    atoms = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    z = torch.tensor([[0.0, 3.0, 0.0, -5.0, 0.0, 1.0, 0.0, 0.0]])
    trace = pursue(z @ atoms, atoms, 6, refit=refit)
    assert trace.n_steps.tolist() == [3]
    assert trace.order[0, :3].tolist() == [3, 1, 5]
    torch.testing.assert_close(trace.codes.dense(), z, atol=1e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 50), k=st.integers(1, 6))
def test_each_step_takes_its_square_from_the_energy_and_leaves_no_part_of_its_atom(seed, k):
    atoms, x = unit(12, 5, seed, torch.float64), 3 * unit(4, 5, seed + 99, torch.float64)
    energy = x.square().sum(1)
    for t in range(1, k + 1):
        trace = pursue(x, atoms, t)
        energy = energy - trace.coefficients[:, -1].square()
        torch.testing.assert_close(trace.residual.square().sum(1), energy, atol=1e-12, rtol=0)
        last = atoms[trace.order[:, -1]]
        assert (trace.residual * last).sum(1).abs().max() < 1e-12


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 50))
def test_the_residual_of_orthogonal_pursuit_is_orthogonal_to_its_whole_support(seed):
    atoms, x = unit(12, 6, seed, torch.float64), unit(4, 6, seed + 99, torch.float64)
    trace = pursue(x, atoms, 3, refit="omp")
    for row in range(4):
        support = atoms[trace.order[row]]
        assert (support @ trace.residual[row]).abs().max() < 1e-12
        assert len(set(trace.order[row].tolist())) == 3


def gradient_pursuit(row, atoms, k, sign):
    """Inference-time optimisation as written: all coefficients of the support move at once."""
    z, support = torch.zeros(len(atoms), dtype=row.dtype), torch.zeros(len(atoms), dtype=torch.bool)
    for _ in range(k):
        residual = row - z @ atoms
        scores = atoms @ residual
        support[(scores.abs() if sign == "abs" else scores).argmax()] = True
        gradient = scores * support
        move = gradient @ atoms
        z = z + (move @ residual) / (move @ move) * gradient
        if sign == "nonneg":
            z = z.clamp(min=0)
    return z


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 50), k=st.integers(1, 7), sign=st.sampled_from(["abs", "nonneg"]))
def test_gradient_pursuit_is_the_plain_loop(seed, k, sign):
    atoms, x = unit(12, 5, seed, torch.float64), 3 * unit(4, 5, seed + 99, torch.float64)
    trace = pursue(x, atoms, k, sign=sign, refit="gp")
    going = trace.n_steps == k
    expected = torch.stack([gradient_pursuit(row, atoms, k, sign) for row in x])
    torch.testing.assert_close(trace.codes.dense()[going], expected[going], atol=1e-10, rtol=0)
    torch.testing.assert_close(x - trace.codes.dense() @ atoms, trace.residual)


def test_gradient_pursuit_takes_the_best_step_and_is_matching_pursuit_at_first():
    atoms, x = unit(12, 5, 1, torch.float64), unit(4, 5, 2, torch.float64)
    energies = [
        [float(e) for e in pursue(x, atoms, k, refit="gp").residual.square().sum(1)]
        for k in range(1, 8)
    ]
    assert all(b < a for before, after in itertools.pairwise(energies)
               for a, b in zip(before, after, strict=True))  # fmt: skip
    first = pursue(x, atoms, 1).residual.square().sum(1)
    torch.testing.assert_close(torch.tensor(energies[0], dtype=torch.float64), first)


def test_gradient_coefficients_follow_a_known_order_and_have_the_true_derivative():
    atoms, x = unit(6, 4, 1, torch.float64), unit(3, 4, 2, torch.float64)
    order = pursue(x, atoms, 4, refit="gp").order
    values = gradient_coefficients(x, atoms, order)
    torch.testing.assert_close(values, pursue(x, atoms, 4, refit="gp").coefficients)
    leaves = x.clone().requires_grad_(), atoms.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: gradient_coefficients(a, b, order), leaves)


@pytest.mark.parametrize(
    ("refit", "sign"), [("mp", "abs"), ("omp", "abs"), ("gp", "abs"), ("gp", "nonneg")]
)
def test_the_energies_of_one_pursuit_are_those_of_every_shorter_one(refit, sign):
    atoms, x = unit(12, 6, 3, torch.float64), unit(5, 6, 4, torch.float64)
    trace = pursue(x, atoms, 6, sign=sign, refit=refit)
    found = residual_energies(x, atoms, trace.order, trace.coefficients, refit, sign)
    shorter = [pursue(x, atoms, k, sign=sign, refit=refit).residual for k in range(1, 7)]
    expected = torch.stack([x, *shorter]).square().sum(-1).T
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_curve_of_an_encoder_starts_at_the_offset_and_ends_at_its_own_error():
    dictionary = dictionaries.create({"type": "topk", "d_in": 6, "d_sae": 12, "k": 2})
    with torch.no_grad():
        dictionary.W_dec.copy_(3 * unit(12, 6, 3))
        dictionary.b_dec.fill_(0.1)
    x = unit(40, 6, 4)
    batches = [Batch(p, p, torch.arange(20), torch.arange(20)) for p in x.split(20)]
    encoder, mean = PursuitEncoder(dictionary, 4), x.mean(0)
    curve = encoder.curve(batches, mean)
    variance = (x - mean).square().sum()
    error = sum((b.x - decode(dictionary, encoder(b), b.x)).square().sum() for b in batches)
    assert float(curve[0]) == pytest.approx(float((x - 0.1).square().sum() / variance), rel=1e-5)
    assert float(curve[-1]) == pytest.approx(float(error / variance), rel=1e-4)
    assert bool((curve.diff() < 0).all())


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 50),
    sign=st.sampled_from(["abs", "nonneg", "raw"]),
    reuse=st.booleans(),
    tol=st.sampled_from([0.0, 0.5]),
    n=st.integers(0, 70),
)
def test_the_quick_path_does_what_the_plain_loop_does(form, seed, sign, reuse, tol, n):
    atoms, x = unit(9, 4, seed, torch.float64), unit(70, 4, seed + 99, torch.float64)[:n]
    rule = {"sign": sign, "reuse": reuse, "tol": tol}
    with using(form):
        quick = pursue(x, atoms, 12, gram=atoms @ atoms.T, **rule)
    order, coefficients = pursue_plainly(x, atoms, 12, **rule)
    torch.testing.assert_close(quick.order, order)
    torch.testing.assert_close(quick.coefficients, coefficients, atol=1e-12, rtol=0)
    if not reuse:
        assert all(
            len(set(r)) == len(r) for r in ([j for j in row if j >= 0] for row in order.tolist())
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", ["abs", "nonneg", "raw"])
@pytest.mark.parametrize("reuse", [True, False])
def test_more_atoms_than_one_block_of_scores_change_nothing(form, sign, reuse):
    atoms, x = unit(2500, 40, 0, torch.float64), unit(30, 40, 1, torch.float64)
    with using(form):
        quick = pursue(x, atoms, 20, gram=atoms @ atoms.T, sign=sign, reuse=reuse)
    order, coefficients = pursue_plainly(x, atoms, 20, sign=sign, reuse=reuse)
    assert torch.equal(quick.order, order)
    torch.testing.assert_close(quick.coefficients, coefficients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", ["abs", "nonneg"])
def test_in_single_precision_selections_differ_from_the_plain_loop_in_ties_only(form, sign):
    atoms, x = unit(800, 24, 0), 5 * unit(200, 24, 1)
    with using(form):
        quick = pursue(x, atoms, 16, gram=atoms @ atoms.T, sign=sign)
    order, coefficients = pursue_plainly(x, atoms, 16, sign=sign)
    same = quick.order == order
    assert same.all(1).float().mean() >= 0.99
    for row in (~same.all(1)).nonzero()[:, 0].tolist():
        step = int((~same[row]).int().argmax())
        pair = quick.coefficients[row, step].abs(), coefficients[row, step].abs()
        assert float((pair[0] - pair[1]).abs() / pair[1]) < 1e-5
    plain = (x - (coefficients[..., None] * atoms[order.clamp(min=0)]).sum(1)).square().sum()
    assert float(quick.residual.square().sum()) == pytest.approx(float(plain), rel=1e-5)


def short_of_the_best(trace, x, atoms):
    """Return by how much each chosen score misses the best one, after the same steps, exactly."""
    residual, short = x.double(), []
    for step in range(trace.order.shape[1]):
        size = (residual @ atoms.double().T).abs()
        atom = trace.order[:, step]
        short.append(size.amax(1) - size.gather(1, atom[:, None])[:, 0])
        residual = residual - trace.coefficients[:, step, None].double() * atoms[atom].double()
    return torch.stack(short, 1)


@needs_numba
def test_the_kernel_tells_apart_what_single_precision_cannot():
    # each atom has seven others that differ from it in the last bits only
    atoms = (unit(50, 24, 0)[:, None] + 2e-7 * unit(400, 24, 1).view(50, 8, 24)).view(400, 24)
    x = 5 * unit(200, 24, 2)
    traces = []
    for form in ("torch", "numba"):
        with using(form):
            traces.append(pursue(x, atoms, 6, gram=atoms @ atoms.T))
    assert (short_of_the_best(traces[0], x, atoms) > 1e-9).any()
    assert short_of_the_best(traces[1], x, atoms).max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_not_finite_stop_at_once(form):
    atoms, x = unit(40, 8, 0), unit(5, 8, 1)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    for sign in ("abs", "nonneg", "raw"):
        with using(form):
            trace = pursue(x, atoms, 4, gram=atoms @ atoms.T, sign=sign)
        assert (trace.n_steps == torch.tensor([4, 0, 4, 0, 4])).all()


@needs_numba
def test_kernels_are_for_one_float_type_and_give_one_result_on_any_number_of_threads():
    atoms, x = unit(300, 16, 0), unit(50, 16, 1)
    with patch("saelab.ops.pursuit._step_block", side_effect=AssertionError):
        one = pursue(x, atoms, 5, gram=gram_of(atoms))
        torch.set_num_threads(3)
        try:
            three = pursue(x, atoms, 5, gram=gram_of(atoms))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(one.order, three.order)
    with (
        pytest.raises(AssertionError),
        patch("saelab.ops.pursuit._step_block", side_effect=AssertionError),
    ):
        pursue(x.bfloat16(), atoms.bfloat16(), 5, gram=gram_of(atoms.bfloat16()))


def test_a_row_that_has_stopped_stays_stopped():
    atoms, x = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    rule = {"sign": "raw", "reuse": False}
    assert pursue(x, atoms, 2, gram=atoms @ atoms.T, **rule).n_steps.tolist() == [0]
    assert pursue_plainly(x, atoms, 2, **rule)[0].tolist() == [[-1, -1]]


def test_the_gram_matrix_is_the_product_and_exactly_symmetric(monkeypatch):
    monkeypatch.setattr("saelab.ops.pursuit.GRAM_ROWS", 7)
    atoms = unit(40, 8, 0)
    gram = gram_of(atoms)
    torch.testing.assert_close(gram, atoms @ atoms.T)
    assert torch.equal(gram, gram.T)
    monkeypatch.setattr("saelab.ops.pursuit.GRAM_BYTES", 40 * 40 * 4 - 1)
    assert gram_of(atoms) is None


def test_pursuit_computes_in_the_precision_of_x_under_autocast():
    atoms, x = unit(40, 8, 0), unit(16, 8, 1)
    with torch.autocast("cpu", torch.bfloat16):
        trace = pursue(x, atoms, 5)
    assert torch.equal(trace.coefficients, pursue(x, atoms, 5).coefficients)


def test_atoms_of_any_norm_keep_the_quick_path_equal_to_the_plain_loop():
    atoms, x = 0.9 * unit(9, 4, 0, torch.float64), unit(5, 4, 1, torch.float64)
    quick = pursue(x, atoms, 8, gram=atoms @ atoms.T, tol=0.3)
    torch.testing.assert_close(quick.order, pursue_plainly(x, atoms, 8, tol=0.3)[0])


def test_other_rows_and_chunks_change_no_bit_of_a_row(monkeypatch):
    atoms, x = unit(40, 8, 0), unit(64, 8, 1)
    whole = pursue(x, atoms, 5).coefficients
    other = torch.cat([x[:32], 7 * x[:32]])
    assert torch.equal(pursue(other, atoms, 5).coefficients[:32], whole[:32])
    monkeypatch.setattr("saelab.ops.pursuit.CHUNK_BYTES", 1)
    torch.testing.assert_close(pursue(x, atoms, 5).coefficients, whole)


def test_one_step_of_pursuit_is_top_one_with_tied_weights():
    atoms, x = unit(40, 8, 0), unit(16, 8, 1)
    best, latent = (x @ atoms.T).max(1)
    trace = pursue(x, atoms, 1, sign="nonneg")
    torch.testing.assert_close(trace.codes.indices, latent)
    torch.testing.assert_close(trace.codes.values, best)


def test_zero_rows_stop_at_once_and_no_rows_are_fine():
    atoms = unit(5, 3, 0)
    trace = pursue(torch.zeros(2, 3), atoms, 2)
    assert trace.n_steps.tolist() == [0, 0]
    assert torch.equal(trace.residual, torch.zeros(2, 3))
    assert pursue(torch.zeros(0, 3), atoms, 2).codes.n_rows == 0


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ShapeError, match="at least one"):
        pursue(torch.zeros(1, 3), torch.zeros(2, 3), 0)
    with pytest.raises(ShapeError, match="least squares"):
        pursue(torch.zeros(1, 3), torch.zeros(2, 3), 1, sign="nonneg", refit="omp")
