"""Tasks as tokens: clean and corrupted prompts, both kinds of negatives, answers and a metric.

`draw` makes a task's prompts for any tokenizer, `encode` makes them from examples of your own. All
versions of a prompt are equally long, and all prompts of one template have their slots at the same
positions: versions can be patched into each other, and averages be taken by slot.
"""

import random
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.circuits import examples
from saelab.circuits.examples import Example, Examples
from saelab.circuits.protocols import Tokenizer
from saelab.errors import ConfigError, TaskError, nearest
from saelab.harvest import toytext

Metric = Literal["logit_difference", "probability_difference"]
"""Mean logit of the right answers minus that of the wrong ones, or the sums' difference of their
probabilities."""
TaskName = Literal["ioi", "greater_than", "docstring", "induction", "agreement"]
Version = Literal["clean", "corrupted", "unpredictable", "off_task"]
_VERSIONS: tuple[Version, ...] = get_args(Version)
ALL = "all"
"""In place of a slot's name: every position."""
END = "end"
"""Slot of the last position: the one whose logits answer."""
_DOUBLINGS = 6
"""How often a draw is repeated with twice the examples, for prompts that are all different."""


@dataclass(frozen=True)
class TaskData:
    """Prompts of a task in four versions, row by row; right-padded, so read `lengths`.

    `clean` are the positive examples. `corrupted` have another right answer: what clean runs are
    patched with. `unpredictable` (the same form and tokens, nothing tells the answer) and
    `off_task` (other text of equal length) are the two kinds of negative examples.
    """

    name: str
    metric: Metric
    clean: Int[Tensor, "n pos"]
    corrupted: Int[Tensor, "n pos"]
    unpredictable: Int[Tensor, "n pos"]
    off_task: Int[Tensor, "n pos"]
    lengths: Int[Tensor, " n"]
    right: Int[Tensor, "n right"]
    """Token ids of the right answers, filled up with −1."""
    wrong: Int[Tensor, "n wrong"]
    templates: Int[Tensor, " n"]
    """Number of the frame that each row was made from."""
    slots: Mapping[str, Int[Tensor, " n"]]
    """Position of each named slot in each row, −1 where its template has none; always `end`."""
    attributes: Mapping[str, tuple[str, ...]]
    """What each row is about, by name: `io`, `subject` and `order` for `ioi`."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def rows(self, index: Int[Tensor, " m"]) -> "TaskData":
        """Return some rows, in that order; rows may repeat."""
        tensors = {
            key: value[index] for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return TaskData(
            name=self.name,
            metric=self.metric,
            slots={name: places[index] for name, places in self.slots.items()},
            attributes={
                name: tuple(values[i] for i in index.tolist())
                for name, values in self.attributes.items()
            },
            **tensors,
        )

    def marked(self, position: str) -> Bool[Tensor, "n pos"]:
        """Return which positions are meant: `all` but the padding, or those of a slot.

        Raises ConfigError for an unknown slot.
        """
        place = torch.arange(self.clean.shape[1])
        if position == ALL:
            return place < self.lengths[:, None]
        if position not in self.slots:
            raise ConfigError(
                f"{self.name} has no slot {position!r}; {nearest(position, [ALL, *self.slots])}"
            )
        return place == self.slots[position][:, None]

    def at_end(self, x: Float[Tensor, "n pos d"]) -> Float[Tensor, "n d"]:
        """Return each row's last position."""
        return x[torch.arange(len(self), device=x.device), (self.lengths - 1).to(x.device)]

    def measure(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
        """Return the metric of each row from the logits at its last position; differentiable."""
        if self.metric == "logit_difference":
            return _mean(logits, self.right) - _mean(logits, self.wrong)
        chances = logits.softmax(-1)
        return _sum(chances, self.right) - _sum(chances, self.wrong)

    def is_right(self, logits: Float[Tensor, "n d_vocab"]) -> Bool[Tensor, " n"]:
        """Return whether each row is answered right.

        With `logit_difference`: the likeliest right answer is likelier than every wrong one. With
        `probability_difference`: the right ones together are likelier than the wrong ones.
        """
        if self.metric == "probability_difference":
            return self.measure(logits) > 0
        return _best(logits, self.right) > _best(logits, self.wrong)

    @property
    def chance(self) -> float:
        """Mean accuracy of an order of the answers that knows nothing."""
        if self.metric == "probability_difference":
            return 0.5
        n_right, n_wrong = ((ids >= 0).sum(1).double() for ids in (self.right, self.wrong))
        return float((n_right / (n_right + n_wrong)).mean())


def _sum(x: Float[Tensor, "n d_vocab"], ids: Int[Tensor, "n m"]) -> Float[Tensor, " n"]:
    ids = ids.to(x.device)
    return (x.gather(1, ids.clamp(min=0)) * (ids >= 0)).sum(1)


def _mean(x: Float[Tensor, "n d_vocab"], ids: Int[Tensor, "n m"]) -> Float[Tensor, " n"]:
    return _sum(x, ids) / (ids >= 0).sum(1).to(x.device)


def _best(x: Float[Tensor, "n d_vocab"], ids: Int[Tensor, "n m"]) -> Float[Tensor, " n"]:
    ids = ids.to(x.device)
    found = x.gather(1, ids.clamp(min=0))
    return found.masked_fill(ids < 0, -torch.inf).max(1).values


# ------------------------------------------------------------------------------------ making tokens


@dataclass(frozen=True)
class Task:
    """A task that can be drawn for any tokenizer."""

    name: TaskName
    metric: Metric
    examples: Examples


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("ioi", "logit_difference", examples.indirect_object),
        Task("greater_than", "probability_difference", examples.greater_than),
        Task("docstring", "logit_difference", examples.docstring),
        Task("induction", "logit_difference", examples.induction),
        Task("agreement", "logit_difference", examples.agreement),
    )
}


