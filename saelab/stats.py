"""Result rows and their errors: the bootstrap over documents, and small corrections.

Tokens of one document are not independent, so documents are drawn, not rows: a resample draws as
many documents as there are, with replacement, and computes the metric from their sums. Everything
is seeded and of bounded memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Statistic = Callable[[Float[Tensor, "b q"]], Float[Tensor, " b"]]
"""A metric of summed columns, for `b` sets of documents at once."""

RESAMPLES = 1000
_CHUNK = 1 << 22
"""Numbers held at once while resampling."""
_ROUNDING = 1e-13
_OTHER = 1 << 32
"""Added to a seed, for draws that have nothing to do with those of documents."""


@dataclass(frozen=True)
class ResultRow:
    """One number with everything needed to trust it."""

    name: str
    """Metric, for example `fvu`."""
    value: float
    unit: str
    n: int
    """Number of rows, positions or latents it was computed over."""
    standard_error: float | None
    """None where an error bar has no meaning (said in the metric's documentation)."""
    metric_version: int
    arm: str
    """`dictionary`, or the name of a control such as `pca(k=32)`."""
    encoder: str = "own"
    evaluator: str = "core"
    replicates: Float[Tensor, " resamples"] | None = field(default=None, compare=False, repr=False)
    """The bootstrap resamples behind the error. Scores of the same documents, settings and seed
    have the same draws, so the resamples of a difference are the differences of these."""

    def plain(self) -> dict[str, Any]:
        """Return JSON-ready data: all but the replicates."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "replicates"}


# ------------------------------------------------------------------------ bootstrap over documents


def bootstrap(
    sums: Float[Tensor, "docs q"],
    statistic: Statistic,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[Tensor, " resamples"]:
    """Return the statistic of each resample of documents, from their sums.

    Two calls with the same seed, number of documents and resamples draw the same documents, so
    columns of two methods side by side, or two calls, give paired resamples.
    """
    sums = sums.double()
    width = len(sums) + sums.shape[1]
    draws = _draws(len(sums), resamples, seed, width)
    return torch.cat([statistic(weights @ sums) for weights in draws])


def bootstrap_weights(
    n: int,
    statistic: Callable[[Float[Tensor, "b n"]], Float[Tensor, "b c"]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[Tensor, "resamples c"]:
    """Return a statistic of each resample of `n` documents that is no function of sums.

    It is given how often each document is drawn. Draws are paired as in `bootstrap`: equal for an
    equal seed, `n` and `resamples`.
    """
    return torch.cat([statistic(weights) for weights in _draws(n, resamples, seed, n)])


def crossed_bootstrap(
    cells: Float[Tensor, "rows docs q"],
    statistic: Statistic,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[Tensor, " resamples"]:
    """Return the statistic of each resample of both rows and documents, from the sums of each cell.

    For numbers over directions and documents, both drawn at random: a cell counts as often as its
    row times as often as its document is drawn (Owen 2007, "The pigeonhole bootstrap", arXiv
    0712.1111). Documents are drawn as in `bootstrap`; with one row it is the same.
    """
    cells, n_rows = cells.double(), len(cells)
    generator = torch.Generator().manual_seed(seed + _OTHER)

    def crossed(documents: Float[Tensor, "b docs"]) -> Float[Tensor, "b 1"]:
        drawn = torch.randint(n_rows, (len(documents), n_rows), generator=generator)
        rows = torch.zeros(drawn.shape, dtype=torch.float64)
        rows.scatter_add_(1, drawn, torch.ones_like(rows))
        return statistic(torch.einsum("br,bd,rdq->bq", rows, documents, cells))[:, None]

    return bootstrap_weights(cells.shape[1], crossed, resamples=resamples, seed=seed)[:, 0]


def bootstrap_median(
    values: Float[Tensor, " n"],
    documents: Int[Tensor, " n"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[Tensor, " resamples"]:
    """Return the median of the rows of each resample of documents, exactly.

    Rows are sorted once. Only a window of ranks around the median is searched, and widened until
    it holds the median of every resample.
    """
    ordered, order = values.double().sort(stable=True)
    known, document = torch.unique(documents, return_inverse=True)
    document, n, reach = document[order], len(values), 0.05
    while True:
        low, high = int(n * max(0.5 - reach, 0)), min(int(n * (0.5 + reach)) + 1, n)
        below = torch.bincount(document[:low], minlength=len(known)).double()
        total = torch.bincount(document, minlength=len(known)).double()
        found, inside = [], True
        for weights in _draws(len(known), resamples, seed, high - low):
            before = (weights @ below)[:, None]
            reached = before + weights[:, document[low:high]].cumsum(1)
            half = torch.ceil((weights @ total) / 2)[:, None]
            inside &= bool(((before < half) & (reached[:, -1:] >= half)).all())
            place = (reached < half).sum(1).clamp(max=high - low - 1)
            found.append(ordered[low + place])
        if inside or reach > 0.5:
            return torch.cat(found)
        reach *= 2


def standard_error(replicates: Float[Tensor, " resamples"] | None) -> float | None:
    """Return the standard deviation of the resamples; None if some are not finite, or there are
    none.

    Exactly 0 where they differ only by rounding.
    """
    if replicates is None or len(replicates) < 2 or not bool(replicates.isfinite().all()):
        return None
    error = float(replicates.std())
    return error if error > _ROUNDING * float(replicates.abs().max()) else 0.0


def known(replicates: Float[Tensor, " resamples"]) -> Float[Tensor, " of_them"]:
    """Return the resamples that have a value: one that draws nothing that was counted is NaN."""
    return replicates[~replicates.isnan()]


def over_documents(
    sums: Float[Tensor, "docs q"],
    statistic: Statistic,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[Tensor, " resamples"] | None:
    """Return `bootstrap`; None with fewer than two documents, which tell nothing of an error."""
    if len(sums) < 2:
        return None
    return bootstrap(sums, statistic, resamples=resamples, seed=seed)


def median_over_documents(
    values: Float[Tensor, " n"],
    documents: Int[Tensor, " n"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[Tensor, " resamples"] | None:
    """Return `bootstrap_median`; None with fewer than two documents."""
    if len(torch.unique(documents)) < 2:
        return None
    return bootstrap_median(values, documents, resamples=resamples, seed=seed)


@dataclass(frozen=True)
class Difference:
    """A paired difference of two methods on the same documents."""

    value: float
    standard_error: float | None
    low: float
    """2.5 % of the resampled differences."""
    high: float
    """97.5 %."""

    @classmethod
    def of(cls, value: float, replicates: Float[Tensor, " resamples"]) -> "Difference":
        """Return a difference with its bootstrap interval, over the resamples that have a value."""
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.nanquantile(replicates.double(), ends).tolist()
        return cls(value, standard_error(known(replicates)), low, high)


def paired_difference(
    first: Float[Tensor, "docs q"],
    second: Float[Tensor, "docs q"],
    statistic: Statistic,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Return statistic(first) − statistic(second), both resampled with the same documents.

    Row i of both tables must be the same document.
    """
    q = first.shape[1]

    def difference(totals: Float[Tensor, "b two_q"]) -> Float[Tensor, " b"]:
        return statistic(totals[:, :q]) - statistic(totals[:, q:])

    both = torch.cat([first, second], 1).double()
    drawn = bootstrap(both, difference, resamples=resamples, seed=seed)
    return Difference.of(float(difference(both.sum(0, keepdim=True))), drawn)


def over_seeds(
    replicates: Float[Tensor, "seeds resamples"], *, seed: int = 0
) -> Float[Tensor, " resamples"]:
    """Return the mean over seeds drawn anew for each resample: with resamples of documents that are
    the same for all seeds, the hierarchical bootstrap over seeds and documents."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(replicates), replicates.shape, generator=generator)
    return replicates.double().gather(0, drawn).mean(0)


def _draws(
    n_documents: int, resamples: int, seed: int, width: int
) -> Iterator[Float[Tensor, "b docs"]]:
    """Yield how often each resample draws each document; `width` is what each resample costs."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _CHUNK // max(width, n_documents))
    for start in range(0, resamples, step):
        b = min(step, resamples - start)
        drawn = torch.randint(n_documents, (b, n_documents), generator=generator)
        weights = torch.zeros(b, n_documents, dtype=torch.float64)
        yield weights.scatter_add_(1, drawn, torch.ones_like(weights))


# -------------------------------------------------------------------------------- ranks, many tests


def auc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Return the chance that a positive scores above a negative; ties count half."""
    from scipy.stats import rankdata

    ranks = rankdata(scores.double().cpu().numpy())
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    wins = ranks[positive.cpu().numpy()].sum() - n_positive * (n_positive + 1) / 2
    return float(wins / (n_positive * n_negative))


def aucs(
    scores: Float[Tensor, "n m"], positive: Bool[Tensor, "n classes"]
) -> Float[Tensor, "classes m"]:
    """Return `auc` of every column of scores for every class; NaN for a class with one side."""
    from scipy.stats import rankdata

    found = []
    truth = positive.double()
    n_positive = truth.sum(0)[:, None]
    pairs = n_positive * (len(positive) - n_positive)
    for part in scores.split(1024, dim=1):
        ranks = torch.from_numpy(rankdata(part.double().cpu().numpy(), axis=0))
        wins = truth.T @ ranks - n_positive * (n_positive + 1) / 2
        found.append(wins / pairs)
    return torch.cat(found, 1) if found else truth.new_zeros(truth.shape[1], 0)


def weighted_auc(
    scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"], weights: Float[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Return `auc` with each document drawn as often as a row of weights says; NaN as there."""
    values, place = torch.unique(scores, return_inverse=True)
    sides = []
    for side in (positive, ~positive):
        mass = weights.new_zeros(len(weights), len(values))
        sides.append(mass.index_add_(1, place[side], weights[:, side]))
    high, low = sides
    below = low.cumsum(1) - low / 2
    return (high * below).sum(1) / (high.sum(1) * low.sum(1))


def weighted_balanced_accuracy(
    said: Bool[Tensor, " n"], positive: Bool[Tensor, " n"], weights: Float[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Return the mean of the shares of positives and of negatives that are told right."""
    right = (said == positive).to(weights)
    truth = positive.to(weights)
    shares = [(weights @ (right * t)) / (weights @ t) for t in (truth, 1 - truth)]
    return (shares[0] + shares[1]) / 2


def benjamini_hochberg(p_values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return adjusted p-values: those below q have a false discovery rate of at most q."""
    from scipy.stats import false_discovery_control

    return torch.from_numpy(false_discovery_control(p_values.double().cpu().numpy()))
