"""Which heads do a task, read off integer codes of their outputs: no run is patched.

O'Neill and Bui 2024, arXiv 2405.12522. One small dictionary is learnt over the outputs of all heads
at the last position, on a few examples where the task can be done (positives) and a few where it
cannot. The code of an output is the number of its largest latent. With P and N the sets of codes of
a head on positives and on negatives, its score is |P \\ N|, or |P \\ N| / |P ∪ N|: how many things
it says only when there is the task. Pairs of heads are scored by pairs of codes in the same way.

Outputs are centred and scaled head by head first, since a dictionary over raw outputs codes which
heads are large. The score counts distinct codes, so a head whose output merely varies scores high
too: `baselines` has the scores that this should be held against.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ConfigError, SiteError

Encode = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d_sae"]]
Fit = Callable[[Float[Tensor, "n d"], int], Encode]
"""Learns a dictionary from rows with a seed, and returns its encoder."""
SILENT = -1
"""Code of an output in which no latent fires."""
ENOUGH_CODED = 0.9
"""Share of outputs with a latent below which codes say little."""


@dataclass(frozen=True)
class HeadOutputs:
    """What every head writes into the stream at the last position of each example."""

    positive: Float[Tensor, "n heads d"]
    negative: Float[Tensor, "m heads d"]

    def __post_init__(self) -> None:
        """Raise ConfigError unless there are as many negatives as positives, at least two."""
        n, m = len(self.positive), len(self.negative)
        if n != m or n < 2:
            raise ConfigError(
                f"codes are compared between equally many positives and negatives, at least 2, but "
                f"there are {n} and {m}; draw more negatives"
            )

    @property
    def both(self) -> Float[Tensor, "examples heads d"]:
        """All examples, positives first."""
        return torch.cat([self.positive, self.negative])

    def normalised(self) -> "HeadOutputs":
        """Return the outputs of each head less their mean, over their root mean square.

        A head that writes the same into every example is all zeros.
        """
        both = self.both - self.both.mean(0)
        scale = both.square().mean((0, 2)).sqrt()
        both = both / torch.where(scale > 0, scale, 1)[:, None]
        return HeadOutputs(both[: len(self.positive)], both[len(self.positive) :])


@dataclass(frozen=True)
class Codes:
    """One integer for each output of each head."""

    positive: Int[Tensor, "n heads"]
    negative: Int[Tensor, "m heads"]

    @property
    def coded(self) -> float:
        """Share of outputs that have a code."""
        both = torch.cat([self.positive, self.negative])
        return float((both != SILENT).double().mean())


def code(outputs: HeadOutputs, encode: Encode) -> Codes:
    """Return the number of the largest latent of each output, `SILENT` where none fires.

    Largest by absolute value, with another code for either sign.
    """
    heads = outputs.positive.shape[1]
    z = encode(rearrange(outputs.both, "n h d -> (n h) d"))
    largest = z.abs().argmax(1)
    value = z.gather(1, largest[:, None])[:, 0]
    found = torch.where(value == 0, SILENT, 2 * largest + (value < 0))
    codes = rearrange(found, "(n h) -> n h", h=heads)
    return Codes(codes[: len(outputs.positive)], codes[len(outputs.positive) :])


def learn_codes(outputs: HeadOutputs, fit: Fit, *, seed: int) -> Codes:
    """Return the codes of a dictionary learnt from these outputs."""
    rows = rearrange(outputs.both, "n h d -> (n h) d")
    return code(outputs, fit(rows[rows.any(1)], seed))


# ------------------------------------------------------------------------------------------- scores


def node_scores(codes: Codes, *, normalised: bool = False) -> Float[Tensor, " heads"]:
    """Return |P \\ N| of each head, or |P \\ N| / |P ∪ N|."""
    new = _new_pairs(codes).diagonal()
    if not normalised:
        return new
    return new / (new + distinct(codes.negative))


def edge_scores(codes: Codes, *, normalised: bool = False) -> Float[Tensor, "heads heads"]:
    """Return how many pairs of codes each pair of heads has in one positive and in no negative.

    Normalised: over the number of distinct pairs of positives plus that of negatives.
    """
    new = _new_pairs(codes)
    if not normalised:
        return new
    positive, negative = (
        _new_pairs(Codes(side, side[:0])) for side in (codes.positive, codes.negative)
    )
    return new / (positive + negative)


def distinct(codes: Int[Tensor, "n heads"]) -> Float[Tensor, " heads"]:
    """Return how many different codes each head has."""
    earlier = (codes[:, None] == codes[None]) & _earlier(len(codes))
    return (~earlier.any(1)).double().sum(0)


def share_of_layer(
    scores: Float[Tensor, " heads"], layers: Int[Tensor, " heads"]
) -> Float[Tensor, " heads"]:
    """Return the softmax over the heads of each layer: ranks between layers change.

    One over all heads would change none.
    """
    shares = torch.zeros_like(scores)
    for layer in layers.unique():
        mine = layers == layer
        shares[mine] = scores[mine].softmax(0)
    return shares


def edge_counts(
    edges: Float[Tensor, "heads heads"], layers: Int[Tensor, " heads"], *, top: int
) -> Float[Tensor, " heads"]:
    """Return how often each head is part of the `top` best pairs, whose first lies in an earlier
    layer.

    Pairs that are level with the last of them share the places that are left.
    """
    possible = layers[:, None] < layers
    if not bool(possible.any()):
        raise SiteError("pairs of heads need heads of two layers at least; this model has one")
    values = edges[possible]
    last = values.topk(min(top, len(values))).values[-1]
    level = values == last
    weight = (values > last).double()
    weight[level] = (min(top, len(values)) - weight.sum()) / level.sum()
    counts = torch.zeros(edges.shape, dtype=torch.float64)
    counts[possible] = weight
    return counts.sum(0) + counts.sum(1)


def _earlier(n: int) -> Bool[Tensor, "n n 1"]:
    return torch.ones(n, n, dtype=torch.bool).tril(-1)[..., None]


def _new_pairs(codes: Codes) -> Float[Tensor, "heads heads"]:
    """Return, for pairs of heads, the number of distinct code pairs of positives not in negatives.

    An example brings a new pair where no negative and no earlier positive has both codes.
    """
    seen = torch.cat([codes.negative, codes.positive])
    heads = codes.positive.shape[1]
    total = torch.zeros(heads, heads, dtype=torch.float64)
    for i, example in enumerate(codes.positive):
        same = (seen[: len(codes.negative) + i] == example).float()
        total += same.T @ same == 0
    return total
