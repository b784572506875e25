"""Match the layers of models by likeness, where the truth is known, graded, or absent.

    python -m saelab_experiments.matching experiments/layers/matching.yaml [ARM …] [KEY=VALUE …]

Three arms, each with a table and with lines of JSON in the run's `out`:

    known      tiny transformers of different seeds, whose layer i belongs to layer i
    damage     a model and its damaged copies
    family     two models without a common truth: only the order of depths can be judged

Methods: Jaccard on the atoms of ITDA dictionaries of equal size, linear CKA, SVCCA, relative
representations, regression, and a matcher that sees nothing but the sizes of dictionaries built at
one threshold.

Every pair is matched both ways, and a number is the mean over ways, pairs and text samples.
*Intervals* are of documents: in each sample everything is rebuilt on bootstrapped documents, and
the interval is t · √(mean of the samples' variances over rebuilds / samples) to both sides, 95 %.
Rebuilt dictionaries see 63 % of the documents, so that the rebuilds' own mean is not used. What
differs between text samples is printed beside it (`samples`), as is the spread over pairs.

What was computed is kept, and the same command goes on where it was stopped.
"""

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from saelab_experiments import pages, subjects
from saelab_experiments.layer_parts import MeasureConfig, parts_of
from saelab_experiments.subjects import DamageArm, FamilyArm, KnownArm, Subject
from torch import Tensor

from saelab import artifacts
from saelab.config import Config, digest, load_yaml
from saelab.errors import ConfigError, CorpusError, nearest
from saelab.evals.layers import accuracy, depth_order, layer_error
from saelab.harvest.sources import Request, records

METHODS = {
    "itda": "ITDA",
    "cka": "CKA",
    "svcca": "SVCCA",
    "relative": "relative",
    "regression": "regression",
    "size": "size only",
}
EASY = 0.95
"""A row in which every method is above this says nothing about methods."""

Parts = list[list[dict[str, Any]]]
"""By text sample and draw: see `layer_parts`."""


class MatchingConfig(Config):
    """A whole study."""

    out: Path
    source: str
    """Texts: a named asset or a file. The first documents are compared on, the rest trained on."""
    samples: int = Field(3, gt=0)
    """Text samples that share no document."""
    documents: int = Field(gt=1)
    """Per text sample."""
    characters: int = Field(640, gt=0)
    """Of each compared document: its beginning, short enough for one window."""
    seed: int = 0
    """Of the draws of documents."""
    measure: MeasureConfig = MeasureConfig()
    known: KnownArm | None = None
    damage: DamageArm | None = None
    family: FamilyArm | None = None


# ------------------------------------------------------------------------------------------- text


def split_texts(config: MatchingConfig) -> tuple[list[Path], list[str]]:
    """Write the text samples, one document a line, and return their files and the other texts.

    Raises CorpusError if there are too few documents.
    """
    request = Request(config.source, "train", None, None, "file", streaming=False)
    found = (" ".join(record.text.split()) for record in records(request))
    texts = list(dict.fromkeys(text for text in found if text))
    n = config.samples * config.documents
    if len(texts) <= n:
        raise CorpusError(
            f"{config.source} holds {len(texts)} documents, but {config.samples} samples of "
            f"{config.documents} and some to train on were asked for; lower `documents`"
        )
    lines = [text[: config.characters].rsplit(" ", 1)[0] for text in texts[:n]]
    folder = config.out / f"texts-{digest(lines)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(config.samples):
        part = lines[number * config.documents : (number + 1) * config.documents]
        files.append(folder / f"sample-{number}.txt")
        if not files[-1].exists():
            artifacts.write_file(files[-1], ("\n".join(part) + "\n").encode())
    return files, texts[n:]


# ---------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Number:
    """One number of a table."""

    arm: str
    row: str
    method: str
    metric: str
    value: float
    half: float
    """Half width of the 95 % interval over documents."""
    spread: float
    """Standard deviation over text samples."""
    over_pairs: float | None
    """Standard deviation over pairs of models; None where there is one."""

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.half:.3f}; samples {self.spread:.2f}"


def number(
    values: Float[Tensor, "pairs samples draws"], *, arm: str, row: str, method: str, metric: str
) -> Number:
    """Return the mean over pairs and samples of draw 0, with its interval over the other draws.

    Raises ConfigError for fewer than two rebuilds.
    """
    pairs, samples, draws = values.shape
    if draws < 3:
        raise ConfigError(f"an interval needs two resamples or more, but {draws - 1} came")
    by_sample = values.mean(0)
    variance = float(by_sample[:, 1:].var(1).mean()) / samples
    half = _t(samples * (draws - 2)) * math.sqrt(variance)
    own = by_sample[:, 0].tolist()
    spread = statistics.stdev(own) if samples > 1 else 0.0
    over = values[:, :, 0].mean(1)
    between = float(over.std()) if pairs > 1 else None
    return Number(arm, row, method, metric, float(over.mean()), half, spread, between)


