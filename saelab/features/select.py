"""What a block of firings says about its latents: counts, histograms, quantiles, examples, tokens.

Every number is exact and found by sorting and segment sums, for all latents of the block at once.
Strength is |z|, since codes may be signed; ties go to the earlier row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.features.events import Block
from saelab.types import Window


@dataclass(frozen=True)
class Layout:
    """Where the rows of a store lie: 4 bytes per row and a few per window."""

    first_row: Int[Tensor, " windows"]
    number: Int[Tensor, " windows"]
    heldout: Bool[Tensor, " windows"]
    ids: Int[Tensor, " rows"]
    """Token id of each row, int32."""
    longest: int
    """Length of the longest window."""

    @staticmethod
    def of(windows: Iterable[Window]) -> "Layout":
        """Collect the layout from all windows of a store, in order."""
        first, number, heldout, ids = [], [], [], []
        longest = 1
        for window in windows:
            first.append(window.first_row)
            number.append(window.number)
            heldout.append(window.heldout)
            ids.append(window.ids.cpu().to(torch.int32))
            longest = max(longest, len(window))
        return Layout(
            torch.tensor(first, dtype=torch.int64),
            torch.tensor(number, dtype=torch.int64),
            torch.tensor(heldout, dtype=torch.bool),
            torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int32),
            longest,
        )

    def place(self, rows: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Return the index of each row's window (in `first_row`) and its position inside it."""
        index = torch.searchsorted(self.first_row, rows, right=True) - 1
        return index, rows - self.first_row[index]


@dataclass(frozen=True)
class Picks:
    """Chosen examples by latent, group and rank, each with its latent's values over the window."""

    latent: Int[Tensor, " m"]
    """Latent id minus the block's first."""
    group: Int[Tensor, " m"]
    rank: Int[Tensor, " m"]
    window: Int[Tensor, " m"]
    """Index into the layout."""
    position: Int[Tensor, " m"]
    value: Float[Tensor, " m"]
    strip_offsets: Int[Tensor, " m_plus_1"]
    strip_positions: Int[Tensor, " nnz"]
    strip_values: Float[Tensor, " nnz"]


@dataclass(frozen=True)
class Sorted:
    """A block's firings with their places, and the order of falling strength inside each latent."""

    block: Block
    window: Int[Tensor, " nnz"]
    position: Int[Tensor, " nnz"]
    heldout: Bool[Tensor, " nnz"]
    token: Int[Tensor, " nnz"]
    order: Int[Tensor, " nnz"]
    """Permutation: latent by latent, strongest first, then by row."""

    @staticmethod
    def of(block: Block, layout: Layout) -> "Sorted":
        """Place and sort the firings of a block."""
        window, position = layout.place(block.rows)
        # The bits of a non-negative float rise with it: one integer key sorts by both.
        bits = block.values.abs().view(torch.int32).long()
        order = ((block.latent << 32) | (0x7FFFFFFF - bits)).sort(stable=True).indices
        token = layout.ids[block.rows].long()
        return Sorted(block, window, position, layout.heldout[window], token, order)


def counts(s: Sorted) -> dict[str, Tensor]:
    """Return held-out firings, strongest value, held-out mean of |z| and the commonest position."""
    n, latent = len(s.block.fires), s.block.latent
    held = torch.bincount(latent[s.heldout], minlength=n)
    strength = s.block.values.abs().double()
    total = torch.zeros(n, dtype=torch.float64)
    total.index_add_(0, latent[s.heldout], strength[s.heldout])
    peak = torch.zeros(n)
    alive = s.block.fires > 0
    peak[alive] = s.block.values[s.order[s.block.offsets[:-1][alive]]]
    width = int(s.position.max()) + 1 if len(s.position) else 1
    places = torch.bincount(latent * width + s.position, minlength=n * width).view(n, width)
    most = places.max(dim=1)
    return {
        "fires_heldout": held,
        "mean": total / held,
        "peak": peak,
        "position": most.indices,
        "position_share": most.values / s.block.fires.clamp(min=1),
    }


