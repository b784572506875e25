"""Running a model on a circuit only: nodes outside it take their mean over corrupted prompts.

At each site a kept node has the value that it takes in this very run, the others their mean in the
same slot. So the full circuit is the model itself, to the bit, and in the empty one every site
holds its mean activation, whatever the dictionary. With m the metric averaged over prompts,

    faithfulness  F(C) = (m(C) − m(∅)) / (m(M) − m(∅))        completeness  F(M ∖ C)

Without error nodes even all latents together reach only a *ceiling*: what the dictionaries'
reconstructions carry. Marks et al. 2024, arXiv 2403.19647; means over prompts as in Wang et al.
2022, arXiv 2211.00593.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.circuits.ability import mean_error
from saelab.circuits.attribution import split
from saelab.circuits.bases import Directions, in_forward_order
from saelab.circuits.contrast import OUTSIDE, Contrast, by_slot, clean_metric
from saelab.circuits.nodes import Kept, every, without
from saelab.errors import ConfigError
from saelab.protocols import Edit, LanguageModel
from saelab.stats import Statistic, over_documents, standard_error

ERRORS = 3.0
"""Standard errors that m(M) − m(∅) has to exceed before a share of it is reported."""


@dataclass(frozen=True)
class Means:
    """Mean of a site's codes and errors over the positions of each slot."""

    f: Float[Tensor, "slots d_sae"]
    error: Float[Tensor, "slots d"]


