"""How well a latent's firing says that something is so: the best F1 of each latent and predicate.

A latent of either sign makes two claims, z > 0 and z < 0. Predicates are single values of an
attribute, a value in one order, and unions of an attribute's values: for each latent the values by
their F1, as many as improve it, up to a limit. Latents are chosen on some prompts and scored on
others.

Makelov, Lange, Nanda 2025, arXiv 2405.08366, section 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST_UNITED = 10
"""Values that a union has at most."""
PRECISE = 0.9
"""Precision from which on a latent counts as a part of a value."""
FOUND = 0.5
"""F1 from which on a value counts as found."""


def claims(z: Float[Tensor, "n m"], *, signed: bool) -> Bool[Tensor, "n signs_m"]:
    """Return where z > 0 and, for signed codes, beside it where z < 0."""
    return torch.cat([z > 0, z < 0], 1) if signed else z > 0


def latent_of(claim: Int[Tensor, "*n"], d_sae: int) -> Int[Tensor, "*n"]:
    """Return the latents that claims are of."""
    return claim % d_sae


def f1(fires: Bool[Tensor, "n m"], truth: Bool[Tensor, "n p"]) -> Float[Tensor, "m p"]:
    """Return the F1 of every claim about every predicate: 2 TP / (fires + true); 0 for 0 / 0."""
    fires, truth = fires.double(), truth.double()
    both = fires.T @ truth
    total = fires.sum(0)[:, None] + truth.sum(0)
    return 2 * both / torch.where(total > 0, total, 1)


@dataclass(frozen=True)
class Best:
    """The best claim about each predicate, chosen on some prompts and scored on others."""

    claim: Int[Tensor, " p"]
    chosen: Float[Tensor, " p"]
    """F1 on the prompts that chose it."""
    score: Float[Tensor, " p"]
    """F1 on the others."""


def best_claims(
    fires: Bool[Tensor, "n m"],
    truth: Bool[Tensor, "n p"],
    other_fires: Bool[Tensor, "n2 m"],
    other_truth: Bool[Tensor, "n2 p"],
) -> Best:
    """Return the claim with the largest F1 about each predicate; ties go to the lowest number."""
    chosen, claim = f1(fires, truth).max(0)
    score = f1(other_fires, other_truth)[claim, torch.arange(truth.shape[1])]
    return Best(claim, chosen, score)


def predicates(
    columns: Sequence[tuple[str, str]],
    table: Bool[Tensor, "n columns"],
    *,
    within: str | None = None,
) -> tuple[list[tuple[str, str]], Bool[Tensor, "n p"]]:
    """Return single values, and each value in one value of the attribute `within`, with names."""
    names, truth = list(columns), [table]
    conditions = [i for i, (name, _) in enumerate(columns) if name == within]
    for i in conditions:
        others = [j for j, (name, _) in enumerate(columns) if name != within]
        truth.append(table[:, others] & table[:, [i]])
        names += [(columns[j][0], f"{columns[j][1]}, {columns[i][1]}") for j in others]
    return names, torch.cat(truth, 1)


def best_unions(
    fires: Bool[Tensor, "n m"], table: Bool[Tensor, "n values"], *, most: int = MOST_UNITED
) -> Float[Tensor, " m"]:
    """Return each claim's best F1 about a union of an attribute's values.

    Values exclude each other. Those with the largest F1 are united first, up to `most`.
    """
    fires_, truth = fires.double(), table.double()
    order = f1(fires, table).argsort(dim=1, descending=True, stable=True)[:, :most]
    both = (fires_.T @ truth).gather(1, order).cumsum(1)
    true = truth.sum(0).expand(len(order), -1).gather(1, order).cumsum(1)
    total = fires_.sum(0)[:, None] + true
    return (2 * both / torch.where(total > 0, total, 1)).max(1).values


@dataclass(frozen=True)
class Splitting:
    """How an attribute's values are spread over latents, averaged over values."""

    found: float
    """Share of values about which some claim has an F1 of at least `FOUND`."""
    parts: float
    """Claims per value with a precision of at least `PRECISE`: more than one split it."""
    recall: float
    """Share of a value's prompts on which at least one of these fires."""


def splitting(
    fires: Bool[Tensor, "n m"], table: Bool[Tensor, "n values"], best: Float[Tensor, " values"]
) -> Splitting:
    """Return how values are split; `best` is each value's F1, chosen and scored apart.

    A claim counts as a part if it fires on at least two prompts.
    """
    fires_, truth = fires.double(), table.double()
    count = fires_.sum(0)[:, None]
    precise = (fires_.T @ truth / count.clamp(min=1) >= PRECISE) & (count >= 2)
    covered = ((fires_ @ precise.double()) > 0) & table
    recall = covered.double().sum(0) / truth.sum(0).clamp(min=1)
    return Splitting(
        float((best >= FOUND).double().mean()),
        float(precise.double().sum(0).mean()),
        float(recall.mean()),
    )
