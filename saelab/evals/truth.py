"""The truth evaluator: a dictionary against the directions and codes planted in its store.

Definitions, ends and error bars of every row: docs/truth.md. It needs a store that offers
`protocols.PlantedStore`; rows are held-out ones, and everything fitted is fitted on training rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from saelab.config import Config
from saelab.errors import ArtifactError, ConfigError, CorpusError
from saelab.evals.controls import Arm, DictionaryArm
from saelab.evals.encoders import OwnEncoder
from saelab.evals.oracles import (
    BestLatent,
    Known,
    LinearOracle,
    Probe,
    Probes,
    PursuitArm,
    SupportOracle,
    known_of,
    omp_oracle,
    probed_features,
)
from saelab.evals.sample import sample_rows
from saelab.metrics import trees
from saelab.metrics import truth as metrics
from saelab.metrics.reconstruction import Reconstruction
from saelab.metrics.sparsity import Sparsity
from saelab.metrics.sums import Accumulator, Definition
from saelab.ops.linalg import unit_rows
from saelab.ops.shuffle import generator
from saelab.ops.tree import levels_of, strata
from saelab.protocols import Dictionary, LanguageModel, PlantedStore, Store, Truth
from saelab.stats import ResultRow, over_documents, standard_error
from saelab.types import Batch

Oracle = Literal["linear", "omp", "support"]

_FLOOR = 1 << 16
"""Stream of the random dictionary: no planted world with the same seed draws from it."""


class TruthConfig(Config):
    """How much is measured, and which ceilings beside it."""

    rows: PositiveInt = 20_000
    """Held-out rows; all of them if there are fewer."""
    fit_rows: PositiveInt = 20_000
    """Training rows for oracles and probes."""
    oracles: tuple[Oracle, ...] = ("linear", "omp", "support")
    """Ceilings with the planted directions."""
    probes: NonNegativeInt = 32
    """Features with a logistic probe, spread over how often they fire; 0 leaves probes out."""
    k: PositiveInt | None = None
    """Steps of the random dictionary's pursuit; by default the dictionary's L0."""
    batch: PositiveInt = 1024
    """Rows held at once."""
    resamples: PositiveInt = 1000
    """Bootstrap resamples behind each standard error."""
    seed: int = 0
    """Of rows, of the random dictionary and of the bootstrap."""


@dataclass
class _Scores:
    """What is summed up for one arm."""

    arm: Arm
    of_directions: list[ResultRow]
    """Rows that need no activations."""
    reconstruction: Reconstruction
    sparsity: Sparsity
    firing: metrics.Firing
    support: metrics.Support
    edges: trees.Edges

    def update_(self, batch: Batch, active: Bool[Tensor, "n n_features"]) -> None:
        x_hat, z = self.arm(batch)
        assert z is not None
        fires = metrics.fires(z).cpu()
        self.reconstruction.update(batch.y, x_hat, batch.documents)
        self.sparsity.update(z, batch.documents)
        self.firing.update(fires, active)
        self.support.update(fires, active, batch.documents)
        self.edges.update(fires, active)


@dataclass
class _Probed:
    """What probes say of the held-out rows, and what is so."""

    probe: Probe
    scores: list[Float[Tensor, "rows probes"]] = field(default_factory=list[Tensor])
    on: list[Bool[Tensor, "rows probes"]] = field(default_factory=list[Tensor])

    def update_(self, batch: Batch, codes: Float[Tensor, "n n_features"]) -> None:
        self.scores.append(self.probe.scores(batch.y.float()))
        self.on.append(codes[:, self.probe.features] > 0)

    def rows(self) -> Iterator[ResultRow]:
        """Yield how well they tell the features."""
        probe, scores, on = self.probe, torch.cat(self.scores), torch.cat(self.on)
        plain, balanced = (metrics.Firing(torch.arange(on.shape[1])) for _ in range(2))
        plain.update(scores > probe.thresholds.plain, on)
        balanced.update(scores > probe.thresholds.balanced, on)
        found = plain.scores() | {
            "f1_balanced": balanced.f1_balanced(),
            "average_precision": float(metrics.average_precision(scores, on).nanmean()),
        }
        for name, value in found.items():
            unit = "mean over probed features"
            yield from _row(name, value, unit, len(on), probe.name, probe.encoder)


@final
class TruthEvaluator:
    """Scores one dictionary against what was planted in one site of a store."""

    name = "truth"
    version = 3

    def __init__(self, config: TruthConfig | None = None, site: str | None = None) -> None:
        """Measure at `site`; by default the store's only one."""
        self.config = config or TruthConfig()
        self.site = site

    @torch.no_grad()
    def __call__(
        self,
        dictionary: Dictionary,
        store: Store,
        model: LanguageModel | None = None,  # noqa: ARG002  (nothing is spliced)
    ) -> Iterator[ResultRow]:
        """Yield the rows of the dictionary, of its floor and ceilings, and of the planted world.

        Raises ConfigError if nothing was planted in the store, ArtifactError if the dictionary has
        another width, CorpusError if fewer than two held-out rows are kept.
        """
        planted, truth, site = self._check(dictionary, store)
        config = self.config
        known = known_of(
            planted, site, truth, dictionary.d_sae,
            rows=config.fit_rows, batch=config.batch, seed=config.seed,
        )  # fmt: skip
        scored = [self._scores(*arm, known) for arm in self._arms(dictionary, known, site)]
        probed = [_Probed(probe) for probe in self._probes(dictionary, known)]
        features_on = torch.zeros(0)
        for batch in self._rows(store, site):
            codes = planted.codes(batch.rows).dense()
            active = codes != 0
            features_on = torch.cat([features_on, active.sum(1)])
            for scores in scored:
                scores.update_(batch, active)
            for scores in probed:
                scores.update_(batch, codes)
        for scores in scored:
            yield from scores.of_directions
            yield from self._rows_of(scores)
            yield from _edge_rows(scores, truth.parents)
        for scores in probed:
            yield from scores.rows()
        yield from _world_rows(truth, features_on)

    # ----------------------------------------------------------------------------------- set-up

    def _check(self, dictionary: Dictionary, store: Store) -> tuple[PlantedStore, Truth, str]:
        truth = store.truth() if isinstance(store, PlantedStore) else None
        if truth is None or not isinstance(store, PlantedStore):
            raise ConfigError(
                "the truth evaluator needs a store with planted directions: give a `synthetic:` "
                "section, or take `truth` out of evaluate.evals."
            )
        site = self.site or next(iter(store.sites))
        if dictionary.d_in != store.width(site) or dictionary.d_out != store.width(site):
            raise ArtifactError(
                f"the dictionary maps width {dictionary.d_in} to {dictionary.d_out}, but {site} "
                f"has width {store.width(site)}: evaluate it on the store it was trained on."
            )
        if store.n_kept(site, "heldout") < 2:
            raise CorpusError(
                "scores need held-out rows, but the store keeps fewer than two: plant more rows "
                "or a larger `holdout`."
            )
        return store, truth, site

    def _rows(self, store: Store, site: str) -> Iterator[Batch]:
        config = self.config
        return sample_rows(
            store, site, "heldout", config.rows, batch=config.batch, seed=config.seed
        )

    def _arms(
        self, dictionary: Dictionary, known: Known, site: str
    ) -> Iterator[tuple[Arm, Float[Tensor, "m d"]]]:
        """Yield each arm with its directions: the dictionary, its floor, its ceilings."""
        config, own = self.config, OwnEncoder(dictionary)
        first = next(self._rows(known.store, site))
        z = own(first)
        k = config.k or max(1, round(float(z.l0().double().mean())))
        yield DictionaryArm("dictionary", dictionary, own), dictionary.W_dec.detach().cpu().float()
        shape = (dictionary.d_sae, dictionary.d_out)
        random = unit_rows(torch.randn(shape, generator=generator(config.seed, _FLOOR)))
        sign = "abs" if bool((z.values < 0).any()) else "nonneg"
        yield PursuitArm("random_dictionary", random, known.mean, k, sign=sign), random
        for oracle in config.oracles:
            if oracle == "linear":
                yield LinearOracle(known), known.directions
            elif oracle == "omp":
                yield omp_oracle(known), known.directions
            else:
                yield SupportOracle(known), known.directions

    def _probes(self, dictionary: Dictionary, known: Known) -> Iterator[Probe]:
        """Yield probes, and the dictionary as such; nothing where no feature is often enough on."""
        places = probed_features(known, self.config.probes)
        if len(places):
            yield Probes(known, places)
            yield BestLatent(known, places, dictionary, batch=self.config.batch)

    def _scores(self, arm: Arm, directions: Float[Tensor, "m d"], known: Known) -> _Scores:
        C = metrics.cosines(directions, known.truth.directions)
        if arm.name.startswith("oracle"):
            pairs = torch.arange(len(known.features)), known.features
            partner, found = known.features, []
        else:
            pairs, partner = metrics.assignment(C), metrics.partners(C)
            found = [*_direction_rows(arm, C, pairs, known)]
            found += _tree_rows(arm, directions, C, pairs, known.truth)
        return _Scores(
            arm, found, Reconstruction(known.mean), Sparsity(len(directions)),
            metrics.Firing(partner), metrics.Support(pairs),
            trees.Edges(trees.latents_of(C, pairs), known.truth.parents),
        )  # fmt: skip

    # ------------------------------------------------------------------------------------- rows

    def _rows_of(self, scores: _Scores) -> Iterator[ResultRow]:
        name, encoder, firing = scores.arm.name, scores.arm.encoder, scores.firing
        found = firing.scores() | {"f1_balanced": firing.f1_balanced()}
        for metric, value in found.items():
            yield from _row(metric, value, "mean over latents", firing.n, name, encoder)
        dead = firing.dead_share()
        yield from _row("dead_share", dead, "share of latents", firing.n, name, encoder)
        for what in scores.support.definitions:
            yield self._measured(scores, scores.support, what)
        by_name = {d.name: d for d in scores.reconstruction.definitions}
        yield self._measured(scores, scores.reconstruction, _r2(by_name["fvu"]))
        ratio = by_name["norm_ratio"]
        shrinkage = Definition("shrinkage", ratio.version, ratio.unit, ratio.of)
        yield self._measured(scores, scores.reconstruction, shrinkage)
        l0 = next(d for d in scores.sparsity.definitions if d.name == "l0")
        yield self._measured(scores, scores.sparsity, l0)

    def _measured(self, scores: _Scores, part: Accumulator, what: Definition) -> ResultRow:
        """Return a metric of sums with its bootstrap error."""
        config, arm, n = self.config, scores.arm, scores.firing.n
        value = float(what.of(part.sums.totals()))
        drawn = over_documents(
            part.sums.table, what.of, resamples=config.resamples, seed=config.seed
        )
        return ResultRow(
            what.name, value, what.unit, n, standard_error(drawn), what.version, arm.name,
            arm.encoder, "truth", drawn,
        )  # fmt: skip


