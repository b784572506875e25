"""The probing evaluator: what can be read off a few latents about a document's label.

Definitions, ends and error bars of every row: docs/metrics.md. Latents are chosen and probes are
fitted on training documents, and scored on held-out ones.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from saelab.config import Config
from saelab.evals.labelled import (
    SUPERVISED,
    Measured,
    Naming,
    Scorer,
    Taught,
    checked_site,
    coordinates_of,
    count_rows,
    difference_row,
    documents_with,
    label_rows,
    latents_of,
    measure,
    pool,
)
from saelab.labels import Labelled, Part, seen_only, word_shares
from saelab.metrics.pooling import Pool, Pooled, Sides, pooled_words
from saelab.probes import Rule, fit_probe, ranked_columns
from saelab.protocols import Dictionary, LanguageModel, Split, Store
from saelab.stats import ResultRow, weighted_auc, weighted_balanced_accuracy

OWN, RAW, WORDS = "dictionary", "raw", "bag_of_words"


class ProbingConfig(Config):
    """Which documents and probes; every arm is treated alike."""

    labels: tuple[str, ...] = ()
    """Labels to tell apart, two or more; documents of others are left out. By default all that are
    frequent enough."""
    ks: tuple[PositiveInt, ...] = (1, 2, 5, 20)
    """Numbers of latents that a probe may use."""
    pools: tuple[Pool, ...] = ("max", "mean")
    """How a document's rows become one: the largest score of each latent, or its mean."""
    select: Rule = "mean_difference"
    """How a probe's latents are chosen: by the difference of the classes' means over training
    documents, or that in standard deviations of the latent."""
    sides: Sides = "two"
    """`two`: a latent's largest negative score is a candidate as well as its largest, and a latent
    may be lower in the class. `one`: neither."""
    documents: PositiveInt = 4000
    """Documents of each split, at most."""
    per_label: Annotated[int, Field(ge=2)] = 10
    """Labels with fewer documents in a split are left out and counted."""
    words: PositiveInt = 4096
    """Words of the bag of words: the commonest of the training documents."""
    strength: PositiveFloat = 1.0
    """C of the logistic regression: 1 / weight of the squared norm, columns standardised."""
    batch: PositiveInt = 1024
    """Rows held at once."""
    resamples: PositiveInt = 1000
    """Bootstrap resamples behind each standard error."""
    seed: int = 0
    """Of the bootstrap."""


@dataclass(frozen=True)
class _Outcome:
    """What probes of one kind say of the held-out documents."""

    arm: str
    kind: str
    """`k=1,max`, or `all,max` for a probe on all columns."""
    metrics: Mapping[str, Measured]


@dataclass(frozen=True)
class _Scene:
    """What is scored: the documents that have rows, and each arm's scores of them."""

    labelled: Labelled
    train: Part
    test: Part
    arms: Mapping[str, tuple[Pooled, Pooled]]


