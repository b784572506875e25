"""The nodes of a circuit: which there are, in which order they are taken, and which are kept.

At each site a node is (slot, column): column i < d_sae is latent i, column d_sae the error. Nodes
of all sites are numbered through, site by site in forward order and row by row in each table.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Scores = Mapping[str, Float[Tensor, "slots nodes"]]
"""A number per node of each site; the last column is the error's."""
Tables = Mapping[str, Shaped[Tensor, "slots nodes"]]
"""Tables of the same sizes, whatever they hold."""
Kept = Mapping[str, Bool[Tensor, "slots nodes"]]
"""A circuit: the nodes of each site that keep their own values."""


class Place(NamedTuple):
    """Where a node is."""

    site: str
    slot: int
    column: int


def ranked(scores: Scores, *, errors: bool = True) -> Int[Tensor, " m"]:
    """Return the numbers of the nodes by |score|, largest first; those of score 0 are left out.

    Ties go by number. Without `errors` only latents are ranked.
    """
    flat = torch.cat([_latents_only(s.abs(), errors).flatten() for s in scores.values()])
    order = flat.argsort(descending=True, stable=True)
    return order[flat[order] > 0]


def shuffled(scores: Scores, *, seed: int, errors: bool = True) -> Int[Tensor, " m"]:
    """Return the same nodes as `ranked`, in an order of chance."""
    nodes = ranked(scores, errors=errors)
    return nodes[torch.randperm(len(nodes), generator=torch.Generator().manual_seed(seed))]


def keep(like: Tables, numbers: Int[Tensor, " m"]) -> dict[str, Bool[Tensor, "slots nodes"]]:
    """Return the circuit of the nodes with these numbers."""
    found, start = {}, 0
    for site, table in like.items():
        mine = numbers[(numbers >= start) & (numbers < start + table.numel())] - start
        mask = torch.zeros(table.numel(), dtype=torch.bool)
        mask[mine] = True
        found[site] = mask.view(table.shape)
        start += table.numel()
    return found


def every(like: Tables, *, errors: bool = True) -> dict[str, Bool[Tensor, "slots nodes"]]:
    """Return the circuit of all nodes, or of all latents."""
    ones = {site: torch.ones(table.shape, dtype=torch.bool) for site, table in like.items()}
    return {site: _latents_only(mask, errors) for site, mask in ones.items()}


def without(kept: Kept, *, errors: bool = True) -> dict[str, Bool[Tensor, "slots nodes"]]:
    """Return the circuit of all other nodes, or of all other latents."""
    return {site: _latents_only(~mask, errors) for site, mask in kept.items()}


def places(like: Tables, numbers: Int[Tensor, " m"]) -> list[Place]:
    """Return where the nodes with these numbers are, in that order."""
    starts, total = [], 0
    for site, table in like.items():
        starts.append((total, site, table.shape[1]))
        total += table.numel()
    found = []
    for number in numbers.tolist():
        start, site, width = next(s for s in reversed(starts) if s[0] <= number)
        found.append(Place(site, *divmod(number - start, width)))
    return found


def _latents_only(table: Tensor, errors: bool) -> Tensor:
    if errors:
        return table
    table = table.clone()
    table[:, -1] = 0
    return table
