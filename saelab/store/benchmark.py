"""SynthSAEBench: sixteen thousand features in trees, correlated, with Zipf frequencies.

The generator of arXiv 2602.14687 with its 16k preset, and smaller worlds that keep its ratios.
Equal to the published one in distribution, not in values. Feature i is drawn by a Gaussian copula
with probability q_i and has magnitude relu(μ_i + σ_i g); then, from the roots down, a child of an
inactive parent is switched off, a child of an active one is scaled by the parent's magnitude over
its mean (so magnitudes multiply down a chain), and of several active siblings one, chosen at
random, stays. q undoes in part what this takes from the nominal probability p. x = a W + b.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.ops.shuffle import generator, permutation
from saelab.ops.tree import levels_of
from saelab.protocols import Truth
from saelab.store.planted import RowsConfig

Preset = Literal["16k", "mini", "mini-matched", "mini-dense", "ci"]

ALPHA, BRANCHING, DEPTH = 0.5, 4, 3
MU = (5.0, 4.0)
SIGMA = (0.5, 0.5)
RANK, SCALE = 25, 0.1
BIAS = 0.5
STEPS, LR = 100, 3e-4
_ROWS = 1024
"""Rows drawn at once."""


@dataclass(frozen=True)
class Size:
    """What distinguishes one preset from another."""

    n: int
    d: int
    roots: int
    p_max: float = 0.4
    p_min: float = 5e-4


SIZES: dict[Preset, Size] = {
    "16k": Size(16_384, 768, 128),
    "mini": Size(1024, 128, 8),
    "mini-matched": Size(1024, 128, 8, p_max=0.31),
    "mini-dense": Size(2688, 128, 21, p_max=0.2),
    "ci": Size(256, 48, 2, p_min=5e-3),
}


class BenchmarkConfig(RowsConfig):
    """A store made by the generator of SynthSAEBench."""

    kind: Literal["benchmark"]
    preset: Preset = "mini"
    """`16k` is the published world (v2); the others run on a small machine."""
    trees: bool = True
    """Parents, exclusive siblings and compensation; without them each feature is by itself."""
    parent_scaling: bool = True
    """Children grow with their parents; the published v1 lacked this by mistake."""
    correlated: bool = True
    """Draw features through the copula's low-rank factor."""
    shuffled: bool = False
    """Give the nominal probabilities to features at random, so that level says nothing of them."""

    @property
    def n_features(self) -> int:
        """Number of planted features."""
        return SIZES[self.preset].n

    @property
    def d(self) -> int:
        """Width of the activations."""
        return SIZES[self.preset].d


@final
class BenchmarkWorld:
    """The benchmark's dictionary, forest and law of codes."""

    def __init__(self, config: BenchmarkConfig) -> None:
        """Build the world; the orthogonalisation of the 16k preset takes about a minute."""
        size, seed = SIZES[config.preset], config.seed
        self._seed = seed
        directions, bias = draw_directions(size.n, size.d, generator(seed, 0))
        p = zipf(size.n, size.p_max, size.p_min)
        if config.shuffled:
            p = p[permutation(size.n, seed, 3)]
        parents = torch.full((size.n,), -1)
        if config.trees:
            parents = forest(size.n, size.roots)
        mu = torch.linspace(*MU, size.n)
        drawn = torch.randn(size.n, generator=generator(seed, 4))
        factor = torch.randn(size.n, RANK, generator=generator(seed, 5)) * SCALE
        self.law = CodeLaw(
            q=compensated(p, parents),
            parents=parents,
            mu=mu,
            sigma=(SIGMA[0] + SIGMA[1] * drawn).abs(),
            factor=factor if config.correlated else torch.zeros(size.n, 0),
            parent_scaling=config.parent_scaling,
        )
        self.truth = Truth(directions, bias, parents)

    def codes(self, shard: int, n: int) -> Iterator[Float[Tensor, "rows n_features"]]:
        """Yield the codes of the first `n` rows of a shard, 1,024 rows at a time."""
        for part, first in enumerate(range(0, n, _ROWS)):
            seeded = generator(self._seed, 1, shard, part)
            yield self.law.draw(min(_ROWS, n - first), seeded)


# -------------------------------------------------------------------------------- the law of codes


def zipf(n: int, p_max: float, p_min: float, alpha: float = ALPHA) -> Float[Tensor, " n"]:
    """Return i^{−alpha}, moved and scaled so that the first is p_max, the last p_min; float64."""
    rank = torch.arange(1, n + 1, dtype=torch.float64) ** -alpha
    if n == 1:
        return torch.full((1,), p_max, dtype=torch.float64)
    return p_min + (p_max - p_min) * (rank - rank[-1]) / (rank[0] - rank[-1])


