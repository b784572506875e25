"""A run: the config that describes it, the stages' keys, and making only what is missing.

    corpus ─harvest→ STORE ─train→ DICTIONARY ─evaluate→ RESULTS
                                      └────────index───→ FEATURES

Every stage is looked up by its key first, in `out` and then wherever it was finished before.
Nothing is overwritten: an edited config adds siblings.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from saelab import api, artifacts, assets
from saelab.artifacts import Draft, Parent, artifact_path, stage_key
from saelab.config import Config, first_difference, load_yaml
from saelab.dictionaries import config_class
from saelab.errors import ArtifactError, ConfigError, LockedError, ResourceError
from saelab.evals.core import CoreConfig
from saelab.features.build import IndexConfig
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.harvest import HarvestConfig
from saelab.models import ModelIdentity, identify, resolve_device
from saelab.store.synthetic import SyntheticConfig
from saelab.train.fit import TrainConfig

log = logging.getLogger(__name__)

STAGE_VERSION = {"store": 1, "dictionary": 1, "results": 1, "features": 1}
"""Bumped by hand when a stage's outputs change for the same inputs; the golden test asks for it."""

STAGES = ("harvest", "train", "evaluate", "index")
Stage = Literal["harvest", "train", "evaluate", "index"]

_MEMBER_KEYS = ("type", "lr", "seed", "site", "init", "name")


class ModelConfig(Config):
    """Which language model to read."""

    source: str
    """A named asset, `hub:org/name`, a local folder, a GGUF file, or `toy`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; `auto` takes bfloat16 where a short probe shows that it is faster."""


class EvaluateConfig(Config):
    """Which evaluators score each dictionary."""

    evals: list[Literal["core"]] = ["core"]
    """Evaluators by name."""
    core: CoreConfig = CoreConfig()
    """Settings of the core evaluator."""


class RunConfig(Config):
    """A whole run. Give `model`, `corpus` and `harvest`, or a finished `store`, or `synthetic`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run; artifacts are called after it."""
    model: ModelConfig | None = None
    """The language model."""
    corpus: CorpusConfig | None = None
    """The text."""
    harvest: HarvestConfig | None = None
    """Which activations to keep."""
    store: Path | None = None
    """A finished store to use instead of corpus and harvest."""
    synthetic: SyntheticConfig | None = None
    """A planted dictionary's store instead of corpus and harvest."""
    dictionaries: list[dict[str, Any]] = []
    """Members: type, its fields, and lr, seed, site, init, name."""
    train: TrainConfig | None = None
    """Settings shared by all members."""
    evaluate: EvaluateConfig | None = None
    """Scores; left out: no evaluation."""
    index: IndexConfig | None = None
    """Feature index; left out: no index."""
    out: Path
    """Folder that receives the artifacts."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; by default as many as there are cores."""

    @model_validator(mode="after")
    def _one_source(self) -> "RunConfig":
        sources = [self.store is not None, self.synthetic is not None, self.corpus is not None]
        if sum(sources) != 1:
            raise ValueError("give exactly one of corpus, store and synthetic")
        if self.corpus is not None and (self.model is None or self.harvest is None):
            raise ValueError("a corpus needs model and harvest beside it")
        if self.dictionaries and self.train is None:
            raise ValueError("dictionaries need a train section (batch, tokens)")
        return self


@dataclass(frozen=True)
class Member:
    """One entry of `dictionaries:`, split into the type's own fields and those of its training."""

    name: str
    fields: dict[str, Any]
    lr: float | None
    seed: int
    site: str | None
    init: str | None

    @staticmethod
    def parse(entry: dict[str, Any], position: int) -> "Member":
        """Check an entry's keys and values. Raises ConfigError naming the entry and the nearest
        key."""
        where = f"dictionaries.{position}"
        if "type" not in entry:
            raise ConfigError(f"{where}.type: this key is required")
        fields = {k: v for k, v in entry.items() if k not in _MEMBER_KEYS or k == "type"}
        try:
            config_class(entry["type"]).parse({"d_in": 2**30, **fields})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        training = _MemberTraining.parse({k: entry[k] for k in _MEMBER_KEYS[1:] if k in entry})
        return Member(
            training.name or "-".join(str(fields[k]) for k in ("type", "d_sae", "k") if k in
            fields), fields, training.lr, training.seed, training.site, training.init,
        )  # fmt: skip


