"""What a run is told: one YAML file, checked as a whole before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from saelab.config import Config, apply_overrides, load_yaml
from saelab.dictionaries import config_class
from saelab.errors import ConfigError, nearest
from saelab.evals.core import CoreConfig
from saelab.evals.truth import TruthConfig
from saelab.features.build import IndexConfig
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.harvest import HarvestConfig
from saelab.store.synthetic import SyntheticConfig
from saelab.train.fit import TrainConfig

_MEMBER_KEYS = ("type", "lr", "seed", "site", "init", "name")


class ModelConfig(Config):
    """Which language model to read."""

    source: str
    """A named asset, `hub:org/name`, a local folder, a GGUF file, or `toy`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; `auto` takes bfloat16 where a short probe shows that it is faster."""


class EvaluateConfig(Config):
    """Which evaluators score each dictionary."""

    evals: list[Literal["core", "truth"]] = ["core"]
    """Evaluators by name; `truth` needs a planted store."""
    core: CoreConfig = CoreConfig()
    """Settings of the core evaluator."""
    truth: TruthConfig = TruthConfig()
    """Settings of the evaluator that knows what was planted."""

    def settings(self) -> dict[str, Config]:
        """Return each evaluator's settings by its name."""
        return {"core": self.core, "truth": self.truth}


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
        if self.corpus is not None and self.evaluate and "truth" in self.evaluate.evals:
            raise ValueError("evaluate.evals: truth needs a planted store (`synthetic:`)")
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
        if not isinstance(entry.get("type"), str):
            raise ConfigError(f"{where}.type: this key is required, and names a type")
        fields = {k: v for k, v in entry.items() if k not in _MEMBER_KEYS or k == "type"}
        try:
            config_class(entry["type"]).parse({"d_in": 2**30, **fields})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        try:
            training = _MemberTraining.parse({k: entry[k] for k in _MEMBER_KEYS[1:] if k in entry})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        return Member(
            training.name or "-".join(str(fields[k]) for k in _NAMING if k in fields),
            fields, training.lr, training.seed, training.site, training.init,
        )  # fmt: skip


_NAMING = ("type", "d_sae", "k", "target_l0")
"""Fields that a member without a name is called after."""


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


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration: a YAML path, the name of a shipped one, or plain data."""
    if isinstance(source, dict):
        data = apply_overrides(source, overrides)
    else:
        data = load_yaml(_config_path(Path(source)), overrides)
    config = RunConfig.parse(data)
    members = [Member.parse(entry, i) for i, entry in enumerate(config.dictionaries)]
    for i, member in enumerate(members):
        if member in members[:i]:
            first = members.index(member)
            raise ConfigError(f"dictionaries.{first} and dictionaries.{i} are the same; drop one")
        _check_site(config, member, i)
    if config.evaluate is not None and config.corpus is not None and config.corpus.holdout == 0:
        raise ConfigError("evaluate needs held-out documents; set corpus.holdout above 0, say 0.1")
    return config


def _check_site(config: RunConfig, member: Member, position: int) -> None:
    """Raise ConfigError if a member's site will not be in the store."""
    if config.harvest is None:
        return
    sites = config.harvest.sites
    where = f"dictionaries.{position}.site"
    if member.site is None and len(sites) > 1:
        raise ConfigError(f"{where}: the store will have {', '.join(sites)}; say which")
    if member.site is not None and member.site not in sites:
        raise ConfigError(
            f"{where}: {member.site!r} is not harvested; {nearest(member.site, sites)}"
        )


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
