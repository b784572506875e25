"""Reads a finished store through memory maps: shuffled without end, in order, or by row number."""

import json
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab import artifacts
from saelab.errors import ArtifactError, CorpusError, ShapeError, SiteError, nearest
from saelab.protocols import SiteStats, Split, Truth
from saelab.store import format as fmt
from saelab.store.maps import ShardMaps
from saelab.store.planted import TRUTH, read_codes, read_truth
from saelab.store.shuffled import Column, Order, Shuffler
from saelab.types import Batch, Document, SparseLatents, TokenTable, Window

BUFFER_BYTES = 256 * 2**20
"""Memory of the shuffle buffer; the order of the batches depends on it."""


@final
class DiskStore:
    """Activations in a finished store folder; implements `protocols.Store`."""

    def __init__(self, path: Path, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        """Open a store. Raises ArtifactError naming a file that is missing or of another size."""
        self.path = path
        manifest = artifacts.read_manifest(path)
        if "sites" not in manifest.facts or fmt.INDEX not in manifest.files:
            raise ArtifactError(f"{path} is a {manifest.stage}, not a store of activations")
        _check_sizes(path, manifest)
        self.facts: dict[str, Any] = manifest.facts
        self.content_hash = manifest.content_hash
        self.model_name: str | None = (self.facts.get("model") or {}).get("name")
        self.model_fingerprint: str | None = self.facts.get("model_fingerprint")
        self.sites = tuple(self.facts["sites"])
        self.n_rows: int = self.facts["n_rows"]
        self.n_windows: int = self.facts["n_windows"]
        self.dtype = fmt.DTYPES[self.facts["dtype"]]
        self.grad_sites = tuple(self.facts.get("grad_stats", {}))
        self.grad_labels: Literal["data", "sampled"] | None
        self.grad_labels = self.facts.get("gradient", {}).get("labels")
        self._grad_dtype = fmt.DTYPES[self.facts.get("grad_dtype", "float32")]
        self.buffer_bytes = buffer_bytes
        self._maps = ShardMaps(path)
        self.n_documents = len(self._maps.document_shard)
        self._document = lru_cache(256)(self._read_document)

    # ------------------------------------------------------------------------- what there is

    def width(self, site: str) -> int:
        """Return the size of the site's vectors. Raises SiteError, naming the nearest."""
        if site not in self.facts["sites"]:
            raise SiteError(
                f"the store {self.path} has no site {site!r}; {nearest(site, self.sites)}"
            )
        return self.facts["sites"][site]

    def n_kept(self, site: str, split: Split) -> int:
        """Return how many rows of the split the site's mask keeps."""
        self.width(site)
        kept = self.facts["kept"][site]
        return sum(kept.values()) if split == "all" else kept[split]

    @cached_property
    def _means(self) -> dict[str, np.ndarray]:
        return fmt.map_tensors(self.path / fmt.STATS)

    def stats(self, site: str) -> SiteStats:
        """Return the float64 statistics of the site's kept training rows."""
        self.width(site)
        mean = torch.from_numpy(self._means[site].copy())
        return SiteStats(mean=mean, **self.facts["stats"][site])

    # ---------------------------------------------------------------------------------- rows

    def batches(
        self,
        site: str,
        *,
        batch: int,
        seed: int,
        split: Split = "train",
        start: int = 0,
        target: str | None = None,
        drop_last: bool = True,
    ) -> Iterator[Batch]:
        """Yield shuffled batches of kept rows, epoch after epoch, without end.

        Blocks of up to 16 rows are permuted over the whole store into a buffer of `buffer_bytes`,
        whose rows are permuted again; each epoch has an order of its own. By default batches run
        on over the end of an epoch; with `drop_last=False` an epoch ends with its short batch.
        With a `target` site, rows are those that both masks keep. Gradients do not change the
        order. Skipping `start` batches reads none of their rows. Raises CorpusError if fewer than
        `batch` rows are kept.
        """
        sites = self._sites(site, target)
        order = Order(sites, split, batch, seed, drop_last)
        columns = [Column(name, self.width(name), self.dtype) for name in sites]
        grad = self._grad_column(site)
        shuffler = Shuffler(self._maps, order, columns, grad, self.buffer_bytes)
        if shuffler.total < batch:
            raise CorpusError(
                f"a batch of {batch} rows was asked for, but {self.path} keeps only "
                f"{shuffler.total} {split} rows of {site}; use a smaller batch or more tokens"
            )
        return shuffler.batches(start)

    def scan(
        self,
        site: str,
        *,
        batch: int,
        split: Split = "all",
        masked: bool = False,
        target: str | None = None,
    ) -> Iterator[Batch]:
        """Yield each row of the split once, in order; masked ones if asked. The last is short."""
        sites = self._sites(site, target)
        waiting = np.zeros(0, dtype=np.int64)
        for first, last in self._maps.bounds():
            rows = np.arange(first, last)
            chosen = self._maps.chosen(rows, () if masked else sites, split)
            waiting = np.append(waiting, rows[chosen])
            while len(waiting) >= batch:
                yield self._batch(sites, waiting[:batch])
                waiting = waiting[batch:]
        if len(waiting):
            yield self._batch(sites, waiting)

    def rows(self, site: str, refs: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the activations with these row numbers, float32, in that order."""
        column = Column(site, self.width(site), self.dtype)
        numbers = refs.cpu().numpy().astype(np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.n_rows:
            raise ShapeError(f"the row numbers of {self.path} lie in 0 … {self.n_rows - 1}")
        return self._read(column, numbers)

    def _read(self, column: Column, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n d"]:
        order = np.argsort(rows, kind="stable")
        found = np.empty((len(rows), column.width), dtype=self._maps.dtype(column.name))
        self._maps.gather(column.name, rows[order], found)
        if (np.diff(order) != 1).any():
            found = found[np.argsort(order, kind="stable")]
        return fmt.to_float32(found, column.dtype)

    def _grad_column(self, site: str) -> Column | None:
        if site not in self.grad_sites:
            return None
        return Column(fmt.grad_name(site), self.width(site), self._grad_dtype)

    def _sites(self, site: str, target: str | None) -> tuple[str, ...]:
        sites = (site,) if target is None else (site, target)
        for name in sites:
            self.width(name)
        return sites

    def _batch(self, sites: tuple[str, ...], rows: Int[np.ndarray, " n"]) -> Batch:
        refs, units = torch.from_numpy(rows), torch.from_numpy(self._maps.units(rows))
        x, *others = [self.rows(site, refs) for site in sites]
        column = self._grad_column(sites[0])
        grad = None if column is None else self._read(column, rows)
        return Batch(x, others[0] if others else x, refs, units, grad)

    def kept_rows(self, site: str, *, split: Split = "all") -> Int[Tensor, " n"]:
        """Return the row numbers of the split that the site's mask keeps, ascending."""
        self.width(site)
        rows = np.arange(self.n_rows)
        return torch.from_numpy(rows[self._maps.chosen(rows, (site,), split)])

    def table(self, refs: Int[Tensor, " n"]) -> TokenTable:
        """Return where these rows came from; `refs` ascend."""
        rows = refs.cpu().numpy().astype(np.int64)
        columns = {name: self._maps.column(name, rows) for name in fmt.COLUMNS}
        return TokenTable(**{name: torch.from_numpy(column) for name, column in columns.items()})

    # ----------------------------------------------------------------- windows and their text

    def windows(
        self, site: str, *, split: Split = "all", limit: int | None = None
    ) -> Iterator[Window]:
        """Yield windows in order; the site chooses whose mask fills `kept`."""
        given = 0
        for number in range(self.n_windows):
            if limit is not None and given >= limit:
                return
            window = self.window(site, number)
            if split == "all" or window.heldout == (split == "heldout"):
                given += 1
                yield window

    def window_of(self, refs: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the window number of each row number."""
        starts = torch.from_numpy(self._maps.window_first.copy())
        return torch.searchsorted(starts, refs.long(), right=True) - 1

    def window(self, site: str, number: int) -> Window:
        """Return one window by number."""
        self.width(site)
        if not 0 <= number < self.n_windows:
            raise ShapeError(f"window numbers lie in 0 … {self.n_windows - 1}, but {number} came")
        first, last = map(int, self._maps.window_first[number : number + 2])
        rows = np.arange(first, last)
        documents = self._maps.column("document", rows)
        return Window(
            number=number,
            first_row=first,
            ids=torch.from_numpy(self._maps.column("token_id", rows)),
            document=torch.from_numpy(documents),
            strings=tuple(self._strings(rows)),
            heldout=bool(self._maps.heldout[documents[0]]),
            kept=torch.from_numpy(self._maps.column(fmt.mask_name(site), rows) == 0),
        )

    def context(self, ref: int, before: int, after: int) -> tuple[list[str], int]:
        """Return the token strings around a row, in its window, and the row's place among them."""
        number = int(self.window_of(torch.tensor([ref])))
        if not 0 <= number < self.n_windows:
            raise ShapeError(f"the row numbers of {self.path} lie in 0 … {self.n_rows - 1}")
        first, last = map(int, self._maps.window_first[number : number + 2])
        start = max(first, ref - before)
        return self._strings(np.arange(start, min(last, ref + after + 1))), ref - start

    # ------------------------------------------------------------------------- what was planted

    def truth(self) -> Truth | None:
        """Return what was planted; None for a store whose rows came from elsewhere."""
        return self._truth

    def codes(self, refs: Int[Tensor, " n"]) -> SparseLatents:
        """Return the planted codes of these row numbers, in that order."""
        if self._truth is None:
            raise ArtifactError(f"nothing was planted in {self.path}: its rows have no known codes")
        n = len(self._truth.directions)
        return read_codes(
            self.path, torch.from_numpy(self._maps.shard_first.copy()), refs.cpu().long(), n
        )

    @cached_property
    def _truth(self) -> Truth | None:
        return read_truth(self.path) if (self.path / TRUTH).exists() else None

    def document(self, number: int) -> Document:
        """Return one document with its text and label."""
        return self._document(number)

    def _strings(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        names = ("document", "char_start", "char_end")
        columns = (self._maps.column(name, rows).tolist() for name in names)
        return [self._document(d).text[a:b] for d, a, b in zip(*columns, strict=True)]

    def _read_document(self, number: int) -> Document:
        path = self.path / fmt.documents_name(int(self._maps.document_shard[number]))
        with path.open("rb") as file:
            file.seek(int(self._maps.document_offset[number]))
            line = file.readline()
        try:
            data = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ArtifactError(
                f"{path} was altered: document {number} cannot be read; delete the store and run "
                "the same command again"
            ) from None
        return Document(number=data.pop("document"), **data)


def _check_sizes(path: Path, manifest: artifacts.Manifest) -> None:
    for name, entry in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            raise ArtifactError(f"{path / name} is missing from the store; make it again") from None
        if size != entry["size"]:
            raise ArtifactError(
                f"{path / name} should have {entry['size']} bytes but has {size}: it was truncated "
                "or altered; delete the store and run the same command again"
            )