def _direction_rows(
    arm: Arm, C: Float[Tensor, "m n"], pairs: metrics.Pairs, known: Known
) -> Iterator[ResultRow]:
    """Yield what the arm's cosines with the planted directions decide, in any world."""
    found: dict[str, float | None] = {
        "mcc": metrics.mcc(C, pairs),
        "mcc_weighted": metrics.mcc(C, pairs, known.frequency),
        "mcc_signed": metrics.mcc_signed(C, pairs),
        "uniqueness": metrics.uniqueness(C),
        "splitting": trees.splitting(C),
        "matched_share": metrics.matched_share(C, pairs),
        "coverage": metrics.coverage(C, known.features),
    }
    for level, nodes in strata(known.truth.parents).items():
        found[f"coverage[{level}]"] = metrics.coverage(C, nodes.nonzero()[:, 0])
    units = {"mcc": "|cosine|", "mcc_weighted": "|cosine|", "mcc_signed": "cosine"}
    units["splitting"] = "latents per feature"
    for metric, value in found.items():
        yield from _row(metric, value, units.get(metric, "share"), len(C), arm.name, arm.encoder)


def _tree_rows(
    arm: Arm,
    directions: Float[Tensor, "m d"],
    C: Float[Tensor, "m n"],
    pairs: metrics.Pairs,
    truth: Truth,
) -> Iterator[ResultRow]:
    """Yield what directions decide in worlds with parents."""
    parents, levels = truth.parents, levels_of(truth.parents)
    if not bool(levels.any()):
        return
    within, across = metrics.gram_errors(directions, truth.directions, pairs, levels)
    found: dict[str, tuple[float | None, str]] = {
        "matched_children": (metrics.matched_children(C, pairs, parents), "share"),
        "absorption": (metrics.absorption(C, pairs, parents), "cosine"),
        "hedging": (trees.hedging(C, pairs, parents), "cosine"),
        "gram_within": (within, "squared cosine"),
        "gram_across": (across, "squared cosine"),
    }
    for metric, (value, unit) in found.items():
        yield from _row(metric, value, unit, len(C), arm.name, arm.encoder)


