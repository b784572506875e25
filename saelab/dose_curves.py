"""Dose–response curves out of finished results: of one dictionary, or of its seeds together."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ArtifactError, nearest
from saelab.results import read_replicates, read_rows
from saelab.stats import Difference, over_seeds
from saelab.steering.curves import CONTROLS, TITLES, DoseCurve
from saelab.steering.trial import Measure

EVALUATOR = "steering"
_AT_DOSE = re.compile(r"steering_score\[dose=([^\]]+)\]\((.*)\)")


@lru_cache(maxsize=64)
def _values(results: Path) -> dict[tuple[str, str], float]:
    """Return the steering rows of finished results by arm and name."""
    rows = (row for row in read_rows(results) if row["evaluator"] == EVALUATOR)
    return {(row["arm"], row["name"]): row["value"] for row in rows}


def labels_in(results: Path) -> list[str]:
    """Return the labels that were steered by."""
    found = (re.fullmatch(r"steering_reached\((.*)\)", name) for _, name in _values(results))
    return list(dict.fromkeys(match[1] for match in found if match))


def with_interval(folders: Sequence[Path], arm: str, name: str) -> Difference | None:
    """Return a steering row with its 95 % interval: over prompts, or windows, and over seeds.

    `folders` are results of dictionaries that differ in their seed; those without the row do not
    count. None where none has it, or its resamples.
    """
    values, drawn = [], []
    for folder in folders:
        value = _values(folder).get((arm, name))
        replicates = read_replicates(folder, EVALUATOR, arm, name)
        if value is not None and replicates is not None:
            values.append(value)
            drawn.append(replicates)
    if not values:
        return None
    return Difference.of(sum(values) / len(values), _joined(drawn))


def _joined(drawn: Sequence[Float[Tensor, " resamples"]]) -> Float[Tensor, " resamples"]:
    return drawn[0] if len(drawn) == 1 else over_seeds(torch.stack(list(drawn)))


def curves_in(folders: Sequence[Path], label: str, *, name: str = "dictionary") -> list[DoseCurve]:
    """Return the curves of one type of dictionary and of its controls, for `dose_figure`.

    `folders` are results artifacts that differ in their seed at most; `name` is what the dictionary
    is called. Raises ArtifactError for a label that was not steered by.
    """
    labels = labels_in(folders[0])
    if label not in labels:
        raise ArtifactError(f"{folders[0]} was not steered by {label!r}; {nearest(label, labels)}")
    rows = [key for folder in folders for key in _values(folder)]
    doses: dict[str, set[str]] = {}
    for arm, row in rows:
        match = _AT_DOSE.fullmatch(row)
        if match and match[2] == label:
            doses.setdefault(arm, set()).add(match[1])
    if any(arm == "prompt" for arm, _ in rows):
        doses["prompt"] = set()
    found = []
    for arm, own in doses.items():
        curve = _curve(folders, label, arm, sorted(own, key=float))
        if curve is not None:
            found.append(curve if arm != "dictionary" else replace(curve, arm=name))
    return found


def _curve(folders: Sequence[Path], label: str, arm: str, doses: Sequence[str]) -> DoseCurve | None:
    suffixes = [f"[dose={dose}]" for dose in doses] or [""]
    measures: dict[Measure, tuple[Difference, ...]] = {}
    for measure in TITLES:
        points = [
            with_interval(folders, arm, f"steering_{measure}{suffix}({label})")
            for suffix in suffixes
        ]
        measures[measure] = tuple(point for point in points if point is not None)
    if not all(measures.values()):
        return None
    reached, non_monotone = (
        _shares(folders, arm, [f"steering_{name}[dose={dose}]({label})" for dose in doses])
        for name in ("directions_reached", "non_monotone")
    )
    return DoseCurve(
        arm, arm in CONTROLS, tuple(map(float, doses)), measures, reached, non_monotone
    )


def _shares(folders: Sequence[Path], arm: str, names: Sequence[str]) -> tuple[float, ...]:
    """Return rows' means over the results that have them; none where some row is in no result."""
    known = [
        [v for f in folders if (v := _values(f).get((arm, name))) is not None] for name in names
    ]
    return tuple(sum(own) / len(own) for own in known) if all(known) else ()
