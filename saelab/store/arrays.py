"""A store from the user's own arrays, without any language model: `saelab store from-npy`."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field

from saelab import artifacts
from saelab.artifacts import Draft
from saelab.config import Config
from saelab.errors import ConfigError, ShapeError, SiteError, nearest
from saelab.store import format as fmt
from saelab.store.writer import DEFAULT_ROWS_PER_SHARD, Advice, StoreWriter
from saelab.types import Document, Mask, Shard, TokenTable, is_heldout

STAGE_VERSION = 1
_ADVICE = Advice(
    nonfinite="leave such rows out with --masked, or repair them",
    overflow="choose --dtype bfloat16 or float32",
)
_MEDIAN_ROWS = 4096


class ArraysConfig(Config):
    """Which `.npy` files become a store."""

    sites: dict[str, Path] = Field(min_length=1)
    """Site name → file of an array (n, d); all files have the same n."""
    gradients: dict[str, Path] = {}
    """Site name → file of the gradients of a loss at its rows (n, d)."""
    documents: Path | None = None
    """File of an array (n,) of document ids, numbers or strings; by default each row is its own."""
    masked: Path | None = None
    """File of an array (n,) that is not zero for the rows to leave out."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the documents that is held out, by the hash of their id."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Of the stored rows; `auto`: float16 for float16 arrays, else float32."""
    window: int = Field(128, gt=0)
    """Consecutive rows of one document form windows of at most this length."""
    rows_per_shard: int = Field(DEFAULT_ROWS_PER_SHARD, gt=0)


def from_arrays(config: ArraysConfig, out: Path, name: str) -> Path:
    """Make a store under `out`, or find it there; return its folder.

    Raises ShapeError, ConfigError or NonFiniteError naming the file that does not fit.
    """
    files = {site: config.sites[site] for site in sorted(config.sites)}
    files |= {f"(gradient {site})": path for site, path in sorted(config.gradients.items())}
    files |= {f"({k})": p for k in ("documents", "masked") if (p := getattr(config, k)) is not None}
    inputs = config.plain() | {"files": {k: _digest(path) for k, path in files.items()}}
    for field in ("sites", "gradients", "documents", "masked"):
        del inputs[field]
    key = artifacts.stage_key(fmt.STAGE, STAGE_VERSION, inputs, [])
    found = artifacts.find(out, fmt.STAGE, name, key)
    if found is not None:
        return found
    with artifacts.open_draft(out, fmt.STAGE, name, key) as draft:
        if not draft.is_finished:
            facts = fill_from_arrays(draft, config)
            draft.finish(stage=fmt.STAGE, name=name, inputs=inputs, parents=[], facts=facts)
    return draft.target


def fill_from_arrays(draft: Draft, config: ArraysConfig) -> dict[str, Any]:
    """Fill an artifact's draft from the arrays; return the manifest's facts."""
    arrays = {site: _matrix(path, f"site {site!r}") for site, path in config.sites.items()}
    first_site, first = next(iter(arrays.items()))
    for site, array in arrays.items():
        if len(array) != len(first):
            raise ShapeError(
                f"all sites need the same rows: {config.sites[first_site]} has {len(first)}, but "
                f"{config.sites[site]} has {len(array)}"
            )
    gradients = _gradients(config, arrays)
    documents = _column(config.documents, len(first))
    masked = _column(config.masked, len(first))
    sites = {site: array.shape[1] for site, array in arrays.items()}
    dtype = config.dtype
    if dtype == "auto":
        half = all(array.dtype == np.float16 for array in arrays.values())
        dtype = "float16" if half else "float32"
    with StoreWriter(
        draft,
        sites,
        dtype,
        rows_per_shard=config.rows_per_shard,
        grad_sites=tuple(gradients),
        advice=_ADVICE,
    ) as writer:
        shards = _shards(config, _Arrays(arrays, gradients, documents, masked))
        for number, shard in enumerate(shards):
            if number >= writer.n_shards:
                writer.append(shard)
        median = {site: _median_norm(array, masked) for site, array in arrays.items()}
        facts = {"model": None, "model_fingerprint": None}
        return writer.finish(median_norm=median, facts=facts)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; an .npy file was expected")
    return artifacts.hash_file(path)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; an .npy file was expected") from None
    except (ValueError, EOFError) as error:
        raise ConfigError(
            f"{path} is not a whole .npy file of numbers or strings: {error}"
        ) from None


def _gradients(config: ArraysConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Load the gradients in the order of the sites, and compare their shapes with the rows'."""
    for site in config.gradients:
        if site not in arrays:
            raise SiteError(
                f"there are gradients at {site!r}, but no rows; {nearest(site, [*arrays])}"
            )
    found: dict[str, np.ndarray] = {}
    for site, rows in arrays.items():
        if site in config.gradients:
            found[site] = _matrix(config.gradients[site], f"the gradient at site {site!r}")
            if found[site].shape != rows.shape:
                raise ShapeError(
                    f"{config.gradients[site]} should hold a gradient for each row of {site!r}, "
                    f"shape {rows.shape}, but has shape {found[site].shape}"
                )
    return found


