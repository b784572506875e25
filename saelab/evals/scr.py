"""Spurious correlation removal: does ablating one attribute's latents free a probe of it?

Documents have two attributes of two values, in all four combinations. A *spurious* probe sees only
those in which both agree (professors who are men, nurses who are women), so that it cannot know
which of the two it was meant to tell. The halves of latents with the largest
|mean over one value − mean over the other| · |⟨d, w⟩|, w a probe of one attribute on all
combinations alike, are ablated, and the spurious probe is asked for the other attribute:

    SCR = (accuracy ablated − accuracy before) / (accuracy of a clean probe − accuracy before)

It is 1 where the probe does as well as one that never saw the correlation, and 0 where it does no
better than before. Asked for is the attribute that the spurious probe tells worse. An accuracy is
the mean over the four combinations. `perturbation.py` says what a half is, and why this is cheap.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ConfigError
from saelab.evals.attributes import Attributes, AttributesConfig, attributes_of, both_of
from saelab.evals.labelled import (
    Measured,
    Naming,
    checked_site,
    count_rows,
    difference_row,
    label_rows,
    measure,
)
from saelab.evals.perturbation import (
    LATENTS,
    OWN,
    PROBE,
    SHUFFLE,
    SHUFFLED,
    AblationConfig,
    Halves,
    Scene,
    check_dictionary,
    coder_of,
    differences,
    encoder_of,
    fall,
    fall_along,
    group_accuracies,
    matched,
    pooled_halves,
    scene_of,
    strongest,
)
from saelab.labels import Labelled, documents_of, labelled_documents
from saelab.ops.shuffle import permutation
from saelab.probes import Probe, fit_probe, mean_difference
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.stats import ResultRow
from saelab.types import Document

LEAST_GAP = 1e-3
"""A clean probe that is better by less leaves nothing to recover: the score is 0, and says so."""
_BALANCE = 1 << 20
"""Stream of the documents that balance the combinations."""


class ScrConfig(AblationConfig):
    """Which attributes are confounded, and how many latents of one of them are ablated."""

    attributes: AttributesConfig = AttributesConfig()
    """The two attributes."""


@dataclass(frozen=True)
class _Pair:
    """A spurious probe, and what it is asked."""

    name: str
    tested: int
    """The attribute that is asked for, the one it tells worse: 0 or 1. The other is removed."""
    x: Float[Tensor, "n d"]
    """Means of as many training documents of each combination."""
    places: Int[Tensor, " n"]
    """Which of the training documents these are."""
    removed: Bool[Tensor, "n one"]
    """Which of them have the first value of the removed attribute."""
    cells: Bool[Tensor, "m four"]
    """Which combination each held-out document has, if any of them."""
    spurious: Probe
    clean: tuple[Probe, Probe]
    """A probe of each attribute, on all combinations alike."""

    @property
    def truth(self) -> Bool[Tensor, " m"]:
        """Which held-out documents have the first value of the attribute asked for."""
        return self.cells[:, [0, 1 + self.tested]].any(1)

    @property
    def remover(self) -> Float[Tensor, "one d"]:
        """The weights of the probe whose latents are ablated."""
        return self.clean[1 - self.tested].weight[None]


@dataclass(frozen=True)
class _Outcome:
    """What the spurious probes say once latents are ablated."""

    arm: str
    n: int
    ablated: float
    """Mean over pairs of the number of latents that were ablated."""
    score: Measured


@dataclass(frozen=True)
class _Ground:
    """What the dictionaries of a site share."""

    scene: Scene
    pairs: tuple[_Pair, ...]
    scores: Float[Tensor, "m pairs"]
    """Of the held-out documents by the spurious probes, before anything is ablated."""
    clean: Float[Tensor, "m pairs"]
    """Whether the clean probe of the attribute asked for is right about them."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the pairs are called in rows."""
        return tuple(pair.name for pair in self.pairs)

    @property
    def groups(self) -> Bool[Tensor, "m four pairs"]:
        """The documents of each combination."""
        return torch.stack([pair.cells for pair in self.pairs], 2)

    def right(self, draws: Sequence[Float[Tensor, "m pairs"]]) -> Float[Tensor, "m pairs"]:
        """Return in which share of the draws each spurious probe is right about each document,
        after its scores fall by as much."""
        truth = torch.stack([pair.truth for pair in self.pairs], 1)
        total = torch.zeros_like(self.scores)
        for falls in draws:
            total += (self.scores - falls > 0) == truth
        return total / len(draws)

    @property
    def before(self) -> Float[Tensor, "m pairs"]:
        """Whether the spurious probes are right before anything is ablated."""
        return self.right([torch.zeros_like(self.scores)])


