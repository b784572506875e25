"""The store's protocol without a disk: activations are made as they are read, shuffled in memory.

Documents, windows, masks and the split are those of a harvest with the same configurations, and
in-order reading gives the same rows, number by number. What a disk is for is refused with a clear
error: rows and contexts by number. Shuffled reading mixes within a buffer of bounded size instead
of the whole corpus.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.config import digest
from saelab.errors import ArtifactError, CorpusError, NonFiniteError, SiteError, nearest
from saelab.harvest.corpus import CorpusConfig, CorpusReport, identity, survey, windows
from saelab.harvest.forward import Group, HarvestConfig, Harvester, groups
from saelab.harvest.harvest import store_dtype
from saelab.ops import shuffle
from saelab.ops.loss_gradient import Labels
from saelab.protocols import LanguageModel, SiteStats, Split
from saelab.types import Batch, Shard, Window, grad_dtype

BUFFER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _Rows:
    """Kept rows in the store's dtype: what the buffer holds."""

    sites: tuple[Float[Tensor, "n d"], ...]
    numbers: Int[Tensor, " n"]
    units: Int[Tensor, " n"]
    grad: Float[Tensor, "n d_grad"] | None
    """Of the first site."""

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, order: Shaped[Tensor, " m"] | slice) -> "_Rows":
        sites = tuple(x[order] for x in self.sites)
        grad = None if self.grad is None else self.grad[order]
        return _Rows(sites, self.numbers[order], self.units[order], grad)

    def batch(self) -> Batch:
        x, *others = [x.float() for x in self.sites]
        grad = None if self.grad is None else self.grad.float()
        return Batch(x, others[0] if others else x, self.numbers, self.units, grad)


