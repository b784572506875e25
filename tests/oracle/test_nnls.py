"""Non-negative least squares beside scipy's, by its conditions of optimality, and its gradient."""

from unittest.mock import patch

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from saelab import kernels
from saelab.ops.nnls import nnls

FORMS = [
    "torch",
    pytest.param(
        "numba",
        marks=pytest.mark.skipif(kernels.name() != "numba", reason="numba is missing or off"),
    ),
]
EACH_FORM = pytest.mark.parametrize("form", FORMS)


def using(form):
    return patch.object(kernels, "name", lambda: form)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scipys(x, features):
    rows = [scipy.optimize.nnls(features.double().T.numpy(), row.numpy())[0] for row in x.double()]
    return torch.from_numpy(np.stack(rows))


def assert_optimal(x, features, z, tolerance):
    """z ≥ 0, no slope is positive, and slopes are 0 where z is not."""
    assert (z >= 0).all()
    x, features, z = x.double(), features.double(), z.double()
    norms = features.norm(dim=1).clamp(min=1e-30)
    slope = (x - z @ features) @ features.T / norms / x.norm(dim=1, keepdim=True).clamp(min=1e-30)
    assert slope.max() <= tolerance
    assert (slope * (z > 0)).abs().max() <= tolerance


@EACH_FORM
@pytest.mark.parametrize(("n", "k", "d"), [(40, 6, 8), (30, 20, 25), (20, 60, 80), (5, 1, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_codes_are_scipys(form, n, k, d, dtype, tolerance):
    features = 3 * normal(k, d, dtype=dtype)
    x = normal(n, d, seed=1, dtype=dtype) + 0.3 * features.sum(0) / k
    with using(form):
        z = nnls(x, features)
    assert z.dtype == dtype
    torch.testing.assert_close(z.double(), scipys(x, features), atol=tolerance, rtol=tolerance)
    assert_optimal(x, features, z, 1e-12 if dtype == torch.float64 else 1e-5)
    assert k == 1 or (0 < (z == 0).sum() < z.numel())


@EACH_FORM
def test_parallel_zero_and_too_many_features_still_give_an_optimum(form):
    some = normal(7, 6)
    features = torch.cat([some, 2 * some[:3], -some[:2], torch.zeros(2, 6), some[3:5] + some[1:3]])
    x = torch.cat([normal(60, 6, seed=1), some, torch.zeros(3, 6)])
    with using(form):
        z = nnls(x, features)
    assert_optimal(x, features, z, 1e-9)
    assert ((z > 0).sum(1) <= 6).all()
    assert (z[:, 12:14] == 0).all()
    assert (z[-3:] == 0).all()


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_multiple_of_a_feature_is_coded_by_that_feature_alone(form, dtype):
    features = normal(12, 16, dtype=dtype)
    with using(form):
        z = nnls(2.5 * features, features)
    assert torch.equal(z != 0, torch.eye(12, dtype=torch.bool))
    torch.testing.assert_close(z, 2.5 * torch.eye(12, dtype=dtype))


@EACH_FORM
def test_a_row_that_is_not_finite_is_not_passed_off_as_zeros(form):
    x = normal(4, 8)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    with using(form):
        z = nnls(x, normal(5, 8, seed=1))
    assert z.isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.skipif(kernels.name() != "numba", reason="numba is missing or off")
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_kernel_and_torch_choose_the_same_support(seed, k, d, whole):
    features, x = normal(k, d, seed=seed), normal(9, d, seed=seed + 1)
    if whole:  # ties, parallel and zero features
        features, x = features.round(), x.round()
    found = []
    for form in ("torch", "numba"):
        with using(form):
            found.append(nnls(x, features))
    errors = [(x - z @ features).norm(dim=1) for z in found]
    torch.testing.assert_close(*errors, atol=1e-7, rtol=1e-7)
    if not whole and k <= d:
        torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


@EACH_FORM
def test_the_gradient_is_that_of_least_squares_on_the_support(form):
    x, features = normal(5, 7).requires_grad_(), normal(4, 7, seed=1).requires_grad_()
    with using(form):
        z = nnls(x, features)
        assert 0 < (z > 0).sum() < z.numel()
        assert gradcheck(nnls, (x, features))


@EACH_FORM
def test_no_rows_give_no_codes(form):
    with using(form):
        assert nnls(normal(0, 4), normal(3, 4)).shape == (0, 3)
