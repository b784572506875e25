"""Arms that know the truth: ceilings that an encoder or a dictionary of this width could reach.

    oracle(linear)    planted directions; the best linear estimate of each code, kept where it
                      exceeds a threshold fitted for F1: the ceiling of one-step encoders
    oracle(omp)       planted directions; orthogonal matching pursuit with the mean true number of
                      features per row
    oracle(support)   planted directions, and which of them are on; coefficients by least squares:
                      the best R² at this width
    probe             logistic regression on x for some features, with a threshold fitted for F1
    best_latent       what probes are measured against: the dictionary's nearest latent, likewise

Where there are more features than latents, directions are those of the most frequent features.
Everything is fitted on training rows.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.evals.encoders import OwnEncoder
from saelab.evals.sample import sample_rows
from saelab.metrics.truth import best_thresholds, cosines
from saelab.ops.pursuit import pursue
from saelab.ops.refit import Refit, Sign
from saelab.ops.sparse import decode_ragged
from saelab.ops.tree import levels_of
from saelab.protocols import Dictionary, PlantedStore, Truth
from saelab.types import Batch, SparseLatents


@dataclass(frozen=True)
class Known:
    """What the oracles may use: training rows, and the truth of the features they stand for."""

    store: PlantedStore
    truth: Truth
    features: Int[Tensor, " m"]
    """The most frequent features, as many as the dictionary has latents."""
    x: Float[Tensor, "n d"]
    a: Float[Tensor, "n m"]
    """Codes of `features` in these rows."""
    frequency: Float[Tensor, " n_features"]
    """Share of these rows in which each planted feature is on."""
    mean: Float[Tensor, " d"]
    """Mean training row."""

    @property
    def cut(self) -> int:
        """Probes are fitted on the rows before it, their thresholds on the others."""
        return len(self.x) * 4 // 5

    @property
    def directions(self) -> Float[Tensor, "m d"]:
        """Directions of `features`."""
        return self.truth.directions[self.features]


def known_of(
    store: PlantedStore, site: str, truth: Truth, m: int, *, rows: int, batch: int, seed: int
) -> Known:
    """Read up to `rows` training rows, and choose the `m` features that fire most in them."""
    parts = list(sample_rows(store, site, "train", rows, batch=batch, seed=seed))
    codes = [store.codes(part.rows) for part in parts]
    counts = torch.zeros(len(truth.directions))
    for z in codes:
        counts += torch.bincount(z.indices, minlength=len(counts))
    features = counts.argsort(descending=True, stable=True)[:m].sort().values
    a = torch.cat([z.dense()[:, features] for z in codes])
    x = torch.cat([part.y for part in parts]).float()
    mean = store.stats(site).mean.float()
    return Known(store, truth, features, x, a, counts / max(len(x), 1), mean)


@final
class LinearOracle:
    """The best linear estimate of each code, kept where it exceeds the threshold of best F1."""

    name, encoder = "oracle(linear)", "linear estimate, threshold"

    def __init__(self, known: Known) -> None:
        """Fit the estimate by ridge regression of codes on rows."""
        self._known = known
        centred = (known.x - known.mean).double()
        self._a_mean = known.a.mean(0)
        gram = centred.T @ centred
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        cross = (centred.T.float() @ known.a).double()  # rows are centred, so codes need not be
        self._map = torch.linalg.solve(gram + ridge, cross).float()
        self._signed = bool((known.a < 0).any())
        self._thresholds = best_thresholds(self._strength(known.x), known.a != 0)

    def _estimate(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        return (x - self._known.mean) @ self._map + self._a_mean

    def _strength(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        estimate = self._estimate(x)
        return estimate.abs() if self._signed else estimate

    def __call__(self, batch: Batch) -> tuple[Float[Tensor, "n d"], SparseLatents]:
        """Return the reconstruction and the codes."""
        x = batch.y.float()
        codes = self._estimate(x) * (self._strength(x) > self._thresholds)
        return codes @ self._known.directions + self._known.truth.bias, _sparse(codes)


@final
class PursuitArm:
    """Given unit directions about a centre, encoded by pursuit."""

    def __init__(
        self,
        name: str,
        atoms: Float[Tensor, "m d"],
        centre: Float[Tensor, " d"],
        k: int,
        *,
        sign: Sign = "abs",
        orthogonal: bool = False,
    ) -> None:
        """Take up to `k` steps; `orthogonal` refits all coefficients at each."""
        self.name, self._atoms, self._centre, self._k = name, atoms, centre, k
        self.encoder = f"{'omp' if orthogonal else 'pursuit'}(k={k})"
        self._sign: Sign = sign
        self._refit: Refit = "omp" if orthogonal else "mp"

    def __call__(self, batch: Batch) -> tuple[Float[Tensor, "n d"], SparseLatents]:
        """Return the reconstruction and the codes."""
        rows = batch.y.float() - self._centre
        z = pursue(rows, self._atoms, self._k, sign=self._sign, refit=self._refit).codes
        return decode_ragged(z, self._atoms) + self._centre, z


def omp_oracle(known: Known) -> PursuitArm:
    """Return pursuit of the planted directions with the mean true number of features per row."""
    k = max(1, round(float((known.a != 0).double().sum(1).mean())))
    return PursuitArm("oracle(omp)", known.directions, known.truth.bias, k, orthogonal=True)


@final
class SupportOracle:
    """Least squares on the features that are truly on."""

    name, encoder = "oracle(support)", "true support, least squares"

    def __init__(self, known: Known) -> None:
        """Nothing is fitted."""
        self._known = known

    def __call__(self, batch: Batch) -> tuple[Float[Tensor, "n d"], SparseLatents]:
        """Return the reconstruction and the codes."""
        known = self._known
        on = known.store.codes(batch.rows).dense()[:, known.features] != 0
        codes = torch.zeros(on.shape)
        size = int(on.sum(1).max())
        if size:
            support = on.float().topk(size, dim=1).indices
            absent = ~on.gather(1, support)
            chosen = known.directions[support].masked_fill(absent[..., None], 0).double()
            target = (batch.y - known.truth.bias).double()
            normal = chosen @ chosen.mT + torch.diag_embed(absent.double() + 1e-9)
            found = torch.linalg.solve(normal, (chosen @ target[..., None]))[..., 0]
            codes.scatter_(1, support, found.float().masked_fill(absent, 0))
        return codes @ known.directions + known.truth.bias, _sparse(codes)


def _sparse(codes: Float[Tensor, "n m"]) -> SparseLatents:
    return SparseLatents.from_dense(codes)


# ----------------------------------------------------------------------------------------- probes

FEWEST = 100
"""Training rows with a feature on below which it has no probe."""


@dataclass(frozen=True)
class Thresholds:
    """Scores above which a feature is said to be on."""

    plain: Float[Tensor, " probes"]
    """For the best F1."""
    balanced: Float[Tensor, " probes"]
    """For the best F1 if each feature were on in half of the rows."""

    @staticmethod
    def fit(scores: Float[Tensor, "n probes"], on: Bool[Tensor, "n probes"]) -> "Thresholds":
        """Choose both."""
        plain, balanced = (best_thresholds(scores, on, balanced=b) for b in (False, True))
        return Thresholds(plain, balanced)


def probed_features(known: Known, n: int, fewest: int = FEWEST) -> Int[Tensor, " probes"]:
    """Return the places in `known.features` of up to `n` features to probe.

    Only of those that are above zero in `fewest` training rows; spread evenly over levels of the
    planted trees, and over how often they fire within each.
    """
    counts = (known.a > 0).sum(0)
    level = levels_of(known.truth.parents)[known.features]
    often = counts.argsort(descending=True, stable=True)
    order = often[level[often].argsort(stable=True)]
    order = order[counts[order] >= fewest]
    n = min(n, len(order))
    return order[torch.arange(n) * len(order) // max(n, 1)]


@final
class Probes:
    """One logistic regression on standardised x per feature: is its code above zero?

    Fitted jointly by L-BFGS with an L2 penalty on the first four fifths of the rows; thresholds are
    fitted on the rest.
    """

    name, encoder = "probe", "logistic"

    def __init__(
        self,
        known: Known,
        places: Int[Tensor, " probes"],
        *,
        penalty: float = 1e-4,
        steps: int = 40,
    ) -> None:
        """Fit probes for the features at these places of `known.features`."""
        self.features = known.features[places]
        self._mean, self._scale = known.x.mean(0), known.x.std(0).clamp(min=1e-6)
        y, cut = known.a[:, places] > 0, known.cut
        self._weights = _logistic(self._standard(known.x[:cut]), y[:cut], penalty, steps)
        self.thresholds = Thresholds.fit(self.scores(known.x[cut:]), y[cut:])

    def _standard(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d_plus_1"]:
        return F.pad((x - self._mean) / self._scale, (0, 1), value=1.0)

    def scores(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n probes"]:
        """Return the logit of each feature."""
        return self._standard(x.float()) @ self._weights


@final
class BestLatent:
    """The dictionary as a set of probes: for each feature the latent with the largest |cosine|.

    A latent speaks for its feature by its value, turned its way. Thresholds as those of `Probes`.
    """

    name, encoder = "best_latent", "nearest latent"

    def __init__(
        self,
        known: Known,
        places: Int[Tensor, " probes"],
        dictionary: Dictionary,
        *,
        batch: int = 1024,
    ) -> None:
        """Take the latents nearest to the features; encode `batch` rows at a time."""
        self.features = known.features[places]
        near = cosines(dictionary.W_dec, known.truth.directions[self.features])
        self._latents = near.abs().argmax(0)
        self._sign = near.gather(0, self._latents[None])[0].sign()
        self._own = OwnEncoder(dictionary)
        cut = known.cut
        scores = torch.cat([self.scores(x) for x in known.x[cut:].split(batch)])
        self.thresholds = Thresholds.fit(scores, known.a[cut:, places] > 0)

    def scores(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n probes"]:
        """Return each feature's latent, turned its way."""
        number = torch.arange(len(x))
        z = self._own(Batch(x, x, number, number)).dense()
        return z[:, self._latents.to(z.device)].cpu() * self._sign


Probe = Probes | BestLatent
"""A score for each of some features, and thresholds for it."""


def _logistic(
    x: Float[Tensor, "n d"], y: Bool[Tensor, "n probes"], penalty: float, steps: int
) -> Float[Tensor, "d probes"]:
    """Return the weights of all probes; the last input is the constant and is not penalised."""
    weights = torch.zeros(x.shape[1], y.shape[1], requires_grad=True)
    target = y.float()
    optimiser = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        losses = F.binary_cross_entropy_with_logits(x @ weights, target, reduction="none")
        loss = losses.mean(0).sum() + penalty * weights[:-1].square().sum()
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimiser.step(closure)
    return weights.detach()
