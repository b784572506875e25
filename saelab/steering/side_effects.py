"""What an edit does beside its concept: to neutral text, and to what else the text is about."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saelab.edits import Handle, LatentEdit, steer
from saelab.edits.placement import Steerable
from saelab.steering.judges import Judge
from saelab.steering.neutral import Neutral
from saelab.steering.sweep import Continuations, presence, text_logits
from saelab.steering.trial import Response, Trial, reported_half, shares


@torch.no_grad()
def unsteered_losses(model: Steerable, neutral: Neutral) -> Float[Tensor, " windows"]:
    """Return each window's mean loss over its scored positions, in nats; NaN without one."""
    return _cross_entropy(model, neutral, range(len(neutral.tokens)))


@torch.no_grad()
def ce_sums(
    model: Steerable,
    directions: Sequence[Sequence[LatentEdit]],
    neutral: Neutral,
    *,
    unsteered: Float[Tensor, " windows"] | None = None,
) -> Float[Tensor, "directions windows 2"]:
    """Return how much each direction's edits raise each window's cross-entropy, in nats per token,
    and 1: as a share of the directions that were read on it; 0 in windows without a scored token.

    Of many directions each is read on some of the windows, as in `trial.shares`. `unsteered` are
    the `unsteered_losses`, measured here if they are not given.
    """
    clean = unsteered_losses(model, neutral) if unsteered is None else unsteered
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


def presences(
    model: Steerable, handle: Handle, latent: int, responses: Sequence[Response], trial: Trial
) -> list[dict[str, float]]:
    """Return, for what was written after the reported prompts in each response, the share of its
    positions on which a latent fires, how much more that is than in unsteered text, and the sum
    over all other latents of how far theirs moves, in either direction."""
    usual = presence(model, handle, _reported(range(len(trial.prompts)), trial.usual))
    found = []
    for response in responses:
        pairs = zip(response.asked, response.written, strict=True)
        parts = [_reported(asked, one) for asked, one in pairs]
        written = Continuations(
            tuple(p for part in parts for p in part.prompts),
            tuple(t for part in parts for t in part.texts),
        )
        own = presence(model, handle, written)
        moved = own - usual
        others = moved.abs().sum() - moved[latent].abs()
        values = {"presence": own[latent], "presence_gain": moved[latent]}
        values["presence_others"] = others
        found.append({name: float(value) for name, value in values.items()})
    return found


def _reported(asked: Sequence[int], written: Continuations) -> Continuations:
    """Return what was written after prompts that are reported on; `asked` are the prompts' places,
    once or several times over."""
    half = reported_half(max(asked) + 1)[list(asked)].tolist()
    kept = [i for i in range(len(written.texts)) if half[i % len(half)]]
    return Continuations(
        tuple(written.prompts[i] for i in kept), tuple(written.texts[i] for i in kept)
    )
