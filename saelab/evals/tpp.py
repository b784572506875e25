"""Targeted probe perturbation: does ablating a label's latents hurt its own probe, and no other?

For every label a linear probe tells its documents from all others. The halves of latents with the
largest effect on it, clamp(mean over the label's documents − mean over the others, ≥ 0) · ⟨d, w⟩,
are ablated, and all probes are asked again on held-out documents:

    TPP = mean over labels of [fall of the label's own accuracy − mean fall of the others']

A half whose effect is not above 0 is never ablated: what fires less on the label, or speaks against
it, is none of its latents, whatever the sign of the code (`perturbation.py` says what a half is).
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.evals.labelled import (
    Measured,
    Naming,
    checked_site,
    count_rows,
    difference_row,
    documents_with,
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
from saelab.labels import Labelled
from saelab.ops.shuffle import permutation
from saelab.probes import fit_probe, mean_difference
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.stats import ResultRow

METRICS = ("tpp", "tpp_own", "tpp_others")
_FEWEST = 3


class TppConfig(AblationConfig):
    """Which labels are perturbed, and how far."""

    labels: tuple[str, ...] = ()
    """Labels to perturb, three or more; documents of others are left out. By default all that are
    frequent enough."""


@dataclass(frozen=True)
class _Outcome:
    """What the probes say once the latents of each label are ablated."""

    arm: str
    n: int
    ablated: float
    """Mean over labels of the number of latents that were ablated."""
    metrics: Mapping[str, Measured]


@dataclass(frozen=True)
class _Ground:
    """What the dictionaries of a site share."""

    scene: Scene
    W: Float[Tensor, "classes d"]
    scores: Float[Tensor, "n classes"]
    """Of the held-out documents, by the probe of each label, before anything is ablated."""

    @property
    def targets(self) -> Bool[Tensor, "n classes"]:
        """Which label each held-out document has."""
        return self.scene.test.targets

    @property
    def groups(self) -> Bool[Tensor, "n two classes"]:
        """The documents of each label, and the others."""
        return torch.stack([self.targets, ~self.targets], 1)

    def right(self, falls: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
        """Return whether each probe is right about each document after its scores fall."""
        return ((self.scores - falls > 0) == self.targets).double()

    def mean_right(
        self, draws: Sequence[Iterable[Float[Tensor, "n classes"]]]
    ) -> Float[Tensor, "n ablated classes"]:
        """Return in which share of the draws each probe is right, for each label's ablation."""
        n, classes = self.scores.shape
        total = torch.zeros(n, classes, classes, dtype=torch.float64)
        for draw in draws:
            total += torch.stack([self.right(falls) for falls in draw], 1)
        return total / len(draws)


