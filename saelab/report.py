"""Tables of finished artifacts: the scorecard, the list, the comparison of two dictionaries."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from saelab import artifacts
from saelab.artifacts import Manifest
from saelab.errors import ArtifactError
from saelab.results import read_replicates, read_rows
from saelab.stats import standard_error

_TITLES = {
    "fvu": "FVU ↓",
    "median_normalised_error": "median error ↓",
    "l0": "L0",
    "ce": "CE ↓",
    "kl": "KL ↓",
    "delta_ce": "ΔCE ↓",
    "ce_recovered_zero": "CE rec. (zero) ↑",
    "ce_recovered_mean": "CE rec. (mean) ↑",
}
_LEADING = tuple(_TITLES)
_TRUTH_TITLES = {
    "mcc": "MCC ↑",
    "uniqueness": "unique ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "f1": "F1 ↑",
    "r2": "R² ↑",
    "shrinkage": "shrinkage → 1",
    "l0": "L0",
    "dead_share": "dead ↓",
}

_CONCEPT_TITLES = {
    "concept_auc[max]": "AUC, max ↑",
    "concept_auc[mean]": "AUC, mean ↑",
    "concept_candidates[max]": "candidates",
    "snmf_score": "SNMF score ↑",
    "snmf_positive": "above 0 ↑",
    "snmf_clamped": "clamped ↓",
}
_PERTURBED = {"tpp": "targeted probe perturbation ↑", "scr": "spurious correlation removed ↑"}
_OF_LABELS = ("probing", "concepts", *_PERTURBED)


def pretty(value: float, error: float | None = None) -> str:
    """Format a number with its standard error, to the error's digits: `0.1782 ± 0.0009`."""
    if not math.isfinite(value):
        return str(value)
    if error is None or not math.isfinite(error):
        return f"{value:.4g}"
    if error == 0:
        return f"{value:.4g} ± 0"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 8)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def scorecard(results: Path) -> Group:
    """Return one results artifact as tables: for each evaluator arms by leading metrics, and the
    dictionary's rest."""
    everything, manifest = read_rows(results), artifacts.read_manifest(results)
    by: dict[str, list[dict[str, Any]]] = {}
    for row in everything:
        by.setdefault(row["evaluator"], []).append(row)
    rows, truth = by.get("core", []), by.get("truth", [])
    rest = [
        row
        for part, titles in ((rows, _TITLES), (truth, _TRUTH_TITLES))
        for row in part
        if row["arm"] == "dictionary" and row["name"] not in titles and "[" not in row["name"]
    ]
    details = table("of the dictionary", "value", "unit")
    for row in rest:
        details.add_row(row["name"], _cell(row), row["unit"])
    n = next((row["n"] for row in everything if row["name"] in ("fvu", "r2")), None)
    spliced = next((row["n"] for row in rows if row["name"] == "kl"), None)
    counted = [f"{n:,} held-out rows"] if n else []
    counted += [f"{spliced:,} spliced positions"] if spliced else []
    counted += [_labels(by[name]) for name in _OF_LABELS if name in by]
    words = ", ".join(counted)
    pages = "docs/metrics.md and docs/truth.md" if truth else "docs/metrics.md"
    note = f"± is one standard error (bootstrap over documents); {words}. See {pages}."
    head = Text(f"{results.name}  {manifest.facts['site']}", style="bold")
    tables = [_by_arm("", rows, _TITLES)] if rows else []
    tables += [_by_arm("against the planted truth", truth, _TRUTH_TITLES)] if truth else []
    tables += _label_tables(by)
    tables += [details] if rest else []
    spaced = [part for shown in tables for part in (Text(), shown)]
    return Group(head, *spaced, Text(), Text(note, style="dim"))