def forest(n: int, roots: int, branching: int = BRANCHING, depth: int = DEPTH) -> Int[Tensor, " n"]:
    """Return each feature's parent, −1 for none: trees filled level by level in index order."""
    parents = torch.full((n,), -1)
    level, used = list(range(min(roots, n))), min(roots, n)
    for _ in range(depth):
        children = list(range(used, min(used + branching * len(level), n)))
        for place, child in enumerate(children):
            parents[child] = level[place // branching]
        level, used = children, used + len(children)
    return parents


def compensated(p: Float[Tensor, " n"], parents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the probability of the raw draw that makes up for gating and exclusion, at most 1.

    q_i = p_i / p_π · (1 + Σ_{siblings} p_j / p_π), to first order; p_π is the parent's nominal one.
    """
    child = parents >= 0
    above = p[parents.clamp(min=0)]
    family = torch.zeros_like(p).index_add_(0, parents[child], p[child])
    siblings = family[parents.clamp(min=0)] - p
    return torch.where(child, p / above * (1 + siblings / above), p).clamp(max=1)


@final
class CodeLaw:
    """Draws codes: copula, magnitudes, then the pass from the roots down."""

    def __init__(
        self,
        *,
        q: Float[Tensor, " n"],
        parents: Int[Tensor, " n"],
        mu: Float[Tensor, " n"],
        sigma: Float[Tensor, " n"],
        factor: Float[Tensor, "n rank"],
        parent_scaling: bool = True,
    ) -> None:
        """`q` is the probability of the raw draw; rows of `factor` are capped at norm² .99."""
        self.q, self.parents, self.mu, self.sigma = q, parents, mu, sigma
        square = factor.square().sum(1, keepdim=True)
        self.factor = torch.where(square > 0.99, factor * (0.99 / square).sqrt(), factor)
        self.noise = (1 - self.factor.square().sum(1)).sqrt()
        self.thresholds = (math.sqrt(2) * torch.erfinv(1 - 2 * q.double())).float()
        self.parent_scaling = parent_scaling
        level = levels_of(parents)
        self._families = [
            _families(parents, level == depth) for depth in range(1, int(level.max()) + 1)
        ]

    def draw(self, n: int, seeded: torch.Generator) -> Float[Tensor, "rows n"]:
        """Return the codes of `n` rows."""
        shape = (n, len(self.q))
        g = torch.randn(shape, generator=seeded) * self.noise
        g += torch.randn(n, self.factor.shape[1], generator=seeded) @ self.factor.T
        amount = torch.randn(shape, generator=seeded).mul_(self.sigma).add_(self.mu).clamp_(min=0)
        a = amount * (g > self.thresholds)
        for parents, children in self._families:
            a = self._descend(a, parents, children, seeded)
        return a

    def _descend(
        self,
        a: Float[Tensor, "rows n"],
        parents: Int[Tensor, " families"],
        children: Int[Tensor, "families size"],
        seeded: torch.Generator,
    ) -> Float[Tensor, "rows n"]:
        """Gate the children of one level by their parents, then keep one of each family."""
        above = a[:, parents, None]
        gate = above / self.mu[parents, None] if self.parent_scaling else (above > 0).float()
        absent = children < 0
        below = (a[:, children.clamp(min=0)] * gate).masked_fill(absent, 0)
        lot = torch.rand(below.shape, generator=seeded).masked_fill(below <= 0, -1)
        first = lot.argmax(2, keepdim=True)
        below = torch.zeros_like(below).scatter(2, first, below.gather(2, first))
        a[:, children[~absent]] = below[:, ~absent]
        return a


def _families(
    parents: Int[Tensor, " n"], here: Tensor
) -> tuple[Int[Tensor, " families"], Int[Tensor, "families size"]]:
    """Return the parents of the features `here`, and their children padded with −1."""
    mine = here.nonzero()[:, 0]
    above, family, counts = torch.unique(parents[mine], return_inverse=True, return_counts=True)
    order = family.argsort(stable=True)
    place = torch.arange(len(mine)) - (counts.cumsum(0) - counts)[family[order]]
    children = torch.full((len(above), int(counts.max())), -1)
    children[family[order], place] = mine[order]
    return above, children


# ---------------------------------------------------------------------------------- the dictionary


def draw_directions(
    n: int, d: int, seeded: torch.Generator, *, steps: int = STEPS, lr: float = LR
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"]]:
    """Return unit directions pushed apart, and a bias of norm .5."""
    directions = torch.randn(n, d, generator=seeded)
    directions /= directions.norm(dim=1, keepdim=True).clamp(min=1e-8)
    constant = torch.randn(d, generator=seeded)
    return push_apart(directions, steps, lr), constant * (BIAS / constant.norm())


def push_apart(W: Float[Tensor, "n d"], steps: int, lr: float) -> Float[Tensor, "n d"]:
    """Minimise Σ_{i≠j} ⟨w_i, w_j⟩² + n Σ (‖w_i‖² − 1)² by Adam, and return unit rows."""
    W = W.clone()
    adam = torch.optim.Adam([W], lr=lr)
    for _ in range(steps):
        W.grad = overlap_grad(W)
        adam.step()
    return W / W.norm(dim=1, keepdim=True).clamp(min=1e-8)


def overlap_grad(W: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the gradient of that loss through the d × d Gram matrix: O(n d²), not O(n² d)."""
    square = W.square().sum(1, keepdim=True)
    return 4 * (W @ (W.T @ W)) - 4 * square * W + 4 * len(W) * (square - 1) * W
