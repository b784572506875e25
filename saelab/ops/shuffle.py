"""Seeded orders: permutations that depend on nothing but their seeds, and block-shuffled epochs.

A block shuffle permutes small blocks of consecutive rows over the whole store, fills a buffer of
bounded size with them and permutes the rows inside it. With a buffer that holds all rows it is a
full permutation.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def generator(seed: int, *path: int) -> torch.Generator:
    """Return a CPU generator for one place in a run, such as `generator(seed, epoch, buffer)`."""
    name = ":".join(map(str, (seed, *path)))
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(value)


def permutation(n: int, seed: int, *path: int) -> Int[Tensor, " n"]:
    """Return a permutation of 0 … n − 1 that depends only on n and the seeds."""
    return torch.randperm(n, generator=generator(seed, *path))


@dataclass(frozen=True)
class BlockOrder:
    """One epoch of a block shuffle: which blocks fill which buffer, in turn."""

    blocks: Int[np.ndarray, " n_blocks"]
    """Block numbers in reading order; blocks without rows are left out."""
    ends: Int[np.ndarray, " n_buffers"]
    """Buffer j holds `blocks[ends[j − 1]:ends[j]]`."""
    row_ends: Int[np.ndarray, " n_buffers"]
    """Number of rows in the buffers 0 … j together."""

    def buffer(self, number: int) -> Int[np.ndarray, " m"]:
        """Return the blocks of one buffer, ascending, so that they are read in disk order."""
        start = self.ends[number - 1] if number else 0
        return np.sort(self.blocks[start : self.ends[number]])


def block_order(counts: Int[np.ndarray, " n"], capacity: int, seed: int, epoch: int) -> BlockOrder:
    """Permute the blocks of an epoch and cut them into buffers of about equal numbers of rows.

    `counts` holds the number of rows in each block. No buffer holds more than `capacity` rows plus
    one block's.
    """
    blocks = np.flatnonzero(counts)
    blocks = blocks[permutation(len(blocks), seed, epoch).numpy()]
    sizes = counts[blocks].astype(np.int64)
    total = int(sizes.sum())
    n_buffers = max(1, -(-total // capacity))
    before = sizes.cumsum() - sizes
    number = before * n_buffers // max(total, 1)
    ends = np.searchsorted(number, np.arange(n_buffers), side="right")
    return BlockOrder(blocks, ends, np.append(0, sizes.cumsum())[ends])
