"""How well a latent's firing says that something is so: the best F1 of each latent and predicate.

A latent of either sign makes two claims, z > 0 and z < 0. Predicates are single values of an
attribute, a value in one order, a value that any attribute has, and unions of an attribute's
values: for each latent the values by their F1, as many as improve it, up to a limit. Latents are
chosen on some prompts and scored on others.

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
IN_SENTENCE = "in sentence"
"""The predicates that a value stands anywhere in the prompt."""


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
    columns: Sequence[tuple[str, str]], table: Bool[Tensor, "n columns"]
) -> dict[str, Bool[Tensor, "n p"]]:
    """Return predicates by kind: `io`, its single values; `io ∧ order`, each value in one value of
    the first attribute that has two; `in sentence`, values that several attributes can have, where
    any of them has it."""
    names = list(dict.fromkeys(name for name, _ in columns))
    of = {name: [i for i, (other, _) in enumerate(columns) if other == name] for name in names}
    found = {name: table[:, of[name]] for name in names}
    within = next((name for name in names if len(of[name]) == 2), None)
    if within is not None:
        for name in names:
            if name != within:
                joined = [found[name] & table[:, [i]] for i in of[within]]
                found[f"{name} ∧ {within}"] = torch.cat(joined, 1)
    values = [value for _, value in columns]
    shared = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if shared:
        places = ([i for i, other in enumerate(values) if other == value] for value in shared)
        found[IN_SENTENCE] = torch.stack([table[:, at].any(1) for at in places], 1)
    return found


@dataclass(frozen=True)
class Unions:
    """Each claim's best union of an attribute's values."""

    score: Float[Tensor, " m"]
    """F1 about it."""
    members: Bool[Tensor, "m values"]
    """The values that are united."""


def best_unions(
    fires: Bool[Tensor, "n m"], table: Bool[Tensor, "n values"], *, most: int = MOST_UNITED
) -> Unions:
    """Return each claim's union with the best F1: values with the largest F1 are united first, up
    to `most`, and never all, which would say nothing.

    Values exclude each other.
    """
    fires_, truth = fires.double(), table.double()
    most = max(min(most, table.shape[1] - 1), 1)
    order = f1(fires, table).argsort(dim=1, descending=True, stable=True)[:, :most]
    both = (fires_.T @ truth).gather(1, order).cumsum(1)
    true = truth.sum(0).expand(len(order), -1).gather(1, order).cumsum(1)
    total = fires_.sum(0)[:, None] + true
    best = (2 * both / torch.where(total > 0, total, 1)).max(1)
    taken = torch.arange(most) <= best.indices[:, None]
    none = torch.zeros(len(order), table.shape[1], dtype=torch.bool)
    return Unions(best.values, none.scatter(1, order, taken))


def tallies(said: Bool[Tensor, "n p"], truth: Bool[Tensor, "n p"]) -> Float[Tensor, "n three_p"]:
    """Return what an F1 is made of, prompt by prompt: said rightly, said, true."""
    return torch.cat([said & truth, said, truth], 1).double()


def f1s(sums: Float[Tensor, "b three_p"]) -> Float[Tensor, "b p"]:
    """Return the F1 of each predicate from sums of `tallies`; 0 for 0 / 0."""
    both, said, true = sums.chunk(3, 1)
    total = said + true
    return 2 * both / torch.where(total > 0, total, 1)


def mean_f1(sums: Float[Tensor, "b three_p"]) -> Float[Tensor, " b"]:
    """Return the mean over predicates of their F1."""
    return f1s(sums).mean(1)


def share_found(sums: Float[Tensor, "b three_p"]) -> Float[Tensor, " b"]:
    """Return the share of predicates with an F1 of at least `FOUND`."""
    return (f1s(sums) >= FOUND).double().mean(1)


@dataclass(frozen=True)
class Splitting:
    """How an attribute's values are spread over latents, averaged over values."""

    parts: float
    """Claims per value with a precision of at least `PRECISE`: more than one split it."""
    recall: float
    """Share of a value's prompts on which at least one of these fires."""


def splitting(fires: Bool[Tensor, "n m"], table: Bool[Tensor, "n values"]) -> Splitting:
    """Return how values are split.

    A claim counts as a part if it fires on at least two prompts.
    """
    fires_, truth = fires.double(), table.double()
    count = fires_.sum(0)[:, None]
    precise = (fires_.T @ truth / count.clamp(min=1) >= PRECISE) & (count >= 2)
    covered = ((fires_ @ precise.double()) > 0) & table
    recall = covered.double().sum(0) / truth.sum(0).clamp(min=1)
    return Splitting(float(precise.double().sum(0).mean()), float(recall.mean()))
