"""How well learnt directions and firings agree with planted ones.

C is the matrix of cosines of decoder directions (m) with planted directions (n). A match counts
whichever way it points, |C|, since signed codes may hold a feature by its negative; of two planted
directions on one line the one that points the same way is preferred. Source of the definitions:
SynthSAEBench, arXiv 2602.14687.
"""

from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saelab.metrics.sums import Accumulator, Definition, DocumentSums
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


def mcc(C: Float[Tensor, "m n"], pairs: Pairs, weights: Float[Tensor, " n"] | None = None) -> float:
    """Return the mean |cosine| of matched pairs; what stays unmatched does not count.

    `weights` are of the features: how often each is on, for example.
    """
    found = C[pairs].double().abs()
    if weights is None:
        return float(found.mean())
    weight = weights[pairs[1]].double()
    return float((found * weight).sum() / weight.sum())


def mcc_signed(C: Float[Tensor, "m n"], pairs: Pairs) -> float:
    """Return the mean cosine of matched pairs: `mcc` if every latent points its feature's way."""
    return float(C[pairs].double().mean())


def coverage(C: Float[Tensor, "m n"], features: Int[Tensor, " k"]) -> float:
    """Return the share of these features that some latent has |cosine| ≥ .9 with."""
    return float((C[:, features].abs().amax(0) >= MATCHED).double().mean())


def gram_errors(
    W: Float[Tensor, "m d"],
    planted: Float[Tensor, "n d"],
    pairs: Pairs,
    levels: Int[Tensor, " n"],
) -> tuple[float, float]:
    """Return the mean squared error of matched latents' cosines with each other.

    First of two of one level, then of two of different ones; each latent is turned its feature's
    way. NaN where there is no such pair.
    """
    latents, features = pairs
    V, T = unit_rows(W.float())[latents], unit_rows(planted.float())[features]
    V = V * (V * T).sum(1, keepdim=True).sign()
    error = (V @ V.T - T @ T.T).double().square()
    same = levels[features][:, None] == levels[features]
    off = ~torch.eye(len(V), dtype=torch.bool)
    return float(error[same & off].mean()), float(error[~same].mean())


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


def overlaps(planted: Float[Tensor, "n d"], *, rows: int = 1024) -> dict[str, float]:
    """Return `mean`, `p95` and `p99` of |cosine| between two planted directions.

    Over all pairs with one of up to `rows` evenly spaced directions.
    """
    n = len(planted)
    chosen = torch.arange(min(n, rows)) * n // min(n, rows)
    unit = unit_rows(planted.float())
    C = (unit[chosen] @ unit.T).abs()
    off = torch.ones_like(C, dtype=torch.bool)
    off[torch.arange(len(chosen)), chosen] = False
    found = C[off].numpy()
    if not len(found):
        return {}
    p95, p99 = np.percentile(found, [95, 99])
    return {"mean": float(found.mean(dtype=np.float64)), "p95": float(p95), "p99": float(p99)}


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

    def f1_balanced(self) -> float:
        """Return the mean F1 as it would be were each feature on in half of the rows.

        0 where a latent never fires; features that are on always or never do not count.
        """
        recall = self.both / self.true
        false = (self.fired - self.both) / (self.n - self.true)
        return float((2 * recall / (1 + recall + false)).nanmean())

    def dead_share(self) -> float:
        """Return the share of latents that fired in none of the rows."""
        return float((self.fired == 0).double().mean())


@final
class Support(Accumulator):
    """Precision, recall and F1 of all firings together, against one-to-one matched features.

    A firing is right if the latent's own feature is on; a feature that is on is found if its own
    latent fires. What is matched with nothing is never right, and never found.
    """

    def __init__(self, pairs: Pairs) -> None:
        """Compare matched latents and features."""
        self._latents, self._features = pairs
        self.sums = DocumentSums(3)

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """support_precision, support_recall, support_f1."""
        return (
            Definition("support_precision", 1, "share of firings", lambda t: _share(t, 1)),
            Definition("support_recall", 1, "share of features on", lambda t: _share(t, 2)),
            Definition(
                "support_f1", 1, "share", lambda t: 2 * t[:, 0] / (t[:, 1] + t[:, 2]).clamp(min=1)
            ),
        )

    def update(
        self,
        fires: Bool[Tensor, "n m"],
        active: Bool[Tensor, "n n_features"],
        documents: Int[Tensor, " n"],
    ) -> None:
        """Take in some rows: which latents fire, and which features are on."""
        both = (fires[:, self._latents] & active[:, self._features]).sum(1)
        self.sums.add(documents, torch.stack([both, fires.sum(1), active.sum(1)], 1).double())


def _share(t: Float[Tensor, "b q"], column: int) -> Float[Tensor, " b"]:
    return t[:, 0] / t[:, column].clamp(min=1)


def average_precision(
    scores: Float[Tensor, "n m"], active: Bool[Tensor, "n m"]
) -> Float[Tensor, " m"]:
    """Return Σ (R_k − R_{k−1}) P_k over the thresholds of each column, ties being one threshold.

    P and R are precision and recall of `scores ≥` the k-th threshold; NaN for a column that is
    never active.
    """
    found = []
    for part, truth in zip(scores.T, active.T, strict=True):
        ordered, order = part.sort(descending=True)
        hits = truth[order].double().cumsum(0)
        last = torch.cat([ordered.diff() < 0, torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
        hits = hits[last]
        gained = hits.diff(prepend=hits.new_zeros(1))
        found.append((gained * hits / (last + 1)).sum() / hits[-1])
    return torch.stack(found)


def fires(z: SparseLatents) -> Bool[Tensor, "n d_sae"]:
    """Return where a code is not zero."""
    return z.dense() != 0


def best_thresholds(
    scores: Float[Tensor, "n m"], active: Bool[Tensor, "n m"], *, balanced: bool = False
) -> Float[Tensor, " m"]:
    """Return for each column the threshold t at which `scores > t` has the largest F1.

    With `balanced`, rows that are not active weigh as much in all as those that are. A column that
    is never active gets +∞.
    """
    found = []
    for part, truth in zip(scores.split(256, 1), active.split(256, 1), strict=True):
        ordered, order = part.sort(0, descending=True)
        hits = truth.gather(0, order).double().cumsum(0)
        rank = torch.arange(1, len(part) + 1, dtype=torch.float64)[:, None]
        weight = hits[-1] / (len(part) - hits[-1]).clamp(min=1) if balanced else 1.0
        taken = hits + weight * (rank - hits)
        f1 = 2 * hits / (taken + hits[-1])
        last = torch.ones_like(truth[:1])
        f1 = f1.masked_fill(~torch.cat([ordered.diff(dim=0) < 0, last]), -1)
        place = f1.argmax(0, keepdim=True)
        here = ordered.gather(0, place)
        below = ordered.gather(0, (place + 1).clamp(max=len(part) - 1))
        threshold = torch.where(place + 1 < len(part), (here + below) / 2, here - 1)[0]
        found.append(threshold.masked_fill(hits[-1] == 0, torch.inf))
    return torch.cat(found)
