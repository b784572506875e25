"""Scores of a model's heads for one task, held against the heads' causal effects.

Every score is computed on draws of examples that are not those of the truth, and compared with each
truth: effects of noising and of denoising, at all positions and at the last one only, which is all
that scores of last outputs can see.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from saelab.circuits import baselines, tasks
from saelab.circuits.discrete_codes import (
    ENOUGH_CODED,
    Codes,
    Fit,
    HeadOutputs,
    edge_counts,
    edge_scores,
    learn_codes,
    node_scores,
    share_of_layer,
)
from saelab.circuits.effects import Effects
from saelab.circuits.head_outputs import head_outputs
from saelab.circuits.patching import Direction, components_of
from saelab.circuits.protocols import PatchableModel
from saelab.circuits.ranking import RankingConfig, agreements
from saelab.circuits.strata import half
from saelab.circuits.tasks import Draw, TaskData
from saelab.clock import now
from saelab.config import Config
from saelab.train.config import TrainConfig

VERSION = 2
"""Bumped when the scores of the same examples change."""
Group = Literal["codes", "observational", "causal"]
Negatives = Literal["unpredictable", "off_task"]
SURFACE = 0.6
"""AUC of a bag of tokens above which negatives differ in their words."""


class EffectsConfig(Config):
    """How the causal truth is measured."""

    pairs: int = Field(default=64, ge=8)
    """Clean and corrupted prompts."""
    seed: NonNegativeInt = 0
    """Of the prompts."""
    positions: list[str] = Field(default=["all", "end"], min_length=1)
    """What is patched: `all` positions together, or a slot, such as `end`."""
    directions: list[Direction] = Field(default=["noising", "denoising"], min_length=1)
    """Into the clean run, or clean values into the corrupted one."""
    gradient_steps: PositiveInt = 5
    """Points of integrated gradients."""


class CodesConfig(Config):
    """How heads are scored without patching."""

    dictionary: dict[str, Any] = {
        "type": "relu",
        "form": "bricken",
        "d_sae": 256,
        "sparsity_weight": 0.001,
    }
    """The small dictionary over outputs: any type, with its fields."""
    lr: float | None = Field(default=2e-3, gt=0)
    """Peak learning rate; null: the rule of training, which is large for so few latents."""
    train: TrainConfig = TrainConfig(batch=1024, tokens=400_000)
    """How it is trained."""
    normalise: bool = True
    """Centre and scale each head first; raw outputs otherwise."""
    examples: list[Annotated[int, Field(ge=2)]] = Field(default=[5, 10, 20], min_length=1)
    """Numbers of positives, two at least: a probe is fitted on half; as many negatives."""
    negatives: list[Negatives] = Field(default=["unpredictable", "off_task"], min_length=1)
    """Kinds of negatives, each by itself."""
    draws: PositiveInt = 5
    """Draws of examples."""
    first_seed: NonNegativeInt = 1000
    """Seed of the first draw; not that of the truth."""
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    """Of the dictionary; each is trained on each draw."""
    top_pairs: PositiveInt = 100
    """Best pairs of heads in which heads are counted."""


@dataclass(frozen=True)
class Scored:
    """One score of every head."""

    method: str
    group: Group
    scores: Float[Tensor, " heads"]
    examples: int | None = None
    """Number of positives it was computed on; None for causal scores."""
    negatives: Negatives | None = None
    draw: int | None = None
    seed: int | None = None
    seconds: float | None = None
    """What the codes took, forward passes and training included."""
    coded: float | None = None
    """Share of outputs with a code."""


def score_heads(
    model: PatchableModel,
    truth: TaskData,
    config: CodesConfig,
    fit: Fit,
    *,
    source: Draw = tasks.draw,
) -> Iterator[Scored]:
    """Yield the codes' scores and the observational baselines, draw by draw.

    No draw has a prompt of `truth`, which comes from the same `source`: effects were measured on
    it. Raises what `tasks.distinct` and `head_outputs` do.
    """
    layers = torch.tensor([c.layer for c in components_of(model, "heads")])
    most = max(config.examples)
    for draw in range(config.draws):
        stream = partial(source, truth.name, model, seed=config.first_seed + draw)
        data = tasks.distinct(stream, most, known=truth)
        started = now()
        positive = head_outputs(model, data, "clean")
        passes = now() - started
        direct = baselines.direct_logits(model, data, positive)
        for kind in config.negatives:
            negative = head_outputs(model, data, kind)
            for n in config.examples:
                outputs = HeadOutputs(positive[:n], negative[:n])
                about: dict[str, Any] = {"examples": n, "negatives": kind, "draw": draw}
                direct_score = direct[:n].mean(0).abs()
                yield Scored("direct_logits", "observational", direct_score, **about)
                first = half(data.templates[:n], seed=draw)
                yield from _of_outputs(outputs, first, config, about)
                share = 2 * passes * n / most
                yield from _of_codes(outputs, config, fit, layers, share, about)


def _of_outputs(
    outputs: HeadOutputs, first: Bool[Tensor, " n"], config: CodesConfig, about: Mapping[str, Any]
) -> Iterator[Scored]:
    found = baselines.of_outputs(outputs, first)
    coded = outputs.normalised() if config.normalise else outputs
    width = int(config.dictionary["d_sae"])
    found |= baselines.of_other_codes(coded, width, seed=about["draw"])
    for method, scores in found.items():
        yield Scored(method, "observational", scores, **about)


def _of_codes(
    outputs: HeadOutputs,
    config: CodesConfig,
    fit: Fit,
    layers: Int[Tensor, " heads"],
    passes: float,
    about: Mapping[str, Any],
) -> Iterator[Scored]:
    coded = outputs.normalised() if config.normalise else outputs
    for seed in config.seeds:
        started = now()
        codes = learn_codes(coded, fit, seed=seed)
        found = _scores(codes, layers, config.top_pairs)
        seconds = passes + now() - started
        for method, scores in found.items():
            yield Scored(
                method, "codes", scores, seed=seed, seconds=seconds, coded=codes.coded, **about
            )
        for method, scores in baselines.of_codes(codes, seed=seed).items():
            yield Scored(method, "observational", scores, seed=seed, **about)


def _scores(
    codes: Codes, layers: Int[Tensor, " heads"], top: int
) -> dict[str, Float[Tensor, " heads"]]:
    found = {
        "codes": node_scores(codes),
        "codes_normalised": node_scores(codes, normalised=True),
    }
    found |= {f"{name}_by_layer": share_of_layer(x, layers) for name, x in found.items()}
    for name, edges in (
        ("codes_pairs", edge_scores(codes)),
        ("codes_pairs_normalised", edge_scores(codes, normalised=True)),
    ):
        found[name] = edge_counts(edges, layers, top=top)
    return found


# --------------------------------------------------------------------------------------- with truth


@dataclass(frozen=True)
class Truth:
    """Exact effects of noising or denoising at one position, and cheaper ones beside them."""

    position: str
    direction: str
    effects: Effects
    others: Mapping[str, Effects]
    """Causal baselines, by name."""
    listed: Bool[Tensor, " heads"] | None = None
    """Heads that were published for the task, where scores are compared with them."""


def compare(scored: Scored, truth: Truth, config: RankingConfig) -> dict[str, Any]:
    """Return a row of the results: a score's agreements with a truth.

    Raises TaskError if the truth has too few heads without an effect.
    """
    about = {key: value for key, value in vars(scored).items() if key != "scores"}
    place = {"position": truth.position, "direction": truth.direction}
    return about | place | agreements(scored.scores, truth.effects, config, truth.listed)


def causal_scores(truth: Truth) -> Iterator[Scored]:
    """Yield the causal baselines of a truth."""
    for method, effects in truth.others.items():
        yield Scored(method, "causal", effects.effect().abs())


def warnings(data: TaskData, rows: list[dict[str, Any]]) -> list[str]:
    """Return what a reader of the scores has to know: words that give negatives away, no codes."""
    found = []
    surface = baselines.bag_of_tokens_auc(data.clean, data.unpredictable, seed=0)
    if surface > SURFACE:
        found.append(
            f"{data.name}: a bag of tokens tells unpredictable negatives with AUC {surface:.2f}, "
            f"above {SURFACE}; scores may be those of words"
        )
    coded = min((row["coded"] for row in rows if row["coded"] is not None), default=1.0)
    if coded < ENOUGH_CODED:
        found.append(
            f"{data.name}: a dictionary codes only {coded:.0%} of outputs, below "
            f"{ENOUGH_CODED:.0%}; lower its sparsity"
        )
    return found
