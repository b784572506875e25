"""Which layer of another model is this one? All pairs of layers compared, and matched by likeness.

A layer is matched with the one it is most alike; where several are equally alike, each of them gets
an equal share of the match, so that a method which cannot tell layers apart scores what chance
does. The truth, where there is one, is that layer i belongs to layer i.

Two models without a common truth are matched by *relative* depth: whether layers further up are
matched with layers further up is Spearman's ρ, beside what it is for permuted matches.

Layer matching: Leask et al. 2025, arXiv 2505.17769, section 5; Kornblith et al. 2019, 1905.00414.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ShapeError
from saelab.evals.similarity import (
    Covariance,
    PairCovariance,
    jaccard,
    linear_cka,
    mean_cosine,
    regression,
    relative_representation,
    svcca,
)

BASELINES = ("cka", "svcca", "relative", "regression")
"""Methods that look at the rows: linear CKA, SVCCA, relative representations, regression."""


@dataclass(frozen=True)
class Likeness:
    """How alike all pairs of layers of two models are; larger is more alike."""

    forth: Float[Tensor, "l m"]
    """Row i: layer i of the first model against each of the second."""
    back: Float[Tensor, "m l"]
    """The same the other way; the transpose of `forth` unless the method has a direction."""

    @staticmethod
    def symmetric(forth: Float[Tensor, "l m"]) -> "Likeness":
        """Return the likeness by a method without a direction."""
        return Likeness(forth, forth.T)


@final
class LayerView:
    """A layer's rows with what each comparison needs of them, computed once."""

    def __init__(self, rows: Float[Tensor, "n d"], anchors: Int[Tensor, " m"]) -> None:
        """Centre the rows, in float64. Raises ShapeError for fewer than two."""
        if len(rows) < 2:
            raise ShapeError(f"a layer's covariance needs two rows or more, but {len(rows)} came")
        self._anchors = anchors
        self.x = rows.double() - rows.double().mean(0)
        self.covariance = Covariance(self.x.T @ self.x / len(rows))

    @cached_property
    def near(self) -> Float[Tensor, "n m"]:
        """The rows' cosines with the anchors."""
        return relative_representation(self.x, self._anchors)


def compare(
    first: Sequence[LayerView], second: Sequence[LayerView], *, variance: float = 0.99
) -> dict[str, Likeness]:
    """Return the likeness of all pairs of layers by each of `BASELINES`.

    Row i of every layer stands for the same place of the text. `variance` is SVCCA's. Regression's
    `forth` is the share of the second's variance that the first explains, and `back` the reverse.
    Raises ShapeError if there are not equally many rows.
    """
    if len({len(layer.x) for layer in (*first, *second)}) > 1:
        raise ShapeError(
            f"the layers have {sorted({len(layer.x) for layer in (*first, *second)})} rows; to be "
            "compared they need the same places of the text: see `alignment.align`"
        )
    shape = len(first), len(second)
    forth = {name: torch.zeros(shape, dtype=torch.float64) for name in BASELINES}
    back = torch.zeros(shape, dtype=torch.float64)
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            pair = PairCovariance(x.covariance, x.x.T @ y.x / len(x.x), y.covariance)
            forth["cka"][i, j] = linear_cka(pair)
            forth["svcca"][i, j] = svcca(pair, variance=variance)
            forth["relative"][i, j] = mean_cosine(x.near, y.near)
            forth["regression"][i, j] = regression(pair)
            back[i, j] = regression(pair.swapped())
    found = {name: Likeness.symmetric(values) for name, values in forth.items()}
    return found | {"regression": Likeness(forth["regression"], back.T)}


def compare_keys(
    first: Sequence[Iterable[Hashable]], second: Sequence[Iterable[Hashable]]
) -> Likeness:
    """Return the Jaccard index of the keys of all pairs of layers' dictionaries: row numbers, or
    places in the text."""
    left, right = [set(keys) for keys in first], [set(keys) for keys in second]
    values = [[jaccard(a, b) for b in right] for a in left]
    return Likeness.symmetric(torch.tensor(values, dtype=torch.float64))


