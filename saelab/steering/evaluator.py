"""The steering evaluator: does a dictionary hold a handle on a concept that controls do not?

For each label, five candidate latents under two rules are found on training documents, steered at
equal doses, and the best of all candidates and doses on every other prompt is reported on the other
prompts. Beside it stand, chosen alike among doses: difference of means, a linear probe, four kinds
of random directions, and an instruction. The judge is trained on one half of the held-out documents
and validated on the other and on unsteered generations. Rows: docs/steering.md.
"""

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from saelab.config import Config
from saelab.edits import Directions, Handle
from saelab.edits.placement import Steerable, pad_of
from saelab.errors import ConfigError
from saelab.evals.labelled import checked_site, coordinates_of, latents_of, pool, seen_only
from saelab.evals.sample import sample_rows
from saelab.labels import Labelled, Part, labelled_documents
from saelab.metrics.pooling import Pooled
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.stats import ResultRow
from saelab.steering import baselines
from saelab.steering.baselines import N_RANDOM
from saelab.steering.candidates import by_detection, by_logit_effect, concept_tokens
from saelab.steering.judges import NgramJudge, Validation, validate
from saelab.steering.sweep import ce_change, continuations
from saelab.steering.trial import EditAt, Response, Selection, Trial, adding, select

log = logging.getLogger(__name__)

OWN, ORACLE, PROMPT, MATCHED = "dictionary", "oracle", "prompt", "matched_latents"
_NEUTRAL = 16
"""Held-out windows whose cross-entropy shows side effects."""
_HEAD = 12
"""Words of a held-out document that an unsteered generation continues."""
_VALIDATED = 64
"""Documents that are continued to validate a judge, at most."""

PROMPTS = (
    "I think that", "Yesterday I", "The first thing to say is", "In my view,", "It began when",
    "They told me that", "After a while", "Last week we", "What I remember is", "People say that",
    "On the way home", "The main point is that", "As far as I know,", "This morning",
    "We had heard that", "In the end",
)  # fmt: skip
"""Beginnings that say nothing of any concept."""


