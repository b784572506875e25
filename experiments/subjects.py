"""The models of the three arms of layer matching, each loaded from a folder only while it is read.

known     tiny transformers, trained from different seeds on the same text
damage    a model, and copies of it with noise, with rounded weights, or trained on
family    two models that somebody else trained
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from saelab_experiments import damage, tiny
from saelab_experiments.tiny import TinyConfig

from saelab import artifacts, models
from saelab.assets import work_folder
from saelab.config import Config, digest
from saelab.errors import AssetError
from saelab.models.convert import quiet_transformers

VERSION = 1
"""Bumped when the same settings give other models."""


class ArmConfig(Config):
    """What is read of each model, and how many dictionaries are built of it."""

    layers: list[int] = Field(min_length=2)
    """Layers whose residual stream, at their end, is compared."""
    tokens: int = Field(gt=0)
    """Positions per text sample and model."""
    atoms: int = Field(gt=0)
    """Of each ITDA dictionary, by which layers are matched."""
    resamples: int = Field(ge=2)
    """Rebuilt sets of dictionaries and baselines per text sample, on bootstrapped documents."""
    dtype: str = "auto"
    """Of the models' computations."""


class KnownArm(ArmConfig):
    """Tiny transformers that differ in their seed."""

    seeds: list[int] = Field(min_length=2)
    """One model each."""
    tiny: TinyConfig
    """Their size and training."""


class DamageArm(ArmConfig):
    """One model and its damaged copies."""

    model: str
    """The undamaged one: a named asset, or another source of weights."""
    noise: list[float] = []
    """Norms of the noise, as shares of each matrix's."""
    bits: list[int] = []
    """Of each weight."""
    steps: list[int] = []
    """Lengths of fine-tuning, in AdamW steps."""
    lr: float = Field(1e-4, gt=0)
    """Of fine-tuning."""
    batch: int = Field(8, gt=0)
    """Windows of 128 tokens per step."""


class FamilyArm(ArmConfig):
    """Two models of different families; `layers` are the first one's."""

    models: tuple[str, str]
    """Their sources."""
    other_layers: list[int] = Field(min_length=2)
    """Layers of the second model."""
    permutations: int = Field(10_000, gt=0)
    """Of the matches, for the null distribution of ρ."""


@dataclass(frozen=True)
class Subject:
    """A model to compare."""

    name: str
    inputs: dict[str, Any]
    """Everything that decides its weights."""
    layers: tuple[int, ...]
    n_layers: int
    open: Callable[[], AbstractContextManager[str]]
    """Gives a source to load it from; what was made for that is removed on leaving."""

    @property
    def sites(self) -> list[str]:
        """The residual stream at the end of its layers."""
        return [f"blocks.{layer}.hook_resid_post" for layer in self.layers]

    @property
    def depths(self) -> list[float]:
        """Relative depth of its layers: 0 for the model's first, 1 for its last."""
        return [layer / (self.n_layers - 1) for layer in self.layers]


TRAINING = "training.json"
"""In a tiny transformer's folder: its loss on held text, and the unigram model's."""


def known(arm: KnownArm, texts: Sequence[str], out: Path) -> list[Subject]:
    """Return the tiny transformers; those that are not there yet are trained first."""
    inputs = {"version": VERSION, "tiny": arm.tiny.plain(), "texts": digest(list(texts))}
    folders = {s: out / "models" / f"tiny-{s}-{digest(inputs)[:8]}" for s in arm.seeds}
    missing = {seed: folder for seed, folder in folders.items() if not folder.exists()}
    if missing:
        _train(arm.tiny, texts, missing)
    return [
        Subject(
            f"seed {seed}",
            inputs | {"seed": seed},
            tuple(arm.layers),
            arm.tiny.n_layers,
            lambda folder=folder: nullcontext(str(folder)),
        )
        for seed, folder in folders.items()
    ]


def _train(config: TinyConfig, texts: Sequence[str], folders: dict[int, Path]) -> None:
    """Train a network per seed into its folder, on all windows but every n-th."""
    tokenizer = tiny.train_tokenizer(texts, config.vocabulary)
    windows = tiny.windows_of(tokenizer, texts, config.context)
    held = torch.arange(len(windows)) % max(2, len(windows) // _HELD_WINDOWS) == 0
    for seed, target in folders.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(target.with_name(f".{target.name}.training")) as work:
            folder = work / "model"
            losses = tiny.train_tiny(
                config, tokenizer, windows[~held], windows[held], seed=seed, folder=folder
            )
            artifacts.write_json(folder / TRAINING, losses)
            artifacts.rename(folder, target)


_HELD_WINDOWS = 64


def damaged(arm: DamageArm, texts: Sequence[str], out: Path) -> list[Subject]:
    """Return the model, then its damaged copies, which are made anew whenever they are opened."""
    identity = models.identify(arm.model, "float32", "cpu")
    if identity.folder is None:
        raise AssetError(f"{arm.model!r} has no folder of weights to damage; name a real model")
    original = identity.folder
    base = {"model": identity.fingerprint}
    layers = tuple(arm.layers)

    def copy(name: str, inputs: dict[str, Any], change_: Callable[[Any, Any], Any]) -> Subject:
        @contextmanager
        def opened() -> Iterator[str]:
            with work_folder(out / "models" / f".{name.replace(' ', '-')}.damaged") as work:
                _write_copy(original, work / "model", change_)
                yield str(work / "model")

        return Subject(name, base | inputs, layers, identity.n_layers, opened)

    found = [Subject(arm.model, base, layers, identity.n_layers, lambda: nullcontext(arm.model))]
    found += [copy(f"noise {share:g}", {"noise": share}, _noise(share)) for share in arm.noise]
    found += [copy(f"{bits} bits", {"bits": bits}, _rounding(bits)) for bits in arm.bits]
    tuning = {"lr": arm.lr, "batch": arm.batch, "texts": digest(list(texts))}
    found += [
        copy(f"tuned {n} steps", {"steps": n} | tuning, _tuning(arm, n, texts)) for n in arm.steps
    ]
    return found


def _noise(share: float) -> Callable[[Any, Any], None]:
    def add(network: Any, _: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        damage.change_matrices_(network, lambda weight: damage.noisy(weight, share, generator))

    return add


def _rounding(bits: int) -> Callable[[Any, Any], None]:
    return lambda network, _: damage.change_matrices_(
        network, lambda weight: damage.rounded(weight, bits)
    )


def _tuning(arm: DamageArm, steps: int, texts: Sequence[str]) -> Callable[[Any, Any], Any]:
    def tune(network: Any, tokenizer: Any) -> None:
        windows = tiny.windows_of(tokenizer, texts, 128)
        damage.tune_(network, windows, steps=steps, batch=arm.batch, lr=arm.lr, seed=0)

    return tune


def _write_copy(original: Path, folder: Path, change_: Callable[[Any, Any], Any]) -> None:
    """Write a copy of a model's folder with changed weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": original, "local_files_only": True}
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(**place)
        network = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        change_(network, tokenizer)
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        network.save_pretrained(folder)


def family(arm: FamilyArm) -> list[Subject]:
    """Return the two models."""
    found = []
    for source, layers in zip(arm.models, (arm.layers, arm.other_layers), strict=True):
        identity = models.identify(source, "float32", "cpu")
        found.append(
            Subject(
                source,
                {"model": identity.fingerprint},
                tuple(layers),
                identity.n_layers,
                lambda source=source: nullcontext(source),
            )
        )
    return found
