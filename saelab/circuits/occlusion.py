"""Occlusion: an attribute that a code misses because a longer one takes its place.

A sparse code has few latents for a vector, and spends them on what is long. Whether an attribute
that is not found is missing from a dictionary or only hidden shows when the features of a longer
attribute i are shrunk in x, and x is coded again:

    x′ = x − (1 − α) u[i, a_i]          u: the labels' features, α from 1 (as it is) to 0 (gone)

A hidden attribute's F1 rises as α falls; that of a missing one does not.

Makelov, Lange, Nanda 2025, arXiv 2405.08366.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from saelab.circuits.attributes import Attributes, Supervised
from saelab.circuits.predicates import best_claims, claims, tallies


@dataclass(frozen=True)
class Revealed:
    """How well the values of one attribute are found while those of a longer one are shrunk."""

    longer: str
    shorter: str
    factor: float
    """α, on the features of the longer."""
    tallies: Float[Tensor, "n three_p"]
    """Of the best claim about each value of the shorter: `predicates.mean_f1` of their sums is the
    mean F1. Claims are chosen and scored apart."""


def lengths(features: Supervised, attributes: Attributes) -> dict[str, float]:
    """Return how far the features of each attribute's values lie from their mean: the root of the
    mean square."""
    found = {}
    for name in attributes.values:
        u = features.u[attributes.of(name)].double()
        found[name] = float((u - u.mean(0)).square().sum(1).mean().sqrt())
    return found


def shrunk(
    x: Float[Tensor, "n d"],
    table: Bool[Tensor, "n columns"],
    features: Supervised,
    columns: Sequence[int],
    factor: float,
) -> Float[Tensor, "n d"]:
    """Return x with the features of an attribute's columns scaled by `factor`."""
    chosen = list(columns)
    return x - (1 - factor) * (table[:, chosen].to(features.u) @ features.u[chosen])


def occlusion(
    encode: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n m"]],
    x: Float[Tensor, "n d"],
    table: Bool[Tensor, "n columns"],
    features: Supervised,
    attributes: Attributes,
    factors: Sequence[float],
    *,
    first: Bool[Tensor, " n"],
    signed: bool,
) -> Iterator[Revealed]:
    """Yield, for each attribute, each factor on it and each shorter attribute, what is found.

    Claims are chosen anew for each factor, on the `first` rows, and scored on the others.
    """
    length = lengths(features, attributes)
    for longer in attributes.values:
        shorter = [name for name in attributes.values if length[name] < length[longer]]
        for factor in factors if shorter else ():
            vectors = shrunk(x, table, features, attributes.of(longer), factor)
            said = claims(encode(vectors).cpu(), signed=signed)
            for name in shorter:
                truth = table[:, attributes.of(name)]
                best = best_claims(said[first], truth[first], said[~first], truth[~first])
                found = tallies(said[~first][:, best.claim], truth[~first])
                yield Revealed(longer, name, factor, found)
