"""What runs of circuits share: the model, finished dictionaries, prompts in two parts, the key."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelab import api, artifacts, assets, dictionaries
from saelab.artifacts import Manifest
from saelab.circuit_runs.config import CircuitConfig, TaskConfig
from saelab.circuits.tasks import TaskData, distinct, shuffled
from saelab.config import Config
from saelab.errors import ArtifactError, ConfigError, SiteError
from saelab.models import fingerprints, resolve_device
from saelab.protocols import Dictionary, LanguageModel
from saelab.stages import Fill, Stages, Work


def find_or_make(
    config: CircuitConfig,
    stage: str,
    inputs: dict[str, Any],
    parents: Sequence[Path],
    fill: Fill,
    *,
    wait: float,
) -> Path:
    """Find or make the artifact of a run; return its folder."""
    stages = Stages(assets.cache_dir(), dry=False, wait=wait)
    work = Work(stage, config.name, inputs, [artifacts.parent_of(path) for path in parents])
    found = stages.find_or_make(work, config.out, fill, config.device)
    assert found is not None, "only a dry run makes nothing"
    return found


_MANNERS = {"batch", "memory_gb", "force"}
"""Fields that change no number."""


def numbers(config: Config) -> dict[str, Any]:
    """Return the fields that change the numbers."""
    return {key: value for key, value in config.plain().items() if key not in _MANNERS}


def open_model(config: CircuitConfig) -> LanguageModel:
    """Load the model of a configuration, on its device and with its threads."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    return api.load_model(config.model.source, dtype=config.model.dtype, device=device)


def chosen_dictionaries(config: CircuitConfig) -> dict[Path, Manifest]:
    """Return the finished dictionaries of a configuration, with their manifests.

    Raises ArtifactError for one of another model or of other weights, ConfigError if there is none.
    """
    if not config.dictionaries:
        raise ConfigError("dictionaries: give at least one finished dictionary's folder")
    chosen = {path: artifacts.read_manifest(path) for path in map(_finished, config.dictionaries)}
    for path, manifest in chosen.items():
        if manifest.stage != "dictionary":
            raise ArtifactError(f"{path} is a {manifest.stage}, but a dictionary is wanted")
        _require_model(path, manifest, config.model.source)
    return chosen


def _require_model(path: Path, manifest: Manifest, source: str) -> None:
    """Raise ArtifactError for a dictionary of another model.

    The weights decide, whatever their dtype was; where they were not written down, the source.
    """
    theirs = (manifest.facts.get("model") or {}).get("source")
    weights = _model_fingerprint(manifest)
    same = theirs in (None, source) if weights is None else weights in fingerprints(source)
    if not same:
        then = " with other weights than it has now" if theirs == source else ""
        raise ArtifactError(
            f"{path} was trained on activations of {theirs or 'another model'}{then}, but the "
            f"circuit is of {source}: give dictionaries of this model, or train them anew"
        )


def _model_fingerprint(manifest: Manifest) -> str | None:
    """Return the fingerprint of the model that a dictionary's rows came from; None if unknown.

    Dictionaries from before it was among their facts have it in the store's manifest, as long as
    the store is there.
    """
    if "model_fingerprint" in manifest.facts:
        return manifest.facts["model_fingerprint"]
    for parent in manifest.parents:
        folder = Path(parent.path)
        if parent.stage == "store" and (folder / artifacts.MANIFEST).exists():
            store = artifacts.read_manifest(folder)
            if store.content_hash == parent.content_hash:
                return store.facts.get("model_fingerprint")
    return None


def check_sites(model: LanguageModel, chosen: Mapping[Path, Manifest]) -> None:
    """Raise SiteError, naming the dictionary, for one of a site that the model does not have."""
    for path, manifest in chosen.items():
        try:
            model.site(manifest.facts["site"])
        except SiteError as error:
            raise SiteError(f"{path} is of a site that {model.name} lacks: {error}") from None


def _finished(path: Path) -> Path:
    """Return a dictionary's folder from its path, or from that without the key at its end."""
    if (path / artifacts.MANIFEST).exists():
        return path
    found = [p.parent for p in path.parent.glob(f"{path.name}-????????/{artifacts.MANIFEST}")]
    if len(found) != 1:
        what = "no finished dictionary" if not found else f"{len(found)} dictionaries"
        raise ArtifactError(
            f"there is {what} at {path}; `saelab list` shows those of a run, and `saelab train` "
            "makes them"
        )
    return found[0]


def load_dictionary(path: Path, model: LanguageModel) -> Dictionary:
    """Load a finished dictionary onto the model's device."""
    return dictionaries.load(path).to(model.device)


def prompts(drawn: Callable[[int], TaskData], n: int, config: TaskConfig) -> TaskData:
    """Return the prompts of a run: `n` different ones, shuffled where that is asked for.

    Raises TaskError if the task has too few of them.
    """
    data = distinct(drawn, n)
    return shuffled(data) if config.shuffled else data


def parted(data: TaskData, pairs: int) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " rest"]]:
    """Return `pairs` of the rows and the rest; both have every template as often as they can."""
    order = data.templates.argsort(stable=True)
    number, n = torch.arange(len(order)), len(order)
    first = (number + 1) * pairs // n > number * pairs // n
    return order[first].sort().values, order[~first].sort().values
