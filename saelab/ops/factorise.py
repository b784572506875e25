"""Semi-non-negative factorisation of rows: X ≈ G F with codes G ≥ 0 and signed, sparse features F.

One `update` is, in this order (Ding, Li, Jordan 2010, with the sparsity of Shafran et al. 2025):

    F ← (GᵀG + ε)⁻¹ Gᵀ X                              least squares
    F ← its `keep` largest entries of each row, by size       the winners take all
    G ← columns at unit norm, their norms into F
    G ← G ⊙ √((P⁺ + G Q⁻) / (P⁻ + G Q⁺ + ε))          P = X Fᵀ, Q = F Fᵀ, A⁺ = max(A, 0), A⁻ = (−A)⁺

Done as written, with ‖X − G F‖² after it, that is three products of X's size. Here it is one and a
sparse one: P is made of the entries that F kept, and the error is ‖X‖² − 2⟨G, P⟩ + ⟨GᵀG, Q⟩, whose
GᵀG the next update needs anyway. X and G are held with rows as columns, so that the sparse product
reads along memory.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.ops.nnls import nnls

Start = Literal["random", "kmeans", "svd"]

EPSILON = 1e-6
"""What is added to GᵀG, and to the denominator of the codes' update."""
FLOOR = 1e-6
"""Smallest code that a start gives: an update cannot leave zero."""
LLOYD_STEPS = 15
RECENT = 16
"""Minibatches whose mean loss is the loss of features that follow a stream."""
_USED = 1e-3
"""Sum of a feature's squared codes, as the stream remembers them, up to which it stays as it is."""
_SPARSE_SHARE = 1 / 8
"""Share of entries kept from which a dense product with F costs less."""


@dataclass(frozen=True)
class Factors:
    """X ≈ codesᵀ features, and what the next update needs of them."""

    codes: Float[Tensor, "k n"]
    """Non-negative; a column per row of X."""
    gram: Float[Tensor, "k k"]
    """codes @ codes.T."""
    features: Float[Tensor, "k d"]
    loss: float
    """‖X − codesᵀ features‖²."""


def update(
    xt: Float[Tensor, "d n"],
    codes: Float[Tensor, "k n"],
    gram: Float[Tensor, "k k"],
    *,
    energy: float,
    keep: int,
) -> Factors:
    """Return the factors after one update; `energy` is ‖X‖², `gram` codes @ codes.T."""
    features = keep_largest(least_squares(gram, codes @ xt.T), keep)
    norms = gram.diagonal().sqrt().clamp(min=torch.finfo(codes.dtype).tiny)[:, None].to(codes)
    features = features * norms
    overlaps, q = _product(features, xt, keep), features @ features.T
    codes = codes / norms
    up = torch.addmm(overlaps.clamp(min=0), (-q).clamp(min=0), codes)
    down = torch.addmm((-overlaps).clamp_(min=0), q.clamp(min=0), codes).add_(EPSILON)
    codes = up.div_(down).sqrt_().mul_(codes)
    gram = codes @ codes.T
    crossed = torch.sum(codes * overlaps, dtype=torch.float64)
    loss = energy - 2 * crossed + torch.sum(gram * q, dtype=torch.float64)
    return Factors(codes, gram, features, float(loss.clamp(min=0)))


