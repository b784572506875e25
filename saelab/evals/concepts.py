"""The concepts evaluator: how well a single latent tells whether a document has a label.

For every label the best latent is chosen on one half of the held-out documents and reported on the
other, beside supervised directions, raw coordinates, random directions and words. Definitions, ends
and error bars of every row: docs/metrics.md.
"""

import logging
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from saelab.config import Config
from saelab.evals.directions import from_covariance, shuffled_labels
from saelab.evals.labelled import (
    SUPERVISED,
    Measured,
    Naming,
    Scorer,
    Taught,
    checked_site,
    coordinates_of,
    cosines_with,
    count_rows,
    difference_row,
    documents_with,
    label_rows,
    latents_of,
    measure,
    pool,
    projections_on,
)
from saelab.evals.sample import sample_rows
from saelab.labels import Labelled, Part, seen_only, word_shares
from saelab.metrics.pooling import Pool, Pooled, Sides, pooled_words
from saelab.ops.linalg import unit_rows
from saelab.ops.shuffle import generator, permutation
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.stats import ResultRow, aucs, weighted_auc

log = logging.getLogger(__name__)

OWN, RAW, WORDS, RANDOM = "dictionary", "raw", "bag_of_words", "random_directions"
COVARIANCE, SHUFFLED = "covariance_directions", "shuffled_labels"
DRAWS = 20
"""Directions of shuffled labels, of each label."""
_ROWS, _ROWS_READ = 4096, 1024
"""Training rows behind the covariance, and how many are read at once."""
POOLS: tuple[Pool, ...] = ("max", "mean")
FLOOR = 1e-3
"""Mean cosines below are raised to it before their ratio is taken."""
_STREAM = 1 << 17
"""Stream of the random directions."""


class ConceptsConfig(Config):
    """Which documents and candidates; every arm is treated alike."""

    labels: tuple[str, ...] = ()
    """Labels to tell apart, two or more; documents of others are left out. By default all that are
    frequent enough."""
    sides: Sides = "two"
    """`two`: a latent and its opposite are both candidates. `one`: only the latent."""
    documents: PositiveInt = 4000
    """Documents of each split, at most; the held-out ones are halved."""
    per_label: Annotated[int, Field(ge=2)] = 10
    """Labels with fewer documents in training or in a half are left out and counted."""
    candidates: PositiveInt | None = None
    """Latents, coordinates or words that each arm may choose from, drawn by the seed: makes arms
    of different width alike. By default all."""
    words: PositiveInt = 4096
    """Words of the bag of words: the commonest of the training documents."""
    batch: PositiveInt = 1024
    """Rows held at once."""
    resamples: PositiveInt = 1000
    """Bootstrap resamples behind each standard error."""
    seed: int = 0
    """Of the random directions, of drawn candidates and of the bootstrap."""


@dataclass(frozen=True)
class _Choice:
    """An arm's best column for every label, chosen on one half."""

    columns: Int[Tensor, " classes"]
    n_candidates: Int[Tensor, " classes"]
    """Columns that vary over the choosing half."""
    width: int
    """Scores of the arm: a column behind them is the opposite of a score."""

    @property
    def places(self) -> Int[Tensor, " classes"]:
        """The score that each column belongs to."""
        return self.columns % self.width

    @property
    def signs(self) -> Int[Tensor, " classes"]:
        """−1 for the opposite of a score."""
        return 1 - 2 * (self.columns >= self.width).long()


@dataclass(frozen=True)
class _Scene:
    """What is scored, and with which directions."""

    labelled: Labelled
    choose: Part
    test: Part
    arms: Mapping[str, tuple[Pooled, Pooled]]
    """Scores of the choosing half, and of the half that is reported."""
    directions: Mapping[str, Float[Tensor, "m d"]]


@dataclass(frozen=True)
class _Ground:
    """What the training documents teach, whatever the dictionary."""

    taught: Taught
    shuffled: Float[Tensor, "classes_draws d"]
    """`DRAWS` directions of shuffled labels for the first label, then for the next."""
    rows: Float[Tensor, "n d"]
    """Activations of the training split."""

    def scored(self, d_sae: int, seed: int) -> dict[str, Float[Tensor, "m d"]]:
        """Return the directions whose projections are scores: random ones, d_sae of a kind and
        some of each label, and those that labels give."""
        shape = (d_sae, self.rows.shape[1])
        return {
            RANDOM: unit_rows(torch.randn(shape, generator=generator(seed, _STREAM))),
            COVARIANCE: from_covariance(self.rows, d_sae, seed=seed),
            SHUFFLED: self.shuffled,
            **self.taught.directions,
        }


