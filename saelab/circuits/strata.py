"""A part of some prompts, drawn by chance, in which every template has its share.

Tasks yield their templates in turn, so a part such as every second prompt is one of some templates
only: of IOI prompts, one of the two orders.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def portion(templates: Int[Tensor, " n"], size: int, *, seed: int) -> Bool[Tensor, " n"]:
    """Return a mask of `size` prompts.

    Of each template it has the share that is due, less or more by under one prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds, kind = torch.unique(templates, return_inverse=True)
    place = torch.randperm(len(kinds), generator=generator)[kind]
    mixed = torch.randperm(len(templates), generator=generator)
    order = mixed[place[mixed].argsort(stable=True)]
    number, n = torch.arange(len(order)), len(order)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[(number + 1) * size // n > number * size // n]] = True
    return chosen


def half(templates: Int[Tensor, " n"], *, seed: int) -> Bool[Tensor, " n"]:
    """Return a mask of one half; the other one has the odd prompt."""
    return portion(templates, len(templates) // 2, seed=seed)
