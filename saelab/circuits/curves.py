"""How faithful circuits of growing size are, beside what stands for no insight at all.

Nodes are ranked on discovery prompts, and circuits measured on test prompts. Arms:

    circuit                latents and errors by |effect|
    circuit, no errors     latents by |effect|, every error at its mean
    by activation          latents by mean |f|, every error at its mean
    random                 latents that fire, in an order of chance, every error at its mean
    neurons, pca           the sites' own coordinates, and principal directions, by |effect|

The arms without errors have the same ceiling, that of all latents together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from saelab.circuits.ablation import Faithfulness, Share
from saelab.circuits.attribution import Passage, SiteEffects, effects_of
from saelab.circuits.bases import Basis, Directions, neurons, principal_directions
from saelab.circuits.contrast import OUTSIDE, Contrast
from saelab.circuits.nodes import keep, ranked, shuffled
from saelab.config import Config

CIRCUIT, LATENTS = "circuit", "circuit, no errors"


class CurvesConfig(Config):
    """Which circuits are measured."""

    sizes: list[PositiveInt] = [1, 3, 10, 30, 100, 300, 1000]
    """Numbers of nodes."""
    draws: NonNegativeInt = 3
    """Random orders of nodes; 0: none."""
    bases: bool = True
    """Whether neurons and principal directions are measured as well."""
    enough: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the ceiling whose number of nodes is reported."""


@dataclass(frozen=True)
class Point:
    """One circuit."""

    arm: str
    n_nodes: int
    faithfulness: Share
    completeness: Share | None = None
    """Faithfulness of all other nodes, or of all other latents in the arm `circuit, no errors`;
    only for these two arms."""
    of_ceiling: Share | None = None
    """Share of what all latents reach; only where there are no error nodes."""


@dataclass(frozen=True)
class Curves:
    """The curves of one set of dictionaries."""

    points: tuple[Point, ...]
    ceiling: Share
    """Faithfulness of all latents without errors."""
    clean: float
    """Mean metric of the whole model on the test prompts."""
    empty: float
    """The same with every node at its mean."""
    n_prompts: int

    def nodes_at(self, share: float, arm: str = LATENTS) -> int | None:
        """Return the smallest measured circuit of an arm that reaches a share of its ceiling: that
        of all latents, or 1 with error nodes. None if there is none."""
        ceiling = 1.0 if arm == CIRCUIT else self.ceiling.value
        mine = sorted((p for p in self.points if p.arm == arm), key=lambda p: p.n_nodes)
        reached = (p.n_nodes for p in mine if p.faithfulness.value >= share * ceiling)
        return next(reached, None)


def curves(
    measure: Faithfulness,
    discovery: Contrast,
    between: Mapping[str, Passage],
    config: CurvesConfig | None = None,
    *,
    seed: int = 0,
) -> Curves:
    """Return every arm's circuits, ranked by effects on the discovery prompts.

    `measure` has the test prompts, `between` the discovery prompts' `passages`. Costs a forward
    pass over the test prompts per circuit, two for the arms whose completeness is measured.
    """
    config, batch = config or CurvesConfig(), measure.batch

    def effects(own: Mapping[str, Directions]) -> dict[str, SiteEffects]:
        return {
            site: effects_of(discovery, d, between[site], batch=batch) for site, d in own.items()
        }

    points = list(_of_dictionaries(measure, effects(measure.dictionaries), config, seed))
    if config.bases:
        rows = {site: _inside(discovery, passage) for site, passage in between.items()}
        arms: dict[str, dict[str, Basis]] = {
            "neurons": {site: neurons(x.shape[1]) for site, x in rows.items()},
            "pca": {site: principal_directions(x) for site, x in rows.items()},
        }
        for arm, bases in arms.items():
            own = Faithfulness(measure.model, measure.contrast, bases, batch=batch, seed=seed)
            points += _of_basis(own, arm, effects(bases), config)
    return Curves(
        tuple(points), measure.share(measure.ceiling()),
        float(measure.full.mean()), float(measure.empty.mean()), len(measure.contrast),
    )  # fmt: skip


def _of_dictionaries(
    measure: Faithfulness, effects: Mapping[str, SiteEffects], config: CurvesConfig, seed: int
) -> Iterator[Point]:
    scores = {site: found.mean for site, found in effects.items()}
    activity = {site: found.activation for site, found in effects.items()}
    ceiling = measure.ceiling()
    for n, numbers in _cut(ranked(scores), config.sizes):
        kept = keep(scores, numbers)
        yield Point(CIRCUIT, n, measure.of(kept), completeness=measure.completeness(kept))
    orders = {
        LATENTS: ranked(scores, errors=False),
        "by activation": ranked(activity, errors=False),
    }
    for draw in range(config.draws):
        orders[f"random {draw}"] = shuffled(activity, seed=seed + draw, errors=False)
    for arm, order in orders.items():
        for n, numbers in _cut(order, config.sizes):
            kept = keep(scores, numbers)
            metric = measure.metric(kept)
            others = measure.completeness(kept, errors=False) if arm == LATENTS else None
            relative = measure.relative(metric, ceiling)
            yield Point(arm, n, measure.share(metric), others, relative)


def _of_basis(
    measure: Faithfulness, arm: str, effects: Mapping[str, SiteEffects], config: CurvesConfig
) -> Iterator[Point]:
    scores = {site: found.mean for site, found in effects.items()}
    for n, numbers in _cut(ranked(scores, errors=False), config.sizes):
        yield Point(arm, n, measure.of(keep(scores, numbers)))


def _cut(order: Int[Tensor, " m"], sizes: Sequence[int]) -> Iterator[tuple[int, Int[Tensor, " n"]]]:
    """Yield the first nodes of an order, as many as there are of them at most."""
    for n in sorted({min(size, len(order)) for size in sizes} - {0}):
        yield n, order[:n]


def _inside(contrast: Contrast, passage: Passage) -> Float[Tensor, "rows d"]:
    """Return the activations of all positions that have a slot, of both prompts of every pair."""
    inside, found = contrast.slots != OUTSIDE, [passage.clean]
    if passage.corrupted is not None:
        found.append(passage.corrupted)
    return torch.cat([x[inside] for x in found])
