"""A run: the config that describes it, the stages' keys, and making only what is missing.

    corpus ─harvest→ STORE ─train→ DICTIONARY ─evaluate→ RESULTS
                                      └────────index───→ FEATURES

Every stage is looked up by its key first, in `out` and then wherever it was finished before.
Members that are missing are trained together, in as many passes over the store as memory needs.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from saelab import api, artifacts, assets
from saelab.artifacts import Draft
from saelab.dictionaries import config_class
from saelab.errors import ArtifactError, ConfigError, DivergedError
from saelab.members import Member
from saelab.models import ModelIdentity, identify, resolve_device
from saelab.passes import Pass, check_memory, check_space, free_memory, needed, split
from saelab.run_config import RunConfig, load_config
from saelab.stages import STAGE_VERSION, Stages, Step, Work, shared_stores
from saelab.train.fit import Fitted

log = logging.getLogger(__name__)

STAGES = ("harvest", "train", "evaluate", "index")
Stage = Literal["harvest", "train", "evaluate", "index"]


def run(
    config: RunConfig | str | Path | dict[str, Any],
    *,
    overrides: Sequence[str] = (),
    until: Stage = "index",
    wait: float = 0.0,
) -> list[Step]:
    """Make everything of a run that is missing, up to a stage; return what was found and made.

    Raises SaelabError for everything a user can cause; DivergedError at the end, when all other
    members are through. An interrupted run goes on with the same call.
    """  # fmt: skip
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    elif overrides:
        raise ConfigError("overrides go with a path, a name or plain data, not with a RunConfig")
    made = Run(config, wait=wait)
    steps = made.execute(until)
    made.raise_diverged()
    return steps


def explain(config: RunConfig, until: Stage = "index") -> list[Step]:
    """Return what `run` would find and make, and why, without making anything."""
    return Run(config, dry=True).execute(until)


class Run:
    """One pass over the stages of a configuration."""

    def __init__(self, config: RunConfig, *, dry: bool = False, wait: float = 0.0) -> None:
        """Prepare a run; nothing is read or written yet."""
        self.config = config
        self.dry = dry
        self.members = config.members()
        self.stages = Stages(assets.cache_dir(), dry=dry, wait=wait)
        self.stores = shared_stores()
        """Stores are large and shared: they live in the cache, and `out` links to them."""
        self.faults: dict[int, str] = {}
        """By member, what is to be said of one that diverged."""
        self._verified: set[Path] = set()

    def execute(self, until: Stage) -> list[Step]:
        """Go through the stages in order."""
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        last = STAGES.index(until)
        self._check()
        store = self._store()
        if last < 1:
            return self.stages.steps
        for number, path in enumerate(self._dictionaries(store)):
            if number in self.faults:
                continue
            for stage, wanted, make in (
                ("results", last >= 2 and self.config.evaluate is not None, self._results),
                ("features", last >= 3 and self.config.index is not None, self._features),
            ):
                if not wanted:
                    continue
                if path is None or store is None:
                    name = self._name(self.members[number])
                    reason = "its dictionary has to be trained first"
                    folder = self.config.out / stage
                    self.stages.note((stage, name), folder, "missing", reason, number)
                else:
                    make(path, store, number)
        return self.stages.steps

    def raise_diverged(self) -> None:
        """Raise DivergedError if members diverged."""
        if self.faults:
            raise DivergedError(self.faults, len(self.members))

    def _check(self) -> None:
        """Find before the first long stage what would stop a later one."""
        config = self.config
        for member in self.members:
            if member.init is not None:
                given = artifacts.read_manifest(Path(member.init))
                if given.stage != "dictionary":
                    raise ArtifactError(f"{member.init} is a {given.stage}, not a dictionary")
                theirs = given.inputs["dictionary"]
                found, wanted = (
                    config_class(fields["type"]).parse(fields).plain()
                    for fields in (theirs, {**member.fields, "d_in": theirs["d_in"]})
                )
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
            self.stages.note(("store", manifest.name), config.store, "found")
            return config.store
        work = self._store_work()
        found = self.stages.find(work, self.stores)
        if found is None:
            if not self.dry:
                self._check_disk()
            found = self.stages.make(work, self.stores, self._fill_store, str(self.device))
        else:
            self.stages.note(work, found, "found")
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
        """Train all missing members, pass by pass; return each one's folder, None without one."""
        if store is None:
            for number, member in enumerate(self.members):
                work, folder = ("dictionary", self._name(member)), self.config.out / "dictionary"
                reason = "its store has to be made first"
                self.stages.note(work, folder, "missing", reason, number)
            return [None] * len(self.members)
        works = [self._dictionary_work(member, store) for member in self.members]
        paths = [self.stages.find(work, self.config.out) for work in works]
        for number, (work, path) in enumerate(zip(works, paths, strict=True)):
            if path is not None:
                self.stages.note(work, path, "found", member=number)
        missing = [i for i, path in enumerate(paths) if path is None]
        if self.dry:
            for i in missing:
                self.stages.miss(works[i], self.config.out, i)
            return paths
        opened = api.open_store(store)
        groups = self.passes(missing, {site: opened.width(site) for site in opened.sites})
        for number, group in enumerate(groups, 1):
            if len(groups) > 1:
                log.info("pass %d of %d: %d dictionaries", number, len(groups), len(group.members))
            for i, path in self._train(works, group.members, store).items():
                paths[i] = path
        return paths

    def passes(self, members: Sequence[int], widths: Mapping[str, int]) -> list[Pass]:
        """Split members into what is trained in one pass over the store each, to fit in memory.

        `widths` are those of the store's sites. Raises ResourceError if a member does not fit by
        itself.
        """
        train, limit = self.config.train, self.config.memory_gb
        assert train is not None
        loads = []
        for i in members:
            member = self.members[i]
            site = member.site or next(iter(widths))
            config = {**member.fields, "d_in": widths[site]}
            loads.append(api.training_load(i, site, config, train))
            what = f"training {self._name(member)}"
            check_memory(needed(loads[-1:]), what, self.device, limit)
        return split(loads, 1e9 * limit if limit else free_memory(self.device))

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
        train = self.config.train.shortened(member.tokens, member.where)
        inputs = {
            "dictionary": config.plain(),
            "lr": member.lr,
            "seed": member.seed,
            "site": site,
            "train": train.key_fields(),
        }
        return Work("dictionary", self._name(member), inputs, parents)

    def _train(self, works: list[Work], group: Sequence[int], store: Path) -> dict[int, Path]:
        """Train members in one pass; return the folders of those that did not diverge."""
        assert self.config.train is not None
        self._verify(store)
        out, known = self.config.out, artifacts.read_manifest(store).facts
        origin = {key: known.get(key) for key in ("model", "model_fingerprint")}
        reasons = {i: self.stages.reason(works[i], out) for i in group}
        with ExitStack() as stack:
            drafts = {i: stack.enter_context(self.stages.draft(works[i], out)) for i in group}
            todo = [i for i in group if not drafts[i].is_finished]
            specs = [
                api.MemberSpec(
                    works[i].name, works[i].inputs, self.members[i].init,
                    self.members[i].tokens, drafts[i],
                )
                for i in todo
            ]  # fmt: skip

            def done(place: int, fitted: Fitted) -> None:
                i = todo[place]
                provenance = fitted.provenance | {"device": str(self.device)}
                self.stages.finish(drafts[i], works[i], fitted.facts | origin, provenance)

            try:
                api.train(specs, store, self.config.train, device=self.device, done=done)
            except DivergedError as error:
                self.faults |= {todo[place]: fault for place, fault in error.faults.items()}
        for i in group:
            status, reason = "made", reasons[i]
            if i in self.faults:
                status, reason = "diverged", self.faults[i]
            self.stages.note(works[i], drafts[i].target, status, reason, i)
        return {i: drafts[i].target for i in group if i not in self.faults}

    def _results(self, dictionary: Path, store: Path, member: int) -> None:
        assert self.config.evaluate is not None
        evaluate, manifest = self.config.evaluate, artifacts.read_manifest(dictionary)
        inputs = api.evaluation_inputs(evaluate.evals, evaluate.settings(), self.device)
        inputs["model"] = self._model_fingerprint(store)
        parents = [artifacts.parent_of(dictionary), artifacts.parent_of(store)]

        def fill(draft: Draft) -> dict[str, Any]:
            self._verify(store)
            return api.write_results(
                draft, dictionary, store, self._model_for(store),
                evals=evaluate.evals, configs=evaluate.settings(),
            )  # fmt: skip

        work = Work("results", manifest.name, inputs, parents)
        self.stages.find_or_make(work, self.config.out, fill, str(self.device), member)

    def _features(self, dictionary: Path, store: Path, member: int) -> None:
        assert self.config.index is not None
        index, manifest = self.config.index, artifacts.read_manifest(dictionary)
        inputs = {"index": index.plain(), "model": self._model_fingerprint(store)}
        parents = [artifacts.parent_of(dictionary), artifacts.parent_of(store)]

        def fill(draft: Draft) -> dict[str, Any]:
            self._verify(store)
            return api.write_features(draft, dictionary, store, self._model_for(store), index)

        work = Work("features", manifest.name, inputs, parents)
        self.stages.find_or_make(work, self.config.out, fill, str(self.device), member)

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

    def _name(self, member: Member) -> str:
        return f"{self.config.name}-{member.name}"

    def _check_disk(self) -> None:
        if self.config.synthetic is None:
            assert self.config.corpus and self.config.harvest
            needed = api.store_bytes(self.model, self.config.corpus, self.config.harvest)
            check_space(self.stores, needed)


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


__all__ = ["STAGE_VERSION", "Run", "RunConfig", "Step", "explain", "load_config", "run"]