def _edge_rows(scores: _Scores, parents: Int[Tensor, " n"]) -> Iterator[ResultRow]:
    """Yield means over the edges of planted trees that lead to each level; `n` is their number."""
    arm, edges = scores.arm, scores.edges
    of_edges = {"edge_recall": edges.recall(), "edge_absorption": edges.absorption()}
    for level, nodes in strata(parents).items():
        for metric, values in of_edges.items():
            mine = values[nodes[edges.children] & ~values.isnan()]
            name, value = f"{metric}[{level}]", float(mine.mean())
            yield from _row(name, value, "mean over edges", len(mine), arm.name, arm.encoder)


def _world_rows(truth: Truth, features_on: Float[Tensor, " n"]) -> Iterator[ResultRow]:
    n, planted = len(features_on), len(truth.directions)
    yield from _row("l0", float(features_on.double().mean()), "features", n, "planted", "none")
    found = {"overlap": metrics.overlap(truth.directions)}
    found |= {f"overlap_{of}": v for of, v in metrics.overlaps(truth.directions).items()}
    for metric, value in found.items():
        yield from _row(metric, value, "|cosine|", planted, "planted", "none")


def _r2(fvu: Definition) -> Definition:
    return Definition("r2", fvu.version, "share", lambda t: 1 - fvu.of(t))


def _row(
    name: str, value: float | None, unit: str, n: int, arm: str, encoder: str
) -> Iterator[ResultRow]:
    """Yield a row without an error bar; nothing where the metric is not defined."""
    if value is not None and not math.isnan(value):
        yield ResultRow(name, value, unit, n, None, metrics.VERSION, arm, encoder, "truth")
