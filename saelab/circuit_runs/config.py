"""What runs of circuits are told: one YAML file each, checked before anything starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from saelab.circuits.attribution import AttributionConfig
from saelab.circuits.curves import CurvesConfig
from saelab.circuits.supervised import SupervisedConfig
from saelab.circuits.tasks import TaskName
from saelab.config import Config, load_yaml
from saelab.run_config import ModelConfig, config_path


class TaskConfig(Config):
    """Which prompts."""

    name: TaskName
    """The task."""
    seed: int = 0
    """Draws the prompts."""
    force: bool = False
    """Go on even if the model cannot do the task."""
    shuffled: bool = False
    """Put the tokens of every prompt in an order of chance: a control."""


class PairsConfig(TaskConfig):
    """Which prompts a circuit is found on, and measured on."""

    pairs: PositiveInt = 64
    """Pairs of prompts on which nodes are found."""
    test_pairs: PositiveInt = 64
    """Other pairs, on which circuits are measured."""


class GraphConfig(Config):
    """How large the graph is."""

    nodes: PositiveInt = 100
    """Nodes with the largest effects; chosen before any edge is computed."""
    edge_share: float = Field(default=0.01, ge=0)
    """Edges below this share of the metric's difference are left out."""
    memory_gb: PositiveFloat = 8.0
    """GB that effects and edges may take."""


class CircuitConfig(Config):
    """What runs of circuits share."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run; the artifact is called after it."""
    model: ModelConfig
    """The language model; gradients want float32."""
    dictionaries: list[Path]
    """Finished dictionaries: their folders, with or without the key at the end."""
    out: Path
    """Folder that receives the artifact."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    threads: PositiveInt | None = None
    """CPU threads; by default as many as there are cores."""


class FeaturesConfig(CircuitConfig):
    """A sparse feature circuit: one dictionary for each of several sites."""

    task: PairsConfig
    """The prompts."""
    attribution: AttributionConfig = AttributionConfig()
    """How effects are found."""
    graph: GraphConfig = GraphConfig()
    """The graph."""
    curves: CurvesConfig = CurvesConfig()
    """Which circuits are measured."""


class LabelsConfig(TaskConfig):
    """Which prompts dictionaries are held against labels on."""

    fit: PositiveInt = 2000
    """Prompts that give features and means, and choose latents."""
    test: PositiveInt = 128
    """Other prompts, on which edits are run."""


class RandomDecoderConfig(Config):
    """The floor: a TopK dictionary with random directions, tied and never trained."""

    d_sae: PositiveInt
    """Number of latents."""
    k: PositiveInt
    """Latents per row."""
    seed: int = 0
    """Draws the directions."""


class SupervisedRunConfig(CircuitConfig):
    """Principled evaluations: several dictionaries of one site."""

    task: LabelsConfig
    """The prompts."""
    supervised: SupervisedConfig = SupervisedConfig()
    """How dictionaries are held against labels."""
    random_decoder: RandomDecoderConfig | None = None
    """The floor's size; left out: no floor."""


def load_features(source: Path, overrides: Sequence[str] = ()) -> FeaturesConfig:
    """Read the configuration of a feature circuit: a YAML path, or the name of a shipped one."""
    return FeaturesConfig.parse(load_yaml(config_path(source), overrides))


def load_supervised(source: Path, overrides: Sequence[str] = ()) -> SupervisedRunConfig:
    """Read the configuration of a supervised evaluation, likewise."""
    return SupervisedRunConfig.parse(load_yaml(config_path(source), overrides))