@torch.no_grad()
def means_by_slot(
    model: LanguageModel,
    tokens: Int[Tensor, "n pos"],
    slots: Int[Tensor, "n pos"],
    dictionaries: Mapping[str, Directions],
    *,
    n_slots: int,
    batch: int = 16,
) -> dict[str, Means]:
    """Return the mean codes and errors of prompts, slot by slot; 0 for a slot without position."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for part, of in zip(tokens.split(batch), slots.split(batch), strict=True):
        for site, x in model.capture(part, list(dictionaries)).items():
            parts = split(dictionaries[site], x)
            new = tuple(by_slot(t, of, n_slots).double().sum(0) for t in (parts.f, parts.error))
            old = sums.get(site, (0, 0))
            sums[site] = (old[0] + new[0], old[1] + new[1])
    count = torch.stack([(slots == slot).sum() for slot in range(n_slots)]).clamp(min=1)[:, None]
    found = {}
    for site, (f, error) in sums.items():
        like, n = dictionaries[site].W_dec, count.to(f)
        found[site] = Means((f / n).to(like.dtype), (error / n).to(like.dtype))
    return found


def ablating(
    dictionary: Directions,
    kept: Bool[Tensor, "slots nodes"],
    means: Means,
    slots: Int[Tensor, "n pos"],
) -> Edit:
    """Return the edit that gives all nodes outside a circuit their means."""
    device = dictionary.W_dec.device
    at = slots.clamp(min=0).to(device)
    inside = (slots != OUTSIDE).to(device)[..., None]
    gone = ~kept.to(device)[at] & inside

    @torch.no_grad()
    def edit(x: Float[Tensor, "n pos d"]) -> Float[Tensor, "n pos d"]:
        parts = split(dictionary, x)
        change = torch.where(gone[..., :-1], means.f[at] - parts.f, 0) @ dictionary.W_dec
        change = change + torch.where(gone[..., -1:], means.error[at] - parts.error, 0)
        return x + change.to(x)

    return edit


def circuit_metric(
    model: LanguageModel,
    contrast: Contrast,
    dictionaries: Mapping[str, Directions],
    kept: Kept,
    means: Mapping[str, Means],
    *,
    batch: int = 16,
) -> Float[Tensor, " n"]:
    """Return the metric of every clean prompt when only the circuit's nodes are left; float64."""
    found = []
    for chunk in contrast.chunks(batch):
        edits = {
            site: ablating(dictionary, kept[site], means[site], chunk.slots)
            for site, dictionary in dictionaries.items()
            if not bool(kept[site].all())
        }
        found.append(chunk.measure(model.logits(chunk.clean, edits)).double().cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class Share:
    """A share of m(M) − m(∅), with its standard error over prompts."""

    value: float
    standard_error: float | None


class Faithfulness:
    """Measures circuits of one set of dictionaries on one set of prompts.

    Raises ConfigError if m(M) − m(∅) is within three standard errors of 0: a share of it would
    mean nothing. Corrupted prompts are needed, for the means.
    """

    def __init__(
        self,
        model: LanguageModel,
        contrast: Contrast,
        dictionaries: Mapping[str, Directions],
        *,
        batch: int = 16,
        seed: int = 0,
    ) -> None:
        """Take the means, and measure the two ends."""
        if contrast.corrupted is None:
            raise ConfigError("the means of a circuit are over corrupted prompts: give some")
        self.model, self.contrast, self.batch, self.seed = model, contrast, batch, seed
        self.dictionaries = in_forward_order(model, dictionaries)
        self.means = means_by_slot(
            model, contrast.corrupted, contrast.slots, self.dictionaries,
            n_slots=contrast.n_slots, batch=batch,
        )  # fmt: skip
        shapes = {
            site: torch.empty(contrast.n_slots, dictionary.d_sae + 1)
            for site, dictionary in self.dictionaries.items()
        }
        self.everything = every(shapes)
        self.full = clean_metric(model, contrast, batch=batch)
        """The metric of each prompt in the whole model."""
        self.empty = self.metric(without(self.everything))
        """The same without any node."""
        _check_difference(self.full, self.empty)

    def metric(self, kept: Kept) -> Float[Tensor, " n"]:
        """Return the metric of every prompt in a circuit."""
        return circuit_metric(
            self.model, self.contrast, self.dictionaries, kept, self.means, batch=self.batch
        )

    def share(self, metric: Float[Tensor, " n"]) -> Share:
        """Return how much of the way from the empty to the full circuit a metric has gone."""
        sums = torch.stack([metric, self.empty, self.full], 1)
        value = float(_share(sums.sum(0, keepdim=True)))
        return Share(value, standard_error(over_documents(sums, _share, seed=self.seed)))

    def of(self, kept: Kept) -> Share:
        """Return a circuit's faithfulness."""
        return self.share(self.metric(kept))

    def completeness(self, kept: Kept) -> Share:
        """Return the faithfulness of everything else: low where the circuit is complete."""
        return self.of(without(kept))

    def ceiling(self) -> Float[Tensor, " n"]:
        """Return the metric with all latents and no error node."""
        return self.metric(every(self.everything, errors=False))

    def relative(self, metric: Float[Tensor, " n"], ceiling: Float[Tensor, " n"]) -> Share:
        """Return a circuit's share of what all latents without errors reach."""
        sums = torch.stack([metric, self.empty, ceiling], 1)
        value = float(_share(sums.sum(0, keepdim=True)))
        return Share(value, standard_error(over_documents(sums, _share, seed=self.seed)))


_share: Statistic = lambda s: (s[:, 0] - s[:, 1]) / (s[:, 2] - s[:, 1])  # noqa: E731 (a ratio)


def _check_difference(full: Float[Tensor, " n"], empty: Float[Tensor, " n"]) -> None:
    """Raise ConfigError if the whole model's metric cannot be told from that without any node."""
    difference = full - empty
    error = mean_error(difference)
    mean = float(difference.mean())
    if abs(mean) < max(ERRORS * error, 1e-12):
        raise ConfigError(
            f"the metric is {float(full.mean()):.4g} in the whole model and "
            f"{float(empty.mean()):.4g} with every node at its mean: a difference of {mean:.3g} "
            f"± {error:.2g} over {len(full)} prompts is no more than noise. Use a task that the "
            "model does, more prompts, or sites that carry it."
        )
