"""Make the runs of a claim folder, and say what each written-down claim came to.

    python -m saelab_experiments.verdicts claims/abs-topk [RUN …] [--figure claims.svg]

A folder holds `claims.yaml` (what is claimed, and what decides it) and the runs' YAMLs, each of
which is also a plain `saelab run`. A run with `seeds` is made once per seed of its planted world;
without, the members' own seeds are the units. What is there already is not made again.

A claim compares two references `run/member` or `run/member:arm`, or one with a fixed number,
unit by unit; a member is called as in its run, without its seed. The interval is a bootstrap over
the units and, in the same draw, the held-out documents: both sides are resampled with the same ones
where results keep resamples. Where they do not, documents enter by each score's standard error, as
if the two scores were independent, which is an upper bound.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import api, artifacts, pipeline
from saelab.config import Config, load_yaml
from saelab.errors import ConfigError, nearest
from saelab.results import read_replicates, read_rows
from saelab.run_config import RunConfig, load_config
from saelab.stats import benjamini_hochberg

RESAMPLES = 10_000
FEWEST = {True: 5, False: 3}
"""Units below which nothing is decided: on planted worlds, on a real model."""


class RunOf(Config):
    """A run of a claim folder."""

    config: str
    """Its YAML, in the same folder."""
    seeds: list[int] | None = None
    """Seeds of the planted world; one run each. None: members' seeds are the units."""
    show: list[str] = ["r2", "f1", "l0", "dead_share"]
    """Metrics in its table."""
    overrides: list[str] = []
    """As on the command line."""
    rates: bool = False
    """Whether it chooses learning rates: only trained, scored by `train_fvu` and `train_l0`, the
    means over the last tenth of its steps: of new rows, if `tokens` is below the store's."""
    sign_tied: list[str] = []
    """AbsTopK members that are also scored as TopK on both signs of their directions."""


class Claim(Config):
    """A claim, written down before the run that decides it."""

    says: str
    metric: str
    first: str
    """What is claimed to be better: `run/member`, or `run/member:arm`."""
    second: str | float
    """Than what: another reference, or a number."""
    direction: Literal["higher", "lower"]
    """Which way the first one is claimed to differ."""
    smallest: float
    """Smallest difference of interest."""
    where: str | None = None
    """Metric of the first one that must be 1 in a unit, or the unit does not count."""


class Claims(Config):
    """A claim folder's `claims.yaml`."""

    paper: str
    runs: dict[str, RunOf]
    claims: list[Claim] = []


@dataclass(frozen=True)
class Score:
    """A metric of one member in one unit."""

    value: float
    error: float
    """Standard error over documents."""
    replicates: Float[Tensor, " resamples"] | None = None
    """The metric on each resample of the documents, if the results keep them."""


Noise = Tensor | float
"""What documents add to a difference: resamples about its value, or their standard deviation."""


Scores = dict[tuple[str, str], dict[int, Score]]
"""(run/member:arm, metric) → unit → score."""


# ------------------------------------------------------------------------------------------- runs


def gather(folder: Path, claims: Claims, only: list[str], out: Path) -> Scores:
    """Make what is missing of the runs, and return every score."""
    scores: Scores = {}
    for name, spec in claims.runs.items():
        if only and name not in only:
            continue
        for seed in spec.seeds if spec.seeds is not None else [None]:
            where = out / folder.name / name / ("all" if seed is None else f"world-{seed}")
            overrides = [*spec.overrides, f"out={where}"]
            overrides += [] if seed is None else [f"synthetic.seed={seed}"]
            config = load_config(folder / spec.config, overrides)
            for label, unit, row in _rows(config, spec, seed):
                reference = f"{name}/{label}:{_arm(row['arm'])}"
                units = scores.setdefault((reference, row["name"]), {})
                if unit in units:
                    raise ConfigError(f"{spec.config}: two members {label!r} with seed {unit}")
                error = row["standard_error"] or 0.0
                units[unit] = Score(row["value"], error, row.get("replicates"))
    return scores


def _rows(config: RunConfig, spec: RunOf, world: int | None) -> Any:
    """Yield (member, unit, result row) of a finished run."""
    steps = pipeline.run(config, until="train" if spec.rates else "evaluate")
    dictionaries = {s.member: s.path for s in steps if s.stage == "dictionary"}
    names = [member.name for member in config.members()]  # one made elsewhere kept another name
    for step in (s for s in steps if s.stage == ("dictionary" if spec.rates else "results")):
        path = dictionaries[step.member]
        inputs = artifacts.read_manifest(path).inputs
        assert step.member is not None, "only the store belongs to no member"
        label = re.sub(r"-seed\d+$", "", names[step.member])
        unit = inputs["seed"] if world is None else world
        if spec.rates:
            for row in _training_rows(path):
                yield label, unit, row
            continue
        rows = read_rows(step.path)
        once = {(row["arm"], row["name"]): row for row in reversed(rows)}  # core's, if both have it
        for row in once.values():
            drawn = read_replicates(step.path, row["evaluator"], row["arm"], row["name"])
            yield label, unit, row | {"replicates": drawn}
        if label in spec.sign_tied:
            store = next(s.path for s in steps if s.stage == "store")
            for row in _sign_tied(path, store, config):
                yield f"{label}-sign-tied", unit, row