@final
class ProbingEvaluator:
    """Fits k-sparse probes for every label of one site's documents.

    What does not depend on the dictionary is fitted once, and kept as long as store and site stay
    the same.
    """

    name = "probing"
    version = 2

    def __init__(self, config: ProbingConfig | None = None, site: str | None = None) -> None:
        """Measure at `site`; by default the store's only one."""
        self.config = config or ProbingConfig()
        self.site = site
        self._kept: tuple[Hashable, list[_Outcome]] | None = None

    def __call__(
        self,
        dictionary: Dictionary,
        store: Store,
        model: LanguageModel | None = None,  # noqa: ARG002  (nothing is spliced)
    ) -> Iterator[ResultRow]:
        """Yield what was scored, then every arm's rows, then the dictionary's differences.

        Raises ConfigError if the documents have no two labels that are frequent enough, and
        ArtifactError if the dictionary has another width.
        """
        site = checked_site(dictionary, store, self.site)
        key = (store.content_hash, site)
        known = self._kept[1] if self._kept is not None and self._kept[0] == key else None
        scene = self._scene(dictionary, store, site, with_others=known is None)
        if known is None:
            known = [o for arm in scene.arms if arm != OWN for o in self._outcomes(scene, arm)]
            self._kept = (key, known)
        own = list(self._outcomes(scene, OWN))
        n = len(scene.test.documents)
        yield from count_rows(scene.labelled, self.name, self.version)
        for outcome in (*own, *known):
            for metric, measured in outcome.metrics.items():
                naming = self._naming(metric, outcome)
                yield from label_rows(naming, measured, scene.labelled.classes, n)
        yield from self._differences(own, known, n)

    def _scene(
        self, dictionary: Dictionary, store: Store, site: str, *, with_others: bool
    ) -> _Scene:
        """Pool every arm's scores, in one pass over each split, and in a second one those of the
        directions that the first pass teaches."""
        config = self.config
        labelled = documents_with(
            config.labels, store, "split", evaluator=self.name,
            at_most=config.documents, per_class=config.per_label,
        )  # fmt: skip
        scorers = {OWN: latents_of(dictionary)}
        if with_others:
            scorers[RAW] = coordinates_of(store.width(site))
        arms, train, test = self._pooled(store, site, labelled, scorers)
        if with_others:
            taught = Taught.by(arms[RAW][0].mean, train.targets)
            arms |= self._pooled(store, site, labelled, taught.scorers())[0]
            _, shares = word_shares({"train": train.texts, "test": test.texts}, config.words)
            arms[WORDS] = (pooled_words(shares["train"]), pooled_words(shares["test"]))
        return _Scene(labelled, train, test, arms)

    def _pooled(
        self, store: Store, site: str, labelled: Labelled, scorers: Mapping[str, Scorer]
    ) -> tuple[dict[str, tuple[Pooled, Pooled]], Part, Part]:
        """Return the scores of both splits' documents, and the documents that have rows."""
        parts: list[Part] = []
        pooled: list[dict[str, Pooled]] = []
        splits: dict[str, Split] = {"train": "train", "test": "heldout"}
        for name, split in splits.items():
            part = labelled.parts[name]
            found, seen = pool(store, site, split, part.documents, scorers, batch=self.config.batch)
            parts.append(seen_only(part, seen, labelled, site))
            pooled.append(found)
        train, test = parts
        return {name: (pooled[0][name], pooled[1][name]) for name in scorers}, train, test

    # ------------------------------------------------------------------------------------- probes

    def _outcomes(self, scene: _Scene, arm: str) -> Iterator[_Outcome]:
        """Yield what probes on an arm say.

        Those on a label's own direction have no other column. Those on coordinates or words may
        also have all.
        """
        config = self.config
        train, test = scene.arms[arm]
        for how in config.pools:
            fit, report = (p.columns(how, config.sides, opposite=False) for p in (train, test))
            kinds: list[int | None] = [*config.ks, *(() if arm == OWN else (None,))]
            if arm in SUPERVISED:
                kinds = [1]
            scores = {k: torch.zeros(scene.test.targets.shape).double() for k in kinds}
            orders = self._orders(fit, scene.train, arm)
            for place, positive in enumerate(scene.train.targets.T):
                for k in kinds:
                    columns = None if k is None else orders[place][:k]
                    probe = fit_probe(fit, positive, columns, strength=config.strength)
                    scores[k][:, place] = probe.scores(report)
            for k, found in scores.items():
                kind = f"{'all' if k is None else f'k={k}'},{how}"
                yield _Outcome(arm, kind, self._metrics(found, scene.test.targets))

    def _orders(
        self, features: Float[Tensor, "n columns"], train: Part, arm: str
    ) -> list[Int[Tensor, " ranked"]]:
        """Return each label's columns, the best first."""
        if arm in SUPERVISED:
            return list(torch.arange(train.targets.shape[1])[:, None])
        two_sided = self.config.sides == "two"
        return ranked_columns(features, train.targets, rule=self.config.select, two_sided=two_sided)

    def _metrics(
        self, scores: Float[Tensor, "n classes"], targets: Bool[Tensor, "n classes"]
    ) -> dict[str, Measured]:
        def accuracy(weights: Tensor) -> Tensor:
            pairs = zip((scores > 0).T, targets.T, strict=True)
            return torch.stack([weighted_balanced_accuracy(*p, weights) for p in pairs], 1)

        def area(weights: Tensor) -> Tensor:
            pairs = zip(scores.T, targets.T, strict=True)
            return torch.stack([weighted_auc(*p, weights) for p in pairs], 1)

        resampling = {"resamples": self.config.resamples, "seed": self.config.seed}
        return {
            "probe_accuracy": measure(accuracy, len(scores), **resampling),
            "probe_auc": measure(area, len(scores), **resampling),
        }

    # --------------------------------------------------------------------------------------- rows

    def _differences(
        self, own: list[_Outcome], others: list[_Outcome], n: int
    ) -> Iterator[ResultRow]:
        """Yield the dictionary's lead over each other arm with as many columns, paired."""
        by_kind = {(outcome.arm, outcome.kind): outcome for outcome in others}
        for outcome in own:
            for arm in (RAW, WORDS, *SUPERVISED):
                beside = by_kind.get((arm, outcome.kind))
                if beside is None:  # a label has one direction of its own
                    continue
                for metric, measured in outcome.metrics.items():
                    naming = self._naming(f"{metric}_over({arm})", outcome)
                    yield difference_row(naming, measured, beside.metrics[metric], n)

    def _naming(self, metric: str, outcome: _Outcome) -> Naming:
        unit = "balanced accuracy" if metric.startswith("probe_accuracy") else "AUC"
        encoder = "own" if outcome.arm == OWN else "none"
        return Naming(
            metric, f"[{outcome.kind}]", unit, outcome.arm, encoder, self.name, self.version
        )
