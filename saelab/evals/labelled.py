"""What the evaluators of labels share: scores pooled per document, and rows per label with errors.

Errors are of a bootstrap over the documents reported on, the same draws for every arm and label:
nothing is chosen or fitted anew in a resample. A resample without a document of a label says
nothing of it, and is left out for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ArtifactError, ConfigError
from saelab.evals.attributes import check_known
from saelab.labels import Division, Labelled, documents_of, labelled_documents
from saelab.metrics.pooling import Pooled, Pooling
from saelab.ops.linalg import unit_rows
from saelab.probes import DIRECTIONS, Direction
from saelab.protocols import Dictionary, Split, Store
from saelab.stats import ResultRow, bootstrap_weights, standard_error

ALL = "corpus"
"""Arm of the rows that say what was scored."""
SUPERVISED: tuple[Direction, ...] = ("mean_difference", "linear_probe")
"""Arms whose columns are the labels' own directions, in the order of the labels."""


@dataclass(frozen=True)
class Scorer:
    """A method that gives each row some scores."""

    width: int
    scores: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n m"]]


def documents_with(
    labels: Sequence[str],
    store: Store,
    division: Division,
    *,
    evaluator: str,
    at_most: int,
    per_class: int,
) -> Labelled:
    """Return a store's documents with one of some labels, by default all; others are left out.

    Raises ConfigError for a label on no document, or on fewer than `per_class` of a part, and as
    `labelled_documents` does.
    """
    key, wanted = f"{evaluator}.labels", set(labels)
    if wanted:
        check_known(labels, (str(d.label) for d in documents_of(store) if d.label is not None), key)
    found = labelled_documents(
        store,
        division,
        at_most=at_most,
        per_class=per_class,
        label_of=lambda d: d.label if not wanted or str(d.label) in wanted else None,
    )
    rare = wanted - set(found.classes)
    if rare:
        raise ConfigError(
            f"{key}: {', '.join(sorted(rare))} have fewer than {per_class} documents in a part: "
            f"take more text, other labels, or a smaller {evaluator}.per_label"
        )
    return found


def latents_of(dictionary: Dictionary) -> Scorer:
    """Return a dictionary's codes as scores."""
    device = dictionary.W_dec.device
    return Scorer(
        dictionary.d_sae, lambda x: dictionary.encode_sparse(x.to(device)).dense().float().cpu()
    )


def coordinates_of(width: int) -> Scorer:
    """Return the activations' own coordinates as scores: neurons, where the site has some."""
    return Scorer(width, lambda x: x.float())


def projections_on(directions: Float[Tensor, "m d"], origin: Float[Tensor, " d"]) -> Scorer:
    """Return projections on directions, of activations from an origin."""
    W, b = directions.float(), origin.float()
    return Scorer(len(W), lambda x: (x.float() - b) @ W.T)


def cosines_with(directions: Float[Tensor, "m d"]) -> Scorer:
    """Return cosines of activations with directions; 0 where either has no length."""
    U = torch.nn.functional.normalize(directions.float(), dim=1)
    return Scorer(len(U), lambda x: torch.nn.functional.normalize(x.float(), dim=1) @ U.T)


@dataclass(frozen=True)
class Taught:
    """What labels alone give: a unit direction of each, by each method."""

    mean: Float[Tensor, " d"]
    """Of the documents, float64: what projections are measured from."""
    directions: Mapping[Direction, Float[Tensor, "classes d"]]

    @staticmethod
    def by(x: Float[Tensor, "n d"], targets: Bool[Tensor, "n classes"]) -> "Taught":
        """Return the directions of training documents, whose mean activations are `x`."""
        found: dict[Direction, Tensor] = {
            method: unit_rows(DIRECTIONS[method](x, targets)) for method in SUPERVISED
        }
        return Taught(x.double().mean(0), found)

    def scorers(self) -> dict[str, Scorer]:
        """Return the projections on each method's directions."""
        return {method: projections_on(W, self.mean) for method, W in self.directions.items()}


def checked_site(dictionary: Dictionary, store: Store, site: str | None) -> str:
    """Return the site to measure at. Raises ConfigError or ArtifactError if it does not fit."""
    if site is None and len(store.sites) > 1:
        raise ConfigError(
            f"the store has the sites {', '.join(store.sites)}: say which one to evaluate."
        )
    site = site or next(iter(store.sites))
    if dictionary.d_in != store.width(site):
        raise ArtifactError(
            f"the dictionary takes vectors of width {dictionary.d_in}, but {site} has width "
            f"{store.width(site)}: evaluate it on the site it was trained on."
        )
    return site


