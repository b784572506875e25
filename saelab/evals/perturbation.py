"""What targeted perturbation is made of: latents are ablated, and linear probes are asked again.

A document is the mean of its rows and a probe is linear. So an ablation at every row,

    x' = x − Σ_{i ∈ S} z_i d_i        (what the dictionary does not reconstruct stays in x')

lowers a probe's score of the document by Σ_{i ∈ S} ⟨d_i, w⟩ · mean(z_i): nothing is encoded twice.

**Signed codes.** A latent fires where z ≠ 0, and its two signs may say two things. So what is
ranked and ablated is a *half* of a latent: max(z, 0) along d_i, or max(−z, 0) along −d_i. A large
negative code is a firing of the second half. Both halves of a latent count, are clamped and are
removed by themselves; of codes that are never negative only first halves fire, and the measures are
those of the paper.

Karvonen, Rager, Marks and Nanda (2024), *Evaluating Sparse Autoencoders on Targeted Concept Erasure
Tasks*, arXiv 2411.18895. How SAEBench differs: docs/metrics.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import Tensor

from saelab.config import Config
from saelab.errors import ArtifactError, ConfigError
from saelab.evals.controls import fit_pca
from saelab.evals.labelled import rows_of
from saelab.labels import Labelled, Part, seen_only
from saelab.metrics.pooling import HalfPooling
from saelab.ops.shuffle import generator, permutation
from saelab.probes import mean_difference
from saelab.protocols import Dictionary, Split, Store
from saelab.types import SparseLatents

OWN, LATENTS, PROBE = "dictionary", "random_latents", "probe"
RAW, PCA, RANDOM, SHUFFLED = "raw", "pca", "random_directions", "shuffled_labels"
_PCA_ROWS = 1 << 14
"""Training rows behind the principal directions."""
_COLUMNS = 1024
"""Halves converted to float64 at once."""
_STREAM, _MATCH, SHUFFLE = 1 << 17, 1 << 18, 1 << 19
"""Streams of the random directions, the random latents and the shuffled labels."""
_TENTHS = 10


class AblationConfig(Config):
    """Which documents, and how many latents are ablated; every arm is treated alike."""

    ns: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 5, 10, 20, 50, 100, 500)
    """Numbers of latents to ablate, ascending; where fewer have an effect, all of those."""
    documents: PositiveInt = 4000
    """Documents of each split, at most."""
    per_label: Annotated[int, Field(ge=2)] = 10
    """Labels with fewer documents in a split are left out and counted."""
    rows: PositiveInt | None = None
    """Rows of each document, at most: its first ones. By default all."""
    strength: PositiveFloat = 1.0
    """C of the logistic regression: 1 / weight of the squared norm, columns standardised."""
    draws: PositiveInt = 20
    """Draws of random live latents, and of shuffled labels; their mean is reported."""
    batch: PositiveInt = 1024
    """Rows held at once."""
    resamples: PositiveInt = 1000
    """Bootstrap resamples behind each standard error."""
    seed: int = 0
    """Of the random directions and latents, of balanced documents and of the bootstrap."""

    @field_validator("ns")
    @classmethod
    def _ascending(cls, ns: tuple[int, ...]) -> tuple[int, ...]:
        if list(ns) != sorted(set(ns)):
            raise ValueError("the numbers of latents should ascend, each given once")
        return ns


# ------------------------------------------------------------------------------- halves of latents


@dataclass(frozen=True)
class Coder:
    """Directions, and how often a row contains each of them."""

    directions: Float[Tensor, "m d"]
    codes: Callable[[Float[Tensor, "n d"]], SparseLatents | Float[Tensor, "n m"]]


@dataclass(frozen=True)
class Halves:
    """An arm's halves over documents: the positive ones of all latents, then the negative ones."""

    train: Float[Tensor, "n halves"]
    """Means over the rows of each training document; never negative."""
    test: Float[Tensor, "m halves"]
    """The same for the documents that are reported on."""
    directions: Float[Tensor, "latents d"]

    def pushes(self, W: Float[Tensor, "probes d"]) -> Float[Tensor, "halves probes"]:
        """Return by how much one unit of each half raises each probe's score, in float64."""
        up = self.directions.double() @ W.double().T
        return torch.cat([up, -up])

    @property
    def sizes(self) -> Float[Tensor, " halves"]:
        """How much each half adds to a training document, as a length; 0: it never fires."""
        lengths = self.directions.double().norm(dim=1)
        return self.train.mean(0, dtype=torch.float64) * lengths.repeat(2)


