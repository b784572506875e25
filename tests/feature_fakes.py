"""A store, a dictionary and a model small enough to check the feature index by brute force."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch

from saelab.protocols import LanguageModel, SiteStats, Store
from saelab.types import Batch, SparseLatents, Window

WORDS = [
    "the",
    " cat",
    " not",
    " sat",
    "\n",
    " <script>alert(1)</script>",
    ".",
    "ing",
    " dog",
    "é",
    " mat",
    "a&b",
]


class TinyStore(Store):
    """Windows of unequal length, every fifth document held out, first positions masked."""

    path = None
    content_hash = "tiny-store"
    model_name = "tiny"
    model_fingerprint = "tiny"
    sites = ("here",)

    def __init__(self, n_windows: int = 40, d: int = 8, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 12, (n_windows,), generator=g)
        self.n_windows = n_windows
        self.n_rows = int(lengths.sum())
        self.first = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        self.x = torch.randn(self.n_rows, d, generator=g)
        self.ids = torch.randint(0, len(WORDS), (self.n_rows,), generator=g)
        self.window_number = torch.repeat_interleave(torch.arange(n_windows), lengths)
        self.heldout = self.window_number % 5 == 4
        self.kept = torch.ones(self.n_rows, dtype=torch.bool)
        self.kept[self.first[:-1]] = False

    def width(self, site: str) -> int:
        return self.x.shape[1]

    def _split(self, split: str) -> torch.Tensor:
        everything = torch.ones_like(self.kept)
        return {"all": everything, "heldout": self.heldout, "train": ~self.heldout}[split]

    def n_kept(self, site: str, split: str) -> int:
        return int((self.kept & self._split(split)).sum())

    def scan(self, site, *, batch, split="all", masked=False, target=None) -> Iterator[Batch]:
        chosen = self._split(split) & (self.kept | masked)
        for rows in chosen.nonzero().squeeze(1).split(batch):
            yield Batch(self.x[rows], self.x[rows], rows, self.window_number[rows])

    def windows(self, site, *, split="all", limit=None) -> Iterator[Window]:
        for number in range(self.n_windows):
            yield self.window(site, number)

    def stats(self, site: str) -> SiteStats:
        x = self.x[self.kept & ~self.heldout].double()
        norm = x.norm(dim=1)
        return SiteStats(
            len(x), x.mean(0), float(norm.mean()), float((norm**2).mean()), float(norm.median())
        )

    def window(self, site: str, number: int) -> Window:
        rows = slice(int(self.first[number]), int(self.first[number + 1]))
        ids = self.ids[rows]
        return Window(
            number, rows.start, ids, self.window_number[rows],
            tuple(WORDS[i] for i in ids.tolist()), bool(self.heldout[rows][0]), self.kept[rows],
        )  # fmt: skip


class TinyDictionary:
    """Keeps the k largest pre-activations by size; signed; the last latent never fires."""

    def __init__(self, d: int = 8, d_sae: int = 13, k: int = 3, seed: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        self.W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d, generator=g), dim=1)
        self.b_dec = torch.zeros(d)
        self.config = SimpleNamespace(type="topk", k=k, d_sae=d_sae)
        self.d_in = self.d_out = d
        self.d_sae, self.k, self.l0_bound = d_sae, k, k

    def encode(self, x):
        pre = x @ self.W_dec.T
        pre[..., -1] = 0.0
        top = pre.abs().topk(self.k, dim=-1).indices
        return torch.zeros_like(pre).scatter(-1, top, pre.gather(-1, top))

    def encode_sparse(self, x):
        return SparseLatents.from_dense(self.encode(x))

    def decode(self, z):
        return z @ self.W_dec

    def offset(self, x):
        return self.b_dec

    def reconstruct(self, x):
        return self.decode(self.encode(x))

    def save(self, path):
        raise NotImplementedError


class TinyModel(LanguageModel):
    """A vocabulary of words, and a random unembedding."""

    name = "tiny"

    def __init__(self, d: int = 8, seed: int = 2) -> None:
        self.W_U = torch.randn(d, len(WORDS), generator=torch.Generator().manual_seed(seed))

    def to_strings(self, ids):
        return [WORDS[i] for i in ids]

    def logit_effect(self, site, directions):
        return directions @ self.W_U
