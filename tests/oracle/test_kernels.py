"""Compiled kernels against their torch forms, and where they must hand over."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab import kernels
from saelab.errors import ConfigError
from saelab.ops import select, sparse

pytest.importorskip("numba")

SEEDS = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_choice(x, W, b, k, signed):
    """Equal sets of latents, except where two exact scores differ by rounding only."""
    indices, values = select.certified_topk(x, W, b, k, signed=signed)
    pre = x.double() @ W.double().T + b.double()
    size = pre.abs() if signed else pre
    torch.testing.assert_close(values.double(), pre.gather(1, indices), rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == k for row in indices.tolist())
    least = size.gather(1, indices).amin(1)
    kth = size.topk(k, dim=1).values[:, -1]
    torch.testing.assert_close(least, kth, rtol=1e-5, atol=1e-4)


@given(seed=SEEDS, k=st.integers(1, 40), signed=st.booleans(), d_sae=st.integers(40, 700))
def test_certified_topk_finds_the_k_largest_exact_scores(seed, k, signed, d_sae):
    x, W, b = normal(7, 48, seed=seed), normal(d_sae, 48, seed=seed + 1), normal(d_sae, seed=seed)
    assert_same_choice(x, W, b, k, signed)


def test_bfloat16_would_choose_wrongly_and_the_bound_repairs_it():
    # latents that bfloat16 cannot tell apart: equal up to its rounding
    x = normal(64, 32, seed=0)
    W = normal(1, 32, seed=1) + 1e-3 * normal(256, 32, seed=2)
    b = torch.zeros(256)
    guess = (x.bfloat16() @ W.bfloat16().T).float().topk(8).indices
    exact = select.product_topk(x, W, b, 8)[0]
    assert (guess.sort(1).values != exact.sort(1).values).any()
    assert_same_choice(x, W, b, 8, signed=False)


def test_biases_and_sizes_of_very_different_scale_keep_the_choice_exact():
    scale = torch.logspace(-4, 4, 300)
    W, b = normal(300, 16, seed=3) * scale[:, None], normal(300, seed=4) * scale.flip(0)
    x = normal(20, 16, seed=5) * torch.logspace(-3, 3, 20)[:, None]
    indices, _ = select.certified_topk(x, W, b, 5)
    exact = (x.double() @ W.double().T + b.double()).topk(5).indices
    assert (indices.sort(1).values == exact.sort(1).values).all()


def test_all_latents_no_rows_and_ties():
    W, b = normal(30, 8, seed=6), normal(30, seed=7)
    indices, _ = select.certified_topk(normal(3, 8, seed=8), W, b, 30)
    assert (indices.sort(1).values == torch.arange(30)).all()
    indices, values = select.certified_topk(torch.zeros(0, 8), W, b, 4)
    assert indices.shape == values.shape == (0, 4)
    indices, values = select.certified_topk(
        torch.zeros(2, 8), torch.zeros(30, 8), torch.ones(30), 4
    )
    assert (values == 1).all() and all(len(set(row)) == 4 for row in indices.tolist())


def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone():
    x, W, b = normal(4, 8, seed=9), normal(30, 8, seed=10), normal(30, seed=11)
    clean = select.certified_topk(x, W, b, 4)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    indices, values = select.certified_topk(x, W, b, 4)
    assert values[[1, 3]].isnan().all() and indices.max() < 30
    for got, wanted in zip((indices, values), clean, strict=True):
        assert (got[[0, 2]] == wanted[[0, 2]]).all()


def test_weights_that_are_not_finite_reach_the_result():
    W = normal(30, 8, seed=12)
    W[3] = torch.nan
    _, values = select.certified_topk(normal(4, 8, seed=13), W, torch.zeros(30), 4)
    assert values.isnan().any(1).all()


@given(seed=SEEDS, n=st.integers(1, 9), k=st.integers(1, 5), ragged=st.booleans())
def test_compiled_sums_equal_torchs(seed, n, k, ragged):
    d_sae, d = 13, 6
    W, x = normal(d_sae, d, seed=seed), normal(n, d, seed=seed + 1)
    indices = normal(n, d_sae, seed=seed + 2).topk(k).indices
    values = normal(n, k, seed=seed + 3)
    offsets = None
    if ragged:  # every second row is empty
        offsets = torch.arange(2 * n + 1).div(2, rounding_mode="floor") * k
        x = normal(2 * n, d, seed=seed + 1)
        indices, values = indices.reshape(-1), values.reshape(-1)

    def double(*tensors):
        return [t.double() for t in tensors]

    for got, wanted in (
        (
            sparse._bag(indices, W, values, offsets),
            sparse._bag(indices, *double(W, values), offsets),
        ),
        (
            sparse._transposed_product(indices, values, x, d_sae, offsets),
            sparse._transposed_product(indices, *double(values, x), d_sae, offsets),
        ),
        (
            sparse._picked_products(x, W, indices, offsets),
            sparse._picked_products(*double(x, W), indices, offsets),
        ),
    ):
        assert got.dtype == torch.float32 and wanted.dtype == torch.float64
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@given(seed=SEEDS, n=st.integers(0, 300), level=st.floats(-3, 4))
def test_entries_above_their_floor_are_those_of_the_dense_table(seed, n, level):
    x, W, b = normal(n, 5, seed=seed), normal(11, 5, seed=seed + 1), normal(11, seed=seed + 2)
    floor = level + normal(11, seed=seed + 3)
    dense = x @ W.T + b
    wanted = torch.where(dense > floor, dense, 0)
    found = select.above(x, W, b, floor)
    assert found.row_offsets[-1] == len(found.values) == (dense > floor).sum()
    torch.testing.assert_close(found.dense(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        select.above(*(t.double() for t in (x, W, b, floor))).dense(),
        wanted.double(), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_results_do_not_depend_on_the_number_of_threads():
    x, W, b = normal(50, 16, seed=14), normal(1100, 16, seed=15), normal(1100, seed=16)
    indices, values = select.certified_topk(x, W, b, 6)
    sums = sparse._transposed_product(indices, values, x, 1100)
    torch.set_num_threads(3)
    try:
        again = select.certified_topk(x, W, b, 6)
        assert (again[0] == indices).all() and (again[1] == values).all()
        assert (sparse._transposed_product(indices, values, x, 1100) == sums).all()
    finally:
        torch.set_num_threads(1)


def test_the_variable_turns_kernels_off_and_refuses_nonsense(monkeypatch):
    code = "from saelab import kernels; import sys; print(kernels.name(), 'numba' in sys.modules)"
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch", "False"]
    monkeypatch.setenv(kernels.VARIABLE, "fortran")
    with pytest.raises(ConfigError, match="auto, numba or torch"):
        kernels.name.__wrapped__()
