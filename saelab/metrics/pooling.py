"""From a score per position to scores per document: the largest, the mean, the mean of each sign.

A signed score says one thing where it is high and another where it is low, so a document has two
extremes: the largest z and the largest −z. For non-negative codes the second is 0 nearly always,
and such a column is never chosen. A latent fires where z ≠ 0, of either sign.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.types import SparseLatents

Pool = Literal["max", "mean"]
Sides = Literal["one", "two"]
"""Whether only high scores count (`one`), or low ones as well (`two`)."""


@dataclass(frozen=True)
class Pooled:
    """What a method says of documents."""

    high: Float[Tensor, "n m"]
    """Largest score over the document's positions."""
    low: Float[Tensor, "n m"]
    """Largest score of the opposite sign: max of −z."""
    mean: Float[Tensor, "n m"]

    def columns(self, pool: Pool, sides: Sides, *, opposite: bool) -> Float[Tensor, "n columns"]:
        """Return a column per candidate: a score, and with two sides its opposite behind them.

        Means of z and −z are one number; `opposite` asks for both, where only high counts.
        """
        first = self.high if pool == "max" else self.mean
        if sides == "one" or (pool == "mean" and not opposite):
            return first
        return torch.cat([first, self.low if pool == "max" else -self.mean], 1)

    def where(self, which: Bool[Tensor, " n"]) -> "Pooled":
        """Return these documents."""
        return Pooled(self.high[which], self.low[which], self.mean[which])


def pooled_words(shares: Float[Tensor, "n words"]) -> Pooled:
    """Return a bag of words as if each word were a latent that is 1 on its own tokens."""
    return Pooled((shares > 0).float(), torch.zeros_like(shares), shares)


@final
class Pooling:
    """Takes in rows of some documents, in any order and split; sums are float64."""

    def __init__(self, documents: Int[Tensor, " n"], width: int) -> None:
        """Pool `width` scores over these documents, whose numbers ascend."""
        self.documents = documents
        self.counts = torch.zeros(len(documents), dtype=torch.int64)
        self._high = torch.full((len(documents), width), -torch.inf)
        self._low = torch.full((len(documents), width), -torch.inf)
        self._sum = torch.zeros(len(documents), width, dtype=torch.float64)

    @property
    def seen(self) -> Bool[Tensor, " n"]:
        """Which documents had a row."""
        return self.counts > 0

    def update(self, scores: Float[Tensor, "n m"], documents: Int[Tensor, " n"]) -> None:
        """Take in rows; each is of one of the documents."""
        numbers, counts = torch.unique_consecutive(documents.cpu(), return_counts=True)
        places = torch.searchsorted(self.documents, numbers)
        pieces = scores.float().cpu().split(counts.tolist())
        for place, piece in zip(places.tolist(), pieces, strict=True):
            self._high[place] = torch.maximum(self._high[place], piece.amax(0))
            self._low[place] = torch.maximum(self._low[place], -piece.amin(0))
            self._sum[place] += piece.sum(0, dtype=torch.float64)
            self.counts[place] += len(piece)

    def compute(self) -> Pooled:
        """Return what there is of the documents that had a row."""
        seen = self.seen
        mean = (self._sum[seen] / self.counts[seen, None]).float()
        return Pooled(self._high[seen], self._low[seen], mean)


@final
class HalfPooling:
    """Takes in codes of some documents' rows, in any order and split; sums are float64.

    A latent has two halves: max(z, 0) and max(−z, 0). Of codes that are never negative the second
    is 0.
    """

    def __init__(self, documents: Int[Tensor, " n"], width: int) -> None:
        """Pool `width` latents over these documents, whose numbers ascend."""
        self.documents = documents
        self.counts = torch.zeros(len(documents), dtype=torch.int64)
        self._width = width
        self._sum = torch.zeros(len(documents), 2 * width, dtype=torch.float64)

    @property
    def seen(self) -> Bool[Tensor, " n"]:
        """Which documents had a row."""
        return self.counts > 0

    def update(self, z: SparseLatents | Float[Tensor, "n m"], documents: Int[Tensor, " n"]) -> None:
        """Take in codes; each row is of one of the documents."""
        places = torch.searchsorted(self.documents, documents.cpu())
        self.counts += torch.bincount(places, minlength=len(self.counts))
        if isinstance(z, SparseLatents):
            values = z.values.cpu().double()
            columns = z.indices.cpu().long() + self._width * (values < 0)
            cells = places[z.rows().cpu()] * (2 * self._width) + columns
            self._sum.view(-1).index_add_(0, cells, values.abs())
        else:
            z = z.cpu().double()
            both = torch.cat([z.clamp(min=0), (-z).clamp(min=0)], 1)
            self._sum.index_add_(0, places, both)

    def compute(self) -> Float[Tensor, "n halves"]:
        """Return both halves' means over the rows of each document that had one: the positive
        halves of all latents, then the negative ones."""
        return (self._sum[self.seen] / self.counts[self.seen, None]).float()
