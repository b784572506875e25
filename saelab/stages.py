"""One artifact of a run at a time: looked up by its key, or made.

It is looked for in the run's own folder first, and then wherever it was finished before. Nothing is
overwritten: an edited config adds siblings.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saelab import artifacts, assets
from saelab.artifacts import Draft, Parent, artifact_path, stage_key
from saelab.config import first_difference
from saelab.errors import ArtifactError

log = logging.getLogger(__name__)

STAGE_VERSION = {
    "store": 1, "dictionary": 3, "results": 3, "features": 2, "effects": 1, "heads": 2,
    "circuit": 2, "supervised": 3,
}  # fmt: skip
"""Bumped by hand when a stage's outputs change for the same inputs; the golden test asks for it."""

Status = Literal["found", "made", "missing", "diverged"]
Fill = Callable[[Draft], dict[str, Any]]
"""Writes an artifact's files into its draft and returns the manifest's facts."""


@dataclass(frozen=True)
class Work:
    """One artifact, described by everything that decides its content."""

    stage: str
    name: str
    inputs: dict[str, Any]
    parents: list[Parent]

    @property
    def key(self) -> str:
        """The stage key."""
        return stage_key(self.stage, STAGE_VERSION[self.stage], self.inputs, self.parents)


@dataclass(frozen=True)
class Step:
    """What a run does, or would do, about one artifact."""

    stage: str
    name: str
    path: Path
    status: Status
    reason: str = ""
    """Which field differs from the closest sibling, or what has to be made first."""
    member: int | None = None
    """Position among the run's members; None for the store."""


class Stages:
    """Finds and makes the artifacts of one run, and keeps account of them."""

    def __init__(self, cache: Path, *, dry: bool, wait: float) -> None:
        """Remember in `cache` where artifacts are; a dry run makes none."""
        self.registry = artifacts.Registry(cache / "registry")
        self.dry = dry
        self.wait = wait
        self.steps: list[Step] = []

    def find(self, work: Work, out: Path) -> Path | None:
        """Return the finished artifact, adopted into `out` if it was made elsewhere."""
        found = artifacts.find(out, work.stage, work.name, work.key)
        if found is not None:
            if not self.dry and self.registry.find(work.key) is None:
                self.registry.record(artifacts.read_manifest(found), found)
            return found
        elsewhere = self.registry.find(work.key)
        if elsewhere is None:
            return None
        if work.stage == "store" or self.dry:
            return elsewhere
        target = artifact_path(out, work.stage, work.name, work.key)
        artifacts.adopt(elsewhere, target)
        return target

    def find_or_make(
        self, work: Work, out: Path, fill: Fill, device: str, member: int | None = None
    ) -> Path | None:
        """Make the artifact if it is not there; return its folder, None in a dry run."""
        found = self.find(work, out)
        if found is not None:
            self.note(work, found, "found", member=member)
            return found
        return self.make(work, out, fill, device, member)

    def make(
        self, work: Work, out: Path, fill: Fill, device: str, member: int | None = None
    ) -> Path | None:
        """Make an artifact; in a dry run only say why it is missing."""
        if self.dry:
            self.miss(work, out, member)
            return None
        reason = self.reason(work, out)
        with self.draft(work, out) as draft:
            if not draft.is_finished:
                self.finish(draft, work, fill(draft), {"device": device})
        self.note(work, draft.target, "made", reason, member)
        return draft.target

    def miss(self, work: Work, out: Path, member: int | None) -> None:
        """Say where an artifact will be, and why it is missing."""
        target = artifact_path(out, work.stage, work.name, work.key)
        self.note(work, target, "missing", self.reason(work, out), member)

    def draft(self, work: Work, out: Path) -> AbstractContextManager[Draft]:
        """Lock and open the artifact's hidden folder."""
        return artifacts.open_draft(out, work.stage, work.name, work.key, wait=self.wait)

    def finish(
        self, draft: Draft, work: Work, facts: dict[str, Any], provenance: dict[str, Any]
    ) -> None:
        """Publish a filled draft and remember where it is."""
        manifest = draft.finish(
            stage=work.stage, name=work.name, inputs=work.inputs, parents=work.parents,
            facts=facts, provenance=provenance,
        )  # fmt: skip
        self.registry.record(manifest, draft.target)

    def reason(self, work: Work, out: Path) -> str:
        """Name the field in which this work differs from the closest finished sibling."""
        siblings = [m for _, m in artifacts.find_all(out, work.stage) if m.name == work.name]
        if not siblings:
            return "not made yet"
        differences = [first_difference(m.inputs, work.inputs) for m in reversed(siblings)]
        return next((d for d in differences if d), "its parent or the stage's version changed")

    def note(
        self,
        work: Work | tuple[str, str],
        path: Path,
        status: Status,
        reason: str = "",
        member: int | None = None,
    ) -> None:
        """Add a line to the account; `work` may be (stage, name) of what cannot be keyed yet."""
        stage, name = work if isinstance(work, tuple) else (work.stage, work.name)
        if not self.dry:
            log.info("%s %s: %s%s", stage, name, status, f" ({reason})" if reason else "")
        self.steps.append(Step(stage, name, path, status, reason, member))


# ------------------------------------------------------------------------- the stores of all runs


def shared_stores() -> Path:
    """Return the folder in the cache that holds the stores."""
    return assets.cache_dir() / "artifacts"


def remove_shared_store(key: str) -> Path:
    """Remove the one shared store whose key starts so. Raises ArtifactError if none or several
    do."""
    found = [p for p, m in artifacts.find_all(shared_stores(), "store") if m.key.startswith(key)]
    if len(found) != 1:
        raise ArtifactError(
            f"{len(found)} stores have a key that starts with {key!r}; see `saelab cache list`"
        )
    shutil.rmtree(found[0])
    return found[0]
