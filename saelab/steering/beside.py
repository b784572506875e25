"""Several steered models in one batch: each list of edits stands in rows of its own.

Generation reads all weights once per token, whatever the number of rows; twenty directions that
continue sixteen prompts each are written in a few batches instead of twenty.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.edits import LatentEdit, Steering
from saelab.edits.placement import Placement, Steerable, encode_prompts
from saelab.steering.sweep import Continuations, seeds_of, written_texts

MAX_ROWS = 160
"""Rows of a batch; the cache of keys and values grows with them."""


@final
class Beside:
    """Edits of a batch: each list of them stands in some rows, one after the other."""

    def __init__(
        self, model: Steerable, edits: Sequence[Sequence[LatentEdit]], n_rows: Sequence[int]
    ) -> None:
        """Check each list of edits by itself. Raises what `Steering` raises."""
        self._parts = [Steering(model, each) for each in edits]
        self._n_rows = list(n_rows)

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
    prompts: Sequence[Sequence[str]],
    edits: Sequence[Sequence[LatentEdit]],
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> list[Continuations]:
    """Return the continuations of each list of prompts under its list of edits, as many of them in
    a batch as fit.

    Each prompt is continued with noise of its own (`seeds_of`): what is written under one list of
    edits is what is written under it alone.
    """
    found = []
    for first, last in _batches([len(own) for own in prompts], max_rows):
        n_rows = [len(own) for own in prompts[first:last]]
        seeds = [one for own in prompts[first:last] for one in seeds_of(own, seed)]
        tokens, starts = encode_prompts(model, [p for own in prompts[first:last] for p in own])
        with model.steered(Beside(model, edits[first:last], n_rows)):
            whole = model.generate(
                tokens, max_new_tokens=max_new_tokens, temperature=temperature, seed=seeds,
                lengths=starts,
            )  # fmt: skip
        texts = iter(written_texts(model, whole, starts, tokens.shape[1]))
        for own in prompts[first:last]:
            found.append(Continuations(tuple(own), tuple(islice(texts, len(own)))))
    return found


def _batches(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield runs of items whose sizes add up to at most `most`, or that are alone."""
    first, total = 0, 0
    for place, size in enumerate(sizes):
        if place > first and total + size > most:
            yield first, place
            first, total = place, 0
        total += size
    if sizes:
        yield first, len(sizes)