def histogram(
    s: Sorted, bins: int
) -> tuple[Float[Tensor, "latents 2"], Int[Tensor, "latents 2 bins"]]:
    """Return each latent's (lowest, highest) edge, 0 included, and (training, held-out) counts."""
    n, latent, values = len(s.block.fires), s.block.latent, s.block.values
    low = torch.zeros(n).scatter_reduce(0, latent, values, "amin")
    high = torch.zeros(n).scatter_reduce(0, latent, values, "amax")
    edges = torch.stack([low, high], dim=1)
    span = (high - low).double().clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (values.double() - low[latent].double()) / span[latent] * bins
    cell = (latent * 2 + s.heldout.long()) * bins + scaled.long().clamp(0, bins - 1)
    return edges, torch.bincount(cell, minlength=n * 2 * bins).view(n, 2, bins)


def quantile_bounds(
    fires: Int[Tensor, " latents"], groups: int
) -> Int[Tensor, "latents groups_plus_1"]:
    """Return the ranks where the groups begin: group g holds [bounds[g], bounds[g + 1])."""
    return (torch.arange(groups + 1) * fires[:, None]) // groups


def quantile_edges(s: Sorted, groups: int) -> Float[Tensor, "latents groups 2"]:
    """Return the largest and smallest |z| of each quantile group; zeros where a group is empty."""
    bounds = quantile_bounds(s.block.fires, groups)
    strength = s.block.values.abs()[s.order]
    start = s.block.offsets[:-1, None]
    ends = torch.stack([bounds[:, :-1], bounds[:, 1:] - 1], dim=2) + start[..., None]
    filled = bounds.diff(dim=1) > 0
    edges = torch.zeros(ends.shape)
    edges[filled] = strength[ends[filled]]
    return edges


def pick_top(s: Sorted, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (group 0, rank, firing): each latent's strongest firing in its `top` best windows."""
    best = _best_of_window(s)
    ordered = best[s.order]
    running = ordered.long().cumsum(0)
    before = torch.cat([running.new_zeros(1), running])[s.block.offsets[:-1]]
    rank = running - 1 - before[s.block.latent]
    chosen = ordered & (rank < top)
    rank = rank[chosen]
    return torch.zeros_like(rank), rank, s.order[chosen]


def _best_of_window(s: Sorted) -> Bool[Tensor, " nnz"]:
    """Mark the strongest firing (the first of equals) of each latent in each window."""
    segment, _ = _segments(s)
    strength = s.block.values.abs()
    peaks = torch.zeros(int(segment[-1]) + 1 if len(segment) else 0)
    peaks.scatter_reduce_(0, segment, strength, "amax", include_self=True)
    at_peak = (strength == peaks[segment]).nonzero().squeeze(1)
    first = torch.ones(len(at_peak), dtype=torch.bool)
    first[1:] = segment[at_peak[1:]] != segment[at_peak[:-1]]
    best = torch.zeros(len(strength), dtype=torch.bool)
    best[at_peak[first]] = True
    return best


def _segments(s: Sorted) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " segments_plus_1"]]:
    """Number the contiguous runs of equal (latent, window); return also where they start."""
    latent, window = s.block.latent, s.window
    starts = torch.ones(len(latent), dtype=torch.bool)
    starts[1:] = (latent[1:] != latent[:-1]) | (window[1:] != window[:-1])
    edges = torch.cat([starts.nonzero().squeeze(1), torch.tensor([len(latent)])])
    return starts.long().cumsum(0) - 1, edges


