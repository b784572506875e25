"""Turning one activation into another by a few latents.

To carry x_s towards x_t, the contribution of one latent after another is replaced by its
counterfactual one, each at most once:

    Δ_i = (z_t,i − z_s,i) W[i]        i = argmin ‖(x_t − x_s) − current − Δ_i‖

So a step removes what the latent wrote and adds what it would have written. Latents whose code is
the same in both are left alone. With enough steps the edit is the *whole* one, x̂_t − x̂_s, and
leaves x_s's error. A *guided* edit asks what latents say instead of where x_t lies: it takes out
those of x_s whose firing tells the old value best, and puts in those of x_t for the new one.

A latent's *weight* is its share of what the code says, ⟨z_i W[i], x̂ − b⟩ / ‖x̂ − b‖²; weights sum
to 1, and an edit's magnitude is the weight of the latents that it takes away.

Makelov, Lange, Nanda 2025, arXiv 2405.08366, section 4 and their code.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.circuits.attributes import Coding
from saelab.errors import ShapeError

_CHUNK = 1 << 25
"""Floats of candidates' changes that are held at once."""
NONE = -1
"""Stands where a row had no further latent to change."""


@dataclass(frozen=True)
class SparseEdit:
    """Edits of many rows by at most k latents each."""

    change: Float[Tensor, "n d"]
    """What is added to x_s."""
    latents: Int[Tensor, "n k"]
    """In the order in which they were taken, filled up with `NONE`."""


@torch.no_grad()
def greedy_edit(
    source: Coding, target: Coding, goal: Float[Tensor, "n d"], k: int
) -> list[SparseEdit]:
    """Return the edits with 1, 2, … k latents, of rows that should move by `goal` = x_t − x_s.

    Only latents whose code differs are taken; ties go to the lowest number. Raises ShapeError if
    the codings are not of the same directions.
    """
    differs = _differs(source, target)
    most = max(int(differs.sum(1).max()), 1)
    step = max(1, _CHUNK // (most * source.W.shape[1]))
    parts = []
    for rows in torch.arange(len(goal)).split(step):
        candidates, valid = _candidates(differs[rows], most)
        weight = (target.z - source.z)[rows].gather(1, candidates)
        changes = weight[..., None] * source.W[candidates]
        parts.append(_pursue(changes, valid, candidates, goal[rows], k))
    return [
        SparseEdit(torch.cat([p[j][0] for p in parts]), torch.cat([p[j][1] for p in parts]))
        for j in range(k)
    ]


@torch.no_grad()
def whole_edit(source: Coding, target: Coding) -> SparseEdit:
    """Return x̂_t − x̂_s as an edit: every latent whose code differs is changed.

    Of two codes by labels that differ in one attribute, one feature is taken out and one put in.
    """
    latents, valid = _candidates(differs := _differs(source, target), int(differs.sum(1).max()))
    return SparseEdit(target.said - source.said, torch.where(valid, latents, NONE))


@torch.no_grad()
def guided_edit(
    source: Coding,
    target: Coding,
    about_source: Float[Tensor, "n m"],
    about_target: Float[Tensor, "n m"],
    k: int,
) -> SparseEdit:
    """Return the edit that takes out the k latents that say most of the source, and puts in the k
    that say most of the target, each with its own code.

    Scores are −∞ for latents that are not to be taken; ties go to the lowest number. `latents` of
    the edit are those taken out.
    """
    out, into = (_top(about, k) for about in (about_source, about_target))
    return SparseEdit(_written(target, into) - _written(source, out), out)


def _top(score: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n k"]:
    latents = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.where(score.gather(1, latents) > -torch.inf, latents, NONE)


def _written(coding: Coding, latents: Int[Tensor, "n k"]) -> Float[Tensor, "n d"]:
    """Return what some latents of each row say together."""
    taken = latents.clamp(min=0)
    z = coding.z.gather(1, taken) * (latents != NONE)
    return torch.einsum("nk,nkd->nd", z, coding.W[taken])


def _differs(source: Coding, target: Coding) -> Bool[Tensor, "n m"]:
    """Return where codes differ. Raises ShapeError if they are not of the same directions."""
    if source.W.shape != target.W.shape or source.z.shape != target.z.shape:
        raise ShapeError(
            f"source and target should be coded alike, but are {tuple(source.z.shape)} and "
            f"{tuple(target.z.shape)} codes of {len(source.W)} and {len(target.W)} directions"
        )
    return source.z != target.z


def _candidates(
    differs: Bool[Tensor, "n m"], most: int
) -> tuple[Int[Tensor, "n c"], Bool[Tensor, "n c"]]:
    """Return the latents of each row that differ, ascending, and which entries are no filling."""
    order = (~differs).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    return order, differs.gather(1, order)


def _pursue(
    changes: Float[Tensor, "n c d"],
    valid: Tensor,
    candidates: Int[Tensor, "n c"],
    goal: Float[Tensor, "n d"],
    k: int,
) -> list[tuple[Tensor, Tensor]]:
    """Return (change, latents) after every step."""
    left, free = goal.clone(), valid.clone()
    size, rows = changes.square().sum(-1), torch.arange(len(goal), device=goal.device)
    chosen = torch.full((len(goal), k), NONE, device=goal.device)
    found = []
    for step in range(k):
        gain = 2 * torch.einsum("nd,ncd->nc", left, changes) - size
        best = gain.masked_fill(~free, -torch.inf).argmax(1)
        some = free[rows, best]
        left = left - torch.where(some[:, None], changes[rows, best], 0)
        chosen[:, step] = torch.where(some, candidates[rows, best], NONE)
        free[rows, best] = False
        found.append((goal - left, chosen.clone()))
    return found


def weights(coding: Coding) -> Float[Tensor, "n m"]:
    """Return each latent's share of what a code says; 0 for an empty code."""
    said = coding.said
    size = said.square().sum(1, keepdim=True)
    return coding.z * (said @ coding.W.T) / torch.where(size > 0, size, 1)


def magnitude(source: Coding, edit: SparseEdit) -> Float[Tensor, " n"]:
    """Return the weight of the latents that an edit takes away."""
    chosen = torch.zeros(source.z.shape, dtype=torch.bool, device=source.z.device)
    taken = edit.latents != NONE
    rows = torch.arange(len(chosen), device=chosen.device)[:, None].expand_as(taken)
    chosen[rows[taken], edit.latents[taken]] = True
    return (weights(source) * chosen).sum(1)
