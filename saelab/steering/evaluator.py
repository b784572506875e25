"""The steering evaluator: does a dictionary hold a handle on a concept that controls do not?

For each label, five candidate latents under two rules are found on training documents, steered at
equal doses, and the best of all candidates and doses on every other prompt is reported on the other
prompts. Beside it stand, chosen alike among doses: difference of means, a linear probe, four kinds
of random directions, and an instruction. Judges learn from another corpus where one is given, and
are validated on held-out documents and on unsteered generations. Rows: docs/steering.md.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from jaxtyping import Float
from torch import Tensor

from saelab.edits import Handle, LatentEdit
from saelab.edits.placement import Steerable
from saelab.protocols import Dictionary, LabelledStore, LanguageModel, Store
from saelab.stats import ResultRow
from saelab.steering.baselines import N_RANDOM
from saelab.steering.candidates import RULES, Candidate, concept_tokens
from saelab.steering.judging import Lexicon, Panel
from saelab.steering.lexicons import lexicon_rows
from saelab.steering.neutral import Neutral, corpus_windows, windows_without
from saelab.steering.prepared import Load, Prepared, Readers
from saelab.steering.rows import Rows, valued
from saelab.steering.scene import Scene, SteeringConfig
from saelab.steering.side_effects import (
    ce_sums,
    mean_change,
    mean_distance,
    others_sums,
    presences,
    unsteered_losses,
)
from saelab.steering.trial import EditAt, Response, Selection, Trial, reported_half, select

log = logging.getLogger(__name__)

OWN, ORACLE, PROMPT, MATCHED = "dictionary", "oracle", "prompt", "matched_latents"


@dataclass(frozen=True)
class Steered:
    """Candidates of one kind, each steered at every dose."""

    candidates: Sequence[Sequence[EditAt]]
    """Each is a latent, or directions of a random kind; none for an instruction."""
    responses: Sequence[Response]
    """Of the first candidate at every dose, then of the second, and so on."""
    selection: Selection | None
    """None where no dose was reached, or the judge was silent."""

    @property
    def chosen(self) -> int:
        """The place of the chosen candidate."""
        assert self.selection is not None
        return self.selection.chosen // (len(self.responses) // len(self.candidates))

    def among(self, places: Sequence[int]) -> "Steered":
        """Return some of the candidates, with what is chosen among them alone."""
        n_doses = len(self.responses) // len(self.candidates)
        kept = [one for i in places for one in self.responses[i * n_doses :][:n_doses]]
        return Steered([self.candidates[i] for i in places], kept, select(kept))

    @property
    def curve(self) -> Sequence[Response]:
        """The chosen candidate at every dose, on the prompts that did not choose it; all candidates
        where none was chosen."""
        if self.selection is None or not self.candidates:
            return [] if self.selection else self.responses
        n_doses = len(self.responses) // len(self.candidates)
        own = self.responses[self.chosen * n_doses :][:n_doses]
        return [one.where(reported_half(len(one.sums))) for one in own]

    def edits(self) -> list[Sequence[LatentEdit]]:
        """Return the chosen edits of each direction that reached the dose; none of a prompt."""
        if self.selection is None or not self.candidates:
            return []
        pairs = zip(self.candidates[self.chosen], self.reported.matched, strict=True)
        return [edit_at(one.strength) for edit_at, one in pairs if one.strength is not None]

    @property
    def reported(self) -> Response:
        """The chosen response, on the prompts that did not choose it."""
        assert self.selection is not None
        return self.selection.reported


@dataclass(frozen=True)
class Ground:
    """What the dictionaries of one site share for a concept."""

    trial: Trial
    rows: Rows
    neutral: Neutral | None = None
    """Text that the concept has nothing to do with, where there is some."""
    losses: Float[Tensor, " windows"] | None = None
    """The unsteered model's, on that text."""
    others: Panel | None = None
    """Judges of the other labels; None where there is none but the opposite."""
    lexicon: Lexicon | None = None
    """A list of the concept's words, where there is one."""
    arms: dict[str, Steered] = field(default_factory=dict)
    """What no dictionary is needed for."""
    kept: list[ResultRow] = field(default_factory=list)
    """The rows of these arms."""


