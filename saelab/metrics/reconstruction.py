"""How close x̂ is to x: fvu, mse, cosine, norm ratio, reconstruction bias, median normalised error.

Everything is summed in float64. `documents` is the document number of each row.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.metrics.sums import Accumulator, Definition, DocumentSums

_N, _ERROR, _SPREAD, _COSINE, _RATIO, _HAT, _CROSS, _NONZERO, _VECTOR = range(9)

_BLOCK = 1 << 15
"""Numbers converted to float64 at once: the working copies stay in cache, and on one thread."""

MEDIAN = "median_normalised_error"
MEDIAN_VERSION = 1
MEDIAN_UNIT = "share"


def _fvu(t: Float[Tensor, "b q"]) -> Float[Tensor, " b"]:
    """Σ‖x−x̂‖² / Σ‖x−mean‖², the mean being that of the same rows (sums are of x − centre)."""
    variance = t[:, _SPREAD] - t[:, _VECTOR:].square().sum(1) / t[:, _N]
    return t[:, _ERROR] / variance


@final
class Reconstruction(Accumulator):
    """Ratios of sums over rows, and the median over rows of ‖x−x̂‖² / ‖x−centre‖².

    The variance in `fvu` is about the mean of the very documents it is computed over, in every
    bootstrap resample too: vector sums are kept per document (documents × d float64), so no mean is
    held fixed. The median is an error that a few huge rows cannot own; it keeps a number per row.
    """

    def __init__(self, centre: Float[Tensor, " d"]) -> None:
        """Normalise the median by the distance from `centre`, the mean of the training rows.

        All other metrics depend on it by rounding only.
        """
        self.centre = centre.to("cpu", torch.float64)
        self.sums = DocumentSums(_VECTOR + len(centre))
        self._errors: list[Float[Tensor, " n"]] = []
        self._documents: list[Int[Tensor, " n"]] = []

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """fvu, mse, cosine, norm_ratio, reconstruction_bias."""
        d = len(self.centre)
        return (
            Definition("fvu", 1, "share", _fvu),
            Definition("mse", 1, "squared activation", lambda t: t[:, _ERROR] / t[:, _N] / d),
            Definition("cosine", 1, "cosine", lambda t: t[:, _COSINE] / t[:, _NONZERO]),
            Definition("norm_ratio", 1, "ratio", lambda t: t[:, _RATIO] / t[:, _NONZERO]),
            Definition("reconstruction_bias", 1, "ratio", lambda t: t[:, _HAT] / t[:, _CROSS]),
        )

    def update(
        self,
        x: Float[Tensor, "n d"],
        x_hat: Float[Tensor, "n d"],
        documents: Int[Tensor, " n"],
    ) -> None:
        """Take in rows and their reconstructions."""
        block = max(1, _BLOCK // len(self.centre))
        parts = zip(x.split(block), x_hat.split(block), strict=True)
        columns = torch.cat([self._columns(*part) for part in parts])
        self.sums.add(documents, columns)
        error, spread = columns[:, _ERROR], columns[:, _SPREAD]
        self._errors.append(torch.where(error == 0, 0, error / spread))
        self._documents.append(documents.cpu())

    def errors(self) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """Return every row's normalised error and document number, in the order they came."""
        return torch.cat(self._errors), torch.cat(self._documents)

    def median(self) -> float:
        """Return the least error with at least half of the rows at or below it."""
        return float(torch.cat(self._errors).median())

    def _columns(
        self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n q"]:
        x, x_hat = x.to("cpu", torch.float64), x_hat.to("cpu", torch.float64)
        centred = x - self.centre
        norm, hat, cross = x.norm(dim=1), x_hat.norm(dim=1), (x * x_hat).sum(1)
        nonzero = norm > 0
        columns = [
            torch.ones_like(norm),
            (x - x_hat).square().sum(1),
            centred.square().sum(1),
            torch.where((cross != 0) & nonzero, cross / (norm * hat), 0),
            torch.where(nonzero, hat / norm, 0),
            hat.square(),
            cross,
            nonzero.double(),
        ]
        return torch.cat([torch.stack(columns, 1), centred], 1)


def _once(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> dict[str, float]:
    metrics = Reconstruction(x.double().mean(0))
    metrics.update(x, x_hat, torch.zeros(len(x), dtype=torch.int64))
    return metrics.compute()


def fvu(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> float:
    """Return Σ‖x−x̂‖² / Σ‖x−mean(x)‖²: 0 is perfect, 1 is predicting the mean; bias counts."""
    return _once(x, x_hat)["fvu"]


def cosine(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> float:
    """Return the mean over rows with x ≠ 0 of the cosine of x and x̂ (0 where x̂ = 0)."""
    return _once(x, x_hat)["cosine"]


def norm_ratio(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> float:
    """Return the mean over rows with x ≠ 0 of ‖x̂‖ / ‖x‖."""
    return _once(x, x_hat)["norm_ratio"]


def reconstruction_bias(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> float:
    """Return Σ‖x̂‖² / Σ⟨x, x̂⟩: 1 means no shrinkage, below 1 that x̂ is too short."""
    return _once(x, x_hat)["reconstruction_bias"]


def mse(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> float:
    """Return the mean squared difference over rows and coordinates."""
    return _once(x, x_hat)["mse"]


def median_normalised_error(
    x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], centre: Float[Tensor, " d"]
) -> float:
    """Return the median over rows of ‖x−x̂‖² / ‖x−centre‖²."""
    metrics = Reconstruction(centre)
    metrics.update(x, x_hat, torch.zeros(len(x), dtype=torch.int64))
    return metrics.median()
