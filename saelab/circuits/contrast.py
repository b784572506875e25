"""Pairs of prompts that differ in what a circuit has to tell apart, and the metric that shows it.

A pair's two prompts have the same length, so that what one puts at a position can be put at the
same position of the other. Positions belong to *slots* of the prompts' template (`subject`, `end`,
or −1 for the last token): nodes of a graph are kept per slot, so that prompts of several templates
add up. Mean activations are kept per template and slot: what `s2+1` is in one template, it is not
in another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.circuits.tasks import TaskData
from saelab.errors import ConfigError, ShapeError
from saelab.protocols import LanguageModel

OUTSIDE = -1
"""Slot of positions that are left alone: they have no nodes and are never replaced."""

Metric = Callable[[Float[Tensor, "batch pos d_vocab"], Int[Tensor, " batch"]], Float[Tensor, "..."]]
"""Returns one number per prompt from the logits and the prompts' row numbers; differentiable."""


@dataclass(frozen=True)
class Contrast:
    """Clean prompts, each with a corrupted one of equal length, and a metric of the clean answer.

    Raises ShapeError if the tables do not fit each other, ConfigError without prompts or slots.
    """

    clean: Int[Tensor, "n pos"]
    corrupted: Int[Tensor, "n2 pos2"] | None
    """As `clean`. None: latents and errors are compared with 0 instead, as for a single prompt."""
    slots: Int[Tensor, "n3 pos3"]
    """As `clean`. Number of each position's slot; `OUTSIDE` for positions that are left alone."""
    slot_names: tuple[str, ...]
    metric: Metric
    templates: Int[Tensor, " n4"] | None = None
    """Number of the template that each pair is of. None: all are of one."""

    def __post_init__(self) -> None:
        """Check that the tables fit each other."""
        if self.corrupted is not None and self.corrupted.shape != self.clean.shape:
            raise ShapeError(
                f"clean prompts are {tuple(self.clean.shape)} tokens, corrupted ones "
                f"{tuple(self.corrupted.shape)}: a pair needs prompts of equal token length"
            )
        if self.slots.shape != self.clean.shape:
            raise ShapeError(
                f"slots are {tuple(self.slots.shape)}, but prompts {tuple(self.clean.shape)}: "
                "give each position a slot"
            )
        if self.templates is not None and len(self.templates) != len(self.clean):
            raise ShapeError(
                f"{len(self.templates)} pairs have a template, but there are {len(self.clean)}: "
                "give each pair the number of its template"
            )
        if not len(self.clean) or not bool((self.slots != OUTSIDE).any()):
            raise ConfigError("there is no prompt with a position to look at; give some, in slots")
        if int(self.slots.max()) >= len(self.slot_names):
            raise ShapeError(
                f"slot {int(self.slots.max())} has no name among {', '.join(self.slot_names)}"
            )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.clean)

    @property
    def n_slots(self) -> int:
        """Number of slots."""
        return len(self.slot_names)

    @property
    def template_of(self) -> Int[Tensor, " n"]:
        """Number of each pair's template; 0 where all are of one."""
        if self.templates is None:
            return torch.zeros(len(self), dtype=torch.long)
        return self.templates

    def chunks(self, batch: int) -> Iterator["Contrast"]:
        """Yield the pairs in order, `batch` at a time; each chunk's metric knows its rows."""
        for rows in torch.arange(len(self)).split(batch):
            yield self.select(rows)

    def select(self, rows: Int[Tensor, " m"]) -> "Contrast":
        """Return the pairs with these row numbers; metrics are still told the numbers here."""
        metric = self.metric
        return replace(
            self,
            clean=self.clean[rows],
            corrupted=None if self.corrupted is None else self.corrupted[rows],
            slots=self.slots[rows],
            templates=None if self.templates is None else self.templates[rows],
            metric=lambda logits, within: metric(logits, rows.to(within.device)[within]),
        )

    def measure(self, logits: Float[Tensor, "n pos d_vocab"]) -> Float[Tensor, " n"]:
        """Return the metric of every pair."""
        found = self.metric(logits, torch.arange(len(self), device=logits.device))
        if found.shape != (len(self),):
            raise ShapeError(
                f"a metric should return one number for each of {len(self)} prompts, but returned "
                f"{tuple(found.shape)}"
            )
        return found


