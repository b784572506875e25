"""Rows, windows and token ids of a store, chosen the same way every time."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from saelab.protocols import Split, Store
from saelab.types import Batch, Window

_SPREAD = 32
"""Windows are picked evenly from this many times as many."""


def sample_rows(
    store: Store, site: str, split: Split, n: int, *, batch: int, seed: int
) -> Iterator[Batch]:
    """Yield `n` distinct kept rows of a split, shuffled across documents; all of them if fewer."""
    kept = store.n_kept(site, split)
    if n >= kept:
        yield from store.scan(site, batch=batch, split=split)
        return
    size, left = min(batch, n), n
    for rows in store.batches(site, batch=size, seed=seed, split=split, drop_last=False):
        yield rows if len(rows) <= left else _pick(rows, torch.arange(left))
        left -= len(rows)
        if left <= 0:
            return


def thinned(batch: Batch, share: float, start: int) -> Batch:
    """Return every 1/share-th row of a stream of rows, of which this batch begins at `start`."""
    place = torch.arange(start, start + len(batch) + 1, dtype=torch.float64)
    return _pick(batch, (place * share).floor().diff() > 0)


def _pick(batch: Batch, which: Shaped[Tensor, " m"]) -> Batch:
    grad = None if batch.grad is None else batch.grad[which]
    return Batch(batch.x[which], batch.y[which], batch.rows[which], batch.documents[which], grad)


def sample_windows(store: Store, site: str, n: int) -> list[Window]:
    """Return `n` held-out windows, evenly spaced over the first 32 n; all of them if fewer."""
    found = list(islice(store.windows(site, split="heldout"), _SPREAD * n))
    return [found[i * len(found) // n] for i in range(n)] if len(found) > n else found


def units(windows: Sequence[Window]) -> dict[int, int]:
    """Return the bootstrap unit of each document: documents that share a window are one unit."""
    root: dict[int, int] = {}

    def find(number: int) -> int:
        while root.setdefault(number, number) != number:
            number = root[number]
        return number

    for window in windows:
        first, *others = torch.unique(window.document).tolist()
        for other in others:
            a, b = sorted((find(first), find(other)))
            root[b] = a
        find(first)
    return {number: find(number) for number in root}


def token_ids(store: Store, site: str, refs: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the token id of each row number, read from its window; −1 where rows are no tokens."""
    numbers, place = torch.unique(store.window_of(refs), return_inverse=True)
    windows = [store.window(site, number) for number in numbers.tolist()]
    lengths = torch.tensor([len(w) for w in windows])
    first = torch.tensor([w.first_row for w in windows])
    start = lengths.cumsum(0) - lengths
    ids = torch.cat([w.ids for w in windows]).long()
    return ids[start[place] + refs - first[place]]