Draw = Callable[..., TaskData]
"""Gives examples as `draw` does: by name, tokenizer, number and seed."""


def draw(name: str, tokenizer: Tokenizer, n: int, *, seed: int) -> TaskData:
    """Return `n` examples of a task, its templates in turn; more of them begin with these.

    Raises ConfigError for an unknown task, and TaskError if the tokenizer has too few words that
    are single tokens.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}; {nearest(name, list(TASKS))}")
    task = TASKS[name]
    chance = random.Random(seed)  # noqa: S311 (examples, no secret)
    found = list(islice(task.examples(tokenizer, chance), n))
    return encode(tokenizer, name, task.metric, found, seed=seed)


def distinct(
    drawn: Callable[[int], TaskData], n: int, *, known: TaskData | None = None
) -> TaskData:
    """Return the first `n` rows of a draw whose clean prompts differ from each other's, and from
    those of `known`.

    `drawn` gives as many examples as it is asked for, more of them beginning with the same ones, as
    `draw` does with its seed. Raises TaskError if there are too few different prompts.
    """
    seen = set() if known is None else set(_prompts(known))
    size = n
    while True:
        data = drawn(size)
        rows = _unseen(_prompts(data), seen)
        if len(rows) >= n:
            return data.rows(torch.tensor(rows[:n]))
        if size >= n << _DOUBLINGS:
            raise TaskError(
                f"{n} prompts of {data.name} were wanted that differ from each other"
                f"{'' if known is None else f' and from {len(known)} others'}, but {size} draws "
                f"gave {len(rows)}; ask for fewer, or take a task with more words"
            )
        size *= 2


def draw_shuffled(name: str, tokenizer: Tokenizer, n: int, *, seed: int) -> TaskData:
    """Return what `draw` does, `shuffled`."""
    return shuffled(draw(name, tokenizer, n, seed=seed))


def shuffled(data: TaskData) -> TaskData:
    """Return prompts whose tokens stand in an order of chance: a control.

    Each template has one order, the same in all versions and wherever it is met, so that pairs stay
    aligned. The first position stays; slots go with their tokens, but for `end`.
    """
    n = len(data)
    order = torch.arange(data.clean.shape[1]).repeat(n, 1)
    for template in data.templates.unique().tolist():
        mine = (data.templates == template).nonzero()[:, 0]
        length = int(data.lengths[mine[0]])
        generator = torch.Generator().manual_seed(template)
        order[mine, 1:length] = 1 + torch.randperm(length - 1, generator=generator)
    moved = order.argsort(1)
    slots = {
        slot: at if slot == END else torch.where(at >= 0, moved[torch.arange(n), at], -1)
        for slot, at in data.slots.items()
    }
    versions = {version: getattr(data, version).gather(1, order) for version in _VERSIONS}
    return replace(data, slots=slots, **versions)


def _prompts(data: TaskData) -> list[tuple[int, ...]]:
    """Return the clean prompts, without padding."""
    rows = zip(data.clean.tolist(), data.lengths.tolist(), strict=True)
    return [tuple(prompt[:length]) for prompt, length in rows]


def _unseen(prompts: Sequence[tuple[int, ...]], known: Collection[tuple[int, ...]]) -> list[int]:
    """Return the row at which each prompt that is not known stands first."""
    first = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
    return sorted(row for prompt, row in first.items() if prompt not in known)


def encode(
    tokenizer: Tokenizer, name: str, metric: Metric, found: Sequence[Example], *, seed: int
) -> TaskData:
    """Return examples as tokens; `seed` draws the off-task text.

    Raises TaskError if versions of a prompt differ in their number of tokens, if prompts of one
    frame do, or if an answer is no single token.
    """
    if not found:
        raise TaskError(f"{name} was given no example; at least one is needed")
    fillings = [(e.clean, e.corrupted, e.unpredictable) for e in found]
    texts = [
        _fill(e.frame, fills) for e, three in zip(found, fillings, strict=True) for fills in three
    ]
    runs = tokenizer.tokenize([text for text, _ in texts])
    ids = [run.ids for run in runs]
    places = [
        {slot: int((run.end < end).sum()) for slot, end in ends.items()}
        for run, (_, ends) in zip(runs, texts, strict=True)
    ]
    _check_equal(name, ids, places, [text for text, _ in texts])
    templates = list(dict.fromkeys(e.frame for e in found))
    numbers = [templates.index(e.frame) for e in found]
    lengths = torch.tensor([len(row) for row in ids[::3]])
    slots = _slots(places[::3], lengths)
    _check_templates(name, numbers, lengths, slots, templates)
    versions = [*(ids[i::3] for i in range(3)), _off_task(tokenizer, lengths.tolist(), seed)]
    shift = int(tokenizer.adds_bos)
    clean, corrupted, unpredictable, off_task = (_padded(rows, tokenizer) for rows in versions)
    answers = _Answers(tokenizer)
    return TaskData(
        name=name,
        metric=metric,
        clean=clean,
        corrupted=corrupted,
        unpredictable=unpredictable,
        off_task=off_task,
        lengths=lengths + shift,
        right=_table([answers(word, e.before_answer) for word in e.right] for e in found),
        wrong=_table([answers(word, e.before_answer) for word in e.wrong] for e in found),
        templates=torch.tensor(numbers),
        slots={slot: torch.where(at >= 0, at + shift, -1) for slot, at in slots.items()},
        attributes={
            key: tuple(e.attributes[key] for e in found) for key in found[0].attributes
        },
    )  # fmt: skip


def _fill(frame: str, fills: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """Return the filled frame, and where in it each slot ends."""
    text, ends = "", dict[str, int]()
    for literal, slot, _, _ in string.Formatter().parse(frame):
        text += literal
        if slot is not None:
            text += fills[slot]
            ends[slot] = len(text)
    return text, ends


def _check_equal(
    name: str, ids: list[Tensor], places: list[dict[str, int]], texts: list[str]
) -> None:
    """Raise TaskError if the versions of an example differ in length or in their slots' places."""
    for i in range(0, len(ids), 3):
        for other in (i + 1, i + 2):
            if len(ids[other]) != len(ids[i]) or places[other] != places[i]:
                raise TaskError(
                    f"the versions of a prompt of {name} should be equally long, slot by slot, but "
                    f"{texts[i]!r} has {len(ids[i])} tokens and {texts[other]!r} "
                    f"{len(ids[other])}. Fill slots with words of as many tokens."
                )


