"""Heads that others have found, for those who have the model."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.circuits.effects import Component
from saelab.errors import ConfigError

GPT2_SMALL_IOI: Mapping[str, tuple[Component, ...]] = {
    role: tuple(Component(layer, head) for layer, head in heads)
    for role, heads in {
        "previous token": ((2, 2), (4, 11)),
        "duplicate token": ((0, 1), (3, 0), (0, 10)),
        "induction": ((5, 5), (6, 9), (5, 8), (5, 9)),
        "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
        "negative name mover": ((10, 7), (11, 10)),
        "name mover": ((9, 9), (9, 6), (10, 0)),
        "backup name mover": (
            (10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (11, 9), (11, 3), (9, 7),
        ),
    }.items()
}  # fmt: skip
"""The 26 heads of indirect object identification in GPT-2 small, by role: Wang et al. 2022,
arXiv 2211.00593."""

GPT2_SMALL_GREATER_THAN: Mapping[str, tuple[Component, ...]] = {
    role: tuple(Component(layer, head) for layer, head in heads)
    for role, heads in {
        "early, on the first year": ((0, 1), (0, 3), (0, 5)),
        "from the first year to the end": ((5, 5), (6, 1), (6, 9), (7, 10), (8, 11), (9, 1)),
    }.items()
}
"""The nine heads of greater-than in GPT-2 small: Hanna, Liu, Variengien 2023, arXiv 2305.00586, as
in public code (github.com/ArthurConmy/Automatic-Circuit-Discovery, `acdc/greaterthan/utils.py`);
its MLPs are no heads and left out. The lists of the other tasks are not shipped."""

LISTS: Mapping[str, Mapping[str, Mapping[str, tuple[Component, ...]]]] = {
    "gpt2_small": {"ioi": GPT2_SMALL_IOI, "greater_than": GPT2_SMALL_GREATER_THAN}
}
"""By model, as configurations know it, by task and by role."""


def is_listed(
    model: str, task: str, components: Sequence[Component]
) -> Bool[Tensor, " components"]:
    """Return which heads are on a model's list for a task.

    Raises ConfigError if the components lack some of them.
    """
    listed = {head for heads in LISTS[model][task].values() for head in heads}
    missing = sorted(listed - set(components))
    if missing:
        raise ConfigError(
            f"the lists of {model} are of another model: this one has no heads "
            f"{', '.join(map(str, missing))}; leave `published` out"
        )
    return torch.tensor([component in listed for component in components])
