"""Linear probes on a few columns or on all, and the directions that labels give.

Everything here takes one row per document and a truth value per class. The probes' regression is
scikit-learn's; the directions are those that Makelov, Lange and Nanda (2025, arXiv 2405.08366)
hold dictionaries against.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rule = Literal["mean_difference", "standardised_difference"]
"""How columns are chosen: by the difference of the classes' means, or that in standard
deviations of the column."""
_COLUMNS = 1024
"""Columns converted to float64 at once."""
Direction = Literal["mean_difference", "mean_features", "least_squares", "linear_probe"]


# ------------------------------------------------------------------------------------------- probes


def ranked_columns(
    features: Float[Tensor, "n m"],
    targets: Bool[Tensor, "n classes"],
    *,
    rule: Rule = "mean_difference",
    two_sided: bool = True,
) -> list[Int[Tensor, " ranked"]]:
    """Return, for each class, the columns by how much their means differ, largest first.

    Ties go by number. Columns that are the same for all documents are left out, and, one-sided,
    those that are not larger in the class. The first k are the columns of a k-sparse probe.
    """
    truth = targets.double()
    parts = []
    for part in features.split(_COLUMNS, dim=1):
        part = part.double()
        difference = _means(part, truth) - _means(part, 1 - truth)
        if rule == "standardised_difference":
            difference = difference / part.std(0).clamp(min=1e-300)
        parts.append(difference)
    varies = (features != features[:1]).any(0)
    found = []
    for difference in torch.cat(parts, 1):
        size = difference.abs() if two_sided else difference
        order = size.argsort(descending=True, stable=True)
        found.append(order[(varies & (size > 0))[order]])
    return found


@dataclass(frozen=True)
class Probe:
    """A logistic regression on some columns: a document is in the class where its score is > 0."""

    columns: Int[Tensor, " k"]
    weight: Float[Tensor, " k"]
    """In the columns' own units, float64."""
    bias: float

    def scores(self, features: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
        """Return each document's log odds."""
        return features[:, self.columns].double() @ self.weight + self.bias


def fit_probe(
    features: Float[Tensor, "n m"],
    positive: Bool[Tensor, " n"],
    columns: Int[Tensor, " k"] | None = None,
    *,
    strength: float = 1.0,
) -> Probe:
    """Fit a probe on some columns, by default all; both classes weigh the same.

    Columns are standardised and the weights then penalised by their squares over 2 · `strength`
    (scikit-learn's C). Without a column that varies the probe knows nothing: all scores are 0.
    """
    from sklearn.linear_model import LogisticRegression

    if columns is None:
        columns = torch.arange(features.shape[1])
    chosen = features[:, columns].double()
    varies = (chosen != chosen[:1]).any(0)
    if not bool(varies.any()):
        return Probe(columns, torch.zeros(len(columns), dtype=torch.float64), 0.0)
    mean = chosen.mean(0)
    spread = torch.where(varies, (chosen - mean).square().mean(0).sqrt(), 1)
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
    model.fit(((chosen - mean) / spread).cpu().numpy(), positive.cpu().numpy())
    weight = torch.from_numpy(model.coef_)[0].double() / spread
    bias = torch.from_numpy(model.intercept_).double() - mean @ weight
    return Probe(columns, weight, float(bias))


# --------------------------------------------------------------------------------------- directions


def mean_difference(
    x: Float[Tensor, "n d"], targets: Bool[Tensor, "n classes"]
) -> Float[Tensor, "classes d"]:
    """Return the mean of each class's documents minus that of the others."""
    x, truth = x.double(), targets.double()
    return _means(x, truth) - _means(x, 1 - truth)


def mean_features(
    x: Float[Tensor, "n d"], targets: Bool[Tensor, "n classes"]
) -> Float[Tensor, "classes d"]:
    """Return the mean of each class's documents minus the mean of all."""
    x = x.double()
    return _means(x, targets.double()) - x.mean(0)


def least_squares_features(
    x: Float[Tensor, "n d"], targets: Bool[Tensor, "n classes"]
) -> Float[Tensor, "classes d"]:
    """Return the u that minimise Σ‖x − mean − Σ_v u_v‖², v over a document's classes.

    Classes may be the values of several attributes, one of each per document; the values of one
    attribute are then known up to a shift, and the smallest u is returned. Equal to
    `mean_features` for independent, balanced attributes.
    """
    x, truth = x.double(), targets.double()
    return torch.linalg.pinv(truth) @ (x - x.mean(0))


def probe_directions(
    x: Float[Tensor, "n d"], targets: Bool[Tensor, "n classes"]
) -> Float[Tensor, "classes d"]:
    """Return the weights of each class's probe on all coordinates."""
    return torch.stack([fit_probe(x, positive).weight for positive in targets.T])


DIRECTIONS: dict[Direction, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_difference": mean_difference,
    "mean_features": mean_features,
    "least_squares": least_squares_features,
    "linear_probe": probe_directions,
}
"""Each class's direction, float64 and not normalised, by the name of the method."""


def _means(
    x: Float[Tensor, "n d"], weights: Float[Tensor, "n classes"]
) -> Float[Tensor, "classes d"]:
    return (weights.T @ x) / weights.sum(0)[:, None]
