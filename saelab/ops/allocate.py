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

_CHUNK_ROWS = 256
"""Rows whose pre-activations are held at once."""
_CHUNK_LATENTS = 64
"""Columns sorted at once: few, so that columns of like quota come together."""

Packed = tuple[Int[Tensor, "n w"], Float[Tensor, "n w"], Bool[Tensor, "n w"]]
"""(indices, values, kept): rows of equal width, the entries that count first in each."""


@torch.no_grad()
def batch_topk(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    total: int,
) -> Packed:
    """Keep the `total` largest entries of the whole table `x W_encᵀ + b_enc`, of any sign.

    Looks only at the largest few of each row, and at more of them as long as some row's candidates
    are all kept; so the answer is that of sorting the whole table.
    """
    n, d_sae = len(x), len(W_enc)
    total = min(total, n * d_sae)
    width = min(d_sae, max(16, -(-4 * total // max(n, 1))))
    while True:
        indices, pre = select.linear_topk(x, W_enc, b_enc, width)
        kept = torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device)
        kept[pre.reshape(-1).topk(total, sorted=False).indices] = True
        kept = kept.view(pre.shape)
        if width == d_sae or not bool(kept.all(1).any()):
            return pack(indices, pre, kept)
        width = min(2 * width, d_sae)


def pack(
    indices: Int[Tensor, "n m"], values: Float[Tensor, "n m"], kept: Bool[Tensor, "n m"]
) -> Packed:
    """Move each row's kept entries to its front, in order, and cut off what no row needs."""
    width = max(1, int(kept.sum(1).max())) if len(kept) else 1
    order = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    return indices.gather(1, order), values.gather(1, order), kept.gather(1, order)


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
def pack_mask(pre: Float[Tensor, "n d_sae"], mask: Bool[Tensor, "n d_sae"]) -> Packed:
    """Return the marked, positive entries as rows of equal width, the largest first."""
    width = max(1, int(mask.sum(1).max())) if len(mask) else 1
    values, indices = torch.where(mask, pre, 0).topk(width, dim=1)
    return indices, values, values > 0


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
