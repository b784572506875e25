"""Hedging, splitting and absorption along the edges of planted trees, where the truth is known.

After SynthSAEBench (arXiv 2602.14687), whose worlds these are for; it has no such metrics of its
own.
"""

from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.metrics.truth import Pairs, partners

HAS_LATENT = 0.5
"""|cosine| from which a matched latent counts as its feature's."""
FEWEST_ALONE = 200
"""Rows with a parent and none of its children below which its edges have no absorption."""


def latents_of(C: Float[Tensor, "m n"], pairs: Pairs) -> Int[Tensor, " n"]:
    """Return each feature's latent, −1 where it has none."""
    latents, features = pairs
    near = C[pairs].abs() >= HAS_LATENT
    found = torch.full((C.shape[1],), -1)
    found[features[near]] = latents[near]
    return found


def hedging(C: Float[Tensor, "m n"], pairs: Pairs, parents: Int[Tensor, " n"]) -> float | None:
    """Return the mean over edges of the cosine of the parent's latent with the planted child.

    The counterpart of `truth.absorption`: each parent's latent is that of the matching, turned to
    point its way. None where no parent is matched.
    """
    latents, features = pairs
    latent, sign = torch.full((C.shape[1],), -1), torch.zeros(C.shape[1])
    latent[features], sign[features] = latents, C[pairs].sign()
    child = ((parents >= 0) & (latent[parents.clamp(min=0)] >= 0)).nonzero()[:, 0]
    if not len(child):
        return None
    above = parents[child]
    return float((C[latent[above], child] * sign[above]).double().mean())


def splitting(C: Float[Tensor, "m n"]) -> float | None:
    """Return how many latents point at a feature (partner, |cosine| ≥ .5), where any does."""
    partner = partners(C)
    near = C.abs().gather(1, partner[:, None])[:, 0] >= HAS_LATENT
    if not bool(near.any()):
        return None
    return int(near.sum()) / len(partner[near].unique())


@final
class Edges:
    """How often a parent's latent is silent where a child is on, for each edge of planted trees."""

    def __init__(self, latents: Int[Tensor, " n"], parents: Int[Tensor, " n"]) -> None:
        """Take the edges whose parent has a latent, as `latents_of` gives them."""
        near = (parents >= 0) & (latents[parents.clamp(min=0)] >= 0)
        self.children = near.nonzero()[:, 0]
        """The child of each edge."""
        self._heads, self._place = torch.unique(parents[self.children], return_inverse=True)
        self._latents = latents[self._heads]
        self._on, self._silent = torch.zeros(2, len(self.children), dtype=torch.float64)
        self._alone, self._alone_silent = torch.zeros(2, len(self._heads), dtype=torch.float64)

    def update(self, fires: Bool[Tensor, "rows m"], active: Bool[Tensor, "rows n"]) -> None:
        """Take in some rows: which latents fire, and which features are on."""
        silent, head = ~fires[:, self._latents], active[:, self._heads]
        row, edge = active[:, self.children].nonzero(as_tuple=True)  # their parents are on, too
        place = self._place[edge]
        self._on += torch.bincount(edge, minlength=len(self.children))
        self._silent += torch.bincount(edge[silent[row, place]], minlength=len(self.children))
        head[row, place] = False
        self._alone += head.sum(0)
        self._alone_silent += (head & silent).sum(0)

    def recall(self) -> Float[Tensor, " edges"]:
        """Return how often the parent's latent fires where parent and child are on; NaN: never."""
        return 1 - self._silent / self._on

    def absorption(self) -> Float[Tensor, " edges"]:
        """Return how much oftener the latent is silent with the child on than with none.

        P(silent | parent, child) − P(silent | parent, no child); NaN where the second has fewer
        than 200 rows or the first none.
        """
        alone = self._alone_silent / self._alone.masked_fill(self._alone < FEWEST_ALONE, torch.nan)
        return self._silent / self._on - alone[self._place]
