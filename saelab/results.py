"""The files of a results artifact: its rows, and the resamples behind their errors."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.artifacts import Draft, canonical_line
from saelab.stats import ResultRow

ROWS = "results.jsonl"
REPLICATES = "replicates.safetensors"


def write_rows(draft: Draft, rows: Iterable[ResultRow], origin: Mapping[str, Any]) -> int:
    """Write rows, each with what it was computed from; return their number."""
    lines: list[bytes] = []
    drawn: dict[str, Tensor] = {}
    for row in rows:
        lines.append(canonical_line(row.plain() | dict(origin)))
        if row.replicates is not None:
            drawn[_key(row.evaluator, row.arm, row.name)] = row.replicates.float().contiguous()
    draft.write(ROWS, b"".join(lines))
    draft.write(REPLICATES, safetensors.torch.save(drawn))
    return len(lines)


def read_rows(results: Path) -> list[dict[str, Any]]:
    """Return a results artifact's rows."""
    text = (results / ROWS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_replicates(
    results: Path, evaluator: str, arm: str, name: str
) -> Float[Tensor, " resamples"] | None:
    """Return the resamples of a row, in float64; None where it has none, or none were kept."""
    path, key = results / REPLICATES, _key(evaluator, arm, name)
    if not path.exists():
        return None
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(key).to(torch.float64) if key in file.keys() else None  # noqa: SIM118


def _key(evaluator: str, arm: str, name: str) -> str:
    return f"{evaluator}/{arm}/{name}"