def _label_tables(by: dict[str, list[dict[str, Any]]]) -> list[Table]:
    """Return the tables of the evaluators of labels, means over labels."""
    found = []
    if "probing" in by:
        kinds = (row["name"] for row in by["probing"] if row["name"].startswith("probe_accuracy["))
        titles = {name: name[15:-1].replace(",", " ") for name in kinds if name.endswith("]")}
        found.append(_by_arm("balanced accuracy of probes ↑", by["probing"], titles))
    if "concepts" in by:
        found.append(_by_arm("labels told by one latent", by["concepts"], _CONCEPT_TITLES))
    for name, title in _PERTURBED.items():
        kinds = (row["name"] for row in by.get(name, ()) if row["name"].startswith(f"{name}[n="))
        titles = {kind: kind[len(name) + 1 : -1] for kind in kinds if kind.endswith("]")}
        found += [_by_arm(title, by[name], titles)] if titles else []
    for evaluator, title, start in _STEERED:
        if evaluator in by:
            names = (row["name"] for row in by[evaluator] if row["name"].startswith(start))
            titles = {name: name.removeprefix(start).rstrip(")") for name in names}
            found.append(_by_arm(title, by[evaluator], titles))
    return found


_STEERED = (
    ("steering", "steering score ↑", "steering_score("),
    ("signs", "least effect of both signs ↑", "signs_least("),
    ("equal_norm", "pushes of one length ↑", "equal_norm_"),
)
"""Evaluators that steer: the table's title, and how the names of its rows begin."""


def _labels(rows: list[dict[str, Any]]) -> str:
    counts = {
        row["name"].removeprefix(f"{row['evaluator']}_"): row["value"]
        for row in rows
        if row["arm"] == "corpus"
    }
    left_out = f" ({counts['labels_left_out']:.0f} left out)" if counts["labels_left_out"] else ""
    return f"{counts['labels']:.0f} labels{left_out} of {counts['documents']:,.0f} documents"


def _by_arm(first: str, rows: list[dict[str, Any]], titles: dict[str, str]) -> Table:
    """Return a table with a line per arm and a column per metric that has a title."""
    cells = {(row["name"], row["arm"]): row for row in rows}
    names = {row["name"] for row in rows}
    leading = [name for name in titles if name in names]
    card = table(first, *(titles[name] for name in leading))
    for arm in dict.fromkeys(row["arm"] for row in rows if row["name"] in leading):
        style = "bold" if arm == "dictionary" else ""
        card.add_row(arm, *(_cell(cells.get((name, arm))) for name in leading), style=style)
    return card


def table(first: str, *columns: str) -> Table:
    """Return an empty table: one left column, the others right."""
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), header_style="bold"
    )
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _order(name: str) -> tuple[int, str]:
    return (_LEADING.index(name) if name in _LEADING else len(_LEADING), name)


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else pretty(row["value"], row["standard_error"])


def markdown(results: Path) -> str:
    """Return the scorecard as a Markdown table, for reports."""
    rows, manifest = read_rows(results), artifacts.read_manifest(results)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    cells = {(row["name"], row["arm"]): row for row in rows}
    lines = [f"## {manifest.name}", "", f"`{results}`", ""]
    lines += [
        "| metric | unit | n | " + " | ".join(arms) + " |",
        "|---|---|--:|" + "--:|" * len(arms),
    ]
    for name in sorted({row["name"] for row in rows}, key=_order):
        first = next(row for row in rows if row["name"] == name)
        values = " | ".join(_cell(cells.get((name, arm))) for arm in arms)
        lines.append(f"| {name} | {first['unit']} | {first['n']} | {values} |")
    return "\n".join([*lines, ""])


def listing(out: Path) -> Table:
    """Return a table of every finished artifact under a folder."""
    found = artifacts.find_all(out)
    if not found:
        raise ArtifactError(f"{out} holds no finished artifact; `saelab run CONFIG` makes some")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in ("stage", "name", "key", "size", "made", "about"):
        table.add_column(column)
    for path, manifest in found:
        size = sum(entry["size"] for entry in manifest.files.values())
        made = artifacts.read_json(path / artifacts.RUN)["started"][:16].replace("T", " ")
        table.add_row(
            manifest.stage,
            manifest.name,
            manifest.key[:8],
            human_bytes(size),
            made,
            _about(manifest),
        )
    return table


