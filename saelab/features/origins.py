"""Where in the text a latent comes from, for dictionaries that are made of a store's rows."""

import logging
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from saelab.features.select import Layout
from saelab.protocols import Dictionary

log = logging.getLogger(__name__)


@runtime_checkable
class KeepsRows(Protocol):
    """A dictionary each of whose latents was a row of the store; −1 where that is not known."""

    rows: Int[Tensor, " d_sae"]
    """Row number in the store."""
    positions: Int[Tensor, " d_sae"]
    """Position in its window."""
    tokens: Int[Tensor, " d_sae"]
    """Token at that position."""


def origins(dictionary: Dictionary, layout: Layout) -> Int[Tensor, " d_sae"]:
    """Return the row of each latent in the store of this layout, −1 where there is none.

    A dictionary that was made from another store has no rows here. It is told by positions and
    tokens: if a single one is not the store's, the numbers mean something else.
    """
    none = torch.full((dictionary.d_sae,), -1)
    if not isinstance(dictionary, KeepsRows):
        return none
    rows = dictionary.rows.cpu().long()
    known = rows >= 0
    at = rows[known]
    if bool((at >= len(layout.ids)).any()):
        return _elsewhere(none)
    _, position = layout.place(at)
    for remembered, here in ((dictionary.positions, position), (dictionary.tokens, layout.ids[at])):
        mine = remembered.cpu()[known]
        if bool(((mine >= 0) & (mine != here)).any()):
            return _elsewhere(none)
    return rows


def _elsewhere(none: Tensor) -> Tensor:
    log.info("the latents are rows of another store: their origins are left out of the index")
    return none
