"""What layer matching computes: stores of every model, and one part per text sample and draw.

A *part* is the likeness of all pairs of layers, by every method, of one draw of a sample's
documents. Draw 0 is the sample itself; the others are bootstrapped documents, on which dictionaries
and baselines are built anew. Parts and stores are written whole and found again, so that an
interrupted run goes on.

Every model's rows are those at which all models of the arm end a token, in one order for all: an
ITDA dictionary depends on it. A document drawn twice counts twice for the baselines; a dictionary
takes each of its rows once. All dictionaries have equally many atoms: thresholds are found on
draw 0 for `AIM` times as many, so that the dictionary is full before the rows end, also on a
resample, which holds 63 % of the documents.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from saelab_experiments.subjects import ArmConfig, Subject
from torch import Tensor

from saelab import api, artifacts, dictionaries, models
from saelab.config import Config, digest
from saelab.evals.alignment import Alignment, align
from saelab.evals.layers import LayerView, Likeness, compare, compare_keys, compare_sizes
from saelab.evals.similarity import chance_jaccard
from saelab.harvest import corpus as corpora
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.harvest import HarvestConfig
from saelab.types import Batch

VERSION = 1
"""Bumped when the same settings give other numbers."""
AIM = 2.0
"""Atoms that a whole sample would come to, over those that a dictionary may have."""
CALIBRATION_ROWS = 2048
"""Rows on which a threshold is found; the size is carried on to all along its power law."""

log = logging.getLogger(__name__)


class MeasureConfig(Config):
    """How layers are compared, in all arms."""

    k: int = Field(8, gt=0)
    """Steps of an ITDA dictionary's pursuit."""
    most_atoms: int = Field(1024, gt=0)
    """Of the dictionaries at a fixed threshold, whose sizes the size-only matcher sees."""
    anchors: int = Field(128, gt=0)
    """Rows that relative representations refer to."""
    variance: float = Field(0.99, gt=0, le=1)
    """Share of it that SVCCA keeps."""
    context: int = Field(256, ge=2)
    """Longest window, in tokens: a whole text of a sample should fit in one."""


# ----------------------------------------------------------------------------------------- stores


def stores_of(
    subject: Subject, samples: Sequence[Path], arm: ArmConfig, context: int, out: Path
) -> list[Path]:
    """Return a store per text sample, harvested now if it is not there; the model is opened once.

    `out` is the arm's folder. Raises CorpusError if a sample has fewer tokens than asked for.
    """
    name = subject.name.replace(" ", "-").replace("/", "-")
    harvest = HarvestConfig(sites=tuple(subject.sites), norm_outlier=None)
    wanted = []
    for number, sample in enumerate(samples):
        corpus = CorpusConfig(
            source=str(sample), tokens=arm.tokens, context=context, holdout=0, min_tail=2,
            sample_by="line",
        )  # fmt: skip
        inputs = {
            "version": VERSION,
            "model": subject.inputs,
            "dtype": arm.dtype,
            "corpus": corpora.identity(corpus) | {"source": sample.name},
            "harvest": harvest.key_fields(),
        }
        key = artifacts.stage_key("store", VERSION, inputs, [])
        wanted.append((f"{name}-{number}", key, corpus, inputs))
    found = [artifacts.find(out, "store", stem, key) for stem, key, *_ in wanted]
    if None in found:
        with subject.open() as source:
            model = models.load_model(source, dtype=arm.dtype)
            for stem, key, corpus, inputs in wanted:
                with artifacts.open_draft(out, "store", stem, key) as draft:
                    if not draft.is_finished:
                        facts = api.make_store(draft, model, corpus, harvest)
                        draft.finish(
                            stage="store", name=stem, inputs=inputs, parents=[], facts=facts
                        )
    return [artifacts.artifact_path(out, "store", stem, key) for stem, key, *_ in wanted]


@dataclass(frozen=True)
class Sample:
    """One text sample as all models of an arm see it."""

    subjects: Sequence[Subject]
    stores: Sequence[Any]
    places: Alignment

    def layers(self, number: int) -> list[Float[Tensor, "n d"]]:
        """Return the rows of a model's layers at the places that all models share."""
        sites, refs = self.subjects[number].sites, self.places.rows[number]
        return [self.stores[number].rows(site, refs) for site in sites]


def open_sample(subjects: Sequence[Subject], paths: Sequence[Path]) -> Sample:
    """Open one sample's stores, one per model, and align them.

    Raises ArtifactError if their documents or their character spans do not go together.
    """
    stores = [api.open_store(path) for path in paths]
    places = align(stores, [subject.sites[0] for subject in subjects])
    return Sample(subjects, stores, places)


# ------------------------------------------------------------------------------------------ draws


@dataclass(frozen=True)
class Draw:
    """Rows of one bootstrap draw of documents."""

    rows: Int[Tensor, " n"]
    """Of the drawn documents, as often as they were drawn."""
    order: Int[Tensor, " m"]
    """The same rows once each, in the order in which dictionaries take them."""
    anchors: Int[Tensor, " a"]
    """Places among `rows` that relative representations refer to."""


def draw_documents(documents: Int[Tensor, " n"], number: int, *, anchors: int, seed: int) -> Draw:
    """Return a draw: all documents once for number 0, else as many at random, with replacement."""
    generator = torch.Generator().manual_seed(int(digest([seed, number])[:15], 16))
    known = documents.unique()
    if number:
        known = known[torch.randint(len(known), (len(known),), generator=generator)]
    rows = torch.cat([(documents == d).nonzero()[:, 0] for d in known.tolist()])
    once = rows.unique()
    order = once[torch.randperm(len(once), generator=generator)]
    return Draw(rows, order, torch.randperm(len(rows), generator=generator)[:anchors])


