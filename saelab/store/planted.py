"""What every planted world has: the rows' settings, the truth, and where the truth is kept.

truth.safetensors          `directions` (n_features, d), `bias` (d), `parents` (n_features)
truth-00000.safetensors    the codes of the rows of shard 0: `row_offsets`, `indices`, `values`
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from saelab.artifacts import Draft
from saelab.config import Config
from saelab.protocols import Truth
from saelab.store import format as fmt
from saelab.types import SparseLatents

TRUTH = "truth.safetensors"


class RowsConfig(Config):
    """How many planted rows, and how they are laid out in the store."""

    n_rows: int = Field(20_000, gt=0)
    window: int = Field(32, gt=0)
    """Rows per window; each window is a document of its own."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the documents that is held out."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    rows_per_shard: int = Field(32_768, gt=0)
    seed: int = 0
    """Of the world and of its rows."""

    @model_validator(mode="after")
    def _whole_windows(self) -> "RowsConfig":
        if self.window > self.rows_per_shard:
            raise ValueError("window must not exceed rows_per_shard")
        return self


@runtime_checkable
class World(Protocol):
    """A planted dictionary and a law of its codes."""

    @property
    def truth(self) -> Truth:
        """What is planted."""
        ...

    def codes(self, shard: int, n: int) -> Iterator[Float[Tensor, "rows n_features"]]:
        """Yield the codes of the first `n` rows of a shard, a few rows at a time."""
        ...


def truth_name(number: int) -> str:
    """Return the file name of a shard's planted codes."""
    return f"truth-{number:05d}.safetensors"


def write_truth(draft: Draft, truth: Truth) -> None:
    """Write what is planted."""
    tensors = {"directions": truth.directions, "bias": truth.bias, "parents": truth.parents}
    draft.write(TRUTH, fmt.to_bytes(tensors))


def read_truth(path: Path) -> Truth:
    """Read what is planted in a store's folder."""
    found = fmt.map_tensors(path / TRUTH)
    return Truth(**{name: torch.from_numpy(value.copy()) for name, value in found.items()})


def write_codes(draft: Draft, shard: int, parts: list[SparseLatents]) -> None:
    """Write the codes of a shard's rows."""
    counts = torch.cat([part.l0() for part in parts])
    tensors = {
        "row_offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        "indices": torch.cat([part.indices for part in parts]).int(),
        "values": torch.cat([part.values for part in parts]),
    }
    draft.write(truth_name(shard), fmt.to_bytes(tensors))


def read_codes(
    path: Path, shard_first_row: Int[Tensor, " n_shards_plus_1"], rows: Int[Tensor, " n"], n: int
) -> SparseLatents:
    """Return the planted codes of these row numbers, over `n` features, in that order."""
    shards = torch.searchsorted(shard_first_row, rows, right=True) - 1
    counts = torch.zeros(len(rows), dtype=torch.int64)
    where, indices, values = [], [], []
    for shard in torch.unique(shards).tolist():
        tensors = fmt.map_tensors(path / truth_name(shard))
        offsets = torch.from_numpy(tensors["row_offsets"].copy())
        mine = (shards == shard).nonzero()[:, 0]
        local = rows[mine] - shard_first_row[shard]
        counts[mine] = offsets.diff()[local]
        within = torch.arange(int(counts[mine].sum()))
        starts = counts[mine].cumsum(0) - counts[mine]
        within += torch.repeat_interleave(offsets[local] - starts, counts[mine])
        where.append(torch.repeat_interleave(mine, counts[mine]))
        indices.append(torch.from_numpy(tensors["indices"][within.numpy()]).long())
        values.append(torch.from_numpy(tensors["values"][within.numpy()]))
    order = torch.cat(where).argsort(stable=True)
    row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseLatents(row_offsets, torch.cat(indices)[order], torch.cat(values)[order], n)