@final
class ConceptsEvaluator:
    """Chooses and scores a latent for every label of one site's documents."""

    name = "concepts"
    version = 2

    def __init__(self, config: ConceptsConfig | None = None, site: str | None = None) -> None:
        """Measure at `site`; by default the store's only one."""
        self.config = config or ConceptsConfig()
        self.site = site
        self._kept: tuple[Hashable, _Ground] | None = None

    def __call__(
        self,
        dictionary: Dictionary,
        store: Store,
        model: LanguageModel | None = None,  # noqa: ARG002  (nothing is spliced)
    ) -> Iterator[ResultRow]:
        """Yield what was scored, every arm's rows, the dictionary's differences, the SNMF score.

        Raises ConfigError if the documents have no two labels that are frequent enough, and
        ArtifactError if the dictionary has another width.
        """
        site = checked_site(dictionary, store, self.site)
        scene = self._scene(dictionary, store, site)
        yield from count_rows(scene.labelled, self.name, self.version)
        chosen: dict[str, _Choice] = {}
        for how in POOLS:
            found: dict[str, Measured] = {}
            for arm in scene.arms:
                choice = self._choose(scene, arm, how)
                chosen.setdefault(arm, choice)
                found[arm] = self._detection(scene, arm, how, choice)
                yield from self._rows(scene, arm, how, choice, found[arm])
            for arm in found:
                if arm != OWN:
                    naming = self._naming(f"concept_auc_over({arm})", f"[{how}]", "AUC", OWN)
                    n = len(scene.test.documents)
                    yield difference_row(naming, found[OWN], found[arm], n)
        yield from self._snmf(scene, store, site, chosen)

    # ------------------------------------------------------------------------------------- set-up

    def _scene(self, dictionary: Dictionary, store: Store, site: str) -> _Scene:
        config = self.config
        labelled = documents_with(
            config.labels, store, "halves", evaluator=self.name,
            at_most=config.documents, per_class=config.per_label,
        )  # fmt: skip
        ground = self._grounded(store, site, labelled)
        scored = ground.scored(dictionary.d_sae, config.seed)
        directions = {RAW: torch.eye(store.width(site)), **scored}
        scorers = {OWN: latents_of(dictionary), RAW: coordinates_of(store.width(site))}
        scorers |= {arm: projections_on(W, ground.taught.mean) for arm, W in scored.items()}
        if dictionary.d_out == dictionary.d_in:
            directions[OWN] = dictionary.W_dec.detach().float().cpu()
        else:
            log.info("a dictionary from one site to another has no SNMF score")
        choose, test, arms = self._pooled(store, site, labelled, scorers)
        texts = {"train": labelled.parts["train"].texts, "choose": choose.texts, "test": test.texts}
        _, shares = word_shares(texts, config.words)
        arms[WORDS] = (pooled_words(shares["choose"]), pooled_words(shares["test"]))
        return _Scene(labelled, choose, test, arms, directions)

    def _grounded(self, store: Store, site: str, labelled: Labelled) -> _Ground:
        """Fit the directions of labels, true and shuffled, on the mean activation of each training
        document; sample rows for the covariance."""
        key = (store.content_hash, site)
        if self._kept is None or self._kept[0] != key:
            part = labelled.parts["train"]
            scorers = {RAW: coordinates_of(store.width(site))}
            found, seen = pool(
                store, site, "train", part.documents, scorers, batch=self.config.batch
            )
            targets = seen_only(part, seen, labelled, site).targets
            x, seed = found[RAW].mean, self.config.seed
            shuffled = [shuffled_labels(x, positive, DRAWS, seed=seed) for positive in targets.T]
            sample = sample_rows(store, site, "train", _ROWS, batch=_ROWS_READ, seed=seed)
            rows = torch.cat([batch.x for batch in sample]).float()
            self._kept = (key, _Ground(Taught.by(x, targets), torch.cat(shuffled), rows))
        return self._kept[1]

    def _pooled(
        self, store: Store, site: str, labelled: Labelled, scorers: Mapping[str, Scorer]
    ) -> tuple[Part, Part, dict[str, tuple[Pooled, Pooled]]]:
        """Return both halves, and each arm's scores of them, in one pass."""
        halves = labelled.parts["choose"], labelled.parts["test"]
        documents = torch.cat([half.documents for half in halves]).sort().values
        pooled, seen = pool(store, site, "heldout", documents, scorers, batch=self.config.batch)
        known = documents[seen]
        choose, test = (
            seen_only(half, torch.isin(half.documents, known), labelled, site) for half in halves
        )
        first = torch.isin(known, choose.documents)
        return choose, test, {a: (p.where(first), p.where(~first)) for a, p in pooled.items()}

    # ---------------------------------------------------------------------------------- detection

    def _choose(self, scene: _Scene, arm: str, how: Pool) -> _Choice:
        """Return the column with the largest AUC on the choosing half, for each label."""
        scores = scene.arms[arm][0].columns(how, self.config.sides, opposite=True)
        width = scene.arms[arm][0].mean.shape[1]
        places = torch.arange(scores.shape[1]) % max(width, 1)
        varies = (scores != scores[:1]).any(0)
        if arm in (SHUFFLED, *SUPERVISED):
            n = DRAWS if arm == SHUFFLED else 1
            allowed = places // n == torch.arange(width // n)[:, None]
        else:
            drawn = permutation(width, self.config.seed)[: self.config.candidates]
            allowed = torch.isin(places, drawn).expand(len(scene.labelled.classes), -1)
        allowed = allowed & varies
        found = aucs(scores, scene.choose.targets)
        best = torch.where(allowed, found, -1).argmax(1) if scores.shape[1] else None
        columns = torch.zeros(len(allowed), dtype=torch.int64) if best is None else best
        return _Choice(columns, allowed.sum(1), max(width, 1))

    def _detection(self, scene: _Scene, arm: str, how: Pool, choice: _Choice) -> Measured:
        """Return the chosen columns' AUC on the other half; .5 where none was to be chosen."""
        scores = scene.arms[arm][1].columns(how, self.config.sides, opposite=True)
        if scores.shape[1] == 0:
            scores = torch.zeros(len(scores), 1)
        picked = scores[:, choice.columns]

        def area(weights: Tensor) -> Tensor:
            pairs = zip(picked.T, scene.test.targets.T, strict=True)
            return torch.stack([weighted_auc(*p, weights) for p in pairs], 1)

        return self._measure(area, len(picked))

    # ------------------------------------------------------------------------------ the SNMF score

    def _snmf(
        self, scene: _Scene, store: Store, site: str, chosen: Mapping[str, _Choice]
    ) -> Iterator[ResultRow]:
        """Yield log(mean largest cosine over documents of the label / over the others), and how
        many of them are above 0."""
        scorers = {
            arm: cosines_with(W[chosen[arm].places] * chosen[arm].signs[:, None])
            for arm, W in scene.directions.items()
        }
        pooled, _ = pool(
            store, site, "heldout", scene.test.documents, scorers, batch=self.config.batch
        )
        n = len(scene.test.documents)
        for arm, found in pooled.items():
            means = mean_cosines(found.high, scene.test.targets)
            score = self._measure(lambda w, of=means: log_ratio(of(w)), n)
            naming = self._naming("snmf_score", "", "nats", arm)
            yield from label_rows(naming, score, scene.labelled.classes, n)
            naming = self._naming("snmf_positive", "", "share of labels", arm)
            yield from label_rows(naming, score.positive, (), n)
            clamped = means(torch.ones(1, n, dtype=torch.float64)) < FLOOR
            share = float(clamped.double().mean())
            yield self._plain("snmf_clamped", share, "share of means", n, arm)

    # --------------------------------------------------------------------------------------- rows

    def _rows(
        self, scene: _Scene, arm: str, how: Pool, choice: _Choice, measured: Measured
    ) -> Iterator[ResultRow]:
        n, classes = len(scene.test.documents), scene.labelled.classes
        yield from label_rows(
            self._naming("concept_auc", f"[{how}]", "AUC", arm), measured, classes, n
        )
        number = float(choice.n_candidates.double().mean())
        yield self._plain(f"concept_candidates[{how}]", number, "columns", n, arm)
        if arm != OWN:
            return
        for label, place, sign in zip(classes, choice.places, choice.signs, strict=True):
            unit = "latent" if sign > 0 else "latent, opposite"
            yield self._plain(f"concept_latent[{how}]({label})", float(place), unit, n, arm)

    def _measure(self, statistic, n: int) -> Measured:
        return measure(statistic, n, resamples=self.config.resamples, seed=self.config.seed)

    def _plain(self, name: str, value: float, unit: str, n: int, arm: str) -> ResultRow:
        """Return a row without an error bar."""
        encoder = "own" if arm == OWN else "none"
        return ResultRow(name, value, unit, n, None, self.version, arm, encoder, self.name)

    def _naming(self, metric: str, suffix: str, unit: str, arm: str) -> Naming:
        encoder = "own" if arm == OWN else "none"
        return Naming(metric, suffix, unit, arm, encoder, self.name, self.version)


def mean_cosines(largest: Float[Tensor, "n classes"], targets: Bool[Tensor, "n classes"]):
    """Return the function from documents' weights to the mean of each label's largest cosines:
    over documents of the label, and over the others."""

    def means(weights: Float[Tensor, "b n"]) -> Float[Tensor, "b two classes"]:
        found = []
        for side in (targets, ~targets):
            truth = side.to(weights)
            found.append((weights @ (largest.to(weights) * truth)) / (weights @ truth))
        return torch.stack(found, 1)

    return means


def log_ratio(means: Float[Tensor, "b two classes"]) -> Float[Tensor, "b classes"]:
    """Return log(first / second), means below `FLOOR` raised to it."""
    raised = means.clamp(min=FLOOR).log()
    return raised[:, 0] - raised[:, 1]