def pick_quantiles(
    s: Sorted, groups: int, each: int, draws: Float[Tensor, "latents groups each"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (group from 1, rank, firing) of `each` firings per quantile group.

    A group is cut into `each` equal strata and one firing is drawn in each, with the uniform
    numbers `draws`: distinct, spread over the group, and the same on every build.
    """
    bounds = quantile_bounds(s.block.fires, groups)
    strata = (torch.arange(each + 1) * bounds.diff(dim=1)[..., None]) // each
    low, size = strata[..., :-1], strata.diff(dim=2)
    inside = torch.minimum((draws * size).long(), (size - 1).clamp(min=0))
    at = s.block.offsets[:-1, None, None] + bounds[:, :-1, None] + low + inside
    filled = size > 0
    _, group, _ = filled.nonzero(as_tuple=True)
    rank = (filled.long().cumsum(2) - 1)[filled]
    return group + 1, rank, s.order[at[filled]]


def with_strips(s: Sorted, parts: list[tuple[Tensor, Tensor, Tensor]]) -> Picks:
    """Join groups of picks in the order (latent, group, rank) and attach their strips."""
    group, rank, firing = (torch.cat(p) for p in zip(*parts, strict=True))
    latent = s.block.latent[firing]
    size = int(rank.max()) + 1 if len(rank) else 1
    groups = int(group.max()) + 1 if len(group) else 1
    order = ((latent * groups + group) * size + rank).argsort()
    group, rank, firing, latent = group[order], rank[order], firing[order], latent[order]
    segment, edges = _segments(s)
    start = edges[segment[firing]]
    offsets, at = _runs(start, edges[segment[firing] + 1])
    return Picks(
        latent, group, rank, s.window[firing], s.position[firing], s.block.values[firing],
        offsets, s.position[at], s.block.values[at],
    )  # fmt: skip


def _runs(
    start: Int[Tensor, " m"], stop: Int[Tensor, " m"]
) -> tuple[Int[Tensor, " m_plus_1"], Int[Tensor, " nnz"]]:
    """Return the numbers of [start, stop) one run after the other, and where each run begins."""
    length = stop - start
    offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
    inside = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], length)
    return offsets, torch.repeat_interleave(start, length) + inside


def strips_in(
    s: Sorted, latent: Int[Tensor, " m"], window: Int[Tensor, " m"]
) -> tuple[Int[Tensor, " m_plus_1"], Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
    """Return (offsets, positions, values) of m latents over one window each, given by its index
    in the layout; a latent that is silent there has an empty strip."""
    place = torch.cat([s.window, window])
    width = int(place.max()) + 1 if len(place) else 1
    fired, asked = s.block.latent * width + s.window, latent * width + window
    start, stop = (torch.searchsorted(fired, asked, right=end) for end in (False, True))
    offsets, at = _runs(start, stop)
    return offsets, s.position[at], s.block.values[at]


def top_tokens(s: Sorted, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (latent, token id, firings, share of Σ|z|) of each latent's `limit` heaviest tokens.

    Sorted by latent, then by falling share; ties go to the smaller id. Rows that are no tokens
    (id −1) count in Σ|z| only.
    """
    strength = s.block.values.abs().double()
    total = torch.zeros(len(s.block.fires), dtype=torch.float64)
    total.index_add_(0, s.block.latent, strength)
    named = s.token >= 0
    token = s.token[named]
    vocab = int(token.max()) + 1 if len(token) else 1
    pairs, inverse, fires = torch.unique(
        s.block.latent[named] * vocab + token, return_inverse=True, return_counts=True
    )
    mass = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, inverse, strength[named])
    latent = pairs // vocab
    share = mass / total[latent]
    order = share.sort(descending=True, stable=True).indices
    order = order[latent[order].sort(stable=True).indices]
    latent = latent[order]
    n_pairs = torch.bincount(latent, minlength=len(s.block.fires))
    before = torch.cat([n_pairs.new_zeros(1), n_pairs.cumsum(0)])[latent]
    keep = torch.arange(len(latent)) - before < limit
    order = order[keep]
    return latent[keep], (pairs % vocab)[order], fires[order], share[order]
