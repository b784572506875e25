"""What steering evaluators know before anything is steered, and the arms that they steer by."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from saelab.config import Config
from saelab.edits import Directions, Handle
from saelab.errors import ConfigError
from saelab.evals.labelled import checked_site, coordinates_of, latents_of, pool
from saelab.evals.sample import sample_rows
from saelab.labels import Labelled, Part, labelled_documents, seen_only
from saelab.metrics.pooling import Pooled
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.steering import baselines
from saelab.steering.candidates import (
    Candidate,
    by_detection,
    by_logit_effect,
    concept_tokens,
)
from saelab.steering.judge_configs import JudgeConfig, NgramsConfig
from saelab.steering.neutral import NeutralConfig
from saelab.steering.trial import EditAt, adding

log = logging.getLogger(__name__)

LARGEST = 8.0
"""Largest change tried, in mean norms of the site's activations."""
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
    opposites: tuple[tuple[str, str], ...] = ()
    """Pairs of labels that are each other's opposite: steering by one, the other is no side effect.
    Of two labels each is the other's."""
    judge: JudgeConfig = NgramsConfig()
    """Who says how much of a concept a text holds; by default a classifier of n-grams that learns
    from one half of the held-out documents."""
    fluency_model: str | None = None
    """Another model whose loss says what is fluent, named as in `model.source`; by default the
    steered model itself, unsteered."""
    neutral: NeutralConfig | None = None
    """Another corpus, on which `steering_ce_change` is measured; by default held-out documents with
    neither the concept's label nor its opposite's, and none where all have one."""
    prompts: Annotated[tuple[str, ...], Field(min_length=16)] = PROMPTS
    """Beginnings that are continued; half of them choose, the others are reported."""
    instruction: str | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "The following text is about {label}."
    )
    """What the prompt arm puts before each beginning; of several, the best on one half of the
    beginnings. `{label}` stands for the label, as the judge calls it."""
    doses: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.05, 0.1, 0.2, 0.4, 0.8)
    """Mean KL(clean ‖ steered) in nats to steer at."""
    new_tokens: PositiveInt = 32
    """Tokens that are written after each beginning."""
    candidates: PositiveInt = 5
    """Latents that are tried under each rule."""
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

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instructions, as a tuple also where there is one."""
        return (self.instruction,) if isinstance(self.instruction, str) else self.instruction


@dataclass(frozen=True)
class Scene:
    """A dictionary, the labelled documents of its store, and what it says of them."""

    config: SteeringConfig
    dictionary: Dictionary
    site: str
    labelled: Labelled
    """In halves: `train` chooses latents and directions."""
    train: Part
    """The training documents that have rows."""
    codes: Pooled
    means: Float[Tensor, "documents d"]
    """Mean activation of each training document."""
    rows: Float[Tensor, "rows d"]
    """Activations of the training split."""
    density: Float[Tensor, " d_sae"]

    @property
    def places(self) -> list[int]:
        """The labels that are steered by, as places among the classes."""
        asked = self.config.concepts
        return [i for i, label in enumerate(self.labelled.classes) if not asked or label in asked]

    def others(self, place: int) -> tuple[int, ...]:
        """Return the labels that are neither this one nor its opposite; none of two."""
        classes = self.labelled.classes
        if len(classes) == 2:
            return ()
        pairs = [pair for pair in self.config.opposites if classes[place] in pair]
        same = {classes[place]}.union(*pairs)
        return tuple(i for i, label in enumerate(classes) if label not in same)

    @property
    def largest(self) -> float:
        """The largest strength tried, as a length."""
        return LARGEST * float(self.rows.norm(dim=1).mean())

    def positive(self, place: int) -> Bool[Tensor, " documents"]:
        """Return which training documents have a label."""
        return self.train.targets[:, place]

    def arm(self, directions: Float[Tensor, "m d"]) -> list[EditAt]:
        """Return an arm of unit directions, so that strengths are lengths."""
        unit = Directions(F.normalize(directions.detach().float().cpu(), dim=1))
        return adding(Handle(unit, self.site), range(len(directions)))

    def candidates(self, model: LanguageModel, place: int) -> list[Candidate]:
        """Return the latents to try for a label: as many under each rule, chosen in training."""
        positive, n = self.positive(place), self.config.candidates
        handle = Handle(self.dictionary, self.site)
        words = concept_tokens(model, self.train.texts, positive)
        return by_detection(self.codes, positive, n) + by_logit_effect(model, handle, words, n)

    def own_arms(self, candidates: Sequence[Candidate]) -> list[list[EditAt]]:
        """Return an arm of one direction for each candidate, its sign put in."""
        W = self.dictionary.W_dec.detach()
        return [self.arm(one.sign * W[[one.latent]]) for one in candidates]

    def shared_arms(self, place: int, n_random: int) -> dict[str, list[EditAt]]:
        """Return the arms that need no dictionary: two supervised ones, three kinds of random."""
        x, positive, seed = self.means, self.positive(place), self.config.seed
        width = self.rows.shape[1]
        directions = {
            "mean_difference": baselines.supervised(x, positive, "mean_difference"),
            "linear_probe": baselines.supervised(x, positive, "linear_probe"),
            "isotropic": baselines.isotropic(width, n_random, seed=seed),
            "covariance": baselines.from_covariance(self.rows, n_random, seed=seed),
            "shuffled_labels": baselines.shuffled_labels(x, positive, n_random, seed=seed),
        }
        return {name: self.arm(rows) for name, rows in directions.items()}

    def matched_arm(self, model: LanguageModel, latent: int, n: int) -> list[EditAt] | None:
        """Return `n` latents like one; None where it is dead, or too few are live to draw from."""
        if self.density[latent] == 0 or int((self.density > 0).sum()) <= n:
            log.warning(
                "steering: no control 'matched_latents': latent %d fires on %.2g of %d rows, and "
                "%d latents are live, of which %d are drawn",
                latent, float(self.density[latent]), len(self.rows),
                int((self.density > 0).sum()), n,
            )  # fmt: skip
            return None
        handle, seed = Handle(self.dictionary, self.site), self.config.seed
        like = baselines.matched_latents(model, handle, latent, self.density, n, seed=seed)
        return self.arm(self.dictionary.W_dec[like])


@torch.no_grad()
def scene_of(
    config: SteeringConfig, dictionary: Dictionary, store: Store, site: str | None
) -> Scene:
    """Return what is known of a dictionary at a site, by default the store's only one.

    Raises ConfigError without labels, or for concepts or opposites that are none of them.
    """
    site = checked_site(dictionary, store, site)
    labelled = labelled_documents(
        store, "halves", at_most=config.documents, per_class=config.per_label
    )
    _check_labels(config, labelled.classes)
    scorers = {"codes": latents_of(dictionary), "x": coordinates_of(store.width(site))}
    part = labelled.parts["train"]
    found, seen = pool(store, site, "train", part.documents, scorers, batch=1024)
    sample = sample_rows(store, site, "train", config.rows, batch=1024, seed=config.seed)
    rows = torch.cat([batch.x for batch in sample]).float()
    fires = [dictionary.encode(x.to(dictionary.W_dec)) != 0 for x in rows.split(1024)]
    density = torch.cat(fires).float().mean(0).cpu()
    train = seen_only(part, seen, labelled, site)
    means = found["x"].mean
    return Scene(config, dictionary, site, labelled, train, found["codes"], means, rows, density)


def _check_labels(config: SteeringConfig, classes: Sequence[str]) -> None:
    opposites = {label for pair in config.opposites for label in pair}
    for field, named in (("concepts", set(config.concepts)), ("opposites", opposites)):
        if named - set(classes):
            raise ConfigError(
                f"steering.{field}: {sorted(named - set(classes))} are no labels with "
                f"{config.per_label} documents in each part; there are {', '.join(classes)}"
            )
