"""Sums per document in float64: what metrics are made of, and what their error bars need.

A metric here is a function of sums over documents (a ratio of sums, usually). Adding rows in
another order or in other batches changes nothing but the rounding of float64, and a bootstrap
over documents (`stats.bootstrap`) needs only the table of sums.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Definition:
    """A metric as a function of sums over any set of documents."""

    name: str
    version: int
    """Bumped when the definition changes."""
    unit: str
    of: Callable[[Float[Tensor, "b q"]], Float[Tensor, " b"]]
    """Takes the summed columns of `b` sets of documents and returns the metric of each."""


class DocumentSums:
    """A table with a row per document and a column per summed quantity, float64, on the CPU."""

    def __init__(self, n_columns: int) -> None:
        """Start with no documents."""
        self.documents = torch.empty(0, dtype=torch.int64)
        """Document numbers, ascending."""
        self.table = torch.empty(0, n_columns, dtype=torch.float64)

    def add(self, documents: Int[Tensor, " n"], values: Float[Tensor, "n q"]) -> None:
        """Add each row's values to its document's sums."""
        numbers = torch.cat([self.documents, documents.to("cpu", torch.int64)])
        rows = torch.cat([self.table, values.to("cpu", torch.float64)])
        self.documents, place = torch.unique(numbers, return_inverse=True)
        place, order = place.sort(stable=True)
        starts = torch.searchsorted(place, torch.arange(len(self.documents)))
        # sums runs of rows several times quicker than index_add, in a fixed order
        self.table = F.embedding_bag(order, rows, starts, mode="sum")

    def totals(self) -> Float[Tensor, "1 q"]:
        """Return the sums over all documents, as one set."""
        return self.table.sum(0, keepdim=True)


class Accumulator:
    """What the accumulators of this package share: they fill `sums` and declare `definitions`."""

    sums: DocumentSums

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """The metrics that can be computed from the sums."""
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """Return each metric over everything seen; NaN where nothing defines it."""
        totals = self.sums.totals()
        return {d.name: float(d.of(totals)) for d in self.definitions}