def rows_of(
    store: Store,
    site: str,
    split: Split,
    documents: Int[Tensor, " n"],
    *,
    batch: int,
    first: int | None = None,
) -> Iterator[tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"]]]:
    """Yield the kept rows of some documents in order, of each its `first` ones or all, and the
    number of each row's document."""
    before = torch.zeros(len(documents), dtype=torch.int64)
    for rows in store.scan(site, batch=batch, split=split):
        mine = torch.isin(rows.documents, documents)
        if first is not None:
            places = torch.searchsorted(documents, rows.documents[mine])
            _, counts = torch.unique_consecutive(places, return_counts=True)
            starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            number = before[places] + torch.arange(len(places)) - starts
            before += torch.bincount(places, minlength=len(before))
            mine[mine.clone()] = number < first
        if bool(mine.any()):
            yield rows.x[mine], rows.documents[mine]


@torch.no_grad()
def pool(
    store: Store,
    site: str,
    split: Split,
    documents: Int[Tensor, " n"],
    scorers: Mapping[str, Scorer],
    *,
    batch: int,
) -> tuple[dict[str, Pooled], Bool[Tensor, " n"]]:
    """Return each scorer's pooled scores, and which documents have a kept row: only those."""
    pools = {name: Pooling(documents, scorer.width) for name, scorer in scorers.items()}
    counted = Pooling(documents, 1)
    for x, of in rows_of(store, site, split, documents, batch=batch):
        counted.update(x[:, :1], of)
        for name, scorer in scorers.items():
            pools[name].update(scorer.scores(x), of)
    return {name: found.compute() for name, found in pools.items()}, counted.seen


# --------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Measured:
    """A metric of every label, and of every label in each resample."""

    values: Float[Tensor, " classes"]
    replicates: Float[Tensor, "resamples classes"]

    @property
    def mean(self) -> "Measured":
        """The mean over labels, as if it were a label."""
        return Measured(self.values.mean()[None], self.replicates.nanmean(1, keepdim=True))

    @property
    def positive(self) -> "Measured":
        """1 where it is above 0, else 0; NaN where a resample says nothing."""
        drawn = self.replicates
        above = (drawn > 0).to(drawn).masked_fill(drawn.isnan(), float("nan"))
        return Measured((self.values > 0).to(self.values), above)

    def split(self, width: int) -> list["Measured"]:
        """Return the metrics of so many labels each that stand in it side by side."""
        parts = zip(self.values.split(width), self.replicates.split(width, 1), strict=True)
        return [Measured(*part) for part in parts]

    def minus(self, other: "Measured") -> "Measured":
        """Return the paired difference from another arm's."""
        return Measured(self.values - other.values, self.replicates - other.replicates)


def measure(
    statistic: Callable[[Float[Tensor, "b n"]], Float[Tensor, "b classes"]],
    n: int,
    *,
    resamples: int,
    seed: int,
) -> Measured:
    """Return a statistic of `n` weighted documents: of each once, and of each resample."""
    values = statistic(torch.ones(1, n, dtype=torch.float64))[0]
    return Measured(values, bootstrap_weights(n, statistic, resamples=resamples, seed=seed))


@dataclass(frozen=True)
class Naming:
    """What the rows of one metric and arm have in common."""

    metric: str
    suffix: str
    """Behind the metric's name, such as `[k=1,max]`."""
    unit: str
    arm: str
    encoder: str
    evaluator: str
    version: int


def label_rows(
    naming: Naming, measured: Measured, classes: Sequence[str], n: int
) -> Iterator[ResultRow]:
    """Yield the mean over labels, then a row per label."""
    yield _row(naming, "", measured.mean, 0, n, keep=True)
    for place, label in enumerate(classes):
        yield _row(naming, f"({label})", measured, place, n)


def difference_row(naming: Naming, mine: Measured, others: Measured, n: int) -> ResultRow:
    """Return the paired difference of two arms' means over labels."""
    return _row(naming, "", mine.mean.minus(others.mean), 0, n)


def count_rows(labelled: Labelled, evaluator: str, version: int) -> Iterator[ResultRow]:
    """Yield how many labels and documents are scored, and how many left out."""
    n = sum(len(part.documents) for part in labelled.parts.values())
    found = {
        "labels": (len(labelled.classes), "labels"),
        "labels_left_out": (labelled.classes_left_out, "labels"),
        "documents": (n, "documents"),
        "documents_left_out": (labelled.documents_left_out, "documents"),
    }
    for name, (value, unit) in found.items():
        yield ResultRow(
            f"{evaluator}_{name}", float(value), unit, n, None, version, ALL, "none", evaluator
        )


def _row(
    naming: Naming, label: str, measured: Measured, place: int, n: int, *, keep: bool = False
) -> ResultRow:
    drawn = measured.replicates[:, place]
    return ResultRow(
        f"{naming.metric}{naming.suffix}{label}", float(measured.values[place]), naming.unit, n,
        standard_error(drawn[~drawn.isnan()]), naming.version, naming.arm, naming.encoder,
        naming.evaluator, drawn if keep else None,
    )  # fmt: skip