def steered(
    scene: Scene, trial: Trial, name: str, candidates: Sequence[Sequence[EditAt]]
) -> Steered:
    """Steer by candidates at every dose, and choose."""
    arms = {f"{name} {place}": arm for place, arm in enumerate(candidates)}
    responses = list(trial.responses(arms, scene.config.doses, largest=scene.largest))
    return Steered(candidates, responses, select(responses))


def ground_of(
    model: Steerable,
    scene: Scene,
    readers: Readers,
    place: int,
    *,
    evaluator: str,
    version: int,
) -> Ground:
    """Train and validate the judge of a concept, and let the unsteered model write."""
    config = scene.config
    judge = readers.judges.of(place)
    validation = readers.judges.validated(
        place, model, new_tokens=config.new_tokens, seed=config.seed
    )
    trial = Trial(
        model, config.prompts, judge,
        fluency_model=readers.fluency, max_new_tokens=config.new_tokens, seed=config.seed,
        tokens=concept_tokens(model, scene.train.texts, scene.positive(place)),
    )  # fmt: skip
    own = f"{model.name}, unsteered"
    reader = own if readers.fluency is None else readers.fluency.name
    rows = Rows(
        scene.labelled.classes[place], validation, int(reported_half(len(config.prompts)).sum()),
        evaluator, version, config.resamples, config.seed, f"fluency({reader})",
    )  # fmt: skip
    return Ground(trial, rows)


def neutral_text(model: Steerable, store: Store, scene: Scene, place: int) -> Neutral | None:
    """Return the configured corpus, or held-out documents with neither the concept nor its
    opposite; None, with a warning, where there is no such document."""
    if scene.config.neutral is not None:
        return corpus_windows(scene.config.neutral, model, scene.site)
    assert isinstance(store, LabelledStore)  # its documents have labels
    classes, others = scene.labelled.classes, scene.others(place)
    near = {label for i, label in enumerate(classes) if i not in others}
    found = windows_without(store, scene.site, model, near)
    if found is None:
        log.warning(
            "steering: no row steering_ce_change(%s): every held-out document is labelled %s; name "
            "a corpus in steering.neutral", classes[place], " or ".join(sorted(near)),
        )  # fmt: skip
    return found