@final
class OnlineStore:
    """A corpus seen through a model, as a `protocols.Store`; every pass runs the model again."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: CorpusConfig,
        config: HarvestConfig,
        *,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """Count the corpus. Raises CorpusError, SiteError or ConfigError as a harvest would."""
        self._model, self._corpus, self._config = model, corpus, config
        self._harvester = Harvester(model, config)
        dtype = store_dtype(config, model.dtype)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._grad_dtype: torch.dtype = getattr(torch, grad_dtype(dtype))
        self._report = survey(corpus, model)
        self.buffer_bytes = buffer_bytes
        self.path = None
        self.model_name: str | None = model.name
        self.model_fingerprint: str | None = model.fingerprint
        self.sites, self.grad_sites = tuple(config.sites), config.grad_sites
        self.grad_labels: Labels | None
        self.grad_labels = None if config.gradient == "none" else config.gradient
        self.n_rows = corpus.tokens
        self.n_windows = self._report.windows
        self.content_hash = digest(
            {
                "corpus": identity(corpus),
                "harvest": config.key_fields() | {"dtype": str(self._dtype)},
                "model": model.fingerprint,
            }
        )

    def width(self, site: str) -> int:
        """Return the size of the site's vectors. Raises SiteError, naming the nearest."""
        if site not in self._harvester.widths:
            raise SiteError(f"site {site!r} is not harvested; {nearest(site, self.sites)}")
        return self._harvester.widths[site]

    def n_kept(self, site: str, split: Split) -> int:
        """Return how many rows of the split the site's mask keeps; the first call is a pass."""
        self.width(site)
        train, heldout = self._kept[site]
        return {"train": train, "heldout": heldout, "all": train + heldout}[split]

    @cached_property
    def _kept(self) -> dict[str, tuple[int, int]]:
        """Per site the number of kept training and held-out rows."""
        counts: dict[str, tuple[int, int]] = {site: (0, 0) for site in self.sites}
        for _, shard in self._shards():
            for site, (train, heldout) in counts.items():
                kept = shard.mask[site] == 0
                held = int((kept & shard.heldout).sum())
                counts[site] = (train + int(kept.sum()) - held, heldout + held)
        return counts

    def stats(self, site: str) -> SiteStats:
        """Return the statistics of the first shard's kept training rows: see their `n`."""
        self.width(site)
        _, shard = next(self._shards())
        chosen = (shard.mask[site] == 0) & ~shard.heldout
        x = shard.x[site].to(self._dtype)[chosen].double()
        norm = x.norm(dim=1)
        return SiteStats(
            len(x),
            x.mean(0),
            float(norm.mean()),
            float(norm.square().mean()),
            self._harvester.median_norm[site],
        )

    # ----------------------------------------------------------------------------------- rows

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
        """Yield shuffled batches of kept rows, pass after pass, without end.

        The buffer is filled to `buffer_bytes`, at least 8 batches, and half of it is given before
        it is filled again. Skipping `start` batches has to run the model over them. With
        `drop_last`, rows that fill no batch at the end of a pass go over into the next one. Raises
        CorpusError if a pass keeps fewer than `batch` rows.
        """
        sites = self._sites(site, target)
        per_row = sum(self.width(name) for name in sites) * self._dtype.itemsize
        capacity = max(self.buffer_bytes // per_row, 8 * batch)
        stream = self._shuffled(sites, split, (batch, capacity, seed), drop_last)
        for number, found in enumerate(stream):
            if number >= start:
                yield found

    def _shuffled(
        self, sites: tuple[str, ...], split: Split, sizes: tuple[int, int, int], flows: bool
    ) -> Iterator[Batch]:
        batch, capacity, seed = sizes
        waiting, fills, epoch = self._empty(sites), 0, 0
        while True:
            seen = 0
            for rows in self._kept_rows(sites, split):
                seen += len(rows)
                waiting = _join([waiting, rows])
                if len(waiting) >= capacity:
                    mixed = waiting.take(shuffle.permutation(len(waiting), seed, epoch, fills))
                    fills += 1
                    given = (len(mixed) - capacity // 2) // batch * batch
                    yield from _cut(mixed.take(slice(0, given)), batch)
                    waiting = mixed.take(slice(given, None))
            if seen < batch:
                raise CorpusError(
                    f"a batch of {batch} rows was asked for, but the corpus keeps only {seen} "
                    f"{split} rows of {sites[0]}; use a smaller batch or more tokens"
                )
            mixed = waiting.take(shuffle.permutation(len(waiting), seed, epoch, fills))
            whole = len(mixed) // batch * batch if flows else len(mixed)
            yield from _cut(mixed.take(slice(0, whole)), batch)
            waiting, fills, epoch = mixed.take(slice(whole, None)), 0, epoch + 1

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
        waiting = self._empty(sites)
        for rows in self._kept_rows(sites, split, masked):
            waiting = _join([waiting, rows])
            whole = len(waiting) // batch * batch
            yield from _cut(waiting.take(slice(0, whole)), batch)
            waiting = waiting.take(slice(whole, None))
        yield from _cut(waiting, batch)

    def windows(
        self, site: str, *, split: Split = "all", limit: int | None = None
    ) -> Iterator[Window]:
        """Yield windows in order; the site chooses whose mask fills `kept`."""
        self.width(site)
        given = 0
        texts: dict[int, str] = {}
        for group, shard in self._shards():
            row = group.first_row
            for number, window in enumerate(group.windows, group.first_window):
                texts |= {document.number: document.text for document in window.begins}
                place = slice(row - group.first_row, row - group.first_row + len(window))
                row += len(window)
                texts = {n: texts[n] for n in set(window.document.tolist())}
                if split != "all" and window.heldout != (split == "heldout"):
                    continue
                if limit is not None and given >= limit:
                    return
                given += 1
                columns = (window.document, window.char_start, window.char_end)
                spans = zip(*(c.tolist() for c in columns), strict=True)
                strings = tuple(texts[n][a:b] for n, a, b in spans)
                kept = shard.mask[site][place] == 0
                yield Window(
                    number, row - len(window), window.ids, window.document, strings,
                    window.heldout, kept,
                )  # fmt: skip

    # ------------------------------------------------------------------- what only a disk offers

    def rows(self, site: str, refs: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:  # noqa: ARG002
        """Refuse: rows by number need a store on disk."""
        _refuse(f"rows of {site} by number")

    def window_of(self, refs: Int[Tensor, " n"]) -> Int[Tensor, " n"]:  # noqa: ARG002
        """Refuse: see `rows`."""
        _refuse("the windows of row numbers")

    def window(self, site: str, number: int) -> Window:  # noqa: ARG002
        """Refuse: see `rows`."""
        _refuse("a window by number")

    def context(self, ref: int, before: int, after: int) -> tuple[list[str], int]:  # noqa: ARG002
        """Refuse: see `rows`."""
        _refuse("the context of a row number")

    # ------------------------------------------------------------------------------------ passes

    def _sites(self, site: str, target: str | None) -> tuple[str, ...]:
        sites = (site,) if target is None else (site, target)
        for name in sites:
            self.width(name)
        return sites

    def _shards(self) -> Iterator[tuple[Group, Shard]]:
        """Run the model over the corpus once."""
        stream = windows(self._corpus, self._model, CorpusReport())
        for group in groups(stream, self._config.rows_per_shard):
            yield group, self._harvester.shard(group)

    def _kept_rows(
        self, sites: tuple[str, ...], split: Split, masked: bool = False
    ) -> Iterator[_Rows]:
        units: dict[int, int] = {}
        for group, shard in self._shards():
            units |= {d.number: d.number if d.group is None else d.group for d in group.documents}
            chosen = torch.ones(len(shard.tokens), dtype=torch.bool)
            for site in sites:
                chosen &= torch.tensor(masked) | (shard.mask[site] == 0)
            if split != "all":
                chosen &= shard.heldout == (split == "heldout")
            document = shard.tokens.document
            units = {n: units[n] for n in set(document.tolist())}
            unit = torch.tensor([units[n] for n in document[chosen].tolist()], dtype=torch.int64)
            numbers = chosen.nonzero().squeeze(1) + group.first_row
            x = tuple(shard.x[site][chosen].to(self._dtype) for site in sites)
            grad = shard.grad.get(sites[0])
            grad = None if grad is None else grad[chosen].to(self._grad_dtype)
            if not masked:
                for site, rows in zip(sites, x, strict=True):
                    _refuse_nonfinite(f"site {site!r}", rows, shard, chosen)
                if grad is not None:
                    _refuse_nonfinite(f"the gradient at site {sites[0]!r}", grad, shard, chosen)
            yield _Rows(x, numbers, unit, grad)

    def _empty(self, sites: tuple[str, ...]) -> _Rows:
        none = torch.zeros(0, dtype=torch.int64)
        x = tuple(torch.zeros(0, self.width(site), dtype=self._dtype) for site in sites)
        grad = torch.zeros(0, self.width(sites[0]), dtype=self._grad_dtype)
        return _Rows(x, none, none, grad if sites[0] in self.grad_sites else None)


def _refuse(what: str) -> NoReturn:
    raise ArtifactError(
        f"an online store cannot give {what}, since it keeps nothing; harvest to disk for that"
    )


def _refuse_nonfinite(
    what: str, rows: Float[Tensor, "n d"], shard: Shard, chosen: Shaped[Tensor, " m"]
) -> None:
    """Raise NonFiniteError if a kept row holds what the dtype cannot."""
    bad = (~rows.isfinite().all(1)).nonzero()
    if len(bad):
        row = int(chosen.nonzero()[int(bad[0])])
        raise NonFiniteError(
            f"{what} holds NaN, infinity or more than {rows.dtype} can hold at position "
            f"{int(shard.tokens.position[row])}, document {int(shard.tokens.document[row])}; "
            "mask these positions, or set harvest.dtype to bfloat16 or float32"
        )


def _join(parts: list[_Rows]) -> _Rows:
    columns: list[Any] = list(zip(*(part.sites for part in parts), strict=True))
    grads = [part.grad for part in parts if part.grad is not None]
    return _Rows(
        tuple(torch.cat(column) for column in columns),
        torch.cat([part.numbers for part in parts]),
        torch.cat([part.units for part in parts]),
        torch.cat(grads) if grads else None,
    )


def _cut(rows: _Rows, batch: int) -> Iterator[Batch]:
    for first in range(0, len(rows), batch):
        yield rows.take(slice(first, first + batch)).batch()