def least_squares(gram: Float[Tensor, "k k"], cross: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
    """Return (gram + ε)⁻¹ cross, inverted in float64; where rounding left `gram` indefinite, by its
    eigenvalues, none below ε."""
    exact = gram.double() + EPSILON * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    root, fault = torch.linalg.cholesky_ex(exact)
    if not fault:
        return torch.cholesky_inverse(root).to(cross) @ cross
    values, vectors = torch.linalg.eigh(exact)
    return ((vectors / values.clamp(min=EPSILON)) @ vectors.T).to(cross) @ cross


def keep_largest(features: Float[Tensor, "k d"], keep: int) -> Float[Tensor, "k d"]:
    """Return the features with 0 outside the `keep` largest entries of each, by size; ties with the
    last of them stay."""
    if keep >= features.shape[1]:
        return features
    size = features.abs()
    return torch.where(size >= size.topk(keep, dim=1).values[:, -1:], features, 0)


def _product(
    features: Float[Tensor, "k d"], xt: Float[Tensor, "d n"], keep: int
) -> Float[Tensor, "k n"]:
    if keep > _SPARSE_SHARE * features.shape[1]:
        return features @ xt
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "Sparse CSR tensor support is in beta state"
        return features.to_sparse_csr() @ xt


# --------------------------------------------------------------------------- the two ways to solve


@dataclass(frozen=True)
class Whole:
    """Factors of rows that all lie in memory."""

    xt: Float[Tensor, "d n"]
    energy: float
    spread: float
    factors: Factors

    @staticmethod
    def of(xt: Float[Tensor, "d n"], codes: Float[Tensor, "k n"]) -> "Whole":
        """Return first factors: codes alone."""
        exact = codes.double()
        gram, none = (exact @ exact.T).to(codes), codes.new_zeros(len(codes), len(xt))
        return Whole(xt, *spread(xt), Factors(codes, gram, none, math.inf))

    @property
    def loss(self) -> float:
        """‖X − G F‖² / Σ‖x − mean‖²."""
        return self.factors.loss / self.spread

    @property
    def is_settled(self) -> bool:
        """Whether `loss` can be held against that of other updates: it is of all rows."""
        return True

    @property
    def features(self) -> Tensor:
        """The features that `loss` is of."""
        return self.factors.features

    def codes(self) -> Float[Tensor, "k n"]:
        """Return the codes, in the unit of unit-norm features."""
        return self.factors.codes * self.features.norm(dim=1)[:, None]

    def next(self, keep: int) -> "Whole":
        """Return the factors after an update."""
        now = self.factors
        found = update(self.xt, now.codes, now.gram, energy=self.energy, keep=keep)
        return replace(self, factors=found)

    def tensors(self) -> dict[str, Tensor]:
        """Return what cannot be read again."""
        now = self.factors
        loss = torch.tensor(now.loss, dtype=torch.float64)
        return {"codes": now.codes, "gram": now.gram, "features": now.features, "loss": loss}


@dataclass(frozen=True)
class Minibatched:
    """Features that follow a stream of batches, through sums that forget their beginnings.

    Each batch is coded by non-negative least squares; then, of update t on,
    S ← β S + GᵀG, C ← β C + GᵀX with β = (1 − 1/t)², F ← (S + ε)⁻¹ C, and the winners take all.
    """

    stream: Iterator[Tensor]
    variance: float
    step: int
    gram: Float[Tensor, "k k"]
    cross: Float[Tensor, "k d"]
    following: Float[Tensor, "k d"]
    """Features for the next batch."""
    features: Float[Tensor, "k d"]
    """Those that the last batch was coded with."""
    last: Float[Tensor, "k batch"]
    """That batch's codes."""
    recent: Float[Tensor, " recent"]
    """Losses of the last batches, newest first."""

    @staticmethod
    def of(
        stream: Iterator[Tensor], batch: int, features: Float[Tensor, "k d"], *, variance: float
    ) -> "Minibatched":
        """Return these features before their first batch."""
        k, d = features.shape
        sums, codes = (features.new_zeros(k, k), features.new_zeros(k, d)), (k, batch)
        recent = torch.zeros(RECENT, dtype=torch.float64)
        return Minibatched(
            stream, variance, 0, *sums, features, features, features.new_zeros(codes), recent
        )

    @property
    def loss(self) -> float:
        """Mean of the last batches' losses."""
        return float(self.recent[: max(self.step, 1)].mean())

    @property
    def is_settled(self) -> bool:
        """Whether `loss` can be held against that of other updates: it is of `RECENT` batches."""
        return self.step >= RECENT

    def codes(self) -> Float[Tensor, "k batch"]:
        """Return the last batch's codes, in the unit of unit-norm features."""
        return self.last * self.features.norm(dim=1)[:, None]

    def next(self, keep: int) -> "Minibatched":
        """Take in a batch; a feature that no recent row used stays as it is."""
        x, features, step = next(self.stream), self.following, self.step + 1
        z = nnls(x, features)
        loss = (x - z @ features).double().square().sum() / (len(x) * self.variance)
        forget = (1 - 1 / step) ** 2
        gram, cross = forget * self.gram + z.T @ z, forget * self.cross + z.T @ x
        found = keep_largest(least_squares(gram, cross), keep)
        used = gram.diagonal() > _USED
        following = torch.where(used[:, None], found, features)
        recent = torch.cat([loss[None].to(self.recent), self.recent[:-1]])
        return Minibatched(
            self.stream, self.variance, step, gram, cross, following, features, z.T, recent
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what cannot be read again."""
        names = ("gram", "cross", "following", "features", "last", "recent")
        return {name: getattr(self, name) for name in names}


# ------------------------------------------------------------------------------------------ starts


def start_codes(
    xt: Float[Tensor, "d n"], k: int, how: Start, generator: torch.Generator
) -> Float[Tensor, "k n"]:
    """Return first codes of rows, all at least `FLOOR`; features follow from them by an update."""
    if how == "kmeans":
        codes = _clusters(xt, k, generator)
    elif how == "svd":
        codes = _singular(xt, k)
    else:
        codes = torch.rand(k, xt.shape[1], generator=generator).to(xt)
    return codes.clamp(min=FLOOR).contiguous()


def _clusters(xt: Float[Tensor, "d n"], k: int, generator: torch.Generator) -> Float[Tensor, "k n"]:
    """Return 1 where a row belongs to a cluster, 0 elsewhere, after `LLOYD_STEPS` of Lloyd's
    k-means from random rows; a cluster without rows moves to another random row.

    Written out here since scikit-learn sums clusters in the order in which threads finish.
    """
    n = xt.shape[1]
    centres = xt[:, torch.randperm(n, generator=generator)[:k].to(xt.device)].T
    member = torch.zeros(k, n, dtype=xt.dtype, device=xt.device)
    for _ in range(LLOYD_STEPS):
        nearest = (centres @ xt - centres.square().sum(1, keepdim=True) / 2).argmax(0)
        member = torch.zeros_like(member).scatter_(0, nearest[None], 1)
        counts = member.sum(1, keepdim=True)
        others = xt[:, torch.randint(n, (k,), generator=generator).to(xt.device)].T
        centres = torch.where(counts > 0, member @ xt.T / counts.clamp(min=1), others)
    return member


def _singular(xt: Float[Tensor, "d n"], k: int) -> Float[Tensor, "k n"]:
    """Return √σ times each of the k leading left singular vectors of X, by whichever Gram matrix is
    smaller; of each vector and its negative the one with more energy above zero."""
    d, n = xt.shape
    values, vectors = torch.linalg.eigh((xt @ xt.T if d <= n else xt.T @ xt).double())
    values, vectors = values[-k:].flip(0).clamp(min=1e-30), vectors[:, -k:].flip(1)
    root = values.sqrt().sqrt()
    codes = (vectors / root).T.to(xt) @ xt if d <= n else (vectors * root).T.to(xt)
    above = codes.clamp(min=0).square().sum(1) >= codes.clamp(max=0).square().sum(1)
    return torch.where(above[:, None], codes, -codes)


def spread(xt: Float[Tensor, "d n"]) -> tuple[float, float]:
    """Return ‖X‖² and Σ‖x − mean‖² of rows, summed in float64; the second is never 0."""
    energy = float(sum(part.double().square().sum() for part in xt.split(64)))
    mean = torch.stack([part.double().mean(1).square().sum() for part in xt.split(64)]).sum()
    return energy, max(energy - xt.shape[1] * float(mean), 1e-12 * energy, 1e-30)