class _MemberTraining(Config):
    """The keys of a member that are not its type's own."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; by default 2e-3 · √(4608 / d_sae)."""
    seed: int = Field(default=0, ge=0)
    """Initialisation and sampling."""
    site: str | None = None
    """Which site of the store; may be left out when there is one."""
    init: str | None = None
    """A finished dictionary to continue from."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """What to call it; by default type, width and k."""


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
    status: Literal["found", "made", "missing"]
    reason: str = ""
    """Which field differs from the closest sibling, or what has to be made first."""


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration: a YAML path, the name of a shipped one, or plain data."""
    if isinstance(source, dict):
        config = RunConfig.parse(source)
    else:
        config = RunConfig.parse(load_yaml(_config_path(Path(source)), overrides))
    for position, entry in enumerate(config.dictionaries):
        Member.parse(entry, position)
    return config


def _config_path(path: Path) -> Path:
    if path.exists():
        return path
    import saelab_experiments

    shipped = Path(next(iter(saelab_experiments.__path__)))
    relative = path.relative_to("experiments") if path.parts[:1] == ("experiments",) else path
    for candidate in (shipped / relative, shipped / f"{relative}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(shipped)) for p in shipped.rglob("*.yaml"))
    raise ConfigError(
        f"there is no configuration {path}, neither here nor shipped; shipped: {', '.join(known)}"
    )


def run(
    config: RunConfig | str | Path | dict[str, Any],
    *,
    overrides: Sequence[str] = (),
    until: Stage = "index",
    wait: float = 0.0,
) -> list[Step]:
    """Make everything of a run that is missing, up to a stage; return what was found and made.

    Raises SaelabError for everything a user can cause. An interrupted run goes on with the same
    call.
    """  # fmt: skip
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    return Run(config, wait=wait).execute(until)


def explain(config: RunConfig, until: Stage = "index") -> list[Step]:
    """Return what `run` would find and make, and why, without making anything."""
    return Run(config, dry=True).execute(until)


class Run:
    """One pass over the stages of a configuration."""

    def __init__(self, config: RunConfig, *, dry: bool = False, wait: float = 0.0) -> None:
        """Prepare a run; nothing is read or written yet."""
        self.config = config
        self.dry = dry
        self.wait = wait
        self.steps: list[Step] = []
        self.members = [Member.parse(d, i) for i, d in enumerate(config.dictionaries)]
        self.registry = artifacts.Registry(assets.cache_dir() / "registry")
        self.stores = assets.cache_dir() / "artifacts"
        """Stores are large and shared: they live in the cache, and `out` links to them."""

    def execute(self, until: Stage) -> list[Step]:
        """Go through the stages in order."""
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        last = STAGES.index(until)
        store = self._store()
        if last < 1 or not self.members:
            return self.steps
        dictionaries = self._dictionaries(store)
        for path in dictionaries:
            if last >= 2 and self.config.evaluate is not None:
                self._results(path, store)
            if last >= 3 and self.config.index is not None:
                self._features(path, store)
        return self.steps

    # ------------------------------------------------------------------------------------- stages

    def _store(self) -> Path | None:
        config = self.config
        if config.store is not None:
            manifest = artifacts.read_manifest(config.store)
            if manifest.stage != "store":
                raise ArtifactError(f"{config.store} is a {manifest.stage}, but a store is wanted")
            self._note("store", manifest.name, config.store, "found")
            return config.store
        work = self._store_work()
        found = self._find(work, self.stores)
        if found is None:
            if not self.dry:
                self._check_disk()
            found = self._make(work, self.stores, self._fill_store)
        else:
            self._note(work.stage, work.name, found, "found")
        if found is not None and not self.dry:
            _link(found, config.out / "store" / found.name)
        return found

    def _store_work(self) -> Work:
        config = self.config
        if config.synthetic is not None:
            return Work("store", "synthetic", {"synthetic": config.synthetic.plain()}, [])
        assert config.model and config.corpus and config.harvest
        name = f"{_slug(config.model.source)}-{_slug(config.corpus.source)}"
        return Work(
            "store", name, api.store_inputs(self.identity, config.corpus, config.harvest), []
        )

    def _fill_store(self, draft: Draft) -> dict[str, Any]:
        config = self.config
        if config.synthetic is not None:
            return api.make_synthetic_store(draft, config.synthetic)
        assert config.model and config.corpus and config.harvest
        facts = api.make_store(draft, self.model, config.corpus, config.harvest)
        return facts | {"model": config.model.plain() | {"name": self.model.name}}

    def _dictionaries(self, store: Path | None) -> list[Path]:
        """Train all missing members together, one stream per site; return every member's folder."""
        if store is None:
            for member in self.members:
                self._note(
                    "dictionary", self._name(member), self.config.out, "missing", "no store yet"
                )
            return []
        works = [self._dictionary_work(member, store) for member in self.members]
        paths: list[Path | None] = [self._find(work, self.config.out) for work in works]
        for work, path in zip(works, paths, strict=True):
            if path is not None:
                self._note(work.stage, work.name, path, "found")
        missing = [i for i, path in enumerate(paths) if path is None]
        if missing and not self.dry:
            artifacts.verify(store)
        sites = sorted({works[i].inputs["site"] for i in missing})
        for site in sites:
            group = [i for i in missing if works[i].inputs["site"] == site]
            made = self._train([works[i] for i in group], [self.members[i] for i in group], store)
            for i, path in zip(group, made, strict=True):
                paths[i] = path
        return [path for path in paths if path is not None]

    def _dictionary_work(self, member: Member, store: Path) -> Work:
        assert self.config.train is not None
        opened = api.open_store(store)
        site = api.choose_site(opened, member.site)
        config = config_class(member.fields["type"]).parse(
            {**member.fields, "d_in": opened.width(site)}
        )
        parents = [artifacts.parent_of(store)]
        if member.init:
            parents.append(artifacts.parent_of(Path(member.init)))
        inputs = {
            "dictionary": config.plain(),
            "lr": member.lr,
            "seed": member.seed,
            "site": site,
            "train": self.config.train.key_fields(),
        }
        return Work("dictionary", self._name(member), inputs, parents)

    def _train(self, works: list[Work], members: list[Member], store: Path) -> list[Path | None]:
        if self.dry:
            return [self._make(work, self.config.out, None) for work in works]
        assert self.config.train is not None
        reasons = [self._reason(work, self.config.out) for work in works]
        with ExitStack() as stack:
            drafts = [stack.enter_context(self._draft(self.config.out, work)) for work in works]
            todo = [
                (work, api.MemberSpec(work.name, work.inputs, member.init, draft))
                for work, member, draft in zip(works, members, drafts, strict=True)
                if not draft.is_finished
            ]
            specs = [spec for _, spec in todo]
            outcomes = api.train(specs, store, self.config.train, device=self.device)
            model = artifacts.read_manifest(store).facts.get("model")
            for (work, spec), outcome in zip(todo, outcomes, strict=True):
                self._finish(spec.draft, work, outcome.facts | {"model": model}, outcome.provenance)
        targets = [artifact_path(self.config.out, w.stage, w.name, w.key) for w in works]
        for work, target, reason in zip(works, targets, reasons, strict=True):
            self._note(work.stage, work.name, target, "made", reason)
        return list(targets)

    def _results(self, dictionary: Path, store: Path | None) -> None:
        assert self.config.evaluate is not None and store is not None
        evaluate, manifest = self.config.evaluate, artifacts.read_manifest(dictionary)
        inputs = api.evaluation_inputs(evaluate.evals, {"core": evaluate.core})
        inputs["model"] = self._model_fingerprint(store)
        parents = [artifacts.parent_of(dictionary), artifacts.parent_of(store)]
        work = Work("results", manifest.name, inputs, parents)

        def fill(draft: Draft) -> dict[str, Any]:
            return api.write_results(
                draft, dictionary, store, self._model_for(store),
                evals=evaluate.evals, configs={"core": evaluate.core},
            )  # fmt: skip

        self._find_or_make(work, fill)

    def _features(self, dictionary: Path, store: Path | None) -> None:
        assert self.config.index is not None and store is not None
        index, manifest = self.config.index, artifacts.read_manifest(dictionary)
        inputs = {"index": index.plain(), "model": self._model_fingerprint(store)}
        parents = [artifacts.parent_of(dictionary), artifacts.parent_of(store)]
        work = Work("features", manifest.name, inputs, parents)

        def fill(draft: Draft) -> dict[str, Any]:
            return api.write_features(draft, dictionary, store, self._model_for(store), index)

        self._find_or_make(work, fill)

    # ---------------------------------------------------------------------------------- the model

    @cached_property
    def device(self) -> torch.device:
        """The device that this run computes on."""
        return resolve_device(self.config.device)

    @cached_property
    def identity(self) -> ModelIdentity:
        """The model's name and fingerprint, without loading it."""
        assert self.config.model is not None
        return identify(self.config.model.source, self.config.model.dtype, self.device)

    @cached_property
    def model(self) -> Any:
        """The live model, loaded at first use."""
        assert self.config.model is not None
        source, dtype = self.config.model.source, self.config.model.dtype
        return api.load_model(source, dtype=dtype, device=self.device)

    def _model_fingerprint(self, store: Path) -> str | None:
        return artifacts.read_manifest(store).facts.get("model_fingerprint")

    def _model_for(self, store: Path) -> Any:
        """The model that the store's rows came from, or None for a store from bare arrays."""
        wanted = self._model_fingerprint(store)
        if wanted is None:
            return None
        if self.config.model is None:
            source = artifacts.read_manifest(store).facts["model"]
            return api.load_model(source["source"], dtype=source["dtype"], device=self.device)
        if self.identity.fingerprint != wanted:
            raise ArtifactError(
                f"{store} holds activations of another model or dtype than {self.identity.name} "
                f"({self.identity.dtype}); name the model that the store was harvested from"
            )
        return self.model

    # --------------------------------------------------------------------------- finding and making

    def _find(self, work: Work, out: Path) -> Path | None:
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

    def _find_or_make(self, work: Work, fill: Any) -> None:
        found = self._find(work, self.config.out)
        if found is not None:
            self._note(work.stage, work.name, found, "found")
        else:
            self._make(work, self.config.out, fill)

    def _make(self, work: Work, out: Path, fill: Any) -> Path | None:
        reason = self._reason(work, out)
        target = artifact_path(out, work.stage, work.name, work.key)
        if self.dry:
            self._note(work.stage, work.name, target, "missing", reason)
            return None
        with self._draft(out, work) as draft:
            if not draft.is_finished:
                self._finish(draft, work, fill(draft), {})
        self._note(work.stage, work.name, target, "made", reason)
        return target

    def _draft(self, out: Path, work: Work) -> Any:
        return artifacts.open_draft(out, work.stage, work.name, work.key, wait=self.wait)

    def _finish(
        self, draft: Draft, work: Work, facts: dict[str, Any], provenance: dict[str, Any]
    ) -> None:
        manifest = draft.finish(
            stage=work.stage, name=work.name, inputs=work.inputs, parents=work.parents,
            facts=facts, provenance=provenance | {"device": str(self.device)},
        )  # fmt: skip
        self.registry.record(manifest, draft.target)

    def _reason(self, work: Work, out: Path) -> str:
        """Name the field in which this work differs from the closest finished sibling."""
        siblings = [m for _, m in artifacts.find_all(out, work.stage) if m.name == work.name]
        if not siblings:
            return "not made yet"
        differences = [first_difference(m.inputs, work.inputs) for m in reversed(siblings)]
        return next((d for d in differences if d), "its parent or the stage's version changed")

    def _note(self, stage: str, name: str, path: Path, status: Any, reason: str = "") -> None:
        log.info("%s %s: %s%s", stage, name, status, f" ({reason})" if reason else "")
        self.steps.append(Step(stage, name, path, status, reason))

    def _name(self, member: Member) -> str:
        return f"{self.config.name}-{member.name}"

    def _check_disk(self) -> None:
        assert self.config.out is not None
        if self.config.synthetic is None:
            assert self.config.corpus and self.config.harvest
            needed = api.store_bytes(self.model, self.config.corpus, self.config.harvest)
            check_space(self.stores, needed)


def check_space(folder: Path, needed: int, what: str = "the store") -> None:
    """Raise ResourceError if the disk that holds `folder` lacks `needed` bytes and a tenth more."""
    import shutil

    existing = next(p for p in [folder, *folder.resolve().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.1 * needed:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free. "
            "Ask for fewer tokens or sites, or a narrower dtype, or set SAELAB_CACHE to a "
            "larger disk."
        )


def _link(target: Path, link: Path) -> None:
    """Make `out/store/…` point to the shared store."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        if link.resolve() == target.resolve():
            return
        link.unlink()
    if not link.exists():
        link.symlink_to(target.resolve(), target_is_directory=True)


def _slug(source: str) -> str:
    tail = source.rstrip("/").split("/")[-1].split("#")[-1].removeprefix("hub:")
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in tail)[:40] or "store"


__all__ = ["LockedError", "Run", "RunConfig", "Step", "explain", "load_config", "run"]