@dataclass(frozen=True)
class Scene:
    """The documents that have rows, and their mean activations."""

    labelled: Labelled
    train: Part
    test: Part
    x_train: Float[Tensor, "n d"]
    """Mean of each document's kept rows, float64."""
    x_test: Float[Tensor, "m d"]


def coder_of(dictionary: Dictionary) -> Coder:
    """Return a dictionary's codes and decoder directions."""
    device = dictionary.W_dec.device
    directions = dictionary.W_dec.detach().float().cpu()
    return Coder(directions, lambda x: dictionary.encode_sparse(x.to(device)))


def basis(directions: Float[Tensor, "d d"], origin: Float[Tensor, " d"]) -> Coder:
    """Return an orthonormal basis about an origin: removing all of a row leaves the origin."""
    W, b = directions.float(), origin.float()
    return Coder(W, lambda x: (x.float() - b) @ W.T)


def bases(store: Store, site: str, config: AblationConfig) -> dict[str, Coder]:
    """Return what a dictionary stands beside, each about the mean of the training rows: the
    coordinates, the principal directions, and a random rotation of the coordinates."""
    mean, d = store.stats(site).mean, store.width(site)
    pca = fit_pca(store, site, rows=_PCA_ROWS, batch=config.batch, seed=config.seed)
    gaussian = torch.randn(d, d, generator=generator(config.seed, _STREAM), dtype=torch.float64)
    found = {RAW: torch.eye(d), PCA: pca.basis.T, RANDOM: torch.linalg.qr(gaussian).Q.T}
    return {name: basis(directions, mean) for name, directions in found.items()}


@torch.no_grad()
def pooled_halves(
    store: Store,
    site: str,
    labelled: Labelled,
    coders: Mapping[str, Coder],
    config: AblationConfig,
) -> tuple[dict[str, Halves], Part, Part]:
    """Return each arm's halves over the training and held-out documents that keep a row, and
    these. Raises CorpusError if a label is left with none."""
    parts: list[Part] = []
    means: list[dict[str, Tensor]] = []
    splits: dict[str, Split] = {"train": "train", "test": "heldout"}
    for name, split in splits.items():
        part = labelled.parts[name]
        pools = {a: HalfPooling(part.documents, len(c.directions)) for a, c in coders.items()}
        for x, of in rows_of(
            store, site, split, part.documents, batch=config.batch, first=config.rows
        ):
            for arm, coder in coders.items():
                pools[arm].update(coder.codes(x), of)
        seen = next(iter(pools.values())).seen
        parts.append(seen_only(part, seen, labelled, site))
        means.append({arm: found.compute() for arm, found in pools.items()})
    halves = {arm: Halves(means[0][arm], means[1][arm], coders[arm].directions) for arm in coders}
    return halves, parts[0], parts[1]


def scene_of(
    store: Store, site: str, labelled: Labelled, config: AblationConfig
) -> tuple[Scene, dict[str, Halves]]:
    """Return the documents' mean activations, and the halves of every basis, from one pass."""
    coders = bases(store, site, config)
    halves, train, test = pooled_halves(store, site, labelled, coders, config)
    d, mean = store.width(site), store.stats(site).mean.double()
    raw = halves[RAW]
    x_train, x_test = (
        part[:, :d].double() - part[:, d:].double() + mean for part in (raw.train, raw.test)
    )
    return Scene(labelled, train, test, x_train, x_test), halves


