"""Products with sparse codes, forwards and backwards, on (indices, values) only.

A code with k of d_sae latents per row needs k/d_sae of the arithmetic of a dense one. Two
differentiable operations carry a training step: `encode_at`, the pre-activations of chosen latents,
and `decode_at`, the weighted sum of their decoder directions. Each has its obvious dense form
beside it, for tests and for reading. Selection stays outside, so any rule that yields (indices,
values) can use them.

The sums are done in a fixed order, so on a CPU equal inputs give equal bits. On a CPU with the
extra `fast` they are compiled (`kernels/sums.py`), else done by torch; both are tested against each
other. Measured at 576 → 16384, k 32, 2048 rows on one core (ms, torch then compiled; the dense
encoder product takes about 440): sums of decoder rows 26 and 14, picked products 33 and 29, sums by
latent 26 and 10.
"""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saelab import kernels
from saelab.types import SparseLatents

_DOT_ROWS = 128
"""Rows gathered at once where there is no `sampled_addmm`: small enough to stay in cache."""
_DOT_PAIRS = 4096
"""The same for the entries of ragged codes."""
_DENSE_SHARE = 1 / 24
"""Share of a ragged code's entries above which whole products cost less."""


# ----------------------------------------------------------------------- the obvious dense forms


def encode_at_dense(
    x: Float[Tensor, "n d_in"],
    b_in: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    indices: Int[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """Return entries `indices` of each row of the dense `(x − b_in) W_encᵀ + b_enc`."""
    return ((x - b_in) @ W_enc.T + b_enc).gather(-1, indices)


def decode_at_dense(
    indices: Int[Tensor, "n k"],
    values: Float[Tensor, "n k"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "n d_out"]:
    """Return Σ_j values[i, j] · W_dec[indices[i, j]], from the dense product."""
    dense = torch.zeros(len(values), len(W_dec), dtype=values.dtype, device=values.device)
    return dense.scatter(-1, indices, values) @ W_dec


# -------------------------------------------------------------------------- the forms that are used


def encode_at(
    x: Float[Tensor, "n d_in"],
    b_in: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    indices: Int[Tensor, "n k"],
    values: Float[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """Make `values`, entries of `(x − b_in) W_encᵀ + b_enc` found without gradient, differentiable.

    `indices` are unique per row; `values` are trusted and returned. Gradients reach all of x, b_in,
    W_enc and b_enc, and cost k/d_sae of a dense backward pass.
    """
    return _EncodeAt.apply(x, b_in, W_enc, b_enc, indices, values, None)  # pyright: ignore[reportReturnType]


def decode_at(
    indices: Int[Tensor, "n k"],
    values: Float[Tensor, "n k"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "n d_out"]:
    """Return Σ_j values[i, j] · W_dec[indices[i, j]]; `indices` are unique per row."""
    return _DecodeAt.apply(indices, values, W_dec, None)  # pyright: ignore[reportReturnType]


def encode_ragged_at(
    x: Float[Tensor, "n d_in"],
    b_in: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    latents: SparseLatents,
) -> SparseLatents:
    """Do as `encode_at` for the entries of a ragged table; return them, differentiable."""
    offsets, indices = latents.row_offsets, latents.indices
    values = _EncodeAt.apply(x, b_in, W_enc, b_enc, indices, latents.values, offsets)
    return SparseLatents(offsets, indices, values, latents.d_sae)  # pyright: ignore[reportArgumentType]


def decode_ragged_at(
    latents: SparseLatents, W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "n d_out"]:
    """Do as `decode_at` for ragged codes: `decode_ragged` with the backward pass of training."""
    return _DecodeAt.apply(latents.indices, latents.values, W_dec, latents.row_offsets)  # pyright: ignore[reportReturnType]


def rows_at(table: Float[Tensor, "m d"], ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Return `table[ids]` for ids that are unique: the backward pass only copies."""
    return _RowsAt.apply(table, ids)  # pyright: ignore[reportReturnType]


def decode_ragged(
    latents: SparseLatents, W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "n d_out"]:
    """Return the product of ragged codes with W_dec, differentiable in values and W_dec."""
    if latents.n_rows == 0:
        return W_dec.new_zeros(0, W_dec.shape[1])
    return F.embedding_bag(
        latents.indices.long(),
        W_dec,
        latents.row_offsets,
        mode="sum",
        per_sample_weights=latents.values.to(W_dec.dtype),
        include_last_offset=True,
    )


class _RowsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: "torch.autograd.function.FunctionCtx", table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape  # pyright: ignore[reportAttributeAccessIssue]
        return table.index_select(0, ids)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore  (torch leaves its signature open)
        (ids,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, ids, grad), None


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "torch.autograd.function.FunctionCtx",
        x: Tensor,
        b_in: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,  # noqa: ARG004  (receives a gradient)
        indices: Tensor,
        values: Tensor,
        offsets: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, b_in, W_enc, indices, offsets)  # pyright: ignore[reportArgumentType]
        return values.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore  (torch leaves its signature open)
        x, b_in, W_enc, indices, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        flat = indices.reshape(-1)
        per_latent = grad.new_zeros(len(W_enc)).index_add_(0, flat, grad.reshape(-1))
        grad_x = _bag(indices, W_enc, grad, offsets) if ctx.needs_input_grad[0] else None
        grad_b_in = -(per_latent @ W_enc) if ctx.needs_input_grad[1] else None
        grad_W = None
        if ctx.needs_input_grad[2]:
            grad_W = _transposed_product(indices, grad, x - b_in, len(W_enc), offsets)
        return grad_x, grad_b_in, grad_W, per_latent, None, None, None


class _DecodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "torch.autograd.function.FunctionCtx",
        indices: Tensor,
        values: Tensor,
        W_dec: Tensor,
        offsets: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(indices, values, W_dec, offsets)  # pyright: ignore[reportArgumentType]
        return _bag(indices, W_dec, values, offsets)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore  (torch leaves its signature open)
        indices, values, W_dec, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = grad_W = None
        if ctx.needs_input_grad[1]:
            grad_values = _picked_products(grad, W_dec, indices, offsets)
        if ctx.needs_input_grad[2]:
            grad_W = _transposed_product(indices, values, grad, len(W_dec), offsets)
        return None, grad_values, grad_W, None


def _bag(indices: Tensor, table: Tensor, weights: Tensor, offsets: Tensor | None = None) -> Tensor:
    if indices.numel() == 0:
        n = len(indices) if offsets is None else len(offsets) - 1
        return table.new_zeros(n, table.shape[1])
    if offsets is not None and _is_dense(indices, offsets, len(table)):
        return (_dense(indices, weights, offsets, len(table)) @ table).to(table.dtype)
    if kernels.fit(table, weights):
        return _compiled_sums(_starts(indices, offsets), indices, weights, table)
    if offsets is None:
        return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights)
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _transposed_product(
    indices: Tensor, values: Tensor, x: Tensor, d_sae: int, offsets: Tensor | None = None
) -> Tensor:
    """Return Zᵀ x for the sparse matrix Z of these codes: per latent, a sum of rows of x."""
    if indices.numel() == 0:
        return x.new_zeros(d_sae, x.shape[1])
    if offsets is not None and _is_dense(indices, offsets, d_sae):
        return _dense(indices, values, offsets, d_sae).T @ x
    if kernels.fit(x, values):
        return _compiled_transposed(indices, values, x, d_sae, offsets)
    latents, order = indices.reshape(-1).sort(stable=True)
    ends = torch.bincount(latents, minlength=d_sae).cumsum(0)
    return F.embedding_bag(
        order // indices.shape[1] if offsets is None else _row_numbers(offsets)[order],
        x,
        torch.cat([ends.new_zeros(1), ends]),
        mode="sum",
        per_sample_weights=values.reshape(-1)[order],
        include_last_offset=True,
    )


def _row_numbers(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff()
    )


def _picked_products(
    x: Tensor, W: Tensor, indices: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """Return ⟨x_i, W[indices[i, j]]⟩ for all i, j."""
    if indices.numel() == 0:
        return x.new_zeros(indices.shape)
    if offsets is not None and _is_dense(indices, offsets, len(W)):
        return (x @ W.T).view(-1)[_places(indices, offsets, len(W))]
    if kernels.fit(x, W):
        return _compiled_products(x, W, indices, offsets)
    if x.device.type == "cuda" or (x.device.type == "cpu" and torch.backends.mkl.is_available()):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly")
            starts = _starts(indices, offsets)
            zeros = x.new_zeros(indices.numel())
            pattern = torch.sparse_csr_tensor(
                starts, indices.reshape(-1), zeros, size=(len(x), len(W)), check_invariants=False
            )
            products = torch.sparse.sampled_addmm(pattern, x, W.T, beta=0.0).values()
            return products.view(indices.shape)
    if offsets is not None:
        rows = _row_numbers(offsets)
        pairs = zip(rows.split(_DOT_PAIRS), indices.split(_DOT_PAIRS), strict=True)
        return torch.cat([(x[row] * W[latent]).sum(-1) for row, latent in pairs])
    parts = [
        torch.bmm(W[some], rows[:, :, None]).squeeze(-1)
        for some, rows in zip(indices.split(_DOT_ROWS), x.split(_DOT_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _is_dense(indices: Tensor, offsets: Tensor, d_sae: int) -> bool:
    return indices.numel() > _DENSE_SHARE * (len(offsets) - 1) * d_sae


def _places(indices: Tensor, offsets: Tensor, d_sae: int) -> Tensor:
    """Return where each entry stands in the dense table, flattened."""
    return _row_numbers(offsets) * d_sae + indices


def _dense(indices: Tensor, values: Tensor, offsets: Tensor, d_sae: int) -> Tensor:
    table = values.new_zeros((len(offsets) - 1) * d_sae)
    return table.scatter_(0, _places(indices, offsets, d_sae), values).view(-1, d_sae)


def _starts(indices: Tensor, offsets: Tensor | None) -> Tensor:
    """Return where each row's entries begin, and where the last one's end."""
    if offsets is not None:
        return offsets
    return torch.arange(0, indices.numel() + 1, indices.shape[1], device=indices.device)


# ------------------------------------------------------------------------------ the compiled forms


def _compiled_sums(starts: Tensor, picks: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    from saelab.kernels import sums  # numba is optional, and slow to import

    out = torch.empty(len(starts) - 1, table.shape[1])
    given = (table, starts.long(), picks.long().reshape(-1), weights.reshape(-1), out)
    kernels.over_rows(sums.weighted_sums, len(out), *kernels.arrays(*given))
    return out


def _compiled_transposed(
    indices: Tensor, values: Tensor, x: Tensor, d_sae: int, offsets: Tensor | None
) -> Tensor:
    from saelab.kernels import sums

    starts = torch.zeros(d_sae + 1, dtype=torch.int64)
    rows, weights = torch.empty(indices.numel(), dtype=torch.int64), torch.empty(indices.numel())
    given = (_starts(indices, offsets).long(), indices.long().reshape(-1), values.reshape(-1))
    sums.transpose(*kernels.arrays(*given, starts, rows, weights))
    return _compiled_sums(starts, rows, weights, x)


def _compiled_products(x: Tensor, W: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    from saelab.kernels import sums

    out = torch.empty(indices.shape)
    given = (x, W, _starts(indices, offsets).long(), indices.long().reshape(-1), out.view(-1))
    kernels.over_rows(sums.picked_products, len(x), *kernels.arrays(*given))
    return out