@final
class SteeringEvaluator:
    """Steers every concept by a dictionary's latents and by what they have to beat."""

    name = "steering"
    version = 3

    def __init__(
        self,
        config: SteeringConfig | None = None,
        site: str | None = None,
        *,
        load: Load | None = None,
    ) -> None:
        """Steer at `site`; by default the store's only one. `load` is for configurations that name
        other models."""
        self.config = config or SteeringConfig()
        self._prepared = Prepared(self.name, self.config, site, self._ground, load)

    def __call__(
        self, dictionary: Dictionary, store: Store, model: LanguageModel | None = None
    ) -> Iterator[ResultRow]:
        """Yield each concept's rows.

        Raises ConfigError without a model that can be steered, without two frequent labels, or for
        a concept that the judge's corpus does not know. An arm that reaches no dose has no other
        row than that; one that nobody judges says so.
        """
        for steerable, scene, place, ground in self._prepared.concepts(dictionary, store, model):
            yield from valued(self._concept(steerable, scene, ground, place))

    def _ground(
        self, model: Steerable, store: Store, scene: Scene, readers: Readers, place: int
    ) -> Ground:
        """Steer by what no dictionary is needed for."""
        ground = ground_of(model, scene, readers, place, evaluator=self.name, version=self.version)
        judges = readers.judges
        neutral = neutral_text(model, store, scene, place)
        how = {"new_tokens": self.config.new_tokens, "seed": self.config.seed}
        ground = replace(
            ground,
            others=judges.of_others(scene.others(place), model, **how),
            lexicon=judges.lexicon(place, model, **how),
            neutral=neutral,
            losses=None if neutral is None else unsteered_losses(model, neutral),
        )
        for name, arm in scene.shared_arms(place, N_RANDOM).items():
            ground.arms[name] = steered(scene, ground.trial, name, [arm])
        told = [
            ground.trial.prompted(one.replace("{label}", judges.called(place)))
            for one in self.config.instructions
        ]
        prompt = Steered([], told, select(told))
        ground.arms[PROMPT] = prompt
        for name, found in ground.arms.items():
            ground.kept.extend(self._arm(model, ground, name, found))
        if prompt.selection is not None:
            place_told = float(prompt.selection.chosen)
            ground.kept.append(ground.rows.row("steering_instruction", place_told, "id", PROMPT))
        return ground

    # ------------------------------------------------------------------------------------ rows

    def _concept(
        self, model: Steerable, scene: Scene, ground: Ground, place: int
    ) -> Iterator[ResultRow]:
        rows, trial = ground.rows, ground.trial
        candidates = scene.candidates(model, place)
        own = steered(scene, trial, OWN, scene.own_arms(candidates))
        arms = {OWN: own}
        if own.selection is not None:
            matched = scene.matched_arm(model, candidates[own.chosen].latent, N_RANDOM)
            if matched is not None:
                arms[MATCHED] = steered(scene, trial, MATCHED, [matched])
        yield from rows.judge()
        if ground.lexicon is not None and not ground.lexicon.is_chosen:
            yield from rows.read_by(ground.lexicon.validation).judge("lexicon")
        for name, found in arms.items():
            yield from self._arm(model, ground, name, found)
        yield from ground.kept
        if own.selection is None:
            return
        yield from self._candidates(rows, candidates, own)
        yield from self._presence(model, scene, ground, candidates[own.chosen].latent, own)
        n_candidates = own.selection.n_candidates
        yield from rows.chosen(ORACLE, own.selection.oracle, n_candidates)
        for name, other in (arms | ground.arms).items():
            if name != OWN and other.selection is not None:
                yield rows.lead(name, OWN, own.reported, other.reported)

    def _candidates(
        self, rows: Rows, candidates: Sequence[Candidate], own: Steered
    ) -> Iterator[ResultRow]:
        """Yield which latent was chosen, under which rule, and the best under each rule."""
        chosen = candidates[own.chosen]
        yield from rows.candidate(OWN, chosen)
        for rule in RULES:
            yield rows.row(f"steering_rule[{rule}]", float(chosen.rule == rule), "share", OWN)
            places = [i for i, one in enumerate(candidates) if one.rule == rule]
            best, suffix = own.among(places), f"[rule={rule}]"
            if best.selection is not None:
                yield from rows.response(OWN, best.reported, suffix)
                yield from rows.candidate(OWN, candidates[places[best.chosen]], suffix)

    def _presence(
        self, model: Steerable, scene: Scene, ground: Ground, latent: int, own: Steered
    ) -> Iterator[ResultRow]:
        """Yield how often the chosen latent and others fire in what is written at each dose."""
        handle = Handle(scene.dictionary, scene.site)
        written = [one for one in own.curve if one.written]
        found = presences(model, handle, latent, written, ground.trial)
        for response, values in zip(written, found, strict=True):
            suffixes = [f"[dose={response.target:g}]"]
            suffixes += [""] if response.target == own.reported.target else []
            for suffix in suffixes:
                for name, value in values.items():
                    unit = "latents" if name == "presence_others" else "share"
                    yield ground.rows.row(f"steering_{name}{suffix}", value, unit, OWN)

    def _arm(
        self, model: Steerable, ground: Ground, name: str, found: Steered
    ) -> Iterator[ResultRow]:
        """Yield an arm's scores, its curve and its side effects."""
        rows, chosen = ground.rows, found.selection
        reached = [one for one in found.responses if one.reached]
        yield rows.row("steering_reached", len(reached) / len(found.responses), "share", name)
        yield from rows.by_dose(name, found.curve)
        if chosen is None:
            missing = sum(one.missing for one in reached) / len(reached) if reached else math.nan
            yield rows.row("steering_missing", missing, "share", name)
            return
        yield from rows.chosen(name, chosen.reported, chosen.n_candidates)
        if ground.lexicon is not None:
            arm = found.candidates[found.chosen] if found.candidates else None
            yield from lexicon_rows(
                rows, ground.lexicon, ground.trial, name, chosen.reported, model=model, arm=arm
            )
        if ground.others is not None:
            sums = others_sums(ground.others.judges, chosen.reported, ground.trial)
            sums = sums[:, reported_half(sums.shape[1])]
            yield rows.read_by(ground.others.validation).summed(
                "steering_others_change", sums, mean_distance, "judge", name
            )
        edits = found.edits()
        if edits and ground.neutral is not None:
            sums = ce_sums(model, edits, ground.neutral, unsteered=ground.losses)
            row = rows.summed("steering_ce_change", sums, mean_change, "nats", name)
            yield replace(row, encoder=ground.neutral.name)
