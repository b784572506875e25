"""A text read by the live model and encoded by a dictionary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.protocols import Dictionary, LanguageModel

LONGEST = 256
"""Tokens read at most: what a page can show and a laptop computes while one waits."""


@dataclass(frozen=True)
class Reading:
    """The codes of a text's tokens."""

    strings: list[str]
    z: Float[Tensor, "pos d_sae"]
    error: list[float]
    """Share of each token's squared distance from the mean activation that is lost."""
    masked: frozenset[int]
    """Positions that harvests leave out (the first one, special tokens): shown, but not ranked."""
    cut: bool
    """Whether the text was longer than what was read."""


@dataclass(frozen=True)
class Rank:
    """A latent that fires on the text, with its strongest token."""

    latent: int
    value: float
    position: int
    tokens: int
    """Number of tokens on which it fires."""


@torch.no_grad()
def read(
    model: LanguageModel,
    dictionary: Dictionary,
    site: str,
    text: str,
    mean: Sequence[float] | None,
) -> Reading:
    """Run the model on the text up to the site and encode every token."""
    run = model.tokenize([text])[0]
    longest = min(LONGEST, model.context - 1)
    spans = list(zip(run.start.tolist(), run.end.tolist(), strict=True))[:longest]
    ids, strings = run.ids.tolist()[:longest], [text[a:b] for a, b in spans]
    if model.adds_bos and model.bos_id is not None:
        ids, strings = [model.bos_id, *ids], ["⟨bos⟩", *strings]
    tokens = torch.tensor([ids], device=model.device)
    x = model.capture(tokens, [site])[site][0].to(dictionary.W_dec.device, dictionary.W_dec.dtype)
    z = dictionary.encode(x)
    centre = torch.tensor(mean if mean is not None else [0.0] * x.shape[1], dtype=x.dtype)
    lost = (x - dictionary.reconstruct(x)).square().sum(-1)
    error = lost / (x - centre.to(x.device)).square().sum(-1).clamp(min=1e-12)
    masked = {p for p, token in enumerate(ids) if p == 0 or token in model.special_ids}
    return Reading(strings, z.cpu(), error.tolist(), frozenset(masked), len(run) > longest)


def ranked(reading: Reading, peaks: Sequence[float] | None = None) -> list[Rank]:
    """Return the latents that fire on kept tokens, strongest first.

    With `peaks`, strength is the share of the latent's own maximum on the store.
    """
    z = reading.z.clone()
    z[sorted(reading.masked)] = 0
    size = z.abs()
    best = size.max(dim=0) if len(z) else None
    if best is None:
        return []
    strength = best.values
    if peaks is not None:
        strength = strength / torch.tensor(peaks).abs().clamp(min=1e-12)
    fires = (z != 0).sum(0)
    order = strength.argsort(descending=True, stable=True)
    order = order[fires[order] > 0]
    return [
        Rank(i, float(z[p, i]), p, int(fires[i]))
        for i, p in zip(order.tolist(), best.indices[order].tolist(), strict=True)
    ]


def strongest(reading: Reading, position: int, limit: int) -> list[tuple[int, float]]:
    """Return (latent, value) of one token's strongest latents."""
    z = reading.z[position]
    ids = z.abs().argsort(descending=True, stable=True)[:limit].tolist()
    return [(i, float(z[i])) for i in ids if z[i] != 0]


def values(reading: Reading, latent: int) -> dict[int, float]:
    """Return a latent's non-zero values on kept tokens, by position."""
    column = reading.z[:, latent]
    found = column.nonzero().squeeze(1).tolist()
    return {p: float(column[p]) for p in found if p not in reading.masked}
