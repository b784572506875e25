"""All firings of all latents, sorted by latent in bounded memory: an external sort.

One pass over the store encodes every kept row; the firings are cut into runs, each run is sorted by
latent and spilled to disk. Reading back a range of latents then touches one slice per run.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab import artifacts
from saelab.features.nodes import Nodes
from saelab.protocols import Store
from saelab.types import SparseLatents

RUN_FIRINGS = 1 << 21
"""Firings held in memory at a time, while spilling and per block while reading."""


@dataclass(frozen=True)
class Block:
    """The firings of the latents `first` … `first + len(fires) − 1`, by latent and then by row."""

    first: int
    fires: Int[Tensor, " latents"]
    """Firings per latent."""
    latent: Int[Tensor, " nnz"]
    """Latent id minus `first`."""
    rows: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]

    @property
    def offsets(self) -> Int[Tensor, " latents_plus_1"]:
        """Latent i's firings are `[offsets[i]:offsets[i + 1]]`."""
        return torch.cat([self.fires.new_zeros(1), self.fires.cumsum(0)])


class Firings:
    """Every firing of a dictionary on a store's kept rows, spilled as runs sorted by latent."""

    def __init__(self, folder: Path, d_sae: int, run_firings: int = RUN_FIRINGS) -> None:
        """Spill into `folder`, which is emptied first."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.d_sae = d_sae
        self.folder = folder
        self.run_firings = run_firings
        self._offsets: list[Int[Tensor, " d_sae_plus_1"]] = []
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._n_pending = 0

    def add(self, rows: Int[Tensor, " n"], z: SparseLatents) -> None:
        """Take in the codes of some rows; rows must come in ascending order."""
        self._pending.append((z.indices.cpu().long(), rows[z.rows().cpu()], z.values.float().cpu()))
        self._n_pending += len(z.values)
        if self._n_pending >= self.run_firings:
            self.spill()

    def spill(self) -> None:
        """Sort what is pending by latent and write it as a run."""
        if not self._n_pending:
            return
        latent, rows, values = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        latent, order = latent.sort(stable=True)
        counts = torch.bincount(latent, minlength=self.d_sae)
        self._offsets.append(torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
        stem = self.folder / f"run-{len(self._offsets):05d}"
        artifacts.write_file(stem.with_suffix(".rows"), rows[order].numpy().tobytes())
        artifacts.write_file(stem.with_suffix(".values"), values[order].numpy().tobytes())
        self._pending, self._n_pending = [], 0

    def fires(self) -> Int[Tensor, " d_sae"]:
        """Return the number of firings of each latent."""
        total = torch.zeros(self.d_sae, dtype=torch.int64)
        for offsets in self._offsets:
            total += offsets.diff()
        return total

    def blocks(self) -> Iterator[Block]:
        """Yield all latents in order, in blocks of about `run_firings` firings."""
        fires = self.fires()
        ends = fires.cumsum(0)
        first = 0
        while first < self.d_sae:
            limit = (int(ends[first - 1]) if first else 0) + self.run_firings
            last = max(first + 1, int(torch.searchsorted(ends, limit, right=True)))
            yield self._block(first, last, fires[first:last])
            first = last

    def _block(self, first: int, last: int, fires: Int[Tensor, " latents"]) -> Block:
        latent, rows, values = [], [], []
        for number, offsets in enumerate(self._offsets, start=1):
            start, stop = int(offsets[first]), int(offsets[last])
            stem = self.folder / f"run-{number:05d}"
            rows.append(_read(stem.with_suffix(".rows"), np.int64, start, stop))
            values.append(_read(stem.with_suffix(".values"), np.float32, start, stop))
            latent.append(
                torch.repeat_interleave(
                    torch.arange(last - first), offsets[first : last + 1].diff()
                )
            )
        if not latent:
            empty = torch.zeros(0, dtype=torch.int64)
            return Block(first, fires, empty, empty, torch.zeros(0))
        ids, order = torch.cat(latent).sort(stable=True)
        return Block(first, fires, ids, torch.cat(rows)[order], torch.cat(values)[order])


def _read(path: Path, dtype: type, start: int, stop: int) -> Tensor:
    count = stop - start
    size = np.dtype(dtype).itemsize
    return torch.from_numpy(np.fromfile(path, dtype, count=count, offset=start * size))


def collect(
    nodes: Nodes,
    store: Store,
    site: str,
    *,
    folder: Path,
    batch: int,
    progress: Callable[[int], None],
) -> Firings:
    """Encode every kept row once and return all firings; `progress` gets the rows done so far."""
    firings = Firings(folder, len(nodes))
    W_dec = nodes.dictionary.W_dec
    done = 0
    with torch.no_grad():
        for part in store.scan(site, batch=batch):
            x = part.x.to(W_dec.device, W_dec.dtype)
            firings.add(part.rows.cpu(), nodes.encode_sparse(x))
            done += len(part)
            progress(done)
    firings.spill()
    return firings
