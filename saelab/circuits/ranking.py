"""How well a score of heads agrees with their causal effects.

*Primary*: Kendall's τ-b and Spearman's ρ with |effect|, and the precision of the k best, relevant
being the k heads of largest |effect|. *Secondary*: ROC AUC and average precision at each cut-off,
positives being heads with |effect| at or above it and negatives those that have none
(`Effects.negligible`); heads between are left out. Ties count as if broken at random, throughout.
"""

from typing import Any, Literal

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from saelab.circuits.effects import NEGLIGIBLE, Effects
from saelab.config import Config
from saelab.errors import TaskError
from saelab.stats import auc


class RankingConfig(Config):
    """Which agreements with the truth are reported."""

    precision_at: list[int] = Field(default=[10, 26], min_length=1)
    """Numbers of best heads looked at."""
    cutoffs: list[float] = [0.01, 0.02, 0.05, 0.1]
    """Least |effect| of a positive."""
    negligible: float = Field(default=NEGLIGIBLE, gt=0)
    """Half-width of the band that holds a negative's 95 % interval."""
    published: Literal["gpt2_small"] | None = None
    """Whose published heads scores are compared with too, as if they were the truth; there are
    lists for `ioi` and `greater_than`."""
    least: int = Field(default=5, ge=1)
    """Fewest positives and negatives of a cut-off; with fewer it is left out, and without enough
    negatives for any, everything is refused."""


def kendall(scores: Float[Tensor, " n"], truth: Float[Tensor, " n"]) -> float:
    """Return Kendall's τ-b; 0 for a constant, which says nothing."""
    from scipy.stats import kendalltau

    if _constant(scores) or _constant(truth):
        return 0.0
    found: Any = kendalltau(scores.numpy(), truth.numpy())
    return float(found.statistic)


def spearman(scores: Float[Tensor, " n"], truth: Float[Tensor, " n"]) -> float:
    """Return Spearman's ρ; 0 for a constant, which says nothing."""
    from scipy.stats import spearmanr

    if _constant(scores) or _constant(truth):
        return 0.0
    found: Any = spearmanr(scores.numpy(), truth.numpy())
    return float(found.statistic)


def precision_at(scores: Float[Tensor, " n"], truth: Float[Tensor, " n"], k: int) -> float:
    """Return the share of the k best-scored heads that are among the k largest of the truth."""
    return float((_share_of_best(scores, k) * _share_of_best(truth, k)).sum() / min(k, len(scores)))


def average_precision(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Return the area under the precision–recall curve, as a sum over the distinct scores."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(positive.numpy(), scores.numpy()))


def _constant(x: Float[Tensor, " n"]) -> bool:
    return bool((x == x[0]).all())


def _share_of_best(x: Float[Tensor, " n"], k: int) -> Float[Tensor, " n"]:
    """Return each one's chance to be among the k largest."""
    k = min(k, len(x))
    last = x.topk(k).values[-1]
    level, above = x == last, (x > last).double()
    return above + level * (k - above.sum()) / level.sum()


def agreements(
    scores: Float[Tensor, " heads"],
    truth: Effects,
    config: RankingConfig,
    listed: Bool[Tensor, " heads"] | None = None,
) -> dict[str, float]:
    """Return every agreement of a score with the truth, by name, and with a list of heads.

    `auc@0.02` and `ap@0.02` are at a cut-off, `auc_helpful@` and `auc_harmful@` count only positive
    and only negative effects. Raises TaskError if the truth has too few negatives.
    """
    effect, none = truth.effect(), truth.negligible(config.negligible)
    scores = scores.double()
    found = {"kendall": kendall(scores, effect.abs()), "spearman": spearman(scores, effect.abs())}
    found |= {f"precision@{k}": precision_at(scores, effect.abs(), k) for k in config.precision_at}
    if listed is not None:
        found["auc_published"] = auc(scores, listed)
        found["ap_published"] = average_precision(scores, listed)
    if int(none.sum()) < config.least:
        raise TaskError(
            f"{int(none.sum())} of {len(none)} heads have an effect that is certainly below "
            f"{config.negligible:.1%}, but {config.least} negatives are needed; take more pairs, "
            "or a wider `negligible`"
        )
    for cutoff in config.cutoffs:
        sides = {"": effect.abs(), "_helpful": effect, "_harmful": -effect}
        for side, values in sides.items():
            positive = values >= cutoff
            if int(positive.sum()) < config.least:
                continue
            kept = positive | none
            found[f"auc{side}@{cutoff:g}"] = auc(scores[kept], positive[kept])
            if not side:
                found[f"ap@{cutoff:g}"] = average_precision(scores[kept], positive[kept])
    return found


def counts(truth: Effects, config: RankingConfig) -> dict[str, int]:
    """Return how many heads are positive, negative and left out at each cut-off."""
    effect, none = truth.effect().abs(), truth.negligible(config.negligible)
    found = {"heads": len(effect), "negatives": int(none.sum())}
    for cutoff in config.cutoffs:
        positive = effect >= cutoff
        found[f"positives@{cutoff:g}"] = int(positive.sum())
        found[f"left_out@{cutoff:g}"] = int((~(positive | none)).sum())
    return found


def ceiling(truth: Effects, config: RankingConfig, *, splits: int, seed: int) -> dict[str, float]:
    """Return the primary agreements of the truth with itself, between random halves of its pairs.

    Each half has half the pairs, so a score may well exceed this a little; not by much.
    """
    found = {
        "kendall": truth.reliability(kendall, splits=splits, seed=seed),
        "spearman": truth.reliability(spearman, splits=splits, seed=seed),
    }
    for k in config.precision_at:
        found[f"precision@{k}"] = truth.reliability(
            lambda a, b, k=k: precision_at(a, b, k), splits=splits, seed=seed
        )
    return found