def recovered(
    ablated: Float[Tensor, "*b"], before: Float[Tensor, "*b"], clean: Float[Tensor, "*b"]
) -> Float[Tensor, "*b"]:
    """Return the share of the way from `before` to `clean`; 0 if that is less than `LEAST_GAP`."""
    small = clean - before < LEAST_GAP
    return torch.where(small, 0.0, (ablated - before) / torch.where(small, 1.0, clean - before))


@final
class ScrEvaluator:
    """Takes the latents of a confounding attribute out of what a misled probe sees."""

    name = "scr"
    version = 1

    def __init__(self, config: ScrConfig | None = None, site: str | None = None) -> None:
        """Measure at `site`; by default the store's only one."""
        self.config = config or ScrConfig()
        self.site = site
        self._kept: tuple[Hashable, _Ground, list[_Outcome]] | None = None

    def __call__(
        self,
        dictionary: Dictionary,
        store: Store,
        model: LanguageModel | None = None,  # noqa: ARG002  (nothing is spliced)
    ) -> Iterator[ResultRow]:
        """Yield what was scored, the probes' accuracies, every arm's rows, then the dictionary's
        differences.

        Raises ConfigError if the documents have no two attributes, too few have a combination, or
        the dictionary has fewer latents than are to be ablated, and ArtifactError if it does not
        map the site to itself.
        """
        site = checked_site(dictionary, store, self.site)
        check_dictionary(dictionary, self.config.ns, self.name)
        ground, shared = self._grounded(store, site)
        labelled, coders = ground.scene.labelled, {OWN: coder_of(dictionary)}
        halves, *_ = pooled_halves(store, site, labelled, coders, self.config)
        own = list(self._ablations(ground, OWN, halves[OWN]))
        others = [*self._ablations(ground, LATENTS, halves[OWN]), *shared]
        yield from count_rows(labelled, self.name, self.version)
        yield from self._rows(ground, own, others)

    # ------------------------------------------------------------------------------------- set-up

    def _grounded(self, store: Store, site: str) -> tuple[_Ground, list[_Outcome]]:
        """Return what does not depend on the dictionary, from before if it is the same site."""
        key = (store.content_hash, site)
        if self._kept is None or self._kept[0] != key:
            config = self.config
            labelled, attributes = self._labelled(store)
            scene, bases = scene_of(store, site, labelled, config)
            pairs = tuple(self._pair(scene, attributes, pair) for pair in attributes.pairs)
            scores = [pair.spurious.scores(scene.x_test) for pair in pairs]
            clean = [(p.clean[p.tested].scores(scene.x_test) > 0) == p.truth for p in pairs]
            ground = _Ground(scene, pairs, torch.stack(scores, 1), torch.stack(clean, 1).double())
            arms = [o for arm in bases for o in self._ablations(ground, arm, bases[arm])]
            self._kept = (key, ground, [*self._supervised(ground), *arms])
        return self._kept[1], self._kept[2]

    def _labelled(self, store: Store) -> tuple[Labelled, Attributes]:
        """Return the documents of the combinations that are asked for, and the attributes."""
        config = self.config
        every = (both_of(document, config.attributes) for document in documents_of(store))
        known = (label for label in every if label is not None)
        attributes = attributes_of(known, config.attributes)
        wanted = {c for pair in attributes.pairs for c in attributes.combinations(pair)}

        def label_of(document: Document) -> str | None:
            label = both_of(document, config.attributes)
            return label if label in wanted else None

        labelled = labelled_documents(
            store, "split", at_most=config.documents, per_class=config.per_label, label_of=label_of
        )
        rare = sorted(wanted - set(labelled.classes))
        if rare:
            raise ConfigError(
                f"scr needs {config.per_label} documents of each combination in each split, but "
                f"there are fewer of {', '.join(rare)}: take more text, other attributes, or a "
                "smaller scr.per_label"
            )
        return labelled, attributes

    def _pair(self, scene: Scene, attributes: Attributes, pair: tuple[str, str]) -> _Pair:
        """Fit the probes of a pair, on as many training documents of each combination."""
        columns = [scene.labelled.classes.index(c) for c in attributes.combinations(pair)]
        train, cells = scene.train.targets[:, columns], scene.test.targets[:, columns]
        mixed = permutation(len(train), self.config.seed, _BALANCE)
        n, strength = int(train.sum(0).min()), self.config.strength
        places = torch.cat([mixed[has[mixed]][:n] for has in train.T]).sort().values
        x, has = scene.x_train[places], train[places]
        first, second = has[:, [0, 1]].any(1), has[:, [0, 2]].any(1)
        agree = first == second
        spurious = fit_probe(x[agree], first[agree], strength=strength)
        clean = (fit_probe(x, first, strength=strength), fit_probe(x, second, strength=strength))
        # Where the attributes disagree, the probe is right about just one of them. Which one is
        # seen on training documents that it was not fitted on.
        told = (spurious.scores(x[~agree]) > 0) == first[~agree]
        tested = int(told.double().mean() > 0.5)
        removed = (second, first)[tested][:, None]
        return _Pair(" or ".join(pair), tested, x, places, removed, cells, spurious, clean)

    # --------------------------------------------------------------------------------------- arms

    def _ablations(self, ground: _Ground, arm: str, halves: Halves) -> Iterator[_Outcome]:
        """Yield what ablating an arm's strongest halves does, or as many random ones."""
        config, sizes = self.config, halves.sizes
        orders = [self._order(pair, halves) for pair in ground.pairs]
        draws = [orders]
        if arm == LATENTS:
            draws = [
                [matched(o, sizes, config.seed, draw, place) for place, o in enumerate(orders)]
                for draw in range(config.draws)
            ]
        pushes = [halves.pushes(pair.spurious.weight[None]) for pair in ground.pairs]
        for n in config.ns:
            falls = [
                _beside(fall(halves.test, *of) for of in zip(pushes, _cut(sets, n), strict=True))
                for sets in draws
            ]
            ablated = sum(map(len, _cut(orders, n))) / len(orders)
            yield _Outcome(arm, n, ablated, self._score(ground, falls))

    def _order(self, pair: _Pair, halves: Halves) -> Int[Tensor, " k"]:
        """Return the halves of the removed attribute, the strongest first."""
        apart = differences(halves.train[pair.places], pair.removed)
        effects = (apart * halves.pushes(pair.remover).T)[0].abs()
        return strongest(effects, self.config.ns[-1])

    def _supervised(self, ground: _Ground) -> Iterator[_Outcome]:
        """Yield what projecting out the removed attribute's direction does: one, all of it."""
        seed = self.config.seed
        shuffled = [
            [
                mean_difference(p.x, p.removed[permutation(len(p.x), seed, SHUFFLE, draw)])
                for p in ground.pairs
            ]
            for draw in range(self.config.draws)
        ]
        found = {
            "mean_difference": [[mean_difference(p.x, p.removed) for p in ground.pairs]],
            "linear_probe": [[p.remover for p in ground.pairs]],
            SHUFFLED: shuffled,
        }
        x = ground.scene.x_test
        for arm, draws in found.items():
            falls = [
                _beside(
                    fall_along(x, p.x.mean(0), u[0], p.spurious.weight[None])
                    for p, u in zip(ground.pairs, directions, strict=True)
                )
                for directions in draws
            ]
            yield _Outcome(arm, 1, 1.0, self._score(ground, falls))

    def _score(self, ground: _Ground, falls: Sequence[Float[Tensor, "m pairs"]]) -> Measured:
        """Return the share of the gap that ablations with these falls of the scores recover."""
        table = torch.stack([ground.right(falls), ground.before, ground.clean], 1)
        groups = ground.groups
        return self._measure(
            lambda w: recovered(*group_accuracies(table, groups, w).unbind(1)), len(table)
        )

    def _measure(self, statistic, n: int) -> Measured:
        return measure(statistic, n, resamples=self.config.resamples, seed=self.config.seed)

    # --------------------------------------------------------------------------------------- rows

    def _rows(
        self, ground: _Ground, own: list[_Outcome], others: list[_Outcome]
    ) -> Iterator[ResultRow]:
        n, groups = len(ground.scores), ground.groups
        table = torch.stack([ground.before, ground.clean], 1)
        found = self._measure(lambda w: group_accuracies(table, groups, w).flatten(1), n)
        before, clean = found.split(len(ground.pairs))
        for metric, measured in (("scr_before", before), ("scr_clean", clean)):
            naming = self._naming(metric, "", "accuracy", PROBE)
            yield from label_rows(naming, measured, ground.names, n)
        small = (clean.values - before.values < LEAST_GAP).tolist()
        yield self._plain("scr_without_gap", sum(small) / len(small), "share of pairs", n, PROBE)
        for pair in ground.pairs:
            tested = float(1 + pair.tested)
            yield self._plain(f"scr_tested({pair.name})", tested, "attribute", n, PROBE)
        for outcome in (*own, *others):
            yield from self._scores(ground, outcome, small)
        mine = {outcome.n: outcome.score for outcome in own}
        for other in others:
            if other.n in mine:
                suffix = f"[n={other.n}]"
                naming = self._naming(f"scr_over({other.arm})", suffix, "share of the gap", OWN)
                yield difference_row(naming, mine[other.n], other.score, n)

    def _scores(
        self, ground: _Ground, outcome: _Outcome, small: Sequence[bool]
    ) -> Iterator[ResultRow]:
        """Yield an arm's scores; the unit says where a pair has no gap to recover."""
        suffix, n, total = f"[n={outcome.n}]", len(ground.scores), sum(small)
        naming = self._naming("scr", suffix, "share of the gap", outcome.arm)
        flags = [f"{total} of {len(small)} pairs have no gap" if total else ""]
        flags += ["no gap" if flag else "" for flag in small]
        rows = label_rows(naming, outcome.score, ground.names, n)
        for row, flag in zip(rows, flags, strict=True):
            yield replace(row, unit=f"{row.unit}; {flag}: 0") if flag else row
        yield self._plain(f"scr_ablated{suffix}", outcome.ablated, "latents", n, outcome.arm)

    def _plain(self, name: str, value: float, unit: str, n: int, arm: str) -> ResultRow:
        """Return a row without an error bar."""
        encoder = encoder_of(arm)
        return ResultRow(name, value, unit, n, None, self.version, arm, encoder, self.name)

    def _naming(self, metric: str, suffix: str, unit: str, arm: str) -> Naming:
        return Naming(metric, suffix, unit, arm, encoder_of(arm), self.name, self.version)


def _beside(columns: Iterable[Float[Tensor, "m one"]]) -> Float[Tensor, "m columns"]:
    return torch.cat(list(columns), 1)


def _cut(sets: Sequence[Int[Tensor, " k"]], n: int) -> list[Int[Tensor, " n"]]:
    return [order[:n] for order in sets]
