"""Tables of circuits: how well a model does its tasks, and which scores find its heads."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from saelab.artifacts import read_json, read_manifest
from saelab.circuit_runs.features import CEILING, CURVES, CurvePoint, read_curves
from saelab.circuits.ability import TaskScore
from saelab.circuits.graph import Graph
from saelab.circuits.paired import ClaimConfig, Paired, against_best
from saelab.report import pretty, table
from saelab.results import read_rows

_GROUPS = ("codes", "observational", "causal")
_ABOUT = {
    "method", "group", "examples", "negatives", "draw", "seed", "seconds", "coded", "position",
    "direction",
}  # fmt: skip
"""Columns of a row that are no agreements."""


def ability_table(scores: Mapping[str, TaskScore | str]) -> Table:
    """Return how well a model does each task."""
    found = table("task", "pairs", "right", "chance", "metric", "clean", "corrupted", "gap", "")
    for name, score in scores.items():
        if isinstance(score, str):
            found.add_row(name, *[""] * 7, Text(score, overflow="fold"))
            continue
        found.add_row(
            name, str(score.n), f"{score.accuracy:.0%}", f"{score.chance:.0%}",
            score.metric.replace("_", " "), pretty(score.clean, score.clean_error),
            pretty(score.corrupted), pretty(score.gap, score.gap_error),
            "can" if score.can_do else "cannot",
        )  # fmt: skip
    return found


def heads_tables(folder: Path) -> Group:
    """Return, for each truth of a finished `heads` artifact, how well each score agrees with it.

    Means over draws and seeds ± their standard error, at the largest number of examples; causal
    scores have neither. The ceiling is the truth's agreement with itself between halves. Below it
    what codes are better by than the best baseline of the same draw; last the claim's verdict.
    """
    manifest = read_manifest(folder)
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    parts: list[Text | Table] = [Text(f"warning: {w}") for w in manifest.facts["warnings"]]
    for truth in manifest.facts["truths"]:
        place = {key: truth[key] for key in ("position", "direction")}
        mine = [row for row in rows if all(row[key] == value for key, value in place.items())]
        parts += [_truth_table(manifest.facts["task"], truth, mine), *_errors(truth)]
        parts.append(_paired_table(place, mine))
    parts.append(Text(_seconds(rows)))
    if manifest.facts["claim"] is not None:
        claim = ClaimConfig.parse(manifest.facts["claim"])
        parts.append(Text(_verdict(manifest.facts["task"], claim, against_best(rows, claim))))
    return Group(*parts)


def _paired_table(place: Mapping[str, str], rows: list[dict[str, Any]]) -> Table:
    """Return what codes are better by than the best baseline of the same draw, by their number of
    examples: mean and 95 % interval over draws of the difference of Kendall's τ."""
    codes = {(row["method"], row["negatives"]) for row in rows if row["group"] == "codes"}
    sizes = sorted({row["examples"] for row in rows if row["examples"] is not None})
    found = table("codes − best baseline", "negatives", *(f"{n} examples" for n in sizes))
    found.title = f"kendall, {place['direction']}, {place['position']} position, draw by draw"
    for method, negatives in sorted(codes):
        about = {"score": method, "negatives": negatives, **place}
        each = (against_best(rows, ClaimConfig.parse(about | {"examples": n})) for n in sizes)
        found.add_row(method, negatives, *map(_difference, each))
    return found


def _difference(paired: Paired) -> str:
    low, high = paired.interval
    return f"{paired.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _verdict(task: str, claim: ClaimConfig, paired: Paired) -> str:
    """Return what a claim came to, in a line."""
    better = sum(difference > 0 for difference in paired.differences)
    return (
        f"claim: {claim.score} ranks the heads of {task} better than the best observational "
        f"baseline ({claim.agreement}, {claim.direction}, {claim.position} position, "
        f"{claim.examples} examples, {claim.negatives} negatives). {_difference(paired)}, better "
        f"in {better} of {len(paired.differences)} draws, best baselines "
        f"{', '.join(dict.fromkeys(paired.best))}: {paired.verdict(claim.smallest)}"
    )


def _errors(truth: dict[str, Any]) -> Iterator[Text]:
    """Yield how far each causal baseline's effects are from the exact ones."""
    for name, found in truth["agreement"].items():
        yield Text(
            f"{name}: effects {found['mean_error']:.1%} of the gap off on average, "
            f"{found['largest_error']:.1%} at most"
        )