def human_bytes(size: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _about(manifest: Manifest) -> str:
    facts = manifest.facts
    if manifest.stage == "store":
        return f"{facts['n_rows']:,} rows of {', '.join(facts['sites'])}"
    if manifest.stage == "dictionary":
        k = manifest.inputs["dictionary"].get("k")
        k = f" × k {k}" if k else ""
        return f"{facts['type']} {facts['d_sae']}{k} on {facts['site']}"
    if manifest.stage == "results":
        return f"{facts['n_results']} numbers by {', '.join(facts['evals'])}"
    return f"{facts['d_sae']} latents"


def lineage(path: Path) -> Text:
    """Return an artifact's ancestry with the inputs of each step."""
    text = Text()
    for depth, folder, manifest in artifacts.lineage(path):
        run = artifacts.read_json(folder / artifacts.RUN)
        pad = "    " * depth
        text.append(f"{pad}{manifest.stage} {folder.name}\n", style="bold")
        text.append(f"{pad}  content {manifest.content_hash[:16]}  made {run['started'][:19]}")
        text.append(
            f" in {run['seconds']:.0f} s with saelab {run['saelab']}, torch {run['torch']}\n"
        )
        for key, value in manifest.inputs.items():
            text.append(f"{pad}  {key}: {json.dumps(value, ensure_ascii=False)}\n", style="dim")
    return text


def comparison(first: Path, second: Path) -> Group:
    """Compare two dictionaries: what differs in their making, and their scores side by side."""
    manifests = [artifacts.read_manifest(p) for p in (first, second)]
    for path, manifest in zip((first, second), manifests, strict=True):
        if manifest.stage != "dictionary":
            raise ArtifactError(f"{path} is a {manifest.stage}; compare takes two dictionaries")
    made = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", title="made with"
    )
    for column in ("field", first.name, second.name):
        made.add_column(column)
    flat = [_flatten(m.inputs) for m in manifests]
    for key in sorted(flat[0].keys() | flat[1].keys()):
        left, right = (f.get(key) for f in flat)
        if left != right:
            made.add_row(key, str(left), str(right))
    scores = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", title="scores"
    )
    for column in ("metric", first.name, second.name, "difference"):
        scores.add_column(column, justify="left" if column == "metric" else "right")
    results = [_newest_results(p, m) for p, m in zip((first, second), manifests, strict=True)]
    rows = [_dictionary_rows(found) for found in results]
    same = _scored_alike(results)
    for name in sorted(rows[0].keys() & rows[1].keys(), key=_order):
        a, b = rows[0][name], rows[1][name]
        paired = _paired_error(results, a) if same else None
        scores.add_row(name, _cell(a), _cell(b), _difference(a, b, paired))
    note = (
        "± of a difference: from resamples that drew the same documents for both."
        if same
        else "The two were scored on different rows or by different settings: the error of a "
        "difference is taken as if they were independent."
    )
    return Group(made, Text(), scores, Text(note, style="dim"))


def _difference(a: dict[str, Any], b: dict[str, Any], paired: float | None) -> str:
    gap = b["value"] - a["value"]
    if paired is not None:
        return f"{gap:+.4g} ± {paired:.2g}"
    if not a["standard_error"] or not b["standard_error"]:
        return f"{gap:+.4g}"
    return f"{gap:+.4g} ± {math.hypot(a['standard_error'], b['standard_error']):.2g}"


def _scored_alike(results: Sequence[Path | None]) -> bool:
    """Whether two results are of the same rows, by the same evaluators and settings."""
    known = [artifacts.read_manifest(path) for path in results if path is not None]
    if len(known) < len(results):
        return False
    alike = [(m.inputs, m.facts["site"], m.parent("store").content_hash) for m in known]
    return alike[0] == alike[1]


def _paired_error(results: Sequence[Path | None], row: dict[str, Any]) -> float | None:
    drawn = [
        read_replicates(path, row["evaluator"], row["arm"], row["name"])
        for path in results
        if path is not None
    ]
    if len(drawn) < 2 or drawn[0] is None or drawn[1] is None or len(drawn[0]) != len(drawn[1]):
        return None
    return standard_error(drawn[1] - drawn[0])


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _newest_results(path: Path, manifest: Manifest) -> Path | None:
    """Return a dictionary's newest results, if it has any."""
    scored = [
        folder
        for folder, m in artifacts.find_all(path.resolve().parents[1], "results")
        if any(p.content_hash == manifest.content_hash for p in m.parents)
    ]
    return scored[-1] if scored else None


def _dictionary_rows(results: Path | None) -> dict[str, dict[str, Any]]:
    """Return a dictionary's scores by metric; empty without results."""
    if results is None:
        return {}
    return {row["name"]: row for row in read_rows(results) if row["arm"] == "dictionary"}
