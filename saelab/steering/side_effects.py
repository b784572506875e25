"""What an edit does beside its concept: to neutral text, and to what else the text is about."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.edits import LatentEdit
from saelab.edits.placement import Steerable, pad_of
from saelab.protocols import Store
from saelab.steering.judges import Judge
from saelab.steering.sweep import ce_change
from saelab.steering.trial import Response, Trial

N_WINDOWS = 16
"""Held-out windows whose cross-entropy is neutral text's."""


@dataclass(frozen=True)
class Neutral:
    """Held-out windows, right-padded."""

    tokens: Int[Tensor, "windows pos"]
    lengths: Int[Tensor, " windows"]


def neutral_windows(store: Store, site: str, model: Steerable, n: int = N_WINDOWS) -> Neutral:
    """Return the first held-out windows of a store."""
    windows = list(islice(store.windows(site, split="heldout"), n))
    tokens = torch.nn.utils.rnn.pad_sequence(
        [w.ids.long() for w in windows], batch_first=True, padding_value=pad_of(model)
    )
    return Neutral(tokens, torch.tensor([len(w) for w in windows]))


def ce_sums(
    model: Steerable, edits: Sequence[LatentEdit], neutral: Neutral
) -> Float[Tensor, "windows 2"]:
    """Return each window's change of cross-entropy in nats per token, and whether it has one."""
    change = ce_change(model, edits, neutral.tokens, neutral.lengths).double().cpu()
    known = ~change.isnan()
    return torch.stack([change.nan_to_num(), known.double()], 1)


def mean_change(totals: Float[Tensor, "b 2"]) -> Float[Tensor, " b"]:
    """Return the mean change over the windows summed up."""
    return totals[:, 0] / totals[:, 1]


def others_sums(
    judges: Sequence[Judge], response: Response, trial: Trial
) -> Float[Tensor, "directions prompts judges_and_1"]:
    """Return how much each judge's score of each prompt's text moves over that of its unsteered
    continuations, and 1: for each direction, as a share of those that continued the prompt."""
    n = len(trial.prompts)
    usual = [judge(trial.usual.texts).double().reshape(-1, n).mean(0) for judge in judges]
    parts = torch.zeros(len(response.written), n, len(judges) + 1, dtype=torch.float64)
    for part, asked, one in zip(parts, response.asked, response.written, strict=True):
        own = list(asked)
        moved = [judge(one.texts).double() - u[own] for judge, u in zip(judges, usual, strict=True)]
        part[own] = torch.stack([*moved, torch.ones(len(own), dtype=torch.float64)], 1)
    return parts / parts[..., -1].sum(0)[:, None].clamp(min=1)


def mean_distance(totals: Float[Tensor, "b judges_and_1"]) -> Float[Tensor, " b"]:
    """Return the mean over judges of how far their mean score moves, in either direction."""
    return (totals[:, :-1] / totals[:, -1:]).abs().mean(1)
