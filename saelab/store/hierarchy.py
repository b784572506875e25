"""The two-level hierarchy of the MP-SAE paper (Costa et al. 2025, arXiv 2506.03093).

Twenty unit directions in R^20: eleven parents, of which exactly one is on in each row, and nine
children, three under each of the first three parents. These parents are on with probability .2, and
then one of their children with probability .2 each (none with .4); the other eight with .05. So
L0 = 1 + .6 · .6 = 1.36. Parents and children are orthogonal; directions of one group (all parents,
or three siblings) have the same cosine, `correlation`:

    f_i = unit((1 − ε) q_i + ε · mean of the group's other q_j),  q an orthonormal basis.

Magnitudes are |N(mean, sd²)|, of parents and children apart.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import ClassVar, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saelab.ops.shuffle import generator
from saelab.protocols import Truth
from saelab.store.planted import RowsConfig

PARENTS, FAMILIES, CHILDREN = 11, 3, 3
N_FEATURES = PARENTS + FAMILIES * CHILDREN
P_FAMILY, P_ALONE, P_CHILD = 0.2, 0.05, 0.2


class HierarchyConfig(RowsConfig):
    """A store made from the two-level hierarchy; its sizes are those of the paper."""

    n_features: ClassVar[int] = N_FEATURES
    d: ClassVar[int] = N_FEATURES

    kind: Literal["hierarchy"]
    correlation: float = Field(0.0, ge=0, lt=1)
    """Cosine between any two directions of one group."""
    mean: float = Field(1.5, gt=0)
    """Mean magnitude of parents."""
    sd: float = Field(0.25, ge=0)
    """Spread of parents' magnitudes; 0 makes them constant."""
    child_mean: float = Field(1.5, gt=0)
    """Mean magnitude of children."""
    child_sd: float = Field(0.25, ge=0)
    """Spread of children's magnitudes; 0 makes them constant."""


@final
class HierarchyWorld:
    """Parents, their exclusive children, and the law of their codes."""

    def __init__(self, config: HierarchyConfig) -> None:
        """Draw the basis and bend each group's directions towards each other."""
        self._config = config
        parents = torch.full((N_FEATURES,), -1)
        parents[PARENTS:] = torch.arange(FAMILIES).repeat_interleave(CHILDREN)
        seeded = generator(config.seed, 0)
        basis = torch.linalg.qr(torch.randn(N_FEATURES, N_FEATURES, generator=seeded)).Q
        starts = [0, *range(PARENTS, N_FEATURES, CHILDREN), N_FEATURES]
        groups = [_bend(basis[a:b], config.correlation) for a, b in pairwise(starts)]
        self.truth = Truth(torch.cat(groups), torch.zeros(N_FEATURES), parents)

    def codes(self, shard: int, n: int) -> Iterator[Float[Tensor, "rows n_features"]]:
        """Yield the codes of the first `n` rows of a shard, in one piece."""
        config, seeded = self._config, generator(self._config.seed, 1, shard)
        chance = torch.full((PARENTS,), P_ALONE)
        chance[:FAMILIES] = P_FAMILY
        parent = torch.multinomial(chance, n, replacement=True, generator=seeded)
        which = (torch.rand(n, generator=seeded) / P_CHILD).long()
        noise = torch.randn(n, 2, generator=seeded)
        a, rows = torch.zeros(n, N_FEATURES), torch.arange(n)
        a[rows, parent] = (config.mean + config.sd * noise[:, 0]).abs()
        has = (parent < FAMILIES) & (which < CHILDREN)
        child = PARENTS + parent * CHILDREN + which
        amount = (config.child_mean + config.child_sd * noise[:, 1]).abs()
        a[rows[has], child[has]] = amount[has]
        yield a


def bend(correlation: float, size: int) -> float:
    """Return the ε at which directions of a group of `size` have this cosine, by bisection."""
    low, high = 0.0, 1 - 1 / size
    for _ in range(60):
        middle = (low + high) / 2
        own, other = 1 - middle, middle / (size - 1)
        inner = 2 * own * other + (size - 2) * other**2
        if inner / (own**2 + (size - 1) * other**2) < correlation:
            low = middle
        else:
            high = middle
    return low


def _bend(basis: Float[Tensor, "n d"], correlation: float) -> Float[Tensor, "n d"]:
    epsilon = bend(correlation, len(basis)) if correlation else 0.0
    others = (basis.sum(0) - basis) / (len(basis) - 1)
    bent = (1 - epsilon) * basis + epsilon * others
    return bent / bent.norm(dim=1, keepdim=True)
