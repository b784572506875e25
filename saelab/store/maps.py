"""The rows of a store's shards behind one numbering, gathered from memory maps."""

from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Bool, Int

from saelab.store import format as fmt


@final
class ShardMaps:
    """Gathers ascending rows of any stored tensor; maps each shard's files at its first use."""

    def __init__(self, path: Path) -> None:
        """Read the index of the store folder `path`."""
        self.path = path
        index = fmt.map_tensors(path / fmt.INDEX)
        self.shard_first = index["shard_first_row"]
        self.window_first = index["window_first_row"]
        self.heldout = index["document_heldout"].astype(bool)
        self.group = index["document_group"]
        self.document_shard = index["document_shard"]
        self.document_offset = index["document_offset"]
        self._shards: dict[int, dict[str, np.ndarray]] = {}

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Yield the first and one past the last row of each shard."""
        return zip(map(int, self.shard_first[:-1]), map(int, self.shard_first[1:]), strict=True)

    def gather(self, name: str, rows: Int[np.ndarray, " n"], out: np.ndarray) -> None:
        """Copy ascending rows of one tensor into `out`."""
        ends = np.searchsorted(rows, self.shard_first)
        for number in np.flatnonzero(np.diff(ends)):
            part = slice(int(ends[number]), int(ends[number + 1]))
            local = rows[part] - self.shard_first[number]
            # "clip" lets NumPy write straight into `out`; the rows are in range by construction
            np.take(self._shard(int(number))[name], local, axis=0, out=out[part], mode="clip")

    def column(self, name: str, rows: Int[np.ndarray, " n"]) -> np.ndarray:
        """Return one column of the token table, or a site's mask, at ascending rows."""
        out = np.empty(len(rows), dtype=self.dtype(name))
        self.gather(name, rows, out)
        return out

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor as it is mapped; two-byte floats appear as int16."""
        return self._shard(0)[name].dtype

    def chosen(
        self, rows: Int[np.ndarray, " n"], sites: tuple[str, ...], split: str
    ) -> Bool[np.ndarray, " n"]:
        """Return which ascending rows are of the split and kept by the masks of all `sites`."""
        chosen = np.ones(len(rows), dtype=bool)
        for site in sites:
            chosen &= self.column(fmt.mask_name(site), rows) == 0
        if split != "all":
            chosen &= self.heldout[self.column("document", rows)] == (split == "heldout")
        return chosen

    def units(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return the bootstrap unit of ascending rows: the document, or its packing group."""
        return self.group[self.column("document", rows)]

    def _shard(self, number: int) -> dict[str, np.ndarray]:
        if number not in self._shards:
            tensors = fmt.map_tensors(self.path / fmt.shard_name(number))
            tensors |= fmt.map_tensors(self.path / fmt.tokens_name(number))
            self._shards[number] = tensors
        return self._shards[number]
