"""Shuffled reading: blocks permuted over the whole store, through a buffer of bounded size."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelab.ops import shuffle
from saelab.store import format as fmt
from saelab.store.maps import ShardMaps
from saelab.types import Batch

_BLOCK_BYTES = 2**14
"""Bytes that are read together, at least one row: large enough for a disk's full speed …"""
_BLOCK_ROWS = 16
"""… and at most this many rows: few enough to mix documents."""


@dataclass(frozen=True)
class Order:
    """Which rows a shuffled reading gives, and the numbers that its order depends on."""

    sites: tuple[str, ...]
    """The input site, and the target site if there is one; rows are kept by both masks."""
    split: str
    batch: int
    seed: int
    flows: bool
    """Whether batches run on over the end of an epoch; else its last batch is short."""


@dataclass(frozen=True)
class Column:
    """A stored tensor with a row of numbers for each row of the store."""

    name: str
    """In the shards."""
    width: int
    dtype: torch.dtype


@final
class Shuffler:
    """Gives one `Order` of a store's rows without end, from any place in it."""

    def __init__(
        self, maps: ShardMaps, order: Order, sites: list[Column], grad: Column | None, n_bytes: int
    ) -> None:
        """Count the chosen rows; the buffer takes `n_bytes`, but holds at least 8 batches.

        Gradients come on top of `n_bytes`, so that the order is the same with and without them.
        """
        self._maps = maps
        self._order = order
        self._columns = sites if grad is None else [*sites, grad]
        self._has_grad = grad is not None
        per_row = sum(column.width * column.dtype.itemsize for column in sites)
        self._block = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // per_row))
        self._counts = self._count()
        self.total = int(self._counts.sum())
        self._capacity = max(n_bytes // per_row, 8 * order.batch)

    def batches(self, start: int) -> Iterator[Batch]:
        """Yield batches from number `start` on."""
        batch = self._order.batch
        per_epoch = self.total if self._order.flows else -(-self.total // batch) * batch
        epoch, offset = divmod(start * batch, per_epoch)
        pieces: list[Batch] = []
        missing = batch
        while True:
            for order in self._epoch(epoch, offset):
                while len(order):
                    pieces.append(self._take(order[:missing]))
                    order = order[missing:]
                    missing -= len(pieces[-1])
                    if missing == 0:
                        yield _join(pieces)
                        pieces, missing = [], batch
            if pieces and not self._order.flows:
                yield _join(pieces)
                pieces, missing = [], batch
            epoch, offset = epoch + 1, 0

    def _epoch(self, epoch: int, offset: int) -> Iterator[Int[Tensor, " n"]]:
        """Fill the buffer again and again; yield each time the order in which to take its rows."""
        seed = self._order.seed
        plan = shuffle.block_order(self._counts, self._capacity, seed, epoch)
        for number, row_end in enumerate(plan.row_ends):
            row_start = int(plan.row_ends[number - 1]) if number else 0
            if row_end <= offset:
                continue
            n = self._fill(plan.buffer(number))
            yield shuffle.permutation(n, seed, epoch, number)[max(0, offset - row_start) :]

    # --------------------------------------------------------------------------------- the buffer

    def _fill(self, blocks: Int[np.ndarray, " m"]) -> int:
        """Read the chosen rows of some blocks into the buffer; return how many there are."""
        rows = self._rows(blocks)
        rows = rows[self._maps.chosen(rows, self._order.sites, self._order.split)]
        for column, space in zip(self._columns, self._space, strict=True):
            self._maps.gather(column.name, rows, space[: len(rows)])
        self._numbers = torch.from_numpy(rows)
        self._units = torch.from_numpy(self._maps.units(rows))
        return len(rows)

    @cached_property
    def _space(self) -> list[np.ndarray]:
        n = min(self._capacity + self._block, self.total)
        return [np.empty((n, c.width), dtype=self._maps.dtype(c.name)) for c in self._columns]

    def _take(self, order: Int[Tensor, " n"]) -> Batch:
        chosen = order.numpy()
        columns = zip(self._columns, self._space, strict=True)
        x, *others = [fmt.to_float32(space[chosen], column.dtype) for column, space in columns]
        grad = others.pop() if self._has_grad else None
        y = others[0] if others else x
        return Batch(x, y, self._numbers[order], self._units[order], grad)

    # --------------------------------------------------------------------------------- the blocks

    def _count(self) -> Int[np.ndarray, " n_blocks"]:
        """Count the chosen rows of each block; blocks start anew with each shard."""
        parts = []
        for first, last in self._maps.bounds():
            chosen = self._maps.chosen(np.arange(first, last), self._order.sites, self._order.split)
            parts.append(
                np.add.reduceat(chosen, np.arange(0, last - first, self._block), dtype=np.int64)
            )
        return np.concatenate(parts)

    @cached_property
    def _block_first(self) -> Int[np.ndarray, " n_blocks_plus_1"]:
        """First row of each block, and one past the last row."""
        starts = [np.arange(first, last, self._block) for first, last in self._maps.bounds()]
        return np.concatenate([*starts, self._maps.shard_first[-1:]])

    def _rows(self, blocks: Int[np.ndarray, " m"]) -> Int[np.ndarray, " n"]:
        rows = self._block_first[blocks][:, None] + np.arange(self._block)
        return rows[rows < self._block_first[blocks + 1][:, None]]


def _join(pieces: list[Batch]) -> Batch:
    if len(pieces) == 1:
        return pieces[0]
    x = torch.cat([piece.x for piece in pieces])
    same = all(piece.y is piece.x for piece in pieces)
    grads = [piece.grad for piece in pieces if piece.grad is not None]
    return Batch(
        x,
        x if same else torch.cat([piece.y for piece in pieces]),
        torch.cat([piece.rows for piece in pieces]),
        torch.cat([piece.documents for piece in pieces]),
        torch.cat(grads) if grads else None,
    )