class SteeringConfig(Config):
    """Which concepts, prompts and doses; every arm is treated alike."""

    concepts: tuple[str, ...] = ()
    """Labels to steer by; by default all that are frequent enough."""
    prompts: Annotated[tuple[str, ...], Field(min_length=16)] = PROMPTS
    """Beginnings that are continued; half of them choose, the others are reported."""
    instruction: str = "The following text is about {label}."
    """What the prompt arm puts before each beginning; `{label}` stands for the label."""
    doses: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.05, 0.1, 0.2, 0.4, 0.8)
    """Mean KL(clean ‖ steered) in nats to steer at."""
    new_tokens: PositiveInt = 32
    """Tokens that are written after each beginning."""
    candidates: PositiveInt = 5
    """Latents that are tried under each rule."""
    largest: PositiveFloat = 8.0
    """Largest change tried, in mean norms of the site's activations."""
    documents: PositiveInt = 2000
    """Documents of each split, at most."""
    per_label: Annotated[int, Field(ge=2)] = 20
    """Labels with fewer documents in a part are left out."""
    rows: Annotated[int, Field(ge=2)] = 4096
    """Activations behind covariances and densities."""
    resamples: PositiveInt = 1000
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Of the random directions, of sampling and of the bootstrap."""


@dataclass(frozen=True)
class _Scene:
    """What is known of a dictionary before anything is steered."""

    dictionary: Dictionary
    site: str
    labelled: Labelled
    train: Part
    codes: Pooled
    means: Float[Tensor, "documents d"]
    rows: Float[Tensor, "rows d"]
    density: Float[Tensor, " d_sae"]

    def arm(self, directions: Float[Tensor, "m d"]) -> list[EditAt]:
        """Return an arm of unit directions, so that strengths are lengths."""
        unit = Directions(F.normalize(directions.detach().float().cpu(), dim=1))
        return adding(Handle(unit, self.site), range(len(directions)))


@dataclass(frozen=True)
class _Ground:
    """What the dictionaries of one site share for a concept."""

    trial: Trial
    judge: NgramJudge
    validation: Validation
    arms: Mapping[str, Selection | None]
    """None where no dose was reached."""


@final
class SteeringEvaluator:
    """Steers every concept by a dictionary's latents and by what they have to beat."""

    name = "steering"
    version = 1

    def __init__(self, config: SteeringConfig | None = None, site: str | None = None) -> None:
        """Steer at `site`; by default the store's only one."""
        self.config = config or SteeringConfig()
        self.site = site
        self._kept: dict[Hashable, _Ground] = {}

    def __call__(
        self, dictionary: Dictionary, store: Store, model: LanguageModel | None = None
    ) -> Iterator[ResultRow]:
        """Yield each concept's rows.

        Raises ConfigError without a model that can be steered, or without two frequent labels. An
        arm that reaches no dose has no other row than that.
        """
        if not isinstance(model, Steerable):
            raise ConfigError("evaluate.evals: steering writes text and needs a live `model:`")
        scene = self._scene(dictionary, store)
        for place, label in enumerate(scene.labelled.classes):
            if not self.config.concepts or label in self.config.concepts:
                key = (store.content_hash, scene.site, model.fingerprint, label)
                if key not in self._kept:
                    self._kept[key] = self._ground(model, scene, place)
                yield from self._concept(model, store, scene, self._kept[key], place)

    @torch.no_grad()
    def _scene(self, dictionary: Dictionary, store: Store) -> _Scene:
        config, site = self.config, checked_site(dictionary, store, self.site)
        labelled = labelled_documents(
            store, "halves", at_most=config.documents, per_class=config.per_label
        )
        unknown = set(config.concepts) - set(labelled.classes)
        if unknown:
            raise ConfigError(
                f"steering.concepts: {sorted(unknown)} are no labels with {config.per_label} "
                f"documents in each part; there are {', '.join(labelled.classes)}"
            )
        scorers = {"codes": latents_of(dictionary), "x": coordinates_of(store.width(site))}
        part = labelled.parts["train"]
        found, seen = pool(store, site, "train", part.documents, scorers, batch=1024)
        sample = sample_rows(store, site, "train", config.rows, batch=1024, seed=config.seed)
        rows = torch.cat([batch.x for batch in sample]).float()
        fires = [dictionary.encode(x.to(dictionary.W_dec)) != 0 for x in rows.split(1024)]
        density = torch.cat(fires).float().mean(0).cpu()
        train = seen_only(part, seen, labelled, site)
        means = found["x"].mean
        return _Scene(dictionary, site, labelled, train, found["codes"], means, rows, density)

    # ------------------------------------------------------------------------------------ arms

    def _ground(self, model: Steerable, scene: _Scene, place: int) -> _Ground:
        """Train and validate the judge, and steer by what no dictionary is needed for."""
        config, parts = self.config, scene.labelled.parts
        choose, test = parts["choose"], parts["test"]
        judge = NgramJudge(choose.texts, choose.targets[:, place], corpus="held-out half")
        heads = [" ".join(text.split()[:_HEAD]) for text in test.texts[:_VALIDATED]]
        written = continuations(
            model, heads, max_new_tokens=config.new_tokens, temperature=1.0, seed=config.seed
        )
        truth = test.targets[:, place]
        validation = validate(judge, (test.texts, truth), (written.texts, truth[:_VALIDATED]))
        trial = Trial(
            model, config.prompts, judge, max_new_tokens=config.new_tokens, seed=config.seed
        )
        arms = self._shared_arms(scene, place)
        found: dict[str, Selection | None] = {
            name: select(self._responses(trial, scene, name, arm)) for name, arm in arms
        }
        instruction = config.instruction.replace("{label}", scene.labelled.classes[place])
        found[PROMPT] = select([trial.prompted(instruction)])
        return _Ground(trial, judge, validation, found)

    def _shared_arms(self, scene: _Scene, place: int) -> list[tuple[str, list[EditAt]]]:
        x, positive = scene.means, scene.train.targets[:, place]
        seed, width = self.config.seed, scene.rows.shape[1]
        directions = {
            "mean_difference": baselines.supervised(x, positive, "mean_difference"),
            "linear_probe": baselines.supervised(x, positive, "linear_probe"),
            "isotropic": baselines.isotropic(width, N_RANDOM, seed=seed),
            "covariance": baselines.from_covariance(scene.rows, N_RANDOM, seed=seed),
            "shuffled_labels": baselines.shuffled_labels(x, positive, N_RANDOM, seed=seed),
        }
        return [(name, scene.arm(rows)) for name, rows in directions.items()]

    def _own_arms(self, model: Steerable, scene: _Scene, place: int) -> list[list[EditAt]]:
        """Return an arm of one direction for each candidate under each rule, signs put in."""
        positive, n = scene.train.targets[:, place], self.config.candidates
        handle = Handle(scene.dictionary, scene.site)
        words = concept_tokens(model, scene.train.texts, positive)
        found = by_detection(scene.codes, positive, n) + by_logit_effect(model, handle, words, n)
        W = scene.dictionary.W_dec.detach()
        return [scene.arm(one.sign * W[[one.latent]]) for one in found]

    def _matched_arm(self, model: Steerable, scene: _Scene, place: int) -> list[EditAt] | None:
        """Return latents like the best detector; None where too few are live to draw from."""
        best = by_detection(scene.codes, scene.train.targets[:, place], 1)[0].latent
        if scene.density[best] == 0 or int((scene.density > 0).sum()) <= N_RANDOM:
            log.warning("steering: too few live latents for the control %r", MATCHED)
            return None
        handle = Handle(scene.dictionary, scene.site)
        like = baselines.matched_latents(
            model, handle, best, scene.density, N_RANDOM, seed=self.config.seed
        )
        return scene.arm(scene.dictionary.W_dec[like])

    def _responses(
        self, trial: Trial, scene: _Scene, name: str, arm: Sequence[EditAt]
    ) -> list[Response]:
        largest = self.config.largest * float(scene.rows.norm(dim=1).mean())
        return list(trial.responses({name: arm}, self.config.doses, largest=largest))

    # ------------------------------------------------------------------------------------ rows

    def _concept(
        self, model: Steerable, store: Store, scene: _Scene, ground: _Ground, place: int
    ) -> Iterator[ResultRow]:
        label, trial = scene.labelled.classes[place], ground.trial
        candidates = self._own_arms(model, scene, place)
        tried = [self._responses(trial, scene, OWN, arm) for arm in candidates]
        own = select([response for responses in tried for response in responses])
        others: dict[str, Selection | None] = dict(ground.arms)
        matched = self._matched_arm(model, scene, place)
        if matched is not None:
            others[MATCHED] = select(self._responses(trial, scene, MATCHED, matched))
        for side in ("heldout_auroc", "generated_auroc"):
            value = getattr(ground.validation, side)
            yield self._row(f"steering_judge_{side}({label})", value, "AUC", "judge", ground, None)
        for name, found in {OWN: own, **others}.items():
            reached = 0.0 if found is None else found.n_reached / found.n_candidates
            yield self._row(f"steering_reached({label})", reached, "share", name, ground, None)
            if found is not None:
                yield from self._arm_rows(label, name, found.reported, found.n_candidates, ground)
        if own is None:
            return
        yield from self._arm_rows(label, ORACLE, own.oracle, own.n_candidates, ground)
        resampling = {"resamples": self.config.resamples, "seed": self.config.seed}
        for name, other in others.items():
            if other is not None:
                lead = own.reported.over(other.reported, **resampling)
                title = f"steering_score_over({name})({label})"
                yield self._row(title, lead.value, "score", OWN, ground, lead.standard_error)
        chosen = candidates[own.chosen // len(self.config.doses)]
        yield from self._side_effects(model, store, scene, ground, own.reported, chosen, label)

    def _arm_rows(
        self, label: str, arm: str, reported: Response, n_candidates: int, ground: _Ground
    ) -> Iterator[ResultRow]:
        spread = reported.interval(resamples=self.config.resamples, seed=self.config.seed)
        numbers = {
            "score": (reported.score, "score", spread.standard_error),
            "lift": (reported.lift, "judge", None),
            "fluency": (reported.fluency, "share", None),
            "dose": (reported.target, "nats", None),
            "kl_last_prompt": (reported.kl_last_prompt, "nats", None),
            "candidates": (float(n_candidates), "responses", None),
        }
        for name, (value, unit, error) in numbers.items():
            if value is not None:
                yield self._row(f"steering_{name}({label})", value, unit, arm, ground, error)

    def _side_effects(
        self, model: Steerable, store: Store, scene: _Scene, ground: _Ground,
        own: Response, arm: Sequence[EditAt], label: str,
    ) -> Iterator[ResultRow]:  # fmt: skip
        """Yield what the chosen edit does to neutral text and to the other labels' judges."""
        strength = own.matched[0].strength
        assert strength is not None
        windows = list(islice(store.windows(scene.site, split="heldout"), _NEUTRAL))
        tokens = torch.nn.utils.rnn.pad_sequence(
            [w.ids.long() for w in windows], batch_first=True, padding_value=pad_of(model)
        )
        lengths = torch.tensor([len(w) for w in windows])
        ce = float(ce_change(model, arm[0](strength), tokens, lengths).nanmean())
        yield self._row(f"steering_ce_change({label})", ce, "nats", OWN, ground, None)
        changes = []
        choose = scene.labelled.parts["choose"]
        for place, other in enumerate(scene.labelled.classes):
            if other != label:
                judge = NgramJudge(choose.texts, choose.targets[:, place], corpus="held-out half")
                moved = judge(own.written[0].texts).mean() - judge(ground.trial.usual.texts).mean()
                changes.append(abs(float(moved)))
        mean = sum(changes) / len(changes)
        yield self._row(f"steering_others_change({label})", mean, "judge", OWN, ground, None)

    def _row(
        self, name: str, value: float, unit: str, arm: str, ground: _Ground, error: float | None
    ) -> ResultRow:
        judge = ground.judge.name + ("" if ground.validation.validated else ", unvalidated")
        n = len(self.config.prompts) // 2
        return ResultRow(name, value, unit, n, error, self.version, arm, judge, self.name)
