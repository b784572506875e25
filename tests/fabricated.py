"""Finished runs without any training: a store, dictionaries and their results, made by hand."""

import json
from pathlib import Path
from typing import Any

from saelab import artifacts
from saelab.config import digest

SITE = "blocks.10.hook_resid_post"


def artifact(out: Path, stage: str, name: str, files: dict[str, Any], **finish: Any) -> Path:
    """Make one artifact of JSON-lines files, unless it is there."""
    key = digest(repr([stage, name, files, finish.get("inputs")]))
    with artifacts.open_draft(out, stage, name, key) as draft:
        if draft.is_finished:
            return draft.target
        for file, lines in files.items():
            draft.write(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
        draft.finish(stage=stage, name=name, **({"inputs": {}, "parents": []} | finish))
        return draft.target


def store(out: Path, name: str = "rows") -> Path:
    """Make a store that holds nothing but its name."""
    return artifact(out, "store", name, {"rows": [name]})


def row(name: str, value: float, error: float | None = None, arm: str = "dictionary", **changes):
    """Return a result row."""
    fields = {"unit": "", "n": 100, "metric_version": 1, "encoder": "own", "evaluator": "core"}
    given = {"name": name, "value": value, "standard_error": error, "arm": arm}
    return fields | given | changes


def scores(l0: float, fvu: float, error: float | None = 0.01, **others: float):
    """Return a dictionary's rows."""
    rows = [row("l0", l0, 0.0), row("fvu", fvu, error)]
    return rows + [row(name, value) for name, value in others.items()]


def member(
    out: Path, kept: Path, name: str, rows: list[dict[str, Any]], *, seed: int = 0, lr=None,
    site: str = SITE, run: dict[str, Any] | None = None, made: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:  # fmt: skip
    """Make a dictionary with results; return its folder. `run` is its `run.json`, `made` what its
    manifest says beside type, site and width."""
    dictionary = {"type": "topk", "d_in": 8, "d_sae": 64, "k": 32} | fields
    dictionary = {key: value for key, value in dictionary.items() if value is not None}
    path = artifact(
        out, "dictionary", name, {"weights": [name, seed]}, parents=[artifacts.parent_of(kept)],
        inputs={
            "dictionary": dictionary, "lr": lr, "seed": seed, "site": site,
            "train": {"tokens": 1000, "batch": 10},
        },
        facts={"type": dictionary["type"], "site": site, "d_sae": dictionary["d_sae"]}
        | (made or {}),
        provenance={"resumed_at": 0, "step_seconds": 5.0} if run is None else run,
    )  # fmt: skip
    parents = [artifacts.parent_of(path), artifacts.parent_of(kept)]
    facts = {"n_results": len(rows), "evals": ["core"], "site": site}
    artifact(out, "results", name, {"results.jsonl": rows}, parents=parents, facts=facts)
    return path
