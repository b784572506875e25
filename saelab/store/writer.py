"""Writes a store shard by shard, behind the work that makes the rows, and resumes after a crash.

A shard's three files are written first, then a small cursor in the draft's scratch folder with the
shard's partial statistics: a shard without a cursor is made again. Statistics are exact float64
partials combined in shard order, so an interrupted store equals an uninterrupted one in every
byte.
"""

import json
import logging
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab import artifacts
from saelab.config import canonical_json
from saelab.errors import ArtifactError, ConfigError, NonFiniteError, ShapeError, nearest
from saelab.store import format as fmt
from saelab.types import Document, Mask, Shard, grad_dtype

_log = logging.getLogger(__name__)
_CHUNK = 4096
DEFAULT_ROWS_PER_SHARD = 32_768


@dataclass(frozen=True)
class Advice:
    """What to do about rows that cannot be kept; by default for rows that come from a model."""

    nonfinite: str = "check the model's dtype (float16 models overflow) or mask these positions"
    overflow: str = "set harvest.dtype to bfloat16 or float32"


_ADVICE = Advice()


@final
class StoreWriter:
    """Appends shards of whole windows to an artifact's draft; use it in a `with` block.

    `rows_per_shard` is advice to whoever cuts the shards, and is recorded. Writing happens in one
    background thread, at most one shard behind; its errors surface at the next call.
    """

    def __init__(
        self,
        draft: artifacts.Draft,
        sites: Mapping[str, int],
        dtype: str,
        *,
        rows_per_shard: int = DEFAULT_ROWS_PER_SHARD,
        grad_sites: Collection[str] = (),
        advice: Advice = _ADVICE,
    ) -> None:
        """Open the draft for these sites (name → width), and gradients at some of them.

        Raises ConfigError on an unknown dtype.
        """
        if dtype not in fmt.DTYPES:
            raise ConfigError(f"unknown store dtype {dtype!r}; {nearest(dtype, [*fmt.DTYPES])}")
        self.sites = dict(sites)
        self.dtype = dtype
        self.grad_sites = tuple(grad_sites)
        self.rows_per_shard = rows_per_shard
        self._advice = advice
        self._draft = draft
        draft.scratch.mkdir(parents=True, exist_ok=True)
        self.n_shards = 0
        while self._cursor_path(self.n_shards).exists():
            self.n_shards += 1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "StoreWriter":
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the background thread; what it raised has been or will be seen elsewhere."""
        self._pool.shutdown(wait=True)

    def cursor(self) -> dict[str, Any] | None:
        """Return what was given with the last complete shard, or None for an empty draft."""
        if self.n_shards == 0:
            return None
        return artifacts.read_json(self._cursor_path(self.n_shards - 1))["given"]

    def append(self, shard: Shard, cursor: dict[str, Any] | None = None) -> None:
        """Write a shard, and with it the state from which its maker can go on.

        Raises ShapeError if the shard does not have the writer's sites and widths, and, at the
        latest with the next call, NonFiniteError if a kept row holds NaN, infinity or too large a
        value.
        """
        self._check(shard)
        self.wait()
        self._pending = self._pool.submit(self._write, self.n_shards, shard, cursor or {})
        self.n_shards += 1

    def wait(self) -> None:
        """Wait until all shards are on disk, and raise what writing them raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def finish(
        self, *, median_norm: Mapping[str, float], facts: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write index and statistics; return the manifest's facts, with `facts` added.

        `median_norm` is the median of ‖x‖ per site in the pre-pass that fixed the norm outliers.
        """
        self.wait()
        if self.n_shards == 0:
            raise ArtifactError("a store needs at least one row; nothing was appended to this one")
        partials = [artifacts.read_json(self._cursor_path(i)) for i in range(self.n_shards)]
        sites = {site: _combine([p["sites"][site] for p in partials]) for site in self.sites}
        grads = {site: _combine([p["grads"][site] for p in partials]) for site in self.grad_sites}
        means = {site: _mean(total) for site, total in sites.items()}
        means |= {fmt.grad_name(site): _mean(total) for site, total in grads.items()}
        self._draft.write(fmt.STATS, fmt.to_bytes(means))
        index = _index(self._draft.folder, self.n_shards)
        self._draft.write(fmt.INDEX, fmt.to_bytes(index))
        return {
            "n_rows": int(index["shard_first_row"][-1]),
            "n_windows": len(index["window_first_row"]) - 1,
            "n_documents": len(index["document_shard"]),
            "n_shards": self.n_shards,
            "dtype": self.dtype,
            "rows_per_shard": self.rows_per_shard,
            "sites": self.sites,
            "kept": {site: s["kept"] for site, s in sites.items()},
            "masked": {site: s["masked"] for site, s in sites.items()},
            "stats": {
                site: _scalars(s) | {"median_norm": float(median_norm[site])}
                for site, s in sites.items()
            },
            **self._grad_facts(grads),
        } | (facts or {})

    def _grad_facts(self, grads: dict[str, dict[str, Any]]) -> dict[str, Any]:
        if not grads:
            return {}
        stats = {site: _scalars(total) for site, total in grads.items()}
        return {"grad_dtype": grad_dtype(self.dtype), "grad_stats": stats}

    def discard(self) -> None:
        """Remove everything written so far, when the source turns out to be unusable."""
        self._pool.shutdown(wait=True)
        for number in reversed(range(self.n_shards)):
            self._cursor_path(number).unlink(missing_ok=True)
            for name in (fmt.shard_name, fmt.tokens_name, fmt.documents_name):
                (self._draft.folder / name(number)).unlink(missing_ok=True)
        self.n_shards = 0

    def _cursor_path(self, number: int) -> Path:
        return self._draft.scratch / f"cursor-{number:05d}.json"

    def _check(self, shard: Shard) -> None:
        widths = {site: x.shape[1] for site, x in shard.x.items()}
        if widths != self.sites:
            raise ShapeError(f"this store holds sites {self.sites}, but a shard has {widths}")
        if {*shard.grad} != {*self.grad_sites}:
            raise ShapeError(
                f"this store holds gradients at {[*self.grad_sites]}, but a shard has them at "
                f"{[*shard.grad]}"
            )
        n = len(shard.tokens)
        for site in self.sites:
            if len(shard.x[site]) != n or len(shard.mask[site]) != n:
                raise ShapeError(f"the token table has {n} rows, but site {site!r} has another")
            grad = shard.grad.get(site)
            if grad is not None and grad.shape != shard.x[site].shape:
                raise ShapeError(
                    f"site {site!r} has rows {tuple(shard.x[site].shape)}, but gradients "
                    f"{tuple(grad.shape)}"
                )

    def _write(self, number: int, shard: Shard, given: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        partial: dict[str, Any] = {}
        partial_grad: dict[str, Any] = {}
        for site in self.sites:
            x = shard.x[site].to(fmt.DTYPES[self.dtype])
            mask, partial[site] = _measure(site, x, shard, self._advice)
            tensors |= {site: x, fmt.mask_name(site): mask}
        for site in self.grad_sites:
            grad = shard.grad[site].to(fmt.DTYPES[grad_dtype(self.dtype)])
            mask = tensors[fmt.mask_name(site)]
            partial_grad[site] = _measure_grad(site, grad, mask, shard, self._advice)
            tensors[fmt.grad_name(site)] = grad
        if shard.label is not None:
            tensors[fmt.LABEL] = shard.label.int()
        columns = {
            name: getattr(shard.tokens, name).to(dtype, copy=True)
            for name, dtype in fmt.COLUMNS.items()
        }
        self._draft.write(fmt.shard_name(number), fmt.to_bytes(tensors))
        self._draft.write(fmt.tokens_name(number), fmt.to_bytes(columns))
        self._draft.write(fmt.documents_name(number), _lines(shard.documents))
        cursor = {"rows": len(shard.tokens), "sites": partial, "grads": partial_grad}
        cursor["given"] = given
        artifacts.write_file(self._cursor_path(number), canonical_json(cursor).encode())


def _lines(documents: tuple[Document, ...]) -> bytes:
    lines = []
    for document in documents:
        data = asdict(document) | {"document": document.number}
        data["group"] = document.number if document.group is None else document.group
        del data["number"]
        if document.split_hash is None:  # it came later: other stores keep their bytes
            del data["split_hash"]
        lines.append(json.dumps(data, sort_keys=True, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _measure(
    site: str, x: Float[Tensor, "n d"], shard: Shard, advice: Advice
) -> tuple[Shaped[Tensor, " n"], dict[str, Any]]:
    """Return the mask with NONFINITE set, and exact sums over the kept training rows."""
    mask = shard.mask[site].clone()
    sums = _sums(_Given(f"site {site!r}", shard.x[site], shard, advice), x, mask)
    train, kept = ~shard.heldout, mask == 0
    counts = {"train": int((kept & train).sum()), "heldout": int((kept & shard.heldout).sum())}
    masked = {str(r.name): int((mask & int(r)).ne(0).sum()) for r in Mask}
    return mask, sums | {"kept": counts, "masked": masked}


def _measure_grad(
    site: str, grad: Float[Tensor, "n d"], mask: Shaped[Tensor, " n"], shard: Shard, advice: Advice
) -> dict[str, Any]:
    """Return exact sums of the gradients at the site's kept training rows."""
    given = _Given(f"the gradient at site {site!r}", shard.grad[site], shard, advice)
    train = int(((mask == 0) & ~shard.heldout).sum())
    return _sums(given, grad, mask.clone()) | {"kept": {"train": train}}


@dataclass(frozen=True)
class _Given:
    """Rows as they came, with what a message about them needs."""

    what: str
    rows: Tensor
    shard: Shard
    advice: Advice


def _sums(
    given: _Given, stored: Float[Tensor, "n d"], mask: Shaped[Tensor, " n"]
) -> dict[str, Any]:
    """Return float64 sums over the kept training rows; mark what is not finite in `mask`."""
    total = torch.zeros(stored.shape[1], dtype=torch.float64)
    norm = square = 0.0
    for start in range(0, len(stored), _CHUNK):
        part = slice(start, start + _CHUNK)
        wide = stored[part].double()
        squares = wide.square().sum(1)
        _refuse_nonfinite(given, start, squares, mask[part])
        chosen = (mask[part] == 0) & ~given.shard.heldout[part]
        total += wide[chosen].sum(0)
        norm += float(squares[chosen].sqrt().sum())
        square += float(squares[chosen].sum())
    return {"sum": total.tolist(), "norm": norm, "square": square}


def _refuse_nonfinite(
    given: _Given, start: int, squares: Float[Tensor, " m"], mask: Shaped[Tensor, " m"]
) -> None:
    """Mark non-finite rows in `mask`; raise if one of them was to be kept."""
    bad = ~squares.isfinite()
    if not bad.any():
        return
    if not (bad & (mask == 0)).any():
        _log.warning(
            "%s: %d masked rows hold NaN, infinity or more than the store's dtype can hold",
            given.what,
            int(bad.sum()),
        )
        mask[bad] |= int(Mask.NONFINITE)
        return
    row = start + int((bad & (mask == 0)).nonzero()[0])
    what, remedy = "NaN or infinity", given.advice.nonfinite
    if given.rows[row].isfinite().all():
        what = f"{float(given.rows[row].abs().max()):.4g}, more than float16 can hold"
        remedy = given.advice.overflow
    tokens = given.shard.tokens
    raise NonFiniteError(
        f"{given.what} holds {what} at position {int(tokens.position[row])} of window "
        f"{int(tokens.window[row])}, document {int(tokens.document[row])}; {remedy}"
    )


def _combine(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the shards' partial sums in shard order."""
    total = np.zeros(len(parts[0]["sum"]))
    for part in parts:
        total += np.array(part["sum"])
    counts = {
        name: {k: sum(p[name][k] for p in parts) for k in parts[0][name]}
        for name in ("kept", "masked")
        if name in parts[0]
    }
    norm, square = (_add(part[name] for part in parts) for name in ("norm", "square"))
    return {"sum": total, "norm": norm, "square": square, **counts}


def _add(values: Any) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


def _mean(total: dict[str, Any]) -> Float[Tensor, " d"]:
    return torch.tensor(total["sum"], dtype=torch.float64) / max(total["kept"]["train"], 1)


def _scalars(total: dict[str, Any]) -> dict[str, float | int]:
    n = total["kept"]["train"]
    return {
        "n": n,
        "mean_norm": total["norm"] / max(n, 1),
        "mean_square_norm": total["square"] / max(n, 1),
    }


def _index(folder: Path, n_shards: int) -> dict[str, Tensor]:
    """Read back the token tables and documents, and note where windows and documents lie."""
    shard_rows, windows = [0], []
    documents: dict[str, list[int]] = {name: [] for name in ("heldout", "group", "shard", "offset")}
    for number in range(n_shards):
        window = np.asarray(fmt.map_tensors(folder / fmt.tokens_name(number))["window"])
        starts = np.flatnonzero(np.diff(window, prepend=-1))
        windows.append(starts + shard_rows[-1])
        shard_rows.append(shard_rows[-1] + len(window))
        offset = 0
        for line in (folder / fmt.documents_name(number)).read_bytes().splitlines(keepends=True):
            data = json.loads(line)
            place = {"heldout": data["heldout"], "group": data["group"]}
            for name, value in (place | {"shard": number, "offset": offset}).items():
                documents[name].append(int(value))
            offset += len(line)
    first = np.concatenate([*windows, [shard_rows[-1]]])
    index = {"shard_first_row": shard_rows, "window_first_row": first}
    tensors = {name: torch.as_tensor(value, dtype=torch.int64) for name, value in index.items()}
    for name, values in documents.items():
        dtype = torch.uint8 if name == "heldout" else torch.int64
        tensors[f"document_{name}"] = torch.tensor(values, dtype=dtype)
    return tensors
