"""What trainers write down the same way: lines of metrics, the machine, what is handed over."""

import json
import logging
from typing import Any

import torch

from saelab import artifacts, kernels
from saelab.artifacts import Draft
from saelab.protocols import Dictionary
from saelab.train.config import Member

METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)


class Journal:
    """A member's lines of metrics: in memory, and in its draft if there is one."""

    def __init__(self, draft: Draft | None) -> None:
        """Begin without lines."""
        self.lines: list[dict[str, Any]] = []
        self._path = None if draft is None else draft.folder / METRICS

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.lines.append(line)
        if self._path is not None:
            artifacts.append_file(self._path, artifacts.canonical_line(line))

    def cut(self, step: int) -> None:
        """Take up the lines that were written, without those after a step and a torn last one."""
        if self._path is None or not self._path.exists():
            return
        written = [json.loads(text) for text in self._path.read_bytes().split(b"\n")[:-1]]
        self.lines = [line for line in written if line["step"] <= step]
        artifacts.write_file(self._path, b"".join(map(artifacts.canonical_line, self.lines)))


def machine() -> dict[str, Any]:
    """Return what bits may depend on beside the configuration."""
    here = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return here | {"kernels": kernels.name()}


def compare_machine(member: str, state: dict[str, Any]) -> None:
    """Warn of a checkpoint that was written under other conditions."""
    here = machine()
    changed = [f"{k} {state.get(k)} → {v}" for k, v in here.items() if state.get(k) != v]
    if changed:
        log.warning(
            "%s goes on from step %d under other conditions (%s): the result may differ "
            "in its last bits from an uninterrupted run's",
            member, state["step"], ", ".join(changed),
        )  # fmt: skip


def times(
    *, steps: int, resumed_at: int, init_seconds: float | None, step_seconds: float
) -> dict[str, Any]:
    """Return how a member's training went, for `run.json`.

    `steps` is how many steps or iterations it took in all, `step_seconds` the time of those since
    step `resumed_at`; `init_seconds` that of its initialisation, None where it was not kept.
    """
    return {
        "resumed_at": resumed_at,
        "steps_taken": steps,
        "init_seconds": None if init_seconds is None else round(init_seconds, 3),
        "step_seconds": round(step_seconds, 3),
    }


def hand_over(member: Member, trained: Dictionary, scale: float) -> dict[str, Any]:
    """Save a finished, folded dictionary into the member's draft; return the facts of any kind."""
    if member.draft is not None:
        trained.save(member.draft.folder)
    return {
        "type": trained.config.type,
        "site": member.site,
        "d_in": trained.d_in,
        "d_sae": trained.d_sae,
        "input_scale": scale,
    }