def _matrix(path: Path, what: str) -> np.ndarray:
    array = _load(path)
    if array.ndim != 2 or len(array) == 0:
        raise ShapeError(
            f"{what} needs an array of rows (n, d), but {path} has shape {array.shape}"
        )
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise ShapeError(f"{path} should hold floating-point rows, but holds {array.dtype}")
    return array


def _column(path: Path | None, n: int) -> np.ndarray | None:
    if path is None:
        return None
    array = _load(path)
    if array.shape != (n,):
        raise ShapeError(f"{path} should have shape ({n},), one entry per row, not {array.shape}")
    return array


@dataclass(frozen=True)
class _Arrays:
    """The opened files."""

    sites: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    documents: np.ndarray | None
    masked: np.ndarray | None


def _shards(config: ArraysConfig, arrays: _Arrays) -> Iterator[Shard]:
    """Cut the rows into shards; a shard's end ends a window."""
    documents, masked = arrays.documents, arrays.masked
    n = len(next(iter(arrays.sites.values())))
    numbers: dict[str, Document] = {}
    windows = 0
    for first in range(0, n, config.rows_per_shard):
        part = slice(first, min(n, first + config.rows_per_shard))
        rows = range(first, part.stop)
        ids = map(str, rows) if documents is None else map(str, documents[part].tolist())
        known = len(numbers)
        mine = [_document(numbers, name, config.holdout) for name in ids]
        number = torch.tensor([document.number for document in mine])
        window, position = _windows(number, config.window)
        zeros = torch.zeros(len(number), dtype=torch.int32)
        table = TokenTable(zeros - 1, window + windows, position, number, zeros, zeros)
        windows += int(window[-1]) + 1
        mask = torch.zeros(len(number), dtype=torch.uint8)
        if masked is not None:
            mask[torch.from_numpy(masked[part] != 0)] = int(Mask.SPECIAL)
        x, grad = (
            {site: torch.from_numpy(_floats(array[part])) for site, array in some.items()}
            for some in (arrays.sites, arrays.gradients)
        )
        heldout = torch.tensor([document.heldout for document in mine])
        new = tuple(numbers.values())[known:]
        yield Shard(x, dict.fromkeys(x, mask), table, heldout, new, grad)


def _floats(rows: np.ndarray) -> np.ndarray:
    """Return a writable copy, float64 as float32."""
    return rows.astype(np.float32 if rows.dtype == np.float64 else rows.dtype, copy=True)


def _document(numbers: dict[str, Document], name: str, holdout: float) -> Document:
    if name not in numbers:
        sha = hashlib.sha256(name.encode()).hexdigest()
        numbers[name] = Document(len(numbers), sha, is_heldout(sha, holdout), "", name)
    return numbers[name]


def _windows(
    number: Int[torch.Tensor, " n"], longest: int
) -> tuple[Int[torch.Tensor, " n"], Int[torch.Tensor, " n"]]:
    """Number the runs of one document, cut at `longest`, and the positions in them."""
    rows = torch.arange(len(number))
    starts = torch.ones(len(number), dtype=torch.bool)
    starts[1:] = number[1:] != number[:-1]
    run = rows - rows[starts][starts.cumsum(0) - 1]
    window = ((run % longest == 0) | starts).cumsum(0) - 1
    return window, run % longest


def _median_norm(array: np.ndarray, masked: np.ndarray | None) -> float:
    """Return the median of ‖x‖ over the first rows that are kept and finite, 0 if there is none."""
    rows: Any = slice(_MEDIAN_ROWS)
    if masked is not None:
        rows = np.flatnonzero(masked == 0)[:_MEDIAN_ROWS]
    norms = np.linalg.norm(array[rows].astype(np.float64), axis=1)
    norms = norms[np.isfinite(norms)]
    return float(np.median(norms)) if len(norms) else 0.0
