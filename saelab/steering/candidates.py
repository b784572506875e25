"""Which latents to steer a concept by: a few candidates under two rules, from training data alone.

Detection: the latents, or their opposites, that best tell documents with the concept from others.
Logit effect: those that push up the concept's own words most. A candidate has a side: a signed code
may say the concept by being negative, and is then steered with a negative strength.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.edits import Handle
from saelab.errors import ConfigError
from saelab.metrics.pooling import Pooled
from saelab.protocols import LanguageModel
from saelab.stats import aucs
from saelab.steering.baselines import unit_effects

Rule = Literal["detection", "logit_effect"]
RULES: tuple[Rule, ...] = get_args(Rule)
N_CANDIDATES = 5
N_TOKENS = 20


@dataclass(frozen=True)
class Candidate:
    """A latent, the sign with which it is steered, and how a rule scores it."""

    latent: int
    sign: int
    score: float
    rule: Rule


def by_detection(
    pooled: Pooled, positive: Bool[Tensor, " documents"], n: int = N_CANDIDATES
) -> list[Candidate]:
    """Return the latents with the best AUROC of a document's largest code of one sign.

    `pooled` holds the training documents' codes (`metrics.pooling`). A latent stands for one side
    only, its better one.
    """
    columns = pooled.columns("max", "two", opposite=True)
    return _best(aucs(columns, positive[:, None])[0], n, "detection")


def by_logit_effect(
    model: LanguageModel, handle: Handle, tokens: Sequence[int], n: int = N_CANDIDATES
) -> list[Candidate]:
    """Return the latents whose direct logit effect on some tokens, at unit length, is largest on
    average."""
    ids = list(tokens)
    effect = torch.cat([part[:, ids].mean(1) for part in unit_effects(model, handle)])
    return _best(torch.cat([effect, -effect]), n, "logit_effect")


def _best(scores: Float[Tensor, " two_m"], n: int, rule: Rule) -> list[Candidate]:
    """Return the best latents of scores of both sides, each by its better side."""
    sides = scores.nan_to_num(-torch.inf).reshape(2, -1)
    best, side = sides.max(0)
    order = best.argsort(descending=True, stable=True)[:n].tolist()
    return [Candidate(i, 1 - 2 * int(side[i]), float(best[i]), rule) for i in order]


def concept_tokens(
    model: LanguageModel,
    texts: Sequence[str],
    positive: Bool[Tensor, " documents"],
    n: int = N_TOKENS,
) -> list[int]:
    """Return the tokens most typical of the concept's documents: its training lexicon.

    By z = difference of log odds of occurring in a document over its standard error, with 1/2 added
    to each count (Monroe, Colaresi, Quinn 2008 without their prior). Raises ConfigError unless
    there are documents of both kinds.
    """
    if len(set(positive.tolist())) < 2:
        raise ConfigError(
            f"a lexicon needs texts with and without the concept, but {int(positive.sum())} of "
            f"{len(positive)} have it"
        )
    counts = torch.zeros(2, model.d_vocab, dtype=torch.float64)
    for run, has in zip(model.tokenize(texts), positive.tolist(), strict=True):
        counts[int(has), run.ids.unique()] += 1
    n_documents = torch.stack([(~positive).sum(), positive.sum()])[:, None]
    seen, unseen = counts + 0.5, n_documents - counts + 0.5
    odds = (seen / unseen).log()
    z = (odds[1] - odds[0]) / (1 / seen + 1 / unseen).sum(0).sqrt()
    return z.argsort(descending=True, stable=True)[:n].tolist()
