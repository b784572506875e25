"""A run: the config that describes it, the stages' keys, and making only what is missing.

    corpus ─harvest→ STORE ─train→ DICTIONARY ─evaluate→ RESULTS
                                      └────────index───→ FEATURES

Every stage is looked up by its key first, in `out` and then wherever it was finished before.
Nothing is overwritten: an edited config adds siblings.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from saelab import api, artifacts, assets
from saelab.artifacts import Draft, Parent, artifact_path, stage_key
from saelab.config import first_difference
from saelab.dictionaries import config_class
from saelab.errors import ArtifactError, ConfigError, ResourceError
from saelab.members import Member
from saelab.models import ModelIdentity, identify, resolve_device
from saelab.run_config import RunConfig, load_config

log = logging.getLogger(__name__)

STAGE_VERSION = {"store": 1, "dictionary": 2, "results": 1, "features": 1}
"""Bumped by hand when a stage's outputs change for the same inputs; the golden test asks for it."""

STAGES = ("harvest", "train", "evaluate", "index")
Stage = Literal["harvest", "train", "evaluate", "index"]
Status = Literal["found", "made", "missing"]
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
    """Position in `dictionaries:`; None for the store."""


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
    elif overrides:
        raise ConfigError("overrides go with a path, a name or plain data, not with a RunConfig")
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
        self.members = config.members()
        self.registry = artifacts.Registry(assets.cache_dir() / "registry")
        self.stores = assets.cache_dir() / "artifacts"
        """Stores are large and shared: they live in the cache, and `out` links to them."""
        self._verified: set[Path] = set()

    def execute(self, until: Stage) -> list[Step]:
        """Go through the stages in order."""
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        last = STAGES.index(until)
        self._check()
        store = self._store()
        if last < 1:
            return self.steps
        for number, path in enumerate(self._dictionaries(store)):
            for stage, wanted, make in (
                ("results", last >= 2 and self.config.evaluate is not None, self._results),
                ("features", last >= 3 and self.config.index is not None, self._features),
            ):
                if not wanted:
                    continue
                if path is None or store is None:
                    name = self._name(self.members[number])
                    reason = "its dictionary has to be trained first"
                    self._note(stage, name, self.config.out / stage, "missing", reason, number)
                else:
                    make(path, store, number)
        return self.steps

    def _check(self) -> None:
        """Find before the first long stage what would stop a later one."""
        config = self.config
        for member in self.members:
            if member.init is not None:
                given = artifacts.read_manifest(Path(member.init))
                if given.stage != "dictionary":
                    raise ArtifactError(f"{member.init} is a {given.stage}, not a dictionary")
                wanted, found = member.fields, given.inputs["dictionary"]
                differing = [k for k, v in wanted.items() if found.get(k) != v]
                if differing:
                    raise ConfigError(
                        f"{member.where}.init: {member.init} has other values of "
                        f"{', '.join(differing)}; continue with the configuration it was made with"
                    )
        if config.store is not None:
            self._check_model(config.store)

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

    def _dictionaries(self, store: Path | None) -> list[Path | None]:
        """Train all missing members together, one stream per site; return each one's folder."""
        if store is None:
            for number, member in enumerate(self.members):
                name, folder = self._name(member), self.config.out / "dictionary"
                reason = "its store has to be made first"
                self._note("dictionary", name, folder, "missing", reason, number)
            return [None] * len(self.members)
        works = [self._dictionary_work(member, store) for member in self.members]
        paths: list[Path | None] = [self._find(work, self.config.out) for work in works]
        for number, (work, path) in enumerate(zip(works, paths, strict=True)):
            if path is not None:
                self._note(work.stage, work.name, path, "found", member=number)
        missing = [i for i, path in enumerate(paths) if path is None]
        if self.dry:
            for i in missing:
                self._make(works[i], self.config.out, None, i)
            return paths
        for site in sorted({works[i].inputs["site"] for i in missing}):
            group = [i for i in missing if works[i].inputs["site"] == site]
            made = self._train(works, group, store)
            for i, path in zip(group, made, strict=True):
                paths[i] = path
        return paths

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

    def _train(self, works: list[Work], group: list[int], store: Path) -> list[Path]:
        assert self.config.train is not None
        settings = self.config.train
        needed = sum(api.training_bytes(works[i].inputs["dictionary"], settings) for i in group)
        check_memory(needed, f"training {len(group)} dictionaries at once", self.device)
        self._verify(store)
        reasons = [self._reason(works[i], self.config.out) for i in group]
        with ExitStack() as stack:
            drafts = [stack.enter_context(self._draft(self.config.out, works[i])) for i in group]
            todo = [
                (works[i], api.MemberSpec(works[i].name, works[i].inputs, init, draft))
                for i, init, draft in zip(
                    group, (self.members[i].init for i in group), drafts, strict=True
                )
                if not draft.is_finished
            ]
            outcomes = api.train([spec for _, spec in todo], store, settings, device=self.device)
            model = artifacts.read_manifest(store).facts.get("model")
            for (work, spec), outcome in zip(todo, outcomes, strict=True):
                self._finish(spec.draft, work, outcome.facts | {"model": model}, outcome.provenance)
        for i, draft, reason in zip(group, drafts, reasons, strict=True):
            self._note("dictionary", works[i].name, draft.target, "made", reason, i)
        return [draft.target for draft in drafts]

    def _results(self, dictionary: Path, store: Path, member: int) -> None:
        assert self.config.evaluate is not None
        evaluate, manifest = self.config.evaluate, artifacts.read_manifest(dictionary)
        inputs = api.evaluation_inputs(evaluate.evals, evaluate.settings())
        inputs["model"] = self._model_fingerprint(store)
        parents = [artifacts.parent_of(dictionary), artifacts.parent_of(store)]

        def fill(draft: Draft) -> dict[str, Any]:
            self._verify(store)
            return api.write_results(
                draft, dictionary, store, self._model_for(store),
                evals=evaluate.evals, configs=evaluate.settings(),
            )  # fmt: skip

        self._find_or_make(Work("results", manifest.name, inputs, parents), fill, member)

    def _features(self, dictionary: Path, store: Path, member: int) -> None:
        assert self.config.index is not None
        index, manifest = self.config.index, artifacts.read_manifest(dictionary)
        inputs = {"index": index.plain(), "model": self._model_fingerprint(store)}
        parents = [artifacts.parent_of(dictionary), artifacts.parent_of(store)]

        def fill(draft: Draft) -> dict[str, Any]:
            self._verify(store)
            return api.write_features(draft, dictionary, store, self._model_for(store), index)

        self._find_or_make(Work("features", manifest.name, inputs, parents), fill, member)

    def _verify(self, store: Path) -> None:
        """Compare a store's files with their hashes, once per run and only if it is read."""
        if store not in self._verified:
            artifacts.verify(store)
            self._verified.add(store)

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
        self._check_model(store)
        return self.model

    def _check_model(self, store: Path) -> None:
        """Raise ArtifactError if the config names another model than the store came from."""
        wanted = self._model_fingerprint(store)
        if wanted is None or self.config.model is None:
            return
        if self.identity.fingerprint != wanted:
            raise ArtifactError(
                f"{store} holds activations of another model or dtype than {self.identity.name} "
                f"({self.identity.dtype}); name the model that the store was harvested from"
            )

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

    def _find_or_make(self, work: Work, fill: Fill, member: int) -> None:
        found = self._find(work, self.config.out)
        if found is not None:
            self._note(work.stage, work.name, found, "found", member=member)
        else:
            self._make(work, self.config.out, fill, member)

    def _make(
        self, work: Work, out: Path, fill: Fill | None, member: int | None = None
    ) -> Path | None:
        reason = self._reason(work, out)
        target = artifact_path(out, work.stage, work.name, work.key)
        if self.dry or fill is None:
            self._note(work.stage, work.name, target, "missing", reason, member)
            return None
        with self._draft(out, work) as draft:
            if not draft.is_finished:
                self._finish(draft, work, fill(draft), {})
        self._note(work.stage, work.name, target, "made", reason, member)
        return target

    def _draft(self, out: Path, work: Work) -> AbstractContextManager[Draft]:
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

    def _note(
        self,
        stage: str,
        name: str,
        path: Path,
        status: Status,
        reason: str = "",
        member: int | None = None,
    ) -> None:
        if not self.dry:
            log.info("%s %s: %s%s", stage, name, status, f" ({reason})" if reason else "")
        self.steps.append(Step(stage, name, path, status, reason, member))

    def _name(self, member: Member) -> str:
        return f"{self.config.name}-{member.name}"

    def _check_disk(self) -> None:
        if self.config.synthetic is None:
            assert self.config.corpus and self.config.harvest
            needed = api.store_bytes(self.model, self.config.corpus, self.config.harvest)
            check_space(self.stores, needed)


def check_memory(needed: float, what: str, device: torch.device) -> None:
    """Raise ResourceError if the device's memory, as a whole, is smaller than `needed` bytes."""
    total = psutil.virtual_memory().total
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    if needed > 0.9 * total:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, but {device.type} has "
            f"{total / 1e9:.1f} GB; lower d_sae or train.batch, or train fewer at once"
        )


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


__all__ = ["Run", "RunConfig", "Step", "explain", "load_config", "run"]
