"""Stand-ins for protocols, small enough to be read at a glance."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from saelab.protocols import SiteStats, Split
from saelab.types import Batch, Document, TokenRun, Window


class ArrayStore:
    """Arrays in memory: windows of 16 rows, one document each; every fifth is held out."""

    def __init__(
        self,
        sites: Mapping[str, Tensor],
        *,
        window: int = 16,
        grads: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._x = dict(sites)
        self._grads = dict(grads or {})
        self._window = window
        self.path: Path | None = None
        self.content_hash = "0" * 64
        self.model_name: str | None = None
        self.model_fingerprint: str | None = None
        self.sites = tuple(sites)
        self.grad_sites = tuple(self._grads)
        self.grad_labels = "sampled" if grads else None
        self.n_rows = len(next(iter(sites.values())))
        self.n_windows = self.n_documents = -(-self.n_rows // window)

    def width(self, site: str) -> int:
        return self._x[site].shape[1]

    def n_kept(self, site: str, split: Split) -> int:
        return len(self._kept(split))

    def stats(self, site: str) -> SiteStats:
        x = self._x[site][self._kept("train")].double()
        norm = x.norm(dim=1)
        return SiteStats(
            len(x), x.mean(0), float(norm.mean()), float((norm**2).mean()), float(norm.median())
        )

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
        kept = self._kept(split)
        generator = torch.Generator().manual_seed(seed)
        number = 0
        while True:
            order = kept[torch.randperm(len(kept), generator=generator)]
            for rows in order.split(batch):
                if len(rows) == batch:
                    if number >= start:
                        yield self._batch(site, rows, target)
                    number += 1

    def scan(
        self,
        site: str,
        *,
        batch: int,
        split: Split = "all",
        masked: bool = False,
        target: str | None = None,
    ) -> Iterator[Batch]:
        for rows in self._kept(split).split(batch):
            yield self._batch(site, rows, target)

    def rows(self, site: str, refs: Tensor) -> Tensor:
        return self._x[site][refs].float()

    def windows(
        self, site: str, *, split: Split = "all", limit: int | None = None
    ) -> Iterator[Window]:
        wanted = [self.window(site, i) for i in range(self.n_windows)]
        wanted = [w for w in wanted if split == "all" or w.heldout == (split == "heldout")]
        yield from wanted[:limit]

    def window_of(self, refs: Tensor) -> Tensor:
        return refs // self._window

    def window(self, site: str, number: int) -> Window:
        first = number * self._window
        n = min(self._window, self.n_rows - first)
        ids = torch.arange(first, first + n)
        return Window(
            number, first, ids, torch.full((n,), number), tuple(f"t{i}" for i in ids.tolist()),
            number % 5 == 4, torch.ones(n, dtype=torch.bool),
        )  # fmt: skip

    def document(self, number: int) -> Document:
        """Return a document with one of three labels."""
        sha = hashlib.sha256(str(number).encode()).hexdigest()
        return Document(number, sha, number % 5 == 4, f"text {number}", f"label {number % 3}")

    def context(self, ref: int, before: int, after: int) -> tuple[list[str], int]:
        window = self.window(self.sites[0], ref // self._window)
        place = ref - window.first_row
        low = max(0, place - before)
        return list(window.strings[low : place + after + 1]), place - low

    def _kept(self, split: Split) -> Tensor:
        rows = torch.arange(self.n_rows)
        heldout = (rows // self._window) % 5 == 4
        if split == "all":
            return rows
        return rows[heldout if split == "heldout" else ~heldout]

    def _batch(self, site: str, rows: Tensor, target: str | None) -> Batch:
        x = self.rows(site, rows)
        y = x if target is None else self.rows(target, rows)
        grad = self._grads[site][rows] if site in self._grads else None
        return Batch(x, y, rows, rows // self._window, grad)


class Texts(ArrayStore):
    """An array store of one site, `site`, whose windows are documents with labels."""

    def __init__(self, x, labels, texts=None, films=None, **options) -> None:
        super().__init__({"site": x}, **options)
        self.films = films
        self.labels = labels
        self.texts = texts or [f"document about {label}" for label in labels]
        self.content_hash = hashlib.sha256(repr((labels, x.sum())).encode()).hexdigest()

    def document(self, number: int) -> Document:
        text = self.texts[number]
        sha = hashlib.sha256(f"{number} {text}".encode()).hexdigest()
        heldout, film = number % 5 == 4, None
        if self.films is not None:
            film = hashlib.sha256(self.films[number].encode()).hexdigest()
        return Document(number, sha, heldout, text, self.labels[number], split_hash=film)


def planted_store(
    *, n: int = 4000, d: int = 16, latents: int = 24, active: int = 2, seed: int = 0
) -> tuple[ArrayStore, Tensor]:
    """Return a store of sparse sums of unit directions plus a bias, and the directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(latents, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    chosen = torch.rand(n, latents, generator=generator).topk(active, dim=1).indices
    amounts = 1 + torch.rand(n, active, generator=generator)
    z = torch.zeros(n, latents).scatter(1, chosen, amounts)
    return ArrayStore({"site": z @ directions + torch.randn(d, generator=generator)}), directions


class WordTokenizer:
    """One token per word with the space before it; digits singly or by two; all else by itself."""

    name = "words"
    pad_id = None

    def __init__(self, *, digits: int = 1, bos_id: int | None = None) -> None:
        self.bos_id = bos_id
        self.adds_bos = bos_id is not None
        years = {1: r"\d", 2: r" ?\d\d|\d", 3: r" ?\d{1,3}"}[digits]
        self._pieces = re.compile(rf" ?[A-Za-z]+|{years}|.", re.DOTALL)
        self._ids: dict[str, int] = {}

    def tokenize(self, texts):
        return [self._run(text) for text in texts]

    def _run(self, text: str) -> TokenRun:
        found = [
            (self._ids.setdefault(p[0], len(self._ids) + 10), p.start(), p.end())
            for p in self._pieces.finditer(text)
        ]
        return TokenRun(*torch.tensor(found, dtype=torch.int64).reshape(-1, 3).unbind(1))

    def to_strings(self, ids):
        strings = {place: piece for piece, place in self._ids.items()}
        return [strings.get(int(i), "<bos>") for i in ids]
