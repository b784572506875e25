"""Several steered models in one batch: each list of edits stands in rows of its own.

Generation reads all weights once per token, whatever the number of rows; twenty directions that
continue sixteen prompts each are written in a few batches instead of twenty.
"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.edits import LatentEdit, Steering
from saelab.edits.placement import Placement, Steerable, encode_prompts
from saelab.steering.sweep import Continuations, written_texts

MAX_ROWS = 160
"""Rows of a batch; the cache of keys and values grows with them."""


@final
class Beside:
    """Edits of a batch: the first of them stand in its first `n_rows` rows, and so on."""

    def __init__(
        self, model: Steerable, edits: Sequence[Sequence[LatentEdit]], n_rows: int
    ) -> None:
        """Check each list of edits by itself. Raises what `Steering` raises."""
        self._parts = [Steering(model, each) for each in edits]
        self._n_rows = n_rows

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are changed in some row."""
        return tuple(dict.fromkeys(site for part in self._parts for site in part.sites))

    def __str__(self) -> str:
        """Return the edits in words."""
        return ", or ".join(map(str, self._parts))

    def apply(
        self, site: str, x: Float[Tensor, "batch pos d"], at: Placement
    ) -> Float[Tensor, "batch pos d"]:
        """Return a site's activations, each row with its own edits."""
        pieces = []
        columns = (column.split(self._n_rows) for column in (x, at.tokens, at.real, at.prompt))
        for part, own, tokens, real, prompt in zip(self._parts, *columns, strict=True):
            inside = site in part.sites
            pieces.append(part.apply(site, own, Placement(tokens, real, prompt)) if inside else own)
        return torch.cat(pieces)


def continuations_beside(
    model: Steerable,
    prompts: Sequence[str],
    edits: Sequence[Sequence[LatentEdit]],
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> list[Continuations]:
    """Return the continuations under each list of edits, as many of them in a batch as fit."""
    tokens, starts = encode_prompts(model, prompts)
    at_once = max(1, max_rows // len(prompts))
    found = []
    for first in range(0, len(edits), at_once):
        part = edits[first : first + at_once]
        with model.steered(Beside(model, part, len(prompts))):
            whole = model.generate(
                tokens.repeat(len(part), 1), max_new_tokens=max_new_tokens,
                temperature=temperature, seed=seed + first, lengths=starts.repeat(len(part)),
            )  # fmt: skip
        for rows in whole.split(len(prompts)):
            texts = written_texts(model, rows, starts, tokens.shape[1])
            found.append(Continuations(tuple(prompts), texts))
    return found