@final
class TppEvaluator:
    """Ablates the latents of every label of one site's documents, and asks the probes of all."""

    name = "tpp"
    version = 1

    def __init__(self, config: TppConfig | None = None, site: str | None = None) -> None:
        """Measure at `site`; by default the store's only one."""
        self.config = config or TppConfig()
        self.site = site
        self._kept: tuple[Hashable, _Ground, list[_Outcome]] | None = None

    def __call__(
        self,
        dictionary: Dictionary,
        store: Store,
        model: LanguageModel | None = None,  # noqa: ARG002  (nothing is spliced)
    ) -> Iterator[ResultRow]:
        """Yield what was scored, the probes' accuracy, every arm's rows, then the dictionary's
        differences.

        Raises ConfigError if the documents have no three labels that are frequent enough or the
        dictionary fewer latents than are to be ablated, and ArtifactError if it does not map the
        site to itself.
        """
        site = checked_site(dictionary, store, self.site)
        check_dictionary(dictionary, self.config.ns, self.name)
        ground, shared = self._grounded(store, site)
        labelled, coders = ground.scene.labelled, {OWN: coder_of(dictionary)}
        halves, *_ = pooled_halves(store, site, labelled, coders, self.config)
        own = list(self._ablations(ground, OWN, halves[OWN]))
        others = [*self._ablations(ground, LATENTS, halves[OWN]), *shared]
        yield from count_rows(labelled, self.name, self.version)
        yield from self._probes(ground)
        for outcome in (*own, *others):
            yield from self._rows(ground, outcome)
        yield from self._differences(own, others, len(ground.targets))

    # ------------------------------------------------------------------------------------- set-up

    def _grounded(self, store: Store, site: str) -> tuple[_Ground, list[_Outcome]]:
        """Return what does not depend on the dictionary, from before if it is the same site."""
        key = (store.content_hash, site)
        if self._kept is None or self._kept[0] != key:
            config = self.config
            scene, bases = scene_of(store, site, self._labelled(store), config)
            probes = [
                fit_probe(scene.x_train, positive, strength=config.strength)
                for positive in scene.train.targets.T
            ]
            scores = torch.stack([probe.scores(scene.x_test) for probe in probes], 1)
            ground = _Ground(scene, torch.stack([probe.weight for probe in probes]), scores)
            arms = [o for arm in bases for o in self._ablations(ground, arm, bases[arm])]
            self._kept = (key, ground, [*self._supervised(ground), *arms])
        return self._kept[1], self._kept[2]

    def _labelled(self, store: Store) -> Labelled:
        config = self.config
        labelled = documents_with(
            config.labels, store, "split", evaluator=self.name,
            at_most=config.documents, per_class=config.per_label,
        )  # fmt: skip
        if len(labelled.classes) < _FEWEST:
            raise ConfigError(
                f"tpp needs three labels or more with {config.per_label} documents in each split "
                "(the probes of two are each other's opposite, and fall alike), but only two have "
                "as many: take more text, other labels, or a smaller tpp.per_label"
            )
        return labelled

    # --------------------------------------------------------------------------------------- arms

    def _ablations(self, ground: _Ground, arm: str, halves: Halves) -> Iterator[_Outcome]:
        """Yield what ablating an arm's strongest halves does, or as many random ones."""
        config, pushes = self.config, halves.pushes(ground.W)
        fires_more = differences(halves.train, ground.scene.train.targets).clamp(min=0)
        orders = [strongest(effects, config.ns[-1]) for effects in fires_more * pushes.T]
        draws = [orders]
        if arm == LATENTS:
            sizes = halves.sizes
            draws = [
                [matched(o, sizes, config.seed, draw, place) for place, o in enumerate(orders)]
                for draw in range(config.draws)
            ]
        for n in config.ns:
            falls = [(fall(halves.test, pushes, order[:n]) for order in sets) for sets in draws]
            ablated = sum(min(n, len(order)) for order in orders) / len(orders)
            yield _Outcome(arm, n, ablated, self._metrics(ground, ground.mean_right(falls)))

    def _supervised(self, ground: _Ground) -> Iterator[_Outcome]:
        """Yield what projecting out a label's own direction does: one direction, all of it."""
        x, targets = ground.scene.x_train, ground.scene.train.targets
        shuffled = (
            targets[permutation(len(targets), self.config.seed, SHUFFLE, draw)]
            for draw in range(self.config.draws)
        )
        found = {
            "mean_difference": [mean_difference(x, targets)],
            "linear_probe": [ground.W],
            SHUFFLED: [mean_difference(x, other) for other in shuffled],
        }
        test, origin = ground.scene.x_test, x.mean(0)
        for arm, draws in found.items():
            falls = [(fall_along(test, origin, u, ground.W) for u in rows) for rows in draws]
            yield _Outcome(arm, 1, 1.0, self._metrics(ground, ground.mean_right(falls)))

    def _metrics(
        self, ground: _Ground, right: Float[Tensor, "n ablated classes"]
    ) -> dict[str, Measured]:
        """Return TPP, the falls of the labels' own accuracies and those of the others'."""
        n_classes = right.shape[1]
        before = ground.right(torch.zeros_like(ground.scores))
        table, groups = torch.cat([before[:, None], right], 1), ground.groups
        itself = torch.eye(n_classes, dtype=torch.bool)

        def statistic(weights: Float[Tensor, "b n"]) -> Float[Tensor, "b three_classes"]:
            accuracies = group_accuracies(table, groups, weights)
            falls = accuracies[:, :1] - accuracies[:, 1:]
            own = falls.diagonal(dim1=1, dim2=2)
            others = falls.masked_fill(itself, float("nan")).nanmean(2)
            return torch.cat([own - others, own, others], 1)

        found = self._measure(statistic, len(right))
        return dict(zip(METRICS, found.split(n_classes), strict=True))

    def _measure(self, statistic, n: int) -> Measured:
        return measure(statistic, n, resamples=self.config.resamples, seed=self.config.seed)

    # --------------------------------------------------------------------------------------- rows

    def _probes(self, ground: _Ground) -> Iterator[ResultRow]:
        """Yield how well the probes tell the labels before anything is ablated."""
        before, groups = ground.right(torch.zeros_like(ground.scores))[:, None], ground.groups
        measured = self._measure(lambda w: group_accuracies(before, groups, w)[:, 0], len(before))
        naming = self._naming("tpp_accuracy", "", "balanced accuracy", PROBE)
        yield from label_rows(naming, measured, ground.scene.labelled.classes, len(before))

    def _rows(self, ground: _Ground, outcome: _Outcome) -> Iterator[ResultRow]:
        suffix, n = f"[n={outcome.n}]", len(ground.targets)
        for metric, measured in outcome.metrics.items():
            naming = self._naming(metric, suffix, "balanced accuracy", outcome.arm)
            classes = ground.scene.labelled.classes if metric == "tpp" else ()
            yield from label_rows(naming, measured, classes, n)
        yield ResultRow(
            f"tpp_ablated{suffix}", outcome.ablated, "latents", n, None, self.version, outcome.arm,
            encoder_of(outcome.arm), self.name,
        )  # fmt: skip

    def _differences(
        self, own: list[_Outcome], others: list[_Outcome], n: int
    ) -> Iterator[ResultRow]:
        """Yield the dictionary's lead over each other arm with as many latents, paired."""
        mine = {outcome.n: outcome.metrics["tpp"] for outcome in own}
        for other in others:
            if other.n in mine:
                naming = self._naming(
                    f"tpp_over({other.arm})", f"[n={other.n}]", "balanced accuracy", OWN
                )
                yield difference_row(naming, mine[other.n], other.metrics["tpp"], n)

    def _naming(self, metric: str, suffix: str, unit: str, arm: str) -> Naming:
        return Naming(metric, suffix, unit, arm, encoder_of(arm), self.name, self.version)
