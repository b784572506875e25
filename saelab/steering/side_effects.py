"""What an edit does beside its concept: to neutral text, and to what else the text is about."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saelab.edits import LatentEdit, steer
from saelab.edits.placement import Steerable
from saelab.steering.judges import Judge
from saelab.steering.neutral import Neutral
from saelab.steering.sweep import text_logits
from saelab.steering.trial import Response, Trial, shares


@torch.no_grad()
def ce_sums(
    model: Steerable, directions: Sequence[Sequence[LatentEdit]], neutral: Neutral
) -> Float[Tensor, "directions windows 2"]:
    """Return how much each direction's edits raise each window's cross-entropy, in nats per token,
    and 1: as a share of the directions that were read on it; 0 in windows without a scored token.

    Of many directions each is read on some of the windows, as in `trial.shares`.
    """
    everything = tuple(range(len(neutral.tokens)))
    clean = _cross_entropy(model, neutral, everything)
    parts = torch.zeros(len(directions), len(clean), 2, dtype=torch.float64)
    dealt = shares(len(directions), len(clean))
    for part, edits, own in zip(parts, directions, dealt, strict=True):
        with steer(model, *edits):
            change = _cross_entropy(model, neutral, own) - clean[list(own)]
        part[list(own)] = torch.stack([change, torch.ones_like(change)], 1)
    parts = torch.where(clean.isnan()[:, None], 0.0, parts)
    return parts / parts[..., 1].sum(0)[:, None].clamp(min=1)


def _cross_entropy(
    model: Steerable, neutral: Neutral, windows: Sequence[int]
) -> Float[Tensor, " n"]:
    """Return each window's mean loss over its scored positions; NaN without one."""
    own = list(windows)
    tokens, lengths, scored = neutral.tokens[own], neutral.lengths[own], neutral.scored[own]
    losses = []
    for logits, ids, counts in zip(
        text_logits(model, tokens, lengths), tokens, scored, strict=True
    ):
        at = counts[: len(logits)].nonzero()[:, 0]
        losses.append(F.cross_entropy(logits[at], ids[at + 1]).double())
    return torch.stack(losses)


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
