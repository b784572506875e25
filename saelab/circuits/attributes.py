"""What prompts are about, as a dictionary: one feature per value of each attribute.

With ā the mean activation and a_i(p) the value of attribute i in prompt p,

    x̂(p) = ā + Σ_i u[i, a_i(p)]

the u are mean features or least squares on the attributes (`probes.DIRECTIONS`). This is the
ceiling of `supervised.py`: the codes come from the labels. A *counterfactual* is a prompt that
differs in one attribute.

Makelov, Lange, Nanda 2025, "Towards Principled Evaluations of Sparse Autoencoders for
Interpretability and Control", arXiv 2405.08366.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.circuits.tasks import TaskData
from saelab.errors import ConfigError, TaskError
from saelab.probes import DIRECTIONS

Features = Literal["mean_features", "least_squares"]


@dataclass(frozen=True)
class Coding:
    """Vectors as weighted sums of directions: x ≈ z W + b, whoever the weights come from."""

    z: Float[Tensor, "n m"]
    W: Float[Tensor, "m d"]
    b: Float[Tensor, " d"]

    @property
    def said(self) -> Float[Tensor, "n d"]:
        """What the weights say, without b."""
        return self.z @ self.W

    @property
    def x_hat(self) -> Float[Tensor, "n d"]:
        """The sums."""
        return self.said + self.b


@dataclass(frozen=True)
class Attributes:
    """The attributes that are looked at, and the values of each; columns are values in order."""

    values: Mapping[str, tuple[str, ...]]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(attribute, value) of each column."""
        return [(name, value) for name, values in self.values.items() for value in values]

    def of(self, attribute: str) -> list[int]:
        """Return an attribute's columns."""
        return [i for i, (name, _) in enumerate(self.columns) if name == attribute]

    def table(self, of: Mapping[str, Sequence[str]]) -> Bool[Tensor, "n columns"]:
        """Return which values each prompt has. Values that are not known have no column."""
        columns = [[v == value for v in of[name]] for name, value in self.columns]
        return torch.tensor(columns).T

    def known(self, of: Mapping[str, Sequence[str]]) -> Bool[Tensor, " n"]:
        """Return whether all attributes of a prompt have a column."""
        return self.table(of).sum(1) == len(self.values)


def attributes_of(data: TaskData) -> Attributes:
    """Return a task's attributes with the values that its prompts have.

    Raises ConfigError if its prompts have none.
    """
    if not data.attributes:
        raise ConfigError(
            f"the prompts of {data.name} have no attributes; supervised evaluation needs a task "
            "that names what its prompts are about, such as ioi"
        )
    return Attributes({name: tuple(sorted(set(v))) for name, v in data.attributes.items()})


@dataclass(frozen=True)
class Supervised:
    """One feature per value, fitted on labelled activations of one place."""

    u: Float[Tensor, "columns d"]
    mean: Float[Tensor, " d"]

    def code(self, table: Bool[Tensor, "n columns"]) -> Coding:
        """Return the codes that the labels give."""
        return Coding(table.to(self.u), self.u, self.mean)


def fit_features(
    x: Float[Tensor, "n d"], table: Bool[Tensor, "n columns"], method: Features
) -> Supervised:
    """Fit features to labelled activations: those of `mean_features` or `least_squares`."""
    u = DIRECTIONS[method](x.cpu(), table)
    return Supervised(u.to(x), x.mean(0))


# ----------------------------------------------------------------------------------- counterfactual


def counterfactual(data: TaskData, attribute: str, *, seed: int) -> TaskData:
    """Return each clean prompt with another value of one attribute, and all else the same.

    New values are drawn from those of other prompts. Only `clean`, its slots and attributes are
    meant to be used: answers and the other versions stay as they were. Raises ConfigError for a
    task or an attribute that cannot be changed so, TaskError if no other value fits.
    """
    change = _CHANGES.get(data.name, {}).get(attribute)
    if change is None:
        raise ConfigError(
            f"{attribute!r} of {data.name} cannot be changed by itself; known: "
            + "; ".join(f"{task}: {', '.join(names)}" for task, names in _CHANGES.items())
        )
    return change(data, random.Random(seed))  # noqa: S311 (examples, no secret)


def _renamed(name: str, *slots: str) -> Callable[[TaskData, random.Random], TaskData]:
    """Return a change that puts another name of the prompts into some slots."""

    def change(data: TaskData, chance: random.Random) -> TaskData:
        tokens = {
            value: int(data.clean[row, data.slots[slots[0]][row]])
            for row, value in enumerate(data.attributes[name])
        }
        clean, drawn = data.clean.clone(), []
        for row in range(len(data)):
            taken = {values[row] for values in data.attributes.values()}
            free = sorted(tokens.keys() - taken)
            if not free:
                raise TaskError(
                    f"prompts of {data.name} have {len(tokens)} values of {name!r}, and none is "
                    "left for a counterfactual; draw more prompts"
                )
            drawn.append(chance.choice(free))
            for slot in slots:
                clean[row, data.slots[slot][row]] = tokens[drawn[-1]]
        return replace(data, clean=clean, attributes={**data.attributes, name: tuple(drawn)})

    return change


def _turned(data: TaskData, chance: random.Random) -> TaskData:
    """Return IOI prompts in the other order: the two people change places."""
    del chance
    rows = torch.arange(len(data))
    io, s1 = data.slots["io"], data.slots["s1"]
    clean = data.clean.clone()
    clean[rows, io], clean[rows, s1] = data.clean[rows, s1], data.clean[rows, io]
    order = tuple({"ABBA": "BABA", "BABA": "ABBA"}[value] for value in data.attributes["order"])
    return replace(
        data, clean=clean, slots={**data.slots, "io": s1, "s1": io},
        attributes={**data.attributes, "order": order},
    )  # fmt: skip


_CHANGES: dict[str, dict[str, Callable[[TaskData, random.Random], TaskData]]] = {
    "ioi": {
        "io": _renamed("io", "io"),
        "subject": _renamed("subject", "s1", "s2"),
        "order": _turned,
    }
}


def at_slots(data: TaskData, slots: Sequence[str]) -> Int[Tensor, "n slots"]:
    """Return where slots stand in each prompt. Raises ConfigError for one that a prompt lacks."""
    for slot in slots:
        if slot not in data.slots or bool((data.slots[slot] < 0).any()):
            known = ", ".join(name for name, at in data.slots.items() if bool((at >= 0).all()))
            raise ConfigError(
                f"not every prompt of {data.name} has a slot {slot!r}; all have: {known}"
            )
    return torch.stack([data.slots[slot] for slot in slots], 1)
