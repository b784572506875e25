"""How alike two representations of the same rows are: five measures, one pass over the pair.

`PairMoments` adds up the joint covariance of two sites (or models) over the same rows, in float64;
linear CKA, SVCCA and linear regression are functions of it. Relative representations need the rows
themselves, and Jaccard only the keys of the atoms that two ITDA dictionaries kept.

Kornblith et al. 2019 (CKA), arXiv 1905.00414; Raghu et al. 2017 (SVCCA), arXiv 1706.05806;
Moschella et al. 2022 (relative representations), arXiv 2209.15430; Leask et al. 2025 (Jaccard on
atoms), arXiv 2505.17769.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ShapeError


@dataclass(frozen=True)
class Covariance:
    """Covariance of one representation; its eigenvectors are found once, at their first use."""

    matrix: Float[Tensor, "d d"]

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues, largest first, and the eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values.flip(0), vectors.flip(1)

    def whitening(self, variance: float) -> Float[Tensor, "d r"]:
        """Return U / √λ for the leading eigenvectors U that hold this share of the variance; those
        without any are left out."""
        values, vectors = self._eigen
        seen = values > values[0].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
        before = values.clamp(min=0).cumsum(0) - values
        kept = seen & (before < variance * values.clamp(min=0).sum())
        return vectors[:, kept] / values[kept].sqrt()


@dataclass(frozen=True)
class PairCovariance:
    """Covariances of two representations, x and y, of the same rows."""

    x: Covariance
    xy: Float[Tensor, "dx dy"]
    y: Covariance

    def swapped(self) -> "PairCovariance":
        """Return the same with x and y exchanged."""
        return PairCovariance(self.y, self.xy.T, self.x)


@final
class PairMoments:
    """Adds up a pair's covariance batch by batch; the split into batches does not matter."""

    def __init__(self, dx: int, dy: int) -> None:
        """Begin without rows."""
        self.n = 0
        self._width = dx
        self._shift: Tensor | None = None
        self._sum = torch.zeros(dx + dy, dtype=torch.float64)
        self._products = torch.zeros(dx + dy, dx + dy, dtype=torch.float64)

    def update(self, x: Float[Tensor, "n dx"], y: Float[Tensor, "m dy"]) -> "PairMoments":
        """Take in rows: row i of x and of y stand for the same input. Raises ShapeError."""
        widths = self._width, len(self._sum) - self._width
        if len(x) != len(y) or (x.shape[1], y.shape[1]) != widths:
            raise ShapeError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)} should be equally many rows of widths "
                f"{widths[0]} and {widths[1]}; read both in the same order"
            )
        rows = torch.cat([x, y], 1).cpu().double()
        if len(rows) == 0:
            return self
        if self._shift is None:
            self._shift = rows.mean(0)
        rows = rows - self._shift
        self.n += len(rows)
        self._sum += rows.sum(0)
        self._products += rows.T @ rows
        return self

    def compute(self) -> PairCovariance:
        """Return the covariances of the rows so far. Raises ShapeError for fewer than two."""
        if self.n < 2:
            raise ShapeError(f"a covariance needs two rows or more, but {self.n} came")
        mean = self._sum / self.n
        full, w = self._products / self.n - torch.outer(mean, mean), self._width
        x, y = Covariance(full[:w, :w]), Covariance(full[w:, w:])
        return PairCovariance(x, full[:w, w:], y)


def linear_cka(pair: PairCovariance) -> float:
    """Return ‖C_xy‖² / (‖C_xx‖ ‖C_yy‖) in Frobenius norms: 1 up to rotation and scale, 0 if
    uncorrelated (but for chance, of about √(d_x d_y) / n for white rows)."""
    return _share(pair.xy.square().sum(), pair.x.matrix.norm() * pair.y.matrix.norm())


def svcca(pair: PairCovariance, *, variance: float = 0.99) -> float:
    """Return the mean canonical correlation of the principal components that hold a share of the
    variance: 1 for any invertible linear map that keeps them apart from what is dropped."""
    x, y = (side.whitening(variance) for side in (pair.x, pair.y))
    correlations = torch.linalg.svdvals(x.T @ pair.xy @ y)
    return float(correlations.clamp(max=1).mean()) if len(correlations) else 0.0


def regression(pair: PairCovariance) -> float:
    """Return the share of y's variance that x explains linearly, tr(C_yx C_xx⁺ C_xy) / tr C_yy."""
    whitened = pair.x.whitening(1.0).T @ pair.xy
    return _share(whitened.square().sum(), pair.y.matrix.trace())


def relative(
    x: Float[Tensor, "n dx"],
    y: Float[Tensor, "n dy"],
    anchors: Int[Tensor, " m"],
) -> float:
    """Return the mean cosine between the rows' relative representations, of the same anchors."""
    near_x, near_y = (relative_representation(rows, anchors) for rows in (x, y))
    return mean_cosine(near_x, near_y)


def relative_representation(
    rows: Float[Tensor, "n d"], anchors: Int[Tensor, " m"]
) -> Float[Tensor, "n m"]:
    """Return the cosines of all rows with the anchors, which are some of them; all are centred
    first. In float64."""
    rows = rows.double()
    unit = torch.nn.functional.normalize(rows - rows.mean(0))
    return unit @ unit[anchors].T


def mean_cosine(x: Float[Tensor, "n m"], y: Float[Tensor, "n m"]) -> float:
    """Return the mean over rows of the cosine of x's row with y's."""
    return float(torch.nn.functional.cosine_similarity(x, y).mean())


@runtime_checkable
class Kept(Protocol):
    """A dictionary whose atoms are rows of a store."""

    rows: Int[Tensor, " d_sae"]


def atom_keys(dictionary: Kept) -> set[int]:
    """Return the row numbers that a dictionary kept: stores of one text, tokenizer and context
    number their rows alike. For other stores see `alignment.place_keys`."""
    return set(dictionary.rows.tolist())


def jaccard(a: Iterable[Hashable], b: Iterable[Hashable]) -> float:
    """Return |a ∩ b| / |a ∪ b|: 1 for equal sets of keys, 0 for disjoint ones, or empty ones."""
    first, second = set(a), set(b)
    return len(first & second) / max(len(first | second), 1)


def chance_jaccard(n_a: int, n_b: int, n_rows: int) -> float:
    """Return about what `jaccard` is for sets of these sizes drawn at random from `n_rows` rows."""
    common = n_a * n_b / n_rows
    return common / max(n_a + n_b - common, 1)


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else 0.0