def _training_rows(path: Path) -> Any:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for metric in ("fvu", "l0"):
        value = statistics.fmean(line[metric] for line in lines[-max(1, len(lines) // 10) :])
        row = {"arm": "dictionary", "name": f"train_{metric}"}
        yield row | {"value": value, "standard_error": None}


def _sign_tied(path: Path, store: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Return the truth rows of an AbsTopK dictionary as TopK on [D; −D]: the same function."""
    from saelab import dictionaries

    signed = dictionaries.load(path)
    fields: dict[str, Any] = {"type": "topk", "d_in": signed.d_in, "d_sae": 2 * signed.d_sae}
    both = dictionaries.create(fields | {"k": signed.config.plain()["k"]})
    mine, tensors = both.state_dict(), signed.state_dict()
    for name in ("W_enc", "W_dec", "b_enc"):
        mine[name].copy_(torch.cat([tensors[name], -tensors[name]]))
    mine["b_dec"].copy_(tensors["b_dec"])
    assert config.evaluate is not None
    rows = api.evaluate_truth(both, api.open_store(store), config=config.evaluate.truth)
    return [row.plain() | {"replicates": row.replicates} for row in rows if row.arm == "dictionary"]


def _arm(arm: str) -> str:
    """Return a control's name without its settings: `pca(k=32)` is `pca`."""
    return arm.split("(")[0] if not arm.startswith(("oracle", "random_error")) else arm


# ----------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Verdict:
    """What a claim came to."""

    claim: Claim
    differences: list[float]
    """Of each unit that counts, positive where it goes the claimed way."""
    interval: tuple[float, float]
    p: float
    n_left_out: int
    planted: bool

    @property
    def mean(self) -> float:
        """The mean difference."""
        return statistics.fmean(self.differences) if self.differences else float("nan")

    @property
    def word(self) -> str:
        """Supported, refuted or undecided: the rule of the claims' README."""
        d, (low, high) = self.differences, self.interval
        if len(d) < FEWEST[self.planted] or self.n_left_out > len(d):
            return "undecided (too few runs count)"
        if min(d) > 0 and low > 0:
            small = self.mean < self.claim.smallest
            return "supported" + (", but smaller than of interest" if small else "")
        return "refuted" if max(d) < 0 and high < 0 else "undecided"


def judge(claim: Claim, scores: Scores, *, planted: bool) -> Verdict:
    """Compare the two sides of a claim unit by unit. Raises ConfigError for an unknown side."""
    first = find(scores, claim.first, claim.metric)
    fixed = isinstance(claim.second, float)
    second = {} if fixed else find(scores, str(claim.second), claim.metric)
    units = sorted(first.keys() if fixed else first.keys() & second.keys())
    counted = units
    if claim.where is not None:
        passes = find(scores, claim.first, claim.where)
        counted = [u for u in units if passes[u].value == 1]
    sign = 1 if claim.direction == "higher" else -1
    differences, noise = [], []
    for unit in counted:
        other = Score(float(claim.second), 0.0) if fixed else second[unit]
        differences.append(sign * (first[unit].value - other.value))
        noise.append(_noise(first[unit], other, sign, differences[-1]))
    interval = _interval(differences, noise, planted)
    return Verdict(
        claim, differences, interval, _p(differences), len(units) - len(counted), planted
    )


def find(scores: Scores, reference: str, metric: str) -> dict[int, Score]:
    """Return a metric's scores by unit. Raises ConfigError naming the nearest."""
    key = (reference if ":" in reference else f"{reference}:dictionary", metric)
    if key not in scores:
        known = sorted(f"{r} {m}" for r, m in scores)
        raise ConfigError(f"nothing measured {' '.join(key)}; {nearest(' '.join(key), known)}")
    return scores[key]


def _noise(first: Score, second: Score, sign: int, difference: float) -> Noise:
    """Return what the documents add to a unit's difference, both sides with the same ones."""
    a, b = first.replicates, second.replicates
    if a is not None and b is not None and len(a) == len(b):
        return sign * (a - b) - difference
    return (first.error**2 + second.error**2) ** 0.5


def _interval(d: list[float], noise: list[Noise], planted: bool) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference, over units and documents.

    Planted worlds have documents of their own; units on one store share theirs, and their draw.
    """
    if len(d) < 2:
        return float("nan"), float("nan")
    seeded = torch.Generator().manual_seed(0)
    values, n = torch.tensor(d, dtype=torch.float64), len(d)
    units = torch.randint(n, (RESAMPLES, n), generator=seeded)
    table = _table(noise, seeded)
    width = n if planted else 1
    documents = torch.randint(table.shape[1], (RESAMPLES, width), generator=seeded)
    means = (values[units] + table[units, documents]).mean(1)
    ends = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def _table(noise: list[Noise], seeded: torch.Generator) -> Float[Tensor, "units draws"]:
    """Return every unit's noise in the same draws of documents."""
    lengths = [len(one) for one in noise if isinstance(one, Tensor)]
    normal = torch.randn(min(lengths, default=RESAMPLES), generator=seeded, dtype=torch.float64)
    drawn = [one[: len(normal)] if isinstance(one, Tensor) else one * normal for one in noise]
    return torch.stack(drawn)


def _p(differences: list[float]) -> float:
    """Return the two-sided p-value of the paired t-test; 1 where nothing varies or is known."""
    from scipy.stats import t

    n = len(differences)
    if n < 2 or not any(differences):
        return 1.0
    error = statistics.stdev(differences) / n**0.5
    return 2 * float(t.sf(abs(statistics.fmean(differences)) / error, n - 1)) if error else 0.0


# ----------------------------------------------------------------------------------------- tables


def run_table(name: str, spec: RunOf, scores: Scores) -> list[str]:
    """Return a run's table: median and quartiles over units, for each member and control."""
    lines = ["| " + " | ".join([name, "runs", *spec.show]) + " |"]
    lines.append("|---|--:|" + "--:|" * len(spec.show))
    rows = dict.fromkeys(reference for reference, _ in scores if reference.startswith(f"{name}/"))
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for reference in rows:
        cells = [scores.get((reference, metric), {}) for metric in spec.show]
        if any(cells):
            cells_text = tuple(map(_median, cells))
            arm = reference.rpartition(":")[2]
            if arm != "dictionary" and (arm, cells_text) in seen:
                continue  # a control that does not depend on the member
            seen.add((arm, cells_text))
            label = reference.removeprefix(f"{name}/").removesuffix(":dictionary")
            n = max(map(len, cells))
            lines.append("| " + " | ".join([label, str(n), *cells_text]) + " |")
    return lines


def _median(units: dict[int, Score]) -> str:
    values = [score.value for score in units.values()]
    if len(values) < 2:
        return f"{values[0]:.4f}" if values else ""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.4f} [{low:.4f}, {high:.4f}]"


def verdict_table(verdicts: list[Verdict]) -> list[str]:
    """Return the table of what claims came to, p-values adjusted by Benjamini and Hochberg."""
    if not verdicts:
        return []
    adjusted = benjamini_hochberg(torch.tensor([v.p for v in verdicts])).tolist()
    lines = [
        "| claim | difference the claimed way [95 %] | runs that way | smallest | p | verdict |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for verdict, p in zip(verdicts, adjusted, strict=True):
        claim, d = verdict.claim, verdict.differences
        low, high = verdict.interval
        wins = f"{sum(x > 0 for x in d)} of {len(d)}"
        wins += f", {verdict.n_left_out} left out" if verdict.n_left_out else ""
        lines.append(
            f"| {claim.says} (`{claim.metric}`) | {verdict.mean:+z.4f} [{low:+z.4f}, {high:+z.4f}] "
            f"| {wins} | {claim.smallest:g} | {p:.2g} | **{verdict.word}** |"
        )
    return lines


def claim_folder(name: str) -> Path:
    """Return a claim folder, given by path or by the name under which it is shipped."""
    shipped = Path(__file__).parent / name
    for folder in (Path(name), shipped):
        if (folder / "claims.yaml").is_file():
            return folder
    raise ConfigError(f"there is no {Path(name) / 'claims.yaml'}, neither here nor shipped")


def read_claims(folder: Path) -> Claims:
    """Read and check a folder's `claims.yaml`."""
    return Claims.parse(load_yaml(folder / "claims.yaml", []))


def main(argv: list[str], say: Callable[[str], Any] = sys.stdout.write) -> None:
    """Make the runs that are missing, and print the tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m saelab_experiments.verdicts")
    parser.add_argument("folder", help="a claim folder, such as claims/abs-topk")
    parser.add_argument("runs", nargs="*", help="of its runs, only these")
    parser.add_argument("--figure", type=Path, help="SVG file for what the claims came to")
    given = parser.parse_args(argv)
    path = claim_folder(given.folder)
    claims = read_claims(path)
    scores = gather(path, claims, given.runs, Path("runs") / "claims")
    asked = [name for name in claims.runs if not given.runs or name in given.runs]
    for name in asked:
        say("\n".join(run_table(name, claims.runs[name], scores)) + "\n\n")
    verdicts = [
        judge(claim, scores, planted=claims.runs[_run(claim.first)].seeds is not None)
        for claim in claims.claims
        if _run(claim.first) in asked
    ]
    say("\n".join(verdict_table(verdicts)) + "\n")
    if given.figure is not None and verdicts:
        from saelab_experiments import forest

        given.figure.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_file(given.figure, forest.figure(verdicts))


def _run(reference: str) -> str:
    return reference.split("/")[0]


if __name__ == "__main__":
    main(sys.argv[1:])