def logit_difference(right: Int[Tensor, " n"], wrong: Int[Tensor, " n"]) -> Metric:
    """Return the metric logit(right) − logit(wrong) at the last position."""

    def metric(
        logits: Float[Tensor, "batch pos d_vocab"], rows: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        last, r, w = logits[:, -1], right.to(rows.device)[rows], wrong.to(rows.device)[rows]
        return (last.gather(1, r[:, None]) - last.gather(1, w[:, None]))[:, 0]

    return metric


def positions_from_the_end(
    tokens: Int[Tensor, "n pos"], *, leave: frozenset[int] = frozenset(), first: bool = True
) -> tuple[Int[Tensor, "n pos"], tuple[str, ...]]:
    """Return slots and names for prompts of one template: every position is its own, −1 the last.

    Tokens in `leave` (special ones) and, with `first`, the first position are `OUTSIDE`: first
    positions are attention sinks, which dictionaries are not trained on.
    """
    n, length = tokens.shape
    slots = torch.arange(length).expand(n, length).clone()
    if leave:
        slots[torch.isin(tokens.cpu(), torch.tensor(sorted(leave)))] = OUTSIDE
    if first:
        slots[:, 0] = OUTSIDE
    return slots, tuple(str(place - length) for place in range(length))


def contrast_of(
    data: TaskData,
    *,
    leave: frozenset[int] = frozenset(),
    slot_names: tuple[str, ...] | None = None,
) -> Contrast:
    """Return a task's pairs, with a slot for every position of its templates.

    A position between two named slots is called after the one before it: `s2+1` is the token after
    the second subject, in every template. The first position, padding and the tokens in `leave`
    (special ones) are `OUTSIDE`. `slot_names` are those of other prompts of the task, to number
    slots alike; raises ConfigError if a slot is not among them.
    """
    rows = [_slot_labels(data, row) for row in range(len(data))]
    names = slot_names or _in_order(rows)
    unknown = {label for labels in rows for label in labels} - set(names)
    if unknown:
        raise ConfigError(
            f"prompts of {data.name} have the slots {', '.join(sorted(unknown))}, but those known "
            f"are {', '.join(names)}: take prompts of the same task and tokenizer"
        )
    slots = torch.full(data.clean.shape, OUTSIDE)
    for row, labels in enumerate(rows):
        slots[row, : len(labels)] = torch.tensor([names.index(label) for label in labels])
    slots[:, 0] = OUTSIDE
    if leave:
        slots[torch.isin(data.clean, torch.tensor(sorted(leave)))] = OUTSIDE

    def metric(
        logits: Float[Tensor, "batch pos d_vocab"], index: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        part = data.rows(index.cpu())
        return part.measure(part.at_end(logits))

    return Contrast(data.clean, data.corrupted, slots, names, metric, data.templates)


def _in_order(rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return all labels by the first position at which they stand anywhere."""
    places: dict[str, int] = {}
    for labels in rows:
        for position, label in enumerate(labels):
            places[label] = min(position, places.get(label, position))
    return tuple(sorted(places, key=lambda label: places[label]))


def _slot_labels(data: TaskData, row: int) -> list[str]:
    """Return what each position of a prompt is called."""
    named = {int(at[row]): name for name, at in data.slots.items() if int(at[row]) >= 0}
    labels, last, since = [], "start", 0
    for position in range(int(data.lengths[row])):
        last, since = (named[position], 0) if position in named else (last, since + 1)
        labels.append(f"{last}+{since}" if since else last)
    return labels


def clean_metric(
    model: LanguageModel, contrast: Contrast, *, batch: int = 16, corrupted: bool = False
) -> Float[Tensor, " n"]:
    """Return the metric of the untouched model, on the clean or on the corrupted prompts."""
    found = []
    for chunk in contrast.chunks(batch):
        tokens = chunk.clean
        if corrupted:
            if chunk.corrupted is None:
                raise ConfigError("there are no corrupted prompts to measure; give some")
            tokens = chunk.corrupted
        found.append(chunk.measure(model.logits(tokens)).double().cpu())
    return torch.cat(found)


def by_slot(
    values: Float[Tensor, "n pos m"], slots: Int[Tensor, "n pos"], n_slots: int
) -> Float[Tensor, "n slots m"]:
    """Return, per prompt, the sum of `values` over the positions of each slot."""
    n, _, m = values.shape
    place = slots.to(values.device)
    bins = torch.where(place == OUTSIDE, n_slots, place)
    sums = values.new_zeros(n, n_slots + 1, m)
    sums.scatter_add_(1, bins[..., None].expand_as(values), values)
    return sums[:, :n_slots]
