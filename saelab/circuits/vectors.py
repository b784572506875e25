"""The activations of a few slots of one site, and the model with others in their place.

A *cross-section* is the site with the slots that a task goes through: patching them from corrupted
prompts moves a given share of the metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.circuits.ability import last_logits
from saelab.circuits.attributes import at_slots
from saelab.circuits.effects import require_gap
from saelab.circuits.tasks import TaskData, Version
from saelab.errors import ConfigError
from saelab.protocols import Edit, LanguageModel
from saelab.types import SiteInfo


@dataclass(frozen=True)
class CrossSection:
    """One site, some slots."""

    site: str
    slots: tuple[str, ...]
    moved: float
    """Share of the metric's difference between clean and corrupted prompts that they carry, on the
    prompts that chose them."""


@dataclass(frozen=True)
class Outcome:
    """What the model makes of some prompts."""

    metric: Float[Tensor, " n"]
    """float64."""
    answer: Int[Tensor, " n"]
    """Its likeliest next token."""


def vectors(
    model: LanguageModel,
    data: TaskData,
    site: str,
    slots: Sequence[str],
    *,
    version: Version = "clean",
    batch: int = 16,
) -> Float[Tensor, "n slots d"]:
    """Return the activations of some slots of every prompt."""
    at = at_slots(data, slots)
    tokens: Tensor = getattr(data, version)
    found = []
    for rows in torch.arange(len(data)).split(batch):
        x = model.capture(tokens[rows], [site])[site]
        found.append(x[torch.arange(len(rows))[:, None], at[rows]])
    return torch.cat(found)


def outcome(
    model: LanguageModel,
    data: TaskData,
    site: str,
    slots: Sequence[str],
    x: Float[Tensor, "n slots d"] | None = None,
    *,
    batch: int = 16,
) -> Outcome:
    """Return the model's metric and answers on clean prompts, with `x` put into the slots."""
    at = at_slots(data, slots)
    metric, answer = [], []
    for rows in torch.arange(len(data)).split(batch):
        edits = {} if x is None else {site: _put(at[rows], x[rows])}
        part = data.rows(rows)
        logits = part.at_end(model.logits(part.clean, edits))
        metric.append(part.measure(logits).double().cpu())
        answer.append(logits.argmax(-1).cpu())
    return Outcome(torch.cat(metric), torch.cat(answer))


def _put(at: Int[Tensor, "n slots"], x: Float[Tensor, "n slots d"]) -> Edit:
    def edit(y: Float[Tensor, "n pos d"]) -> Float[Tensor, "n pos d"]:
        y = y.clone()
        y[torch.arange(len(y))[:, None], at] = x.to(y)
        return y

    return edit


class Swap:
    """How much of the metric's difference between clean and corrupted prompts goes through slots.

    Raises TaskError if the difference is within noise.
    """

    def __init__(
        self, model: LanguageModel, data: TaskData, slots: Sequence[str], *, batch: int = 16
    ) -> None:
        """Measure both ends; `slots` are those that can be asked about."""
        self.model, self.data, self.slots, self.batch = model, data, tuple(slots), batch
        clean, corrupted = (
            data.measure(last_logits(model, data, version, batch=batch)).double().cpu()
            for version in ("clean", "corrupted")
        )
        self.clean = clean
        """The metric of each clean prompt."""
        self.gaps = clean - corrupted
        """What corrupted prompts take from it."""
        require_gap(self.gaps, data.name)
        self._held = dict[str, Tensor]()

    def moved(self, site: str, slots: Sequence[str]) -> Float[Tensor, " n"]:
        """Return what corrupted activations of some slots of a site take from the metric."""
        if site not in self._held:
            self._held[site] = vectors(
                self.model, self.data, site, self.slots, version="corrupted", batch=self.batch
            )
        x = self._held[site][:, [self.slots.index(slot) for slot in slots]]
        return self.clean - outcome(self.model, self.data, site, slots, x, batch=self.batch).metric

    def share(self, site: str, slots: Sequence[str]) -> float:
        """Return Σ moved / Σ gaps."""
        return float(self.moved(site, slots).sum() / self.gaps.sum())


def choose_slots(
    model: LanguageModel,
    data: TaskData,
    site: str,
    *,
    share: float = 0.5,
    slots: Sequence[str] = (),
    batch: int = 16,
) -> CrossSection:
    """Return the fewest slots, those that carry most first, which together move `share`.

    They are chosen among `slots`, by default all that every prompt has. Raises ConfigError if they
    do not move so much together, TaskError if the metrics of clean and corrupted prompts differ by
    no more than noise.
    """
    slots = slots or [name for name, at in data.slots.items() if bool((at >= 0).all())]
    swap = Swap(model, data, slots, batch=batch)
    alone = {slot: swap.share(site, [slot]) for slot in slots}
    order = sorted(slots, key=lambda slot: -alone[slot])
    together = 0.0
    for n in range(1, len(order) + 1):
        together = alone[order[0]] if n == 1 else swap.share(site, order[:n])
        if together >= share:
            return CrossSection(site, tuple(order[:n]), together)
    raise ConfigError(
        f"the slots {', '.join(slots)} of {site} together move {together:.0%} of the metric, but "
        f"{share:.0%} is wanted: give more slots, another site, or a smaller share"
    )


def in_every_layer(model: LanguageModel, site: str) -> list[str]:
    """Return the sites at the same place in every layer, this one among them."""
    mine = _place(model.site(site))
    return [other.name for other in model.sites() if _place(other) == mine]


def _place(site: SiteInfo) -> str:
    return site.name if site.layer is None else site.name.replace(f".{site.layer}.", ".*.", 1)
