"""`saelab circuits heads`: every artifact of a configuration, looked up by its key or made.

    TASK ─patch→ EFFECTS (truths and causal baselines) ─score→ HEADS

Effects are measured once per model, task and method; scores of other settings reuse them.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from saelab import artifacts, assets
from saelab.artifacts import Draft
from saelab.circuit_runs import api as circuits_api
from saelab.circuits.heads import CodesConfig, EffectsConfig
from saelab.circuits.paired import ClaimConfig
from saelab.circuits.protocols import PatchableModel
from saelab.circuits.published import LISTS
from saelab.circuits.ranking import RankingConfig
from saelab.circuits.tasks import TaskName
from saelab.config import Config, apply_overrides, load_yaml
from saelab.models import ModelIdentity, identify, resolve_device
from saelab.run_config import ModelConfig, config_path
from saelab.stages import Fill, Stages, Step, Work

Control = Literal["redrawn", "shuffled"]


class HeadsRun(Config):
    """Which heads do a task: scores without patching, held against patching."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run; artifacts are called after it."""
    model: ModelConfig
    """The language model."""
    tasks: list[TaskName] = Field(min_length=1)
    """Tasks, each by itself."""
    effects: EffectsConfig = EffectsConfig()
    """The causal truth."""
    codes: CodesConfig = CodesConfig()
    """Discrete codes and the observational baselines."""
    ranking: RankingConfig = RankingConfig()
    """Agreements between scores and truth."""
    claim: ClaimConfig | None = None
    """What is claimed of codes, written down before the run; it ends with a verdict."""
    shuffled: bool = False
    """Put the tokens of every prompt in an order of chance: a control."""
    controls: list[Control] = []
    """Run again, to be shown beside: `redrawn` with weights before training (of a real model),
    `shuffled` with shuffled prompts. Never forced: what cannot do a task is refused as a row."""
    force: bool = False
    """Go on with a task that the model cannot do."""
    out: Path
    """Folder that receives the artifacts."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; by default as many as there are cores."""

    @model_validator(mode="after")
    def _published_of_the_tasks(self) -> "HeadsRun":
        if self.ranking.published is None:
            return self
        listed = LISTS[self.ranking.published]
        others = [task for task in self.tasks if task not in listed]
        if others:
            raise ValueError(
                f"ranking.published={self.ranking.published} lists heads of {', '.join(listed)}, "
                f"but tasks has {', '.join(others)} too; drop that, or leave `published` out"
            )
        return self

    @model_validator(mode="after")
    def _trained_weights_to_redraw(self) -> "HeadsRun":
        if "redrawn" in self.controls and self.model.source.startswith(("toy", "handwired")):
            raise ValueError(
                f"controls has redrawn, but {self.model.source} has no trained weights to draw "
                "anew; drop it, or take a real model"
            )
        return self

    @model_validator(mode="after")
    def _claim_of_what_is_run(self) -> "HeadsRun":
        if self.claim is None:
            return self
        for key, run in (
            ("examples", self.codes.examples), ("negatives", self.codes.negatives),
            ("position", self.effects.positions), ("direction", self.effects.directions),
        ):  # fmt: skip
            if getattr(self.claim, key) not in run:
                raise ValueError(
                    f"claim.{key}={getattr(self.claim, key)} is not among what is run: "
                    f"{', '.join(map(str, run))}; claim one of these"
                )
        return self

    @model_validator(mode="after")
    def _other_prompts(self) -> "HeadsRun":
        first, seed = self.codes.first_seed, self.effects.seed
        if first <= seed < first + self.codes.draws:
            raise ValueError(
                f"effects.seed={seed} is also the seed of a draw ({first} to "
                f"{first + self.codes.draws - 1}); scores have to come from other prompts"
            )
        return self


