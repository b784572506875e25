"""What lies in a run's folder: one entry per dictionary. No Streamlit here."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saelab import artifacts
from saelab.artifacts import Manifest


@dataclass(frozen=True)
class Entry:
    """A dictionary with what was made from it, or one that is being trained."""

    id: str
    """Name of its folder: what links and the URL call it."""
    name: str
    path: Path | None
    """The dictionary's folder; None where only its index lies here."""
    facts: dict[str, Any]
    made: str
    """When it was begun, as ISO 8601; empty if not recorded."""
    running: bool = False
    results: list[dict[str, Any]] = field(default_factory=list)
    """Rows of its newest results."""
    features: Path | None = None

    @property
    def title(self) -> str:
        """Name and the first digits of the key, as in the folder's name."""
        return self.id

    @property
    def levels(self) -> list[int]:
        """Numbers of latents, and of concepts above them, in its index; empty without one."""
        if self.features is None:
            return []
        return artifacts.read_manifest(self.features).facts.get("levels", [])

    def row(self, name: str, arm: str = "dictionary") -> dict[str, Any] | None:
        """Return the result row of a metric, or None if it was not computed."""
        for row in self.results:
            if row["name"] == name and row["arm"] == arm and row.get("encoder", "own") == "own":
                return row
        return None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the training log; a torn last line is left out."""
        if self.path is None or not (self.path / "metrics.jsonl").exists():
            return []
        lines = (self.path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]


def entries(folder: Path) -> list[Entry]:
    """Return the dictionaries under a run's folder, newest first; those in training before all.

    Raises ArtifactError if an artifact is of another schema.
    """
    results = artifacts.find_all(folder, "results")
    features = artifacts.find_all(folder, "features")
    found = [
        _entry(path, manifest, results, features)
        for path, manifest in artifacts.find_all(folder, "dictionary")
    ]
    known = {entry.features for entry in found}
    found += [_orphan(path, manifest) for path, manifest in features if path not in known]
    found.sort(key=lambda entry: entry.made, reverse=True)
    return _running(folder) + found


def _entry(
    path: Path,
    manifest: Manifest,
    results: list[tuple[Path, Manifest]],
    features: list[tuple[Path, Manifest]],
) -> Entry:
    scored = _newest_child(manifest, results)
    return Entry(
        path.name, manifest.name, path,
        manifest.inputs.get("dictionary", {}) | manifest.facts, _made(path),
        results=_lines(scored / "results.jsonl") if scored else [],
        features=_newest_child(manifest, features),
    )  # fmt: skip


def _orphan(path: Path, manifest: Manifest) -> Entry:
    return Entry(path.name, manifest.name, None, manifest.facts, _made(path), features=path)


def _running(folder: Path) -> list[Entry]:
    """Return the drafts of dictionaries: being trained, or left by an interrupted run."""
    drafts = sorted(folder.glob("dictionary/.*.partial"))
    return [
        Entry(d.name[1:].removesuffix(".partial"), d.name[1:].rsplit("-", 1)[0], d, {}, "", True)
        for d in drafts
    ]


def _newest_child(parent: Manifest, children: list[tuple[Path, Manifest]]) -> Path | None:
    mine = [
        path
        for path, manifest in children
        if any(p.content_hash == parent.content_hash for p in manifest.parents)
    ]
    return mine[-1] if mine else None


def _made(path: Path) -> str:
    run = path / artifacts.RUN
    return artifacts.read_json(run).get("started", "") if run.exists() else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
