"""Running a model on a circuit only: nodes outside it take their mean over corrupted prompts.

At each site a kept node has the value that it takes in this very run, the others their mean in the
same slot of the same template: over all templates, tokens of unlike meaning would be averaged under
one slot's name. So the full circuit is the model itself, to the bit, and in the empty one every
site holds its mean activation, whatever the dictionary. With m the metric averaged over prompts,

    faithfulness  F(C) = (m(C) − m(∅)) / (m(M) − m(∅))        completeness  F(M ∖ C)

Without error nodes even all latents together reach only a *ceiling*: what the dictionaries'
reconstructions carry. Marks et al. 2024, arXiv 2403.19647; means over prompts as in Wang et al.
2022, arXiv 2211.00593.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.circuits.ability import mean_error
from saelab.circuits.attribution import split
from saelab.circuits.bases import Directions, in_forward_order
from saelab.circuits.contrast import OUTSIDE, Contrast, clean_metric
from saelab.circuits.nodes import Kept, every, without
from saelab.errors import ConfigError
from saelab.protocols import Edit, LanguageModel
from saelab.stats import Statistic, over_documents, standard_error

ERRORS = 3.0
"""Standard errors that m(M) − m(∅) has to exceed before a share of it is reported."""


@dataclass(frozen=True)
class Means:
    """Mean of a site's codes and errors over the positions of each slot, template by template."""

    f: Float[Tensor, "templates slots d_sae"]
    error: Float[Tensor, "templates slots d"]


@torch.no_grad()
def corrupted_means(
    model: LanguageModel,
    contrast: Contrast,
    dictionaries: Mapping[str, Directions],
    *,
    batch: int = 16,
) -> dict[str, Means]:
    """Return each site's mean codes and errors of corrupted prompts, by template and slot.

    0 for a slot that a template has not. Raises ConfigError without corrupted prompts.
    """
    if contrast.corrupted is None:
        raise ConfigError("the means of a circuit are over corrupted prompts: give some")
    shape = (int(contrast.template_of.max()) + 1, contrast.n_slots)
    sums = {
        site: tuple(torch.zeros(*shape, w, dtype=torch.float64) for w in (d.d_sae, d.d_out))
        for site, d in dictionaries.items()
    }
    count = torch.zeros(*shape, 1, dtype=torch.float64)
    for chunk in contrast.chunks(batch):
        assert chunk.corrupted is not None
        inside = chunk.slots != OUTSIDE
        template = chunk.template_of[:, None].expand_as(chunk.slots)[inside]
        place = (template, chunk.slots[inside])
        count.index_put_(place, torch.ones(len(template), 1).double(), accumulate=True)
        for site, x in model.capture(chunk.corrupted, list(dictionaries)).items():
            parts = split(dictionaries[site], x)
            for total, values in zip(sums[site], (parts.f, parts.error), strict=True):
                total.index_put_(place, values.cpu()[inside].double(), accumulate=True)
    found = {}
    for site, (f, error) in sums.items():
        like, n = dictionaries[site].W_dec, count.clamp(min=1)
        found[site] = Means((f / n).to(like), (error / n).to(like))
    return found


def ablating(
    dictionary: Directions, kept: Bool[Tensor, "slots nodes"], means: Means, contrast: Contrast
) -> Edit:
    """Return the edit that gives all nodes outside a circuit their means, in these prompts."""
    device = dictionary.W_dec.device
    at = contrast.slots.clamp(min=0).to(device)
    template = contrast.template_of[:, None].to(device)
    inside = (contrast.slots != OUTSIDE).to(device)[..., None]
    gone = ~kept.to(device)[at] & inside

    @torch.no_grad()
    def edit(x: Float[Tensor, "n pos d"]) -> Float[Tensor, "n pos d"]:
        parts = split(dictionary, x)
        f, error = means.f.to(device)[template, at], means.error.to(device)[template, at]
        change = torch.where(gone[..., :-1], f - parts.f, 0) @ dictionary.W_dec
        change = change + torch.where(gone[..., -1:], error - parts.error, 0)
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
            site: ablating(dictionary, kept[site], means[site], chunk)
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
        self.model, self.contrast, self.batch, self.seed = model, contrast, batch, seed
        self.dictionaries = in_forward_order(model, dictionaries)
        self.means = corrupted_means(model, contrast, self.dictionaries, batch=batch)
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

    def completeness(self, kept: Kept, *, errors: bool = True) -> Share:
        """Return the faithfulness of everything else: low where the circuit is complete.

        Without `errors` of all other latents, every error at its mean: from the ceiling down to 0.
        """
        return self.of(without(kept, errors=errors))

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