def compare_sizes(first: Sequence[int], second: Sequence[int]) -> Likeness:
    """Return −|log size ratio| of all pairs of layers' dictionaries, built at one threshold.

    A control for `compare_keys`: what a matcher knows that sees nothing but sizes. Raises
    ShapeError for an empty dictionary.
    """
    if min(*first, *second) < 1:
        raise ShapeError(f"sizes {[*first]} and {[*second]} should all be 1 or more")
    left, right = (torch.tensor(sizes, dtype=torch.float64).log() for sizes in (first, second))
    return Likeness.symmetric(-(left[:, None] - right[None, :]).abs())


# ---------------------------------------------------------------------------------------- matching


def matched(likeness: Float[Tensor, "l m"]) -> Float[Tensor, "l m"]:
    """Return each layer's match as shares of 1 over the candidates, equal where they tie."""
    best = likeness == likeness.amax(1, keepdim=True)
    return best.double() / best.sum(1, keepdim=True)


def accuracy(likeness: Float[Tensor, "l m"]) -> float:
    """Return the share of layers matched with their counterpart; chance is 1 / l. Raises ShapeError
    where there are no counterparts."""
    _check_square(likeness)
    return float(matched(likeness).diagonal().mean())


def layer_error(likeness: Float[Tensor, "l m"], layers: Sequence[int]) -> float:
    """Return the mean distance, in layers, between a layer's match and its counterpart; `layers`
    are the layer numbers of both models. Raises ShapeError as `accuracy`."""
    _check_square(likeness)
    number = torch.tensor(layers, dtype=torch.float64)
    return float((matched(likeness) * (number[:, None] - number).abs()).sum(1).mean())


@dataclass(frozen=True)
class DepthOrder:
    """Whether deeper layers are matched with deeper ones."""

    rho: float
    """Spearman's correlation of a layer's relative depth with its match's; 0 if all are equal."""
    p: float
    """Share of permuted matches, and the matches themselves, with a ρ as large: one-sided."""
    null: tuple[float, float]
    """2.5 % and 97.5 % of the permutations' ρ."""


def depth_order(
    likeness: Float[Tensor, "l m"],
    depths: tuple[Sequence[float], Sequence[float]],
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> DepthOrder:
    """Return Spearman's ρ of matched relative depths against a permutation null.

    `depths` are the relative depths of the first model's layers and of the candidates. A layer that
    ties between candidates has their mean depth. Raises ShapeError for fewer than three layers.
    """
    own = torch.tensor(depths[0], dtype=torch.float64)
    found = matched(likeness) @ torch.tensor(depths[1], dtype=torch.float64)
    if len(own) < 3:
        raise ShapeError(f"an order needs three layers or more, but {len(own)} came")
    generator = torch.Generator().manual_seed(seed)
    mine, theirs = _standard_ranks(own), _standard_ranks(found)
    rho = float(mine @ theirs)
    order = torch.rand(permutations, len(own), generator=generator).argsort(1)
    drawn = theirs[order] @ mine
    reached = int((drawn >= rho - 1e-12).sum())
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return DepthOrder(rho, (1 + reached) / (1 + permutations), (low, high))


def _standard_ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return ranks, ties sharing theirs, centred and of unit length; zeros if all are equal."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(values.numpy().round(12)))
    ranks = ranks - ranks.mean()
    length = float(ranks.norm())
    return ranks / length if not math.isclose(length, 0, abs_tol=1e-9) else ranks.zero_()


def _check_square(likeness: Float[Tensor, "l m"]) -> None:
    if likeness.shape[0] != likeness.shape[1]:
        raise ShapeError(
            f"likeness of {likeness.shape[0]} layers with {likeness.shape[1]} has no counterparts: "
            "accuracy needs the same layers of both models; use `depth_order`"
        )
