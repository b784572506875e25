"""How well learnt directions and firings agree with planted ones.

C is the matrix of cosines of decoder directions (m) with planted directions (n). A match counts
whichever way it points, |C|, since signed codes may hold a feature by its negative; of two planted
directions on one line the one that points the same way is preferred. Source of the definitions:
SynthSAEBench, arXiv 2602.14687.
"""

from typing import final

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saelab.ops.linalg import unit_rows
from saelab.types import SparseLatents

VERSION = 1
MATCHED = 0.9
"""|cosine| from which a planted direction counts as found."""
_PREFER = 1e-6


Pairs = tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]
"""Latents and the features that they are matched with, one to one."""


def cosines(W: Float[Tensor, "m d"], planted: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """Return the cosine of each decoder direction with each planted one, float32."""
    return unit_rows(W.detach().cpu().float()) @ unit_rows(planted.cpu().float()).T


def partners(C: Float[Tensor, "m n"]) -> Int[Tensor, " m"]:
    """Return for each latent the planted feature with the largest |cosine|."""
    return _closeness(C).argmax(1)


def assignment(C: Float[Tensor, "m n"]) -> Pairs:
    """Return the one-to-one matching with the largest Σ |cosine|, min(m, n) pairs.

    Hungarian: a minute or so at 4,096 × 16,384.
    """
    latents, features = linear_sum_assignment(_closeness(C).numpy(), maximize=True)
    return torch.from_numpy(latents), torch.from_numpy(features)


def mcc(C: Float[Tensor, "m n"], pairs: Pairs) -> float:
    """Return the mean |cosine| of matched pairs; what stays unmatched does not count."""
    return float(C[pairs].double().abs().mean())


def uniqueness(C: Float[Tensor, "m n"]) -> float:
    """Return the number of different partners per latent, dead latents included."""
    return len(partners(C).unique()) / len(C)


def matched_share(C: Float[Tensor, "m n"], pairs: Pairs) -> float:
    """Return the share of matched pairs with |cosine| ≥ .9."""
    return float((C[pairs].abs() >= MATCHED).double().mean())


def matched_children(
    C: Float[Tensor, "m n"], pairs: Pairs, parents: Int[Tensor, " n"]
) -> float | None:
    """Return the share of planted children that are matched with |cosine| ≥ .9.

    1 where every child has a latent of its own: only then does `absorption` speak of children.
    None in a world without parents.
    """
    child = parents >= 0
    if not bool(child.any()):
        return None
    latents, features = pairs
    mine = child[features]
    found = C[latents[mine], features[mine]].abs() >= MATCHED
    return float(found.sum() / child.sum())


def absorption(C: Float[Tensor, "m n"], pairs: Pairs, parents: Int[Tensor, " n"]) -> float | None:
    """Return the mean cosine of children's latents with their parents' planted directions.

    Each child's latent is that of the matching, turned to point its way. 0 is perfect where parents
    and children are orthogonal, and 0 on average for random directions: read it beside
    `matched_share`. None where no child is matched.
    """
    latents, features = pairs
    child = parents[features] >= 0
    if not bool(child.any()):
        return None
    latents, features = latents[child], features[child]
    return float((C[latents, parents[features]] * C[latents, features].sign()).mean())


def overlap(planted: Float[Tensor, "n d"]) -> float:
    """Return the mean over planted directions of the largest |cosine| with another one."""
    unit = unit_rows(planted.double())
    largest = []
    for start in range(0, len(unit), 1024):
        C = (unit[start : start + 1024] @ unit.T).abs()
        C.diagonal(start).zero_()
        largest.append(C.amax(1))
    return float(torch.cat(largest).mean())


def _closeness(C: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    return C.abs() + _PREFER * (C > 0)


# ----------------------------------------------------------------------------------------- firing


@final
class Firing:
    """Counts how often each latent fires together with its planted partner."""

    def __init__(self, partner: Int[Tensor, " m"]) -> None:
        """Compare latent j with planted feature `partner[j]`."""
        self.partner = partner
        self.both, self.fired, self.true = torch.zeros(3, len(partner), dtype=torch.float64)
        self.n = 0

    def update(self, fires: Bool[Tensor, "n m"], active: Bool[Tensor, "n n_features"]) -> None:
        """Take in some rows: which latents fire, and which features are on."""
        true = active[:, self.partner]
        self.both += (fires & true).sum(0)
        self.fired += fires.sum(0)
        self.true += true.sum(0)
        self.n += len(fires)

    def scores(self) -> dict[str, float]:
        """Return precision, recall and F1, each the plain mean over latents, 0 where undefined."""
        parts = {
            "precision": self.both / self.fired,
            "recall": self.both / self.true,
            "f1": 2 * self.both / (self.fired + self.true),
        }
        return {name: float(part.nan_to_num(0.0).mean()) for name, part in parts.items()}

    def dead_share(self) -> float:
        """Return the share of latents that fired in none of the rows."""
        return float((self.fired == 0).double().mean())


def fires(z: SparseLatents) -> Bool[Tensor, "n d_sae"]:
    """Return where a code is not zero."""
    return z.dense() != 0


def best_thresholds(
    scores: Float[Tensor, "n m"], active: Bool[Tensor, "n m"]
) -> Float[Tensor, " m"]:
    """Return for each column the threshold t at which `scores > t` has the largest F1.

    A column that is never active gets +∞.
    """
    found = []
    for part, truth in zip(scores.split(256, 1), active.split(256, 1), strict=True):
        ordered, order = part.sort(0, descending=True)
        hits = truth.gather(0, order).double().cumsum(0)
        taken = torch.arange(1, len(part) + 1, dtype=torch.float64)[:, None]
        f1 = 2 * hits / (taken + hits[-1])
        last = torch.ones_like(truth[:1])
        f1 = f1.masked_fill(~torch.cat([ordered.diff(dim=0) < 0, last]), -1)
        place = f1.argmax(0, keepdim=True)
        here = ordered.gather(0, place)
        below = ordered.gather(0, (place + 1).clamp(max=len(part) - 1))
        threshold = torch.where(place + 1 < len(part), (here + below) / 2, here - 1)[0]
        found.append(threshold.masked_fill(hits[-1] == 0, torch.inf))
    return torch.cat(found)