def check_dictionary(dictionary: Dictionary, ns: tuple[int, ...], evaluator: str) -> None:
    """Raise ArtifactError for a dictionary that writes elsewhere than it reads, ConfigError for
    one with fewer latents than the least number to ablate."""
    if dictionary.d_out != dictionary.d_in:
        raise ArtifactError(
            f"{evaluator} takes latents out of the activations that they are read from, but this "
            f"dictionary maps width {dictionary.d_in} to {dictionary.d_out}; leave {evaluator} out "
            "of evaluate.evals"
        )
    if ns[0] > dictionary.d_sae:
        raise ConfigError(
            f"{evaluator}.ns: even the least number of latents to ablate, {ns[0]}, is more than "
            f"the {dictionary.d_sae} that the dictionary has; give smaller ones"
        )


def encoder_of(arm: str) -> str:
    """Return what a row of an arm says of its encoder."""
    return "own" if arm in (OWN, LATENTS) else "none"


# ----------------------------------------------------------------------------- ranking and ablating


def differences(
    halves: Float[Tensor, "n halves"], targets: Bool[Tensor, "n classes"]
) -> Float[Tensor, "classes halves"]:
    """Return each half's mean over a class's documents minus that over the others, float64."""
    return torch.cat([mean_difference(p, targets) for p in halves.split(_COLUMNS, dim=1)], 1)


def strongest(effects: Float[Tensor, " halves"], most: int) -> Int[Tensor, " k"]:
    """Return the halves with the largest effects, largest first, ties by number; at most `most`,
    and none whose effect is not above 0."""
    order = effects.argsort(descending=True, stable=True)[:most]
    return order[effects[order] > 0]


def matched(
    chosen: Int[Tensor, " k"], sizes: Float[Tensor, " halves"], seed: int, *path: int
) -> Int[Tensor, " k"]:
    """Return random live halves, one for each chosen one and of the same tenth of sizes.

    The halves that fire are cut into tenths by size, and drawn from theirs without replacement: so
    as much is taken out of the activations, wherever it lies. The first n stand for the first n.
    """
    live = (sizes > 0).nonzero()[:, 0]
    tenth = torch.full(sizes.shape, -1)
    tenth[live[sizes[live].argsort(stable=True)]] = (
        torch.arange(len(live)) * _TENTHS // max(len(live), 1)
    )
    mixed = live[permutation(len(live), seed, _MATCH, *path)]
    drawn = torch.empty_like(chosen)
    for number in range(_TENTHS):
        mine = tenth[chosen] == number
        drawn[mine] = mixed[tenth[mixed] == number][: int(mine.sum())]
    return drawn


def fall(
    halves: Float[Tensor, "n halves"],
    pushes: Float[Tensor, "halves probes"],
    ablated: Int[Tensor, " k"],
) -> Float[Tensor, "n probes"]:
    """Return by how much each probe's score of each document falls when halves are ablated."""
    return halves[:, ablated].double() @ pushes[ablated]


def fall_along(
    x: Float[Tensor, "n d"],
    origin: Float[Tensor, " d"],
    direction: Float[Tensor, " d"],
    W: Float[Tensor, "probes d"],
) -> Float[Tensor, "n probes"]:
    """Return by how much scores fall when a direction's share of x is set to the origin's."""
    u = direction.double() / direction.double().norm().clamp(min=1e-300)
    return ((x - origin) @ u)[:, None] * (W @ u)


def group_accuracies(
    right: Float[Tensor, "n k columns"],
    groups: Bool[Tensor, "n g columns"],
    weights: Float[Tensor, "b n"],
) -> Float[Tensor, "b k columns"]:
    """Return the mean over a column's groups of documents of their weighted share that is right.

    With the positives and the negatives of a class as groups it is balanced accuracy. NaN where a
    group weighs nothing.
    """
    shares = []
    for side in groups.unbind(1):
        truth = side.to(weights)
        hits = weights @ (right.to(weights) * truth[:, None]).flatten(1)
        shares.append(hits.unflatten(1, right.shape[1:]) / (weights @ truth)[:, None])
    return torch.stack(shares).mean(0)