def _seconds(rows: list[dict[str, Any]]) -> str:
    """Return what codes took, by number of examples."""
    took = defaultdict[int, list[float]](list)
    for row in rows:
        if row["seconds"] is not None:
            took[row["examples"]].append(row["seconds"])
    each = (f"{max(seconds):.1f} s for {n}" for n, seconds in sorted(took.items()))
    return f"codes took at most {', '.join(each)} examples, forward passes and training included"


def _truth_table(task: str, truth: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    most = max(row["examples"] or 0 for row in rows)
    groups = defaultdict[tuple[str, str, str], list[dict[str, Any]]](list)
    for row in rows:
        if row["examples"] in (None, most):
            groups[row["group"], row["method"], row["negatives"] or ""].append(row)
    names = list(dict.fromkeys(key for row in rows for key in row if key not in _ABOUT))
    found = table("score", "negatives", *names)
    counts = truth["counts"]
    found.title = (
        f"{task}: {truth['direction']}, {truth['position']} position, {most} examples; "
        f"{counts['heads']} heads, {counts['negatives']} without effect"
    )
    ceiling = truth["ceiling"]
    found.add_row("ceiling", "", *(pretty(ceiling[n]) if n in ceiling else "" for n in names))
    for group in _GROUPS:
        found.add_section()
        for (_, method, negatives), mine in sorted(
            item for item in groups.items() if item[0][0] == group
        ):
            found.add_row(method, negatives, *(_mean(mine, name) for name in names))
    return found


def _mean(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return pretty(mean)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return pretty(mean, math.sqrt(variance / len(values)))


def effects_line(folder: Path) -> str:
    """Return what one measurement of effects cost and how well the model does its task."""
    facts, run = read_manifest(folder).facts, read_json(folder / "run.json")
    return f"{facts['score']}; {facts['flops'] / 1e12:.2f} TFLOP in {run['seconds']:.0f} s"


def circuit_tables(path: Path, graph: Graph, top: int) -> Group:
    """Return a circuit's curves and its strongest nodes."""
    parts: list[Text | Table] = [Text(line) for line in _circuit_facts(path, graph)]
    for name, title in CURVES.items():
        parts += [Text(), _curve_table(title, read_curves(path, name))]
    nodes = table("node", "effect", "activation")
    for node in graph.nodes[:top]:
        nodes.add_row(node.id, pretty(node.effect, node.standard_error), pretty(node.activation))
    return Group(*parts, Text(), nodes, Text(), Text(str(path)))


def _curve_table(title: str, curves: Mapping[str, Sequence[CurvePoint]]) -> Table:
    """Return one measure of circuits of growing size, an arm a row."""
    sizes = sorted({point.n_nodes for points in curves.values() for point in points})
    found = table(f"{title}, of n nodes", *(str(n) for n in sizes))
    for arm, points in curves.items():
        own = {p.n_nodes: pretty(p.value, p.standard_error) for p in points}
        found.add_row(arm, *(own.get(n, "") for n in sizes))
    return found


def _circuit_facts(path: Path, graph: Graph) -> list[str]:
    rows = read_rows(path)
    ceiling = next(row for row in rows if row["arm"] == CEILING)
    lines = [
        f"{graph.name}: metric {graph.clean:.3g} on clean and {graph.corrupted:.3g} on corrupted "
        f"prompts; {len(graph.nodes)} nodes have {graph.share:.0%} of all effects",
        f"what nodes send on is {graph.mismatch:.0%} off their effects (Σ|outflow − effect| / "
        "Σ|effect|)",
        f"ceiling without error nodes: {pretty(ceiling['value'], ceiling['standard_error'])}",
    ]
    return lines + [
        f"{row['name'].replace('_', ' ')}, {row['arm']}: {row['value']:.0f}"
        for row in rows
        if row["name"].startswith("nodes_at")
    ]


def supervised_table(path: Path) -> Table:
    """Return a supervised evaluation: a row per score, a column per dictionary."""
    rows = read_rows(path)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    found = table("score", *arms)
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {
            row["arm"]: pretty(row["value"], row["standard_error"])
            for row in rows
            if row["name"] == name
        }
        found.add_row(name, *(own.get(arm, "") for arm in arms))
    return found
