"""Forests given by the parent of each node, −1 for none."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def levels_of(parents: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return each node's distance from its root."""
    level, above = torch.zeros_like(parents), parents
    while bool((above >= 0).any()):
        level += above >= 0
        above = torch.where(above >= 0, parents[above.clamp(min=0)], -1)
    return level


def has_children(parents: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Return which nodes are some node's parent."""
    found = torch.zeros(len(parents), dtype=torch.bool)
    found[parents[parents >= 0]] = True
    return found


def strata(parents: Int[Tensor, " n"]) -> dict[str, Bool[Tensor, " n"]]:
    """Return the nodes of each level: `root`, `level 1` …, and `alone` for trees of one node.

    Nothing where no node has a parent.
    """
    level, inner = levels_of(parents), has_children(parents)
    if not bool(inner.any()):
        return {}
    found = {"root": (level == 0) & inner}
    found |= {f"level {i}": level == i for i in range(1, int(level.max()) + 1)}
    found["alone"] = (level == 0) & ~inner
    return {name: nodes for name, nodes in found.items() if bool(nodes.any())}
