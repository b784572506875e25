"""How much each latent and each dictionary's error carries a metric, from gradients.

At a site, x = f W_dec + b_dec + r: the code f, and the error r. With m the metric, and the gradient
flowing from x̂ to f and straight through x → x̂ + r, the gradient at x gives both:

    ∂m/∂f_i = ⟨W_dec[i], g⟩        ∂m/∂r = g        g = ∂m/∂x

A node's *effect* is how much the metric falls when the node takes its value in the corrupted
prompt: g · (clean − corrupted), summed over the error's coordinates. To first order (`attribution`)
g is that of the clean prompt. `integrated` averages it over the straight line from the clean to the
corrupted activations of one site, all else clean; the left sum of the paper leaves out the end
point and errs by O(1/steps), the midpoint rule is exact for quadratic metrics.

Effects are kept per slot: summed over its positions in a prompt, then averaged over prompts. At
each site, the effects of all nodes sum to g · (x_clean − x_corrupted).

Marks, Rager, Michaud, Belinkov, Bau, Mueller 2024, "Sparse Feature Circuits", arXiv 2403.19647;
Syed, Rager, Conmy 2023 (attribution patching), arXiv 2310.10348.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from saelab.circuits.bases import Directions, in_forward_order
from saelab.circuits.contrast import Contrast, by_slot
from saelab.config import Config
from saelab.protocols import Edit, LanguageModel

Rule = Literal["left", "midpoint"]


class AttributionConfig(Config):
    """How effects are found."""

    method: Literal["attribution", "integrated"] = "integrated"
    """`attribution`: the clean gradient; `integrated`: its mean on the way to the corrupted
    prompt."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Points of that way."""
    rule: Rule = "left"
    """Where the points lie: `left` as published, or `midpoint`."""
    batch: PositiveInt = 16
    """Pairs that go through the model together."""


@dataclass(frozen=True)
class SiteEffects:
    """Effects of one site's nodes: columns are latents, the last one is the error."""

    mean: Float[Tensor, "slots nodes"]
    """How much the metric falls, averaged over prompts; float64."""
    standard_error: Float[Tensor, "slots nodes"]
    """Over prompts."""
    activation: Float[Tensor, "slots nodes"]
    """Mean over prompts of |f|, and of ‖r‖, summed over the slot's positions."""


@dataclass(frozen=True)
class Passage:
    """One site: the activations of both prompts, and the gradient between them."""

    clean: Float[Tensor, "n pos d"]
    corrupted: Float[Tensor, "n pos d"] | None
    """None: latents and error are compared with 0."""
    gradient: Float[Tensor, "n pos d"]

    def rows(self, rows: Int[Tensor, " m"], device: torch.device) -> "Passage":
        """Return some prompts, on a device."""
        end = self.corrupted
        return Passage(
            self.clean[rows].to(device),
            None if end is None else end[rows].to(device),
            self.gradient[rows].to(device),
        )


@dataclass(frozen=True)
class Parts:
    """Activations taken apart by a dictionary: x = f W_dec + b_dec + error."""

    f: Float[Tensor, "n pos d_sae"]
    error: Float[Tensor, "n pos d"]


def split(dictionary: Directions, x: Float[Tensor, "n pos d"]) -> Parts:
    """Return the codes of x, and what the dictionary misses."""
    f = dictionary.encode(x)
    return Parts(f, x.to(f) - f @ dictionary.W_dec - dictionary.b_dec)


def path_gradient(
    gradient: Callable[[Tensor], Tensor],
    start: Float[Tensor, "..."],
    end: Float[Tensor, "..."],
    *,
    steps: int,
    rule: Rule,
) -> Float[Tensor, "..."]:
    """Return the mean of a gradient over `steps` points of the straight line from start to end.

    Times (end − start) it is the integrated gradient: with one step of rule `left`, attribution
    patching.
    """
    shift = 0.5 if rule == "midpoint" else 0.0
    points = (torch.lerp(start, end, (step + shift) / steps) for step in range(steps))
    total = torch.zeros_like(start)
    for point in points:
        total += gradient(point)
    return total / steps


def passages(
    model: LanguageModel,
    contrast: Contrast,
    dictionaries: Mapping[str, Directions],
    config: AttributionConfig,
) -> dict[str, Passage]:
    """Return both activations of every site and the gradient between them, on the CPU.

    Costs one forward and backward pass per batch and, integrated, one per site and step. Of the
    dictionaries only the sites matter, and b_dec where there are no corrupted prompts: effects of
    other dictionaries of these sites, and edges, cost no further pass.
    """
    dictionaries = in_forward_order(model, dictionaries)
    parts = [_passages(model, c, dictionaries, config) for c in contrast.chunks(config.batch)]
    return {site: _joined([part[site] for part in parts]) for site in dictionaries}


