"""How sparse codes are and how evenly latents are used; a latent fires where z ≠ 0.

Codes without a budget, such as non-negative least squares, have many values next to nothing: their
type may say from which share of the row's largest on a value counts (`l0_floor`).
"""

import math
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.metrics.sums import Accumulator, Definition, DocumentSums
from saelab.types import SparseLatents

VALUE_BITS = 8
"""Bits for the size of one stored value in `description_length`."""
RARE = 1e-6
"""A latent that fires less often is ultra-rare."""
DENSE = 0.1
"""A latent that fires more often is dense."""

_N, _L0, _CHOICE = range(3)


@final
class Sparsity(Accumulator):
    """Mean L0, description length, and how often each latent fires."""

    def __init__(self, d_sae: int, value_bits: int = VALUE_BITS, floor: float = 0.0) -> None:
        """Start with no rows of codes over `d_sae` latents; values below `floor` times their row's
        largest count as 0."""
        self.floor = floor
        self.d_sae = d_sae
        self.value_bits = value_bits
        self.signed = False
        """Whether a negative value was seen: each value then costs one bit more."""
        self.counts = torch.zeros(d_sae, dtype=torch.int64)
        """Number of rows in which each latent fired."""
        self.n = 0
        self.sums = DocumentSums(3)

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """l0, description_length."""
        bits = self.value_bits + int(self.signed)
        return (
            Definition("l0", 1, "latents", lambda t: t[:, _L0] / t[:, _N]),
            Definition(
                "description_length",
                1,
                "bits per row",
                lambda t: (t[:, _CHOICE] + bits * t[:, _L0]) / t[:, _N],
            ),
        )

    def update(self, z: SparseLatents, documents: Int[Tensor, " n"]) -> None:
        """Take in the codes of some rows; stored zeros do not count."""
        fires = counted(z, self.floor)
        l0 = torch.bincount(z.rows()[fires], minlength=z.n_rows).cpu().double()
        self.counts += torch.bincount(z.indices[fires].cpu().long(), minlength=self.d_sae)
        self.signed |= bool((z.values < 0).any())
        self.n += z.n_rows
        columns = torch.stack([torch.ones_like(l0), l0, log2_choose(self.d_sae, l0)], 1)
        self.sums.add(documents, columns)

    def density(self) -> Float[Tensor, " d_sae"]:
        """Return the share of rows in which each latent fired."""
        return self.counts.double() / self.n

    def dead_share(self) -> float:
        """Return the share of latents that never fired in these `n` rows: state n beside it."""
        return float((self.counts == 0).double().mean())

    def rare_share(self) -> float:
        """Return the share of latents with density below `RARE`, dead ones included."""
        return float((self.density() < RARE).double().mean())

    def dense_share(self) -> float:
        """Return the share of latents with density above `DENSE`."""
        return float((self.density() > DENSE).double().mean())


def counted(z: SparseLatents, floor: float) -> Bool[Tensor, " nnz"]:
    """Return which values fire: not 0, and at least `floor` times the largest of their row."""
    size, rows = z.values.abs(), z.rows()
    if floor == 0 or not len(size):
        return size > 0
    largest = size.new_zeros(z.n_rows).scatter_reduce(0, rows, size, "amax")
    return (size > 0) & (size >= floor * largest[rows])


def log2_choose(n: int, k: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return log₂ of the number of ways to choose k of n, in float64."""
    k = k.double()
    top = torch.tensor(n + 1.0, dtype=torch.float64)
    return (torch.lgamma(top) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)) / math.log(2)


def description_length(d_sae: int, l0: float, value_bits: int, signed: bool) -> float:
    """Return log₂ C(d_sae, l0) + l0 · (value_bits + 1 if signed): bits of one row's code."""
    choice = log2_choose(d_sae, torch.tensor([float(l0)]))
    return float(choice) + l0 * (value_bits + int(signed))


def density_histogram(
    density: Float[Tensor, " d_sae"], lowest: int = -6, per_decade: int = 1
) -> list[tuple[float, float, float]]:
    """Return (from, to, share of latents) in bins of log₁₀ density, from `lowest` up to 0.

    A bin holds its lower edge; the last holds 0 too, and the first is everything below `lowest`,
    dead latents included, with −inf as its lower edge. Shares sum to 1.
    """
    n_bins = -lowest * per_decade
    place = (density.double().log10() - lowest) * per_decade
    place = (place.floor().clamp(-1, n_bins - 1) + 1).long()
    shares = torch.bincount(place, minlength=n_bins + 1).double() / len(density)
    edges = [-math.inf, *(lowest + i / per_decade for i in range(n_bins + 1))]
    return list(zip(edges[:-1], edges[1:], shares.tolist(), strict=True))
