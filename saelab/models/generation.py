"""Continuing prompts token by token, with a key-value cache and prompts of different lengths.

Prompts come right-padded, as everywhere. For the passes they are shifted to end together (left
padding), so that each pass adds one column for all rows; a mask keeps padding out of attention, and
positions are counted from each row's first token. The result is right-padded again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ShapeError

Step = Callable[
    [Int[Tensor, "batch new"], Any, Bool[Tensor, "batch seen"] | None],
    tuple[Float[Tensor, "batch d_vocab"], Any],
]
"""One pass over new tokens, given the cache and what of all tokens so far is no padding (None:
all of it): the logits after the last, and the cache."""
_SEEDS = 2**64
"""Seeds are taken modulo this, since NumPy's are not negative."""


def check_prompts(lengths: Int[Tensor, " batch"]) -> None:
    """Check that each prompt has a token. Raises ShapeError."""
    empty = (lengths < 1).nonzero()[:, 0].tolist()
    if empty:
        raise ShapeError(
            f"each prompt needs a token to go on from, but prompts {empty} are empty; begin with "
            "a word, or with BOS where the model has it"
        )


def shifted(
    tokens: Int[Tensor, "batch pos"], shift: Int[Tensor, " batch"], fill: int
) -> Int[Tensor, "batch pos"]:
    """Return each row moved to the right by its shift (to the left if negative)."""
    place = torch.arange(tokens.shape[1], device=tokens.device) - shift[:, None]
    inside = (place >= 0) & (place < tokens.shape[1])
    moved = tokens.gather(1, place.clamp(0, tokens.shape[1] - 1))
    return torch.where(inside, moved, fill)


def continued(
    step: Step,
    prompts: Int[Tensor, "batch pos"],
    lengths: Int[Tensor, " batch"] | None,
    choose: Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]],
    *,
    max_new_tokens: int,
    eos: int | None,
    pad: int,
) -> Int[Tensor, "batch total"]:
    """Return each prompt with its continuation; see `HookedModel.generate`."""
    pos, real, shift = prompts.shape[1], None, None
    tokens = prompts
    if lengths is not None and bool((lengths < pos).any()):
        shift = pos - lengths.to(tokens.device)
        real = torch.arange(pos, device=tokens.device) >= shift[:, None]
        tokens = shifted(tokens, shift, pad)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    new, cache = tokens, None
    for _ in range(max_new_tokens):
        logits, cache = step(new, cache, real)
        chosen = choose(logits)
        if eos is not None:
            chosen = torch.where(ended, eos, chosen)
            ended |= chosen == eos
        new = chosen[:, None]
        tokens = torch.cat([tokens, new], dim=1)
        real = None if real is None else F.pad(real, (0, 1), value=True)
        if bool(ended.all()):
            break
    return tokens if shift is None else shifted(tokens, -shift, pad)


def chooser(
    temperature: float, seeds: Sequence[Sequence[int]]
) -> Callable[[Float[Tensor, "batch d_vocab"]], Int[Tensor, " batch"]]:
    """Return the rule that takes the likeliest token, or with a temperature draws one.

    It draws by exponential races: the token with the largest p / e, with e exponential, has won
    with chance p. Each row has a stream of e of its own, so that what it draws depends on nothing
    else in the batch, and like distributions mostly draw the same token. NumPy's generators draw
    them ten times as fast as torch's.
    """
    streams = [np.random.default_rng(seed) for seed in seeds]

    def choose(logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        if temperature <= 0:
            return logits.argmax(-1)
        chances = F.softmax(logits.cpu() / temperature, dim=-1)
        times = np.empty(chances.shape, np.float32)
        for row, stream in zip(times, streams, strict=True):
            row[:] = stream.standard_exponential(len(row))  # in float32, one in 2^23 would be 0
        return (chances / torch.from_numpy(times)).argmax(-1).to(logits.device)

    return choose


def seeds_of_rows(seed: int | Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Return what each row's stream is seeded by: a row with a seed of its own draws what it draws
    alone with that seed. Raises ShapeError unless there is one seed, or one for each row."""
    if isinstance(seed, int):
        return [(seed % _SEEDS, row) for row in range(rows)]
    if len(seed) != rows:
        raise ShapeError(
            f"each prompt needs a seed of its own, but {len(seed)} came for {rows} prompts; give "
            "one number for all, or one for each"
        )
    return [(own % _SEEDS, 0) for own in seed]