def _joined(parts: Sequence[Passage]) -> Passage:
    ends = [part.corrupted for part in parts if part.corrupted is not None]
    return Passage(
        torch.cat([part.clean.cpu() for part in parts]),
        torch.cat([end.cpu() for end in ends]) if ends else None,
        torch.cat([part.gradient.cpu() for part in parts]),
    )


def _passages(
    model: LanguageModel,
    chunk: Contrast,
    dictionaries: Mapping[str, Directions],
    config: AttributionConfig,
) -> dict[str, Passage]:
    sites = list(dictionaries)
    whole = model.grad_at(chunk.clean, sites, lambda logits: chunk.measure(logits).sum())
    other = {} if chunk.corrupted is None else model.capture(chunk.corrupted, sites)
    found = {}
    for site, (clean, gradient) in whole.items():
        corrupted = other.get(site)
        if config.method == "integrated":
            nothing = dictionaries[site].b_dec.detach().to(clean)
            end = nothing.expand_as(clean) if corrupted is None else corrupted
            gradient = path_gradient(
                lambda x, site=site: _gradient_with(model, chunk, site, x),
                clean, end, steps=config.steps, rule=config.rule,
            )  # fmt: skip
        found[site] = Passage(clean, corrupted, gradient)
    return found


def _gradient_with(model: LanguageModel, chunk: Contrast, site: str, x: Tensor) -> Tensor:
    """Return the metric's gradient at a site that is given these activations."""
    put: Edit = lambda _: x  # noqa: E731 (a constant edit)
    found = model.grad_at(
        chunk.clean, [site], lambda logits: chunk.measure(logits).sum(), edits={site: put}
    )
    return found[site][1]


@torch.no_grad()
def node_effects(
    dictionary: Directions, passage: Passage
) -> tuple[Float[Tensor, "n pos nodes"], Float[Tensor, "n pos nodes"]]:
    """Return each node's effect and activation at each position; the last column is the error."""
    here, lost = split(dictionary, passage.clean), differences(dictionary, passage)
    g = passage.gradient.to(lost.f)
    latents = lost.f * (g @ dictionary.W_dec.T)
    error = (lost.error * g).sum(-1, keepdim=True)
    size = torch.cat([here.f.abs(), here.error.norm(dim=-1, keepdim=True)], -1)
    return torch.cat([latents, error], -1), size


@torch.no_grad()
def differences(dictionary: Directions, passage: Passage) -> Parts:
    """Return what codes and errors lose on the way from the clean to the corrupted prompt."""
    clean = split(dictionary, passage.clean)
    if passage.corrupted is None:
        return clean
    corrupted = split(dictionary, passage.corrupted)
    return Parts(clean.f - corrupted.f, clean.error - corrupted.error)


def effects_of(
    contrast: Contrast, dictionary: Directions, passage: Passage, *, batch: int = 16
) -> SiteEffects:
    """Return the effects of every latent and error of one site at every slot.

    Memory is a few dense codes of a batch and six numbers per node.
    """
    sums = _Sums(contrast.n_slots, dictionary.d_sae + 1)
    for rows in torch.arange(len(contrast)).split(batch):
        effect, size = node_effects(dictionary, passage.rows(rows, dictionary.W_dec.device))
        slots = contrast.slots[rows]
        sums.add_(by_slot(effect, slots, contrast.n_slots), by_slot(size, slots, contrast.n_slots))
    return sums.effects(len(contrast))


def attribute(
    model: LanguageModel,
    contrast: Contrast,
    dictionaries: Mapping[str, Directions],
    config: AttributionConfig | None = None,
) -> dict[str, SiteEffects]:
    """Return the effects of every latent and error at every slot, site by site in forward order.

    `passages` and `effects_of` in one. Raises what `in_forward_order` does.
    """
    config = config or AttributionConfig()
    between = passages(model, contrast, dictionaries, config)
    return {
        site: effects_of(contrast, dictionaries[site], passage, batch=config.batch)
        for site, passage in between.items()
    }


class _Sums:
    """Sums over prompts, in float64."""

    def __init__(self, n_slots: int, n_nodes: int) -> None:
        self.effect, self.square, self.size = torch.zeros(
            3, n_slots, n_nodes, dtype=torch.float64
        ).unbind(0)

    def add_(
        self, effect: Float[Tensor, "n slots nodes"], size: Float[Tensor, "n slots nodes"]
    ) -> None:
        effect = effect.double().cpu()
        self.effect += effect.sum(0)
        self.square += effect.square().sum(0)
        self.size += size.double().cpu().sum(0)

    def effects(self, n: int) -> SiteEffects:
        mean = self.effect / n
        spread = (self.square / n - mean.square()).clamp(min=0)
        return SiteEffects(mean, (spread / max(n - 1, 1)).sqrt(), self.size / n)