def load_heads(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> HeadsRun:
    """Read a configuration: a YAML path, the name of a shipped one, or plain data."""
    if isinstance(source, dict):
        data = apply_overrides(source, overrides)
    else:
        data = load_yaml(config_path(Path(source)), overrides)
    config = HeadsRun.parse(data)
    circuits_api.check_dictionary(config.codes)
    return config


def controls(config: HeadsRun) -> Iterator[tuple[Control, HeadsRun]]:
    """Yield the controls of a run, each on one task, so that one refusal leaves the others."""
    again = config.model.model_copy(update={"source": f"redrawn:0:{config.model.source}"})
    changes: dict[Control, dict[str, Any]] = {
        "redrawn": {"model": again},
        "shuffled": {"shuffled": True},
    }
    for control in config.controls:
        for task in config.tasks:
            own = {"name": f"{config.name}-{control}", "tasks": [task]}
            plain = {"controls": [], "claim": None, "force": False}
            yield control, config.model_copy(update=own | plain | changes[control])


class Heads:
    """One pass over the artifacts of a configuration."""

    def __init__(self, config: HeadsRun, *, wait: float = 0.0) -> None:
        """Prepare a run; nothing is read or written yet."""
        self.config = config
        self.stages = Stages(assets.cache_dir(), dry=False, wait=wait)
        self._known = dict[str, Path]()

    def execute(self) -> list[Step]:
        """Find or make everything, task by task."""
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        for task in self.config.tasks:
            self._heads(task, self._truths(task))
        return self.stages.steps

    def _truths(self, task: str) -> dict[tuple[str, str], dict[str, Path]]:
        """Return the folders of a task's effects, by position and direction, and by method."""
        causal = self.config.effects
        return {
            (position, direction): {
                name: self._effects(task, method)
                for name, method in circuits_api.methods(causal, position, direction).items()
            }
            for position in causal.positions
            for direction in causal.directions
        }

    def _effects(self, task: str, method: dict[str, Any]) -> Path:
        """Return the folder of one method's effects; several truths may share it."""
        config = self.config
        inputs = circuits_api.effects_inputs(
            self.identity.fingerprint, task, config.effects, method, shuffled=config.shuffled
        )
        work = Work("effects", f"{config.name}-{task}", inputs, [])
        if work.key not in self._known:
            self._known[work.key] = self._make(
                work, lambda draft: circuits_api.write_effects(
                    draft, self.model, inputs, force=config.force
                )
            )  # fmt: skip
            circuits_api.require_able(self._known[work.key], force=config.force)
        return self._known[work.key]

    def _heads(self, task: str, truths: dict[tuple[str, str], dict[str, Path]]) -> None:
        config = self.config
        inputs = circuits_api.heads_inputs(self.identity.fingerprint, config.codes, config.ranking)
        folders = dict.fromkeys(path for held in truths.values() for path in held.values())
        parents = [artifacts.parent_of(path) for path in folders]
        settings = (config.effects, config.codes, config.ranking)
        claim = config.claim and config.claim.plain()
        inputs |= {"claim": claim} | ({"shuffled": True} if config.shuffled else {})

        def fill(draft: Draft) -> dict[str, Any]:
            facts = circuits_api.write_heads(
                draft, self.model, task, truths, settings, shuffled=config.shuffled
            )
            return facts | {"claim": claim}

        work = Work("heads", f"{config.name}-{task}", inputs, parents)
        self._make(work, fill)

    def _make(self, work: Work, fill: Fill) -> Path:
        path = self.stages.find_or_make(work, self.config.out, fill, str(self.device))
        assert path is not None, "only a dry run makes nothing"
        return path

    @cached_property
    def device(self) -> torch.device:
        """The device that this run computes on."""
        return resolve_device(self.config.device)

    @cached_property
    def identity(self) -> ModelIdentity:
        """The model's name and fingerprint, without loading it."""
        return identify(self.config.model.source, self.config.model.dtype, self.device)

    @cached_property
    def model(self) -> PatchableModel:
        """The live model, loaded at first use."""
        source = self.config.model
        return circuits_api.load_model(source.source, source.dtype, self.device)
