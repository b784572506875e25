"""Selection under a budget that a whole batch shares, and thresholds that stand in for it later.

Pre-activations of a batch form an (n, d_sae) table. Its largest entries may be kept overall
(`batch_topk`), or a given number of each column (`column_topk`). Which entries of a row survive
then depends on the other rows, so that a dictionary in use needs thresholds: one for all latents
(`common_threshold`), or one for each (`latent_thresholds`).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.ops import select
from saelab.types import SparseLatents

_CHUNK_ROWS = 256
"""Rows whose pre-activations are held at once."""
_CHUNK_LATENTS = 64
"""Columns sorted at once: few, so that columns of like quota come together."""


@torch.no_grad()
def batch_topk(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    total: int,
) -> SparseLatents:
    """Keep the `total` largest entries of the whole table `x W_encᵀ + b_enc`, of any sign.

    Looks at the largest few of each row first. Rows whose candidates are all kept are looked at
    again, whole, so the answer is that of sorting the whole table.
    """
    n, d_sae = len(x), len(W_enc)
    total = min(total, n * d_sae)
    width = min(d_sae, max(16, -(-4 * total // max(n, 1))))
    indices, pre = select.linear_topk(x, W_enc, b_enc, width)
    rows = torch.arange(n, device=x.device)[:, None].expand_as(indices)
    kept = _largest(pre, total)
    full = kept.all(1)
    if width < d_sae and bool(full.any()):
        # what is certain so far bounds the answer from below
        floor, again = pre[kept].min(), full.nonzero()[:, 0]
        whole = F.linear(x[again], W_enc).to(x.dtype) + b_enc
        row, column = (whole >= floor).nonzero(as_tuple=True)
        rows = torch.cat([rows[~full].flatten(), again[row]])
        indices = torch.cat([indices[~full].flatten(), column])
        pre = torch.cat([pre[~full].flatten(), whole[row, column]])
        kept = _largest(pre, total)
    return _ragged(rows[kept], indices[kept], pre[kept], n, d_sae)


def _largest(values: Tensor, total: int) -> Tensor:
    """Mark the `total` largest values."""
    flat = values.reshape(-1)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(total, sorted=False).indices] = True
    return kept.view(values.shape)


def _ragged(rows: Tensor, indices: Tensor, values: Tensor, n: int, d_sae: int) -> SparseLatents:
    """Return entries as ragged rows; within a row they keep their order."""
    order = rows.argsort(stable=True)
    ends = torch.bincount(rows, minlength=n).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    return SparseLatents(offsets, indices[order], values[order], d_sae)


def between(latents: SparseLatents, start: int, end: int) -> SparseLatents:
    """Return only the entries of latents start … end − 1, differentiable in their values."""
    inside = (latents.indices >= start) & (latents.indices < end)
    counts = torch.bincount(latents.rows()[inside], minlength=latents.n_rows)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseLatents(offsets, latents.indices[inside], latents.values[inside], latents.d_sae)


@torch.no_grad()
def column_topk(
    pre: Float[Tensor, "n d_sae"], quota: Int[Tensor, " d_sae"]
) -> Bool[Tensor, "n d_sae"]:
    """Mark the `quota[i]` largest positive entries of each column i."""
    mask = torch.zeros_like(pre, dtype=torch.bool).T.contiguous()
    columns = pre.T.contiguous()
    for ids in quota.argsort(stable=True).split(_CHUNK_LATENTS):
        most = min(int(quota[ids].max()), len(pre))
        values, rows = columns[ids].topk(most, dim=1)
        place = torch.arange(most, device=pre.device)
        chosen = (place < quota[ids][:, None]) & (values > 0)
        mask[ids] = torch.zeros_like(columns[ids], dtype=torch.bool).scatter(1, rows, chosen)
    return mask.T


@torch.no_grad()
def fill(pre: Float[Tensor, "n d_sae"], quota: Int[Tensor, " d_sae"]) -> Bool[Tensor, "n d_sae"]:
    """Mark as `column_topk` does; what columns leave of their quotas goes to the largest left."""
    mask = column_topk(pre, quota)
    slack = int(quota.sum() - mask.sum())
    if slack > 0:
        rest = pre.masked_fill(mask, 0).reshape(-1)
        values, place = rest.topk(min(slack, rest.numel()), sorted=False)
        mask = mask.reshape(-1).index_fill(0, place[values > 0], True).view(pre.shape)
    return mask


@torch.no_grad()
def forced_share(pre: Float[Tensor, "n d_sae"], mask: Bool[Tensor, "n d_sae"]) -> Float[Tensor, ""]:
    """Return the share of the marked entries that are not among as many largest of the table.

    These are the picks that quotas force: a choice by size alone would not have made them. 0 where
    nothing is marked.
    """
    total = int(mask.sum())
    if total == 0:
        return pre.new_zeros(())
    width = min(pre.shape[1], -(-4 * total // len(pre)))
    best = select.topk(pre, width)[1]
    edge = best.flatten().topk(total, sorted=False).values.min()
    full = best.amin(1) >= edge  # rows that may hold more large entries than were looked at
    if bool(full.any()):
        best = torch.cat([best[~full].flatten(), pre[full].flatten()])
        edge = best.topk(total, sorted=False).values.min()
    return (pre[mask] < edge).sum() / total


@torch.no_grad()
def ragged(pre: Float[Tensor, "n d_sae"], mask: Bool[Tensor, "n d_sae"]) -> SparseLatents:
    """Return the marked entries as ragged rows."""
    rows, indices = mask.nonzero(as_tuple=True)
    return _ragged(rows, indices, pre[rows, indices], *pre.shape)


@torch.no_grad()
def common_threshold(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    total: int,
) -> Float[Tensor, ""]:
    """Return a number above which the table `x W_encᵀ + b_enc` has `total` entries.

    It lies half way to the next entry, so that rounding does not move it across one; it is 0 where
    fewer entries are positive.
    """
    best, floor = x.new_zeros(0), x.new_zeros(())
    for part in x.split(_CHUNK_ROWS):
        pre = F.linear(part, W_enc, b_enc)
        best = torch.cat([best, pre[pre > floor]])
        if len(best) > 2 * (total + 1):
            best = best.topk(total + 1, sorted=False).values
            floor = best.min()
    if len(best) <= total:
        return x.new_zeros(())
    edge = best.topk(total + 1).values[max(total - 1, 0) :]
    return edge.mean() if total else edge.max()


@torch.no_grad()
def latent_thresholds(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    counts: Int[Tensor, " d_sae"],
) -> Float[Tensor, " d_sae"]:
    """Return for each latent i a number ≥ 0 above which `counts[i]` of its pre-activations lie.

    Fewer where fewer are positive. It lies half way to the next one.
    """
    thresholds = x.new_zeros(len(W_enc))
    n = len(x)
    for ids in counts.argsort(stable=True).split(_CHUNK_LATENTS):
        count = counts[ids].clamp(max=n)[:, None]
        pre = W_enc[ids] @ x.T + b_enc[ids, None]
        best = pre.topk(min(int(count.max()) + 1, n), dim=1).values
        last = best.gather(1, (count - 1).clamp(min=0))
        after = best.gather(1, count.clamp(max=best.shape[1] - 1))
        after = after.masked_fill(count == n, 0)
        thresholds[ids] = ((last + after) / 2).clamp(min=0)[:, 0]
    return thresholds


def zipf_densities(
    mean_l0: float, d_sae: int, *, exponent: float, shift: float
) -> Float[Tensor, " d_sae"]:
    """Return densities ∝ (rank + shift)^(−exponent), rank 1 … d_sae, that add up to `mean_l0`.

    None exceeds 1: what a capped latent cannot take goes to the others in proportion.
    """
    rank = torch.arange(1, d_sae + 1, dtype=torch.float64)
    weight = (rank + shift) ** -exponent
    density, capped = mean_l0 * weight / weight.sum(), 0
    while bool((density[capped:] > 1).any()) and capped < d_sae:
        capped += int((density[capped:] > 1).sum())
        rest = weight[capped:]
        density[:capped] = 1
        density[capped:] = (mean_l0 - capped) * rest / rest.sum()
    return density.float()
