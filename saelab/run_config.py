"""What a run is told: one YAML file, checked as a whole before anything starts."""

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from saelab.config import Config, apply_overrides, load_yaml
from saelab.dictionaries import config_class
from saelab.errors import ConfigError, nearest
from saelab.evals.concepts import ConceptsConfig
from saelab.evals.core import CoreConfig
from saelab.evals.probing import ProbingConfig
from saelab.evals.scr import ScrConfig
from saelab.evals.tpp import TppConfig
from saelab.evals.truth import TruthConfig
from saelab.features.build import IndexConfig
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.harvest import HarvestConfig
from saelab.members import Member, expand
from saelab.steering.equal_norm import EqualNormConfig
from saelab.steering.scene import SteeringConfig
from saelab.store.synthetic import SyntheticConfig
from saelab.train.fit import TrainConfig
from saelab.types import holds_neurons


class ModelConfig(Config):
    """Which language model to read."""

    source: str
    """A named asset, `hub:org/name`, a local folder, a GGUF file, or `toy`; `redrawn:SEED:` before
    it draws its weights anew."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; `auto` takes bfloat16 where a short probe shows that it is faster."""


EvalName = Literal[
    "core", "truth", "probing", "concepts", "tpp", "scr", "steering", "signs", "equal_norm"
]
_BY_LABELS = ("probing", "concepts", "tpp", "scr", "steering", "signs")


class EvaluateConfig(Config):
    """Which evaluators score each dictionary."""

    evals: list[EvalName] = ["core"]
    """Evaluators by name; `truth` needs a planted store, `probing`, `concepts`, `tpp`, `scr`,
    `steering` and `signs` need labels, and the last two and `equal_norm` the model."""
    core: CoreConfig = CoreConfig()
    """Settings of the core evaluator."""
    truth: TruthConfig = TruthConfig()
    """Settings of the evaluator that knows what was planted."""
    probing: ProbingConfig = ProbingConfig()
    """Settings of the k-sparse probes."""
    concepts: ConceptsConfig = ConceptsConfig()
    """Settings of concept detection."""
    tpp: TppConfig = TppConfig()
    """Settings of targeted probe perturbation."""
    scr: ScrConfig = ScrConfig()
    """Settings of spurious correlation removal."""
    steering: SteeringConfig = SteeringConfig()
    """Settings of steering by concepts."""
    signs: SteeringConfig = SteeringConfig()
    """Settings of steering both ways; `instruction` is of no use there."""
    equal_norm: EqualNormConfig = EqualNormConfig()
    """Settings of pushing by one length."""

    def settings(self) -> dict[str, Config]:
        """Return each evaluator's settings by its name."""
        return {name: getattr(self, name) for name in typing.get_args(EvalName)}

    @property
    def need_labels(self) -> list[str]:
        """The chosen evaluators that score documents by their labels."""
        return [name for name in self.evals if name in _BY_LABELS]


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
    grid: dict[str, Any] | list[dict[str, Any]] = []
    """More members: a list under a key is an axis, and each combination is a member. May be a list
    of grids."""
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
    memory_gb: float | None = Field(default=None, gt=0)
    """GB that training may take, in as many passes over the store as that needs; by default nine
    tenths of what is free."""

    @model_validator(mode="after")
    def _one_source(self) -> "RunConfig":
        sources = [self.store is not None, self.synthetic is not None, self.corpus is not None]
        if sum(sources) != 1:
            raise ValueError("give exactly one of corpus, store and synthetic")
        if self.corpus is not None and (self.model is None or self.harvest is None):
            raise ValueError("a corpus needs model and harvest beside it")
        if self.corpus is not None and self.evaluate and "truth" in self.evaluate.evals:
            raise ValueError("evaluate.evals: truth needs a planted store (`synthetic:`)")
        if self.evaluate and self.store is None:
            _check_labels(self.corpus, self.evaluate.need_labels)
        if (self.dictionaries or self.grid) and self.train is None:
            raise ValueError("dictionaries need a train section (batch, tokens)")
        return self

    def members(self) -> list[Member]:
        """Return all members, of the list and of the grids. Raises ConfigError naming a bad one."""
        return expand(self.dictionaries, self.grid)


def _check_labels(corpus: CorpusConfig | None, evals: list[str]) -> None:
    """Raise ValueError if a store made from this corpus will have no documents to score."""
    if not evals:
        return
    what = f"evaluate.evals: {', '.join(evals)} needs documents"
    if corpus is None:
        raise ValueError(f"{what} with labels, which planted stores have not; give a corpus")
    if corpus.source != "toy" and corpus.label_field is None:
        raise ValueError(f"{what} with labels; say which column with corpus.label_field")
    if corpus.packing != "document":
        raise ValueError(f"{what} that share no window; set corpus.packing to document")


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration: a YAML path, the name of a shipped one, or plain data."""
    if isinstance(source, dict):
        data = apply_overrides(source, overrides)
    else:
        data = load_yaml(config_path(Path(source)), overrides)
    config = RunConfig.parse(data)
    for member in config.members():
        _check_site(config, member)
        _check_gradient(config, member)
        _check_neurons(config, member)
        if config.train is not None:
            config.train.shortened(member.tokens, member.where)
    if config.evaluate is not None and config.corpus is not None and config.corpus.holdout == 0:
        raise ConfigError("evaluate needs held-out documents; set corpus.holdout above 0, say 0.1")
    return config


def _check_site(config: RunConfig, member: Member) -> None:
    """Raise ConfigError if a member's site will not be in the store."""
    if config.harvest is None:
        return
    sites = config.harvest.sites
    where = f"{member.where}.site"
    if member.site is None and len(sites) > 1:
        raise ConfigError(f"{where}: the store will have {', '.join(sites)}; say which")
    if member.site is not None and member.site not in sites:
        raise ConfigError(
            f"{where}: {member.site!r} is not harvested; {nearest(member.site, sites)}"
        )


def _check_gradient(config: RunConfig, member: Member) -> None:
    """Raise ConfigError if a member is trained on gradients that the store will not have."""
    own = config_class(member.fields["type"]).parse({"d_in": 2**30, **member.fields})
    if not own.needs_grad or config.store is not None:
        return
    if config.harvest is None or config.harvest.gradient == "none":
        remedy = "a planted store has none"
        if config.harvest is not None:
            remedy = "set harvest.gradient to sampled or data"
        raise ConfigError(
            f"{member.where}: {own.type} is trained on the gradients of the model's loss; {remedy}"
        )


def _check_neurons(config: RunConfig, member: Member) -> None:
    """Raise ConfigError if a member groups neurons, and its site will have none."""
    if config.harvest is None or not config_class(member.fields["type"]).needs_neurons:
        return
    site = member.site or config.harvest.sites[0]
    if not holds_neurons(site):
        raise ConfigError(
            f"{member.where}: {member.fields['type']} groups an MLP's neurons, but {site!r} has "
            "none; harvest the input of a W_out, blocks.N.mlp.hook_post, and name it as `site`"
        )


def config_path(path: Path) -> Path:
    """Return the file of a configuration, here or shipped. Raises ConfigError if there is none."""
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