def _check_templates(
    name: str,
    numbers: list[int],
    lengths: Int[Tensor, " n"],
    slots: Mapping[str, Int[Tensor, " n"]],
    templates: list[str],
) -> None:
    """Raise TaskError if the prompts of one frame are not aligned."""
    number = torch.tensor(numbers)
    for i, frame in enumerate(templates):
        for column in (lengths, *slots.values()):
            if len(column[number == i].unique()) > 1:
                raise TaskError(
                    f"all prompts of a frame of {name} should be equally long, slot by slot, but "
                    f"those of {frame!r} are not. Fill each slot with words of as many tokens."
                )


def _slots(places: list[dict[str, int]], lengths: Int[Tensor, " n"]) -> dict[str, Tensor]:
    names = dict.fromkeys(slot for row in places for slot in row)
    found = {name: torch.tensor([row.get(name, -1) for row in places]) for name in names}
    return found | {END: lengths - 1}


def _padded(rows: Sequence[Tensor], tokenizer: Tokenizer) -> Int[Tensor, "n pos"]:
    if tokenizer.adds_bos:
        rows = [torch.cat([torch.tensor([tokenizer.bos_id]), row]) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=tokenizer.pad_id or 0
    )


def _table(rows: Iterator[list[int]]) -> Int[Tensor, "n m"]:
    columns = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=-1)


class _Answers:
    """Looks up the one token of an answer, each only once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[str, str], int] = {}

    def __call__(self, word: str, before: str) -> int:
        if (word, before) not in self._known:
            whole, stem = self._tokenizer.tokenize([f"{before or ' '}{word}", before])
            if len(whole) != len(stem) + 1:
                raise TaskError(
                    f"an answer should be a single token, but {word!r} is "
                    f"{len(whole) - len(stem)} tokens of {self._tokenizer.name}; take another word"
                )
            self._known[word, before] = int(whole.ids[-1])
        return self._known[word, before]


def _off_task(tokenizer: Tokenizer, lengths: list[int], seed: int) -> list[Int[Tensor, " pos"]]:
    """Return pieces of plain text with these numbers of tokens."""
    text = "\n".join(text for text, _ in islice(toytext.documents(), 60))
    ids = tokenizer.tokenize([text])[0].ids
    if len(ids) <= max(lengths):
        raise TaskError(
            f"off-task text has {len(ids)} tokens, but a prompt has {max(lengths)}; shorten it"
        )
    chance = random.Random(seed)  # noqa: S311 (a text, no secret)
    starts = [chance.randrange(len(ids) - length) for length in lengths]
    return [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]