# ------------------------------------------------------------------------------------ one draw


def keep_rows(
    x: Float[Tensor, "n d"], draw: Draw, fields: dict[str, Any]
) -> tuple[Int[Tensor, " atoms"], float]:
    """Build an ITDA dictionary of a draw's rows; return the rows it kept and its threshold.

    `fields` are the type's settings without `d_in`.
    """
    dictionary: Any = dictionaries.create({"type": "itda", "d_in": x.shape[1], **fields})
    rows = x[draw.order]
    dictionary.begin_(x[draw.rows].mean(0), rows[:CALIBRATION_ROWS], len(rows))
    dictionary.partial_fit(Batch(rows, rows, draw.order, torch.zeros_like(draw.order)))
    return dictionary.rows, float(dictionary.threshold)


def measure(
    sample: Sample,
    pairs: Sequence[tuple[int, int]],
    draw: Draw,
    arm: ArmConfig,
    config: MeasureConfig,
    first: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the likeness of all pairs of layers of the pairs of models, as JSON-ready data.

    `first` is what this gave for draw 0, whose thresholds hold for all draws; None for draw 0.
    """
    n = len(sample.subjects)
    given = None if first is None else first["thresholds"]
    kept: list[list[list[int]]] = []
    thresholds: list[list[float]] = []
    sizes: list[list[int]] = []
    for i in range(n):
        layers = sample.layers(i)
        built = [
            keep_rows(x, draw, _fields(arm, config, None if given is None else given[i][place]))
            for place, x in enumerate(layers)
        ]
        kept.append([rows.tolist() for rows, _ in built])
        thresholds.append([threshold for _, threshold in built])
        same = sorted(given[0] if given else thresholds[0])[len(thresholds[0]) // 2]
        fixed = {"d_sae": config.most_atoms, "k": config.k, "threshold": same}
        sizes.append([len(keep_rows(x, draw, fixed)[0]) for x in layers])
    likeness: dict[str, dict[str, Any]] = {}
    for i in sorted({i for i, _ in pairs}):
        mine = _views(sample.layers(i), draw)
        for j in (b for a, b in pairs if a == i):
            found = compare(mine, _views(sample.layers(j), draw), variance=config.variance)
            found["itda"] = compare_keys(kept[i], kept[j])
            found["size"] = compare_sizes(sizes[i], sizes[j])
            likeness[f"{i}-{j}"] = {name: _plain(value) for name, value in found.items()}
    fewest = min(len(rows) for layers in kept for rows in layers)
    return {
        "thresholds": thresholds,
        "sizes": sizes,
        "fewest_atoms": fewest,
        "places": len(sample.places.documents),
        "documents": sample.places.n_shared,
        "chance_jaccard": chance_jaccard(arm.atoms, arm.atoms, len(draw.order)),
        "likeness": likeness,
    }


def _fields(arm: ArmConfig, config: MeasureConfig, threshold: float | None) -> dict[str, Any]:
    size = {"target_size": round(AIM * arm.atoms)} if threshold is None else {}
    return {"d_sae": arm.atoms, "k": config.k, "threshold": threshold, **size}


def _views(layers: Sequence[Tensor], draw: Draw) -> list[LayerView]:
    return [LayerView(x[draw.rows], draw.anchors) for x in layers]


def _plain(likeness: Likeness) -> dict[str, Any]:
    return {"forth": likeness.forth.tolist(), "back": likeness.back.tolist()}


# ------------------------------------------------------------------------------------------ parts


def parts_of(
    subjects: Sequence[Subject],
    pairs: Sequence[tuple[int, int]],
    samples: Sequence[Path],
    arm: ArmConfig,
    config: MeasureConfig,
    *,
    out: Path,
    seed: int,
) -> list[list[dict[str, Any]]]:
    """Return an arm's parts, by sample and draw; what is missing is computed and written.

    `out` is the arm's folder.
    """
    inputs = {
        "version": VERSION,
        "models": [[s.inputs, list(s.layers)] for s in subjects],
        "arm": arm.plain(),
        "measure": config.plain(),
        "samples": [artifacts.hash_file(path) for path in samples],
        "seed": seed,
    }
    folder = out / f"parts-{digest(inputs)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    names = [[folder / f"sample-{s}-draw-{r}.json" for r in range(arm.resamples + 1)]
             for s in range(len(samples))]  # fmt: skip
    if not all(path.exists() for row in names for path in row):
        stores = [stores_of(subject, samples, arm, config.context, out) for subject in subjects]
        for s, row in enumerate(names):
            _fill(row, open_sample(subjects, [paths[s] for paths in stores]),
                  pairs, arm, config, seed + s)  # fmt: skip
    return [[artifacts.read_json(path) for path in row] for row in names]


def _fill(
    paths: Sequence[Path],
    sample: Sample,
    pairs: Sequence[tuple[int, int]],
    arm: ArmConfig,
    config: MeasureConfig,
    seed: int,
) -> None:
    """Write the missing parts of one sample; draw 0 comes first."""
    for number, path in enumerate(paths):
        if path.exists():
            continue
        started = time.monotonic()
        first = artifacts.read_json(paths[0]) if number else None
        draw = draw_documents(sample.places.documents, number, anchors=config.anchors, seed=seed)
        artifacts.write_json(path, measure(sample, pairs, draw, arm, config, first))
        log.info("%s: %.0f seconds", path.relative_to(path.parents[2]), time.monotonic() - started)