def _t(degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def ways(parts: Parts, pair: str, method: str) -> Iterator[list[list[Float[Tensor, "l m"]]]]:
    """Yield the likeness of a pair of models by a method, forth and back, by sample and draw."""
    for way in ("forth", "back"):
        yield [
            [torch.tensor(part["likeness"][pair][method][way], dtype=torch.float64) for part in row]
            for row in parts
        ]


def scored(
    parts: Parts, pairs: Sequence[str], method: str, score: Callable[[Tensor], float]
) -> Float[Tensor, "pairs samples draws"]:
    """Return a score of the likeness of each pair, the mean of both ways."""
    both = [
        [[[score(likeness) for likeness in row] for row in way] for way in ways(parts, p, method)]
        for p in pairs
    ]
    return torch.tensor(both, dtype=torch.float64).mean(1)


def truth_numbers(
    arm: str, row: str, parts: Parts, pairs: Sequence[str], layers: Sequence[int]
) -> list[Number]:
    """Return accuracy and layer error of every method on pairs whose truth is known."""
    found = []
    for method in METHODS:
        names = {"arm": arm, "row": row, "method": method}
        right = scored(parts, pairs, method, accuracy)
        found.append(number(right, metric="accuracy", **names))
        wrong = scored(parts, pairs, method, lambda a: layer_error(a, layers))
        found.append(number(wrong, metric="layer_error", **names))
    own = scored(parts, pairs, "itda", lambda a: float(a.diagonal().mean()))
    names = {"arm": arm, "row": row, "method": "itda"}
    return [*found, number(own, metric="jaccard_of_counterparts", **names)]


def order_numbers(
    arm: FamilyArm, pair: Sequence[Subject], parts: Parts
) -> tuple[list[Number], dict[tuple[str, str], float]]:
    """Return Spearman's ρ of both ways, and for each (row, method) the largest p of a sample."""
    found, p_values = [], {}
    depths = pair[0].depths, pair[1].depths
    for method in METHODS:
        for way, likenesses in zip((1, -1), ways(parts, "0-1", method), strict=True):
            row = " → ".join(subject.name for subject in pair[::way])
            orders = [
                [depth_order(a, depths[::way], permutations=arm.permutations) for a in draws]
                for draws in likenesses
            ]
            rho = torch.tensor([[[order.rho for order in draws] for draws in orders]])
            names = {"arm": "family", "row": row, "method": method, "metric": "rho"}
            found.append(number(rho.double(), **names))
            p_values[row, method] = max(draws[0].p for draws in orders)
    return found, p_values


# ----------------------------------------------------------------------------------------- tables


def table(
    numbers: Sequence[Number], metric: str, note: Callable[[Number], str] = lambda _: ""
) -> list[str]:
    """Return the table of a metric: a line per row, a column per method."""
    chosen = [n for n in numbers if n.metric == metric]
    lines = [f"| {metric} | " + " | ".join(METHODS.values()) + " |"]
    lines.append("|---|" + "--:|" * len(METHODS))
    for row in dict.fromkeys(n.row for n in chosen):
        here = [n for n in chosen if n.row == row]
        cells = {n.method: f"{n}{note(n)}" for n in here}
        easy = metric == "accuracy" and all(n.value > EASY for n in here if n.method != "size")
        label = row + (" (too easy: does not count)" if easy else "")
        lines.append(f"| {label} | " + " | ".join(cells.get(m, "") for m in METHODS) + " |")
    return lines


def report(
    title: str, parts: Parts, numbers: Sequence[Number], atoms: int, tables: Sequence[Sequence[str]]
) -> str:
    """Return an arm's section."""
    every = [part for row in parts for part in row]
    least = min(part["fewest_atoms"] for part in every)
    chance = statistics.fmean(part["chance_jaccard"] for row in parts for part in row[:1])
    own = [n for n in numbers if n.metric == "jaccard_of_counterparts"]
    places = ", ".join(f"{row[0]['places']} in {row[0]['documents']}" for row in parts)
    lines = [f"## {title}", "", f"Places and documents per text sample: {places}."]
    lines.append(
        f"{atoms} atoms per dictionary"
        + (f" (at least {least}: not all were full)" if least < atoms else "")
        + f"; Jaccard by chance {chance:.3f}"
        + "".join(f", of counterparts in {n.row} {n.value:.3f}" for n in own)
        + "."
    )
    for one in tables:
        lines += ["", *one]
    return "\n".join([*lines, ""])


# ------------------------------------------------------------------------------------------- arms


def run_known(config: MatchingConfig, arm: KnownArm) -> tuple[str, list[Number]]:
    """Match the layers of tiny transformers of different seeds."""
    samples, texts = split_texts(config)
    models = subjects.known(arm, texts, config.out / "known")
    pairs = list(combinations(range(len(models)), 2))
    parts = parts_of(
        models, pairs, samples, arm, config.measure, out=config.out / "known", seed=config.seed
    )
    names = [f"{i}-{j}" for i, j in pairs]
    numbers = truth_numbers("known", f"{len(pairs)} pairs of seeds", parts, names, arm.layers)
    losses = []
    for model in models:
        with model.open() as folder:
            losses.append(artifacts.read_json(Path(folder) / subjects.TRAINING))
    trained = ", ".join(f"{loss['loss']:.2f}" for loss in losses)
    note = f"Loss of the models {trained} nats; of unigrams {losses[0]['unigram']:.2f}."
    chance = f"Chance: accuracy {1 / len(arm.layers):.3f}."
    both = [table(numbers, metric, _over_pairs) for metric in ("accuracy", "layer_error")]
    text = report("Known truth", parts, numbers, arm.atoms, [[note, chance], *both])
    return text, numbers


def _over_pairs(n: Number) -> str:
    return "" if n.over_pairs is None else f"; pairs {n.over_pairs:.2f}"


def run_damage(config: MatchingConfig, arm: DamageArm) -> tuple[str, list[Number]]:
    """Match the layers of a model with those of its damaged copies."""
    samples, texts = split_texts(config)
    models = subjects.damaged(arm, texts, config.out / "damage")
    pairs = [(0, j) for j in range(1, len(models))]
    parts = parts_of(
        models, pairs, samples, arm, config.measure, out=config.out / "damage", seed=config.seed
    )
    numbers = []
    for i, j in pairs:
        numbers += truth_numbers("damage", models[j].name, parts, [f"{i}-{j}"], arm.layers)
    chance = f"Chance: accuracy {1 / len(arm.layers):.3f}."
    both = [table(numbers, metric) for metric in ("accuracy", "layer_error")]
    text = report(f"Damage to {arm.model}", parts, numbers, arm.atoms, [[chance], *both])
    return text, numbers


def run_family(config: MatchingConfig, arm: FamilyArm) -> tuple[str, list[Number]]:
    """Match the layers of two models of different families."""
    samples, _ = split_texts(config)
    models = subjects.family(arm)
    parts = parts_of(
        models, [(0, 1)], samples, arm, config.measure, out=config.out / "family", seed=config.seed
    )
    numbers, p_values = order_numbers(arm, models, parts)
    note = "ρ of matched relative depths; p: the largest of the samples', against permuted matches."
    rho = table(numbers, "rho", lambda n: f"; p {p_values[n.row, n.method]:.2g}")
    text = report("Another family", parts, numbers, arm.atoms, [[note], rho])
    return text, numbers


ARMS: dict[str, Callable[[MatchingConfig, Any], tuple[str, list[Number]]]] = {
    "known": run_known,
    "damage": run_damage,
    "family": run_family,
}


def main(argv: list[str], say: Callable[[str], Any] = sys.stdout.write) -> None:
    """Run the arms that are named, or all that the configuration has, and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m saelab_experiments.matching")
    parser.add_argument("config", type=Path, help="the study's YAML")
    parser.add_argument("words", nargs="*", metavar="ARM|KEY=VALUE", help=", ".join(ARMS))
    given = parser.parse_args(argv)
    names = [word for word in given.words if "=" not in word]
    overrides = [word for word in given.words if "=" in word]
    config = MatchingConfig.parse(load_yaml(given.config, overrides))
    known = [name for name in ARMS if getattr(config, name) is not None]
    for name in names:
        if name not in known:
            raise ConfigError(f"{given.config} has no arm {name!r}; {nearest(name, known)}")
    config.out.mkdir(parents=True, exist_ok=True)
    numbers: list[Number] = []
    for name in names or known:
        text, found = ARMS[name](config, getattr(config, name))
        numbers += found
        say(text + "\n")
    lines = b"".join(artifacts.canonical_line(asdict(n)) for n in numbers)
    artifacts.write_file(config.out / f"matching-{'-'.join(names or known)}.jsonl", lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pages.run(main)
