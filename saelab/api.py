"""The one module that knows every concrete package: it opens, loads and hands objects to the verbs.

The first half is what people call from notebooks; the second is what a run's stages call to fill
an artifact's draft.
"""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab import artifacts, dictionaries, models, store
from saelab.artifacts import Draft, read_manifest
from saelab.config import Config
from saelab.edits.placement import Steerable
from saelab.errors import ArtifactError, ConfigError, SiteError, nearest
from saelab.evals.concepts import ConceptsEvaluator
from saelab.evals.core import CoreConfig, CoreEvaluator
from saelab.evals.probing import ProbingEvaluator
from saelab.evals.scr import ScrEvaluator
from saelab.evals.tpp import TppEvaluator
from saelab.evals.truth import TruthConfig, TruthEvaluator
from saelab.features.build import IndexConfig, build
from saelab.features.read import Features
from saelab.harvest import corpus as corpora
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.harvest import HarvestConfig, harvest, store_dtype
from saelab.harvest.online import OnlineStore
from saelab.passes import Load
from saelab.progress import Bar, spinner
from saelab.protocols import Dictionary, Evaluator, LanguageModel, Solved, Store
from saelab.results import write_rows
from saelab.stats import ResultRow
from saelab.steering.kinds import READING, STEERING, judge_inputs
from saelab.store.arrays import ArraysConfig, from_arrays
from saelab.store.reader import BUFFER_BYTES
from saelab.store.synthetic import SyntheticConfig, fill_synthetic
from saelab.train.fit import CALIBRATION_ROWS, Done, Fitted, Member, TrainConfig
from saelab.train.fit import fit as fit_members
from saelab.train.progress import describe

# -------------------------------------------------------------------------------------- notebooks


def load_model(
    source: str, *, dtype: str = "auto", device: str | torch.device = "auto"
) -> Steerable:
    """Load a language model: a named asset, `hub:org/name`, a folder, a GGUF file, or `toy`."""
    return models.load_model(source, dtype=dtype, device=device)


def open_store(path: str | Path) -> Store:
    """Open a finished store for reading. Raises ArtifactError if it is incomplete or altered."""
    return store.open_store(_artifact(path, "store"))


def open_online(
    model: LanguageModel,
    corpus: CorpusConfig | Mapping[str, Any],
    settings: HarvestConfig | Mapping[str, Any],
) -> Store:
    """Open a corpus as a store that lives in memory: every pass over it runs the model again.

    For training where the disk is the limit; `corpus` and `settings` are the `corpus:` and
    `harvest:` sections of a run. Batches equal a stored store's rows bit for bit.
    """
    if not isinstance(corpus, CorpusConfig):
        corpus = CorpusConfig.parse(dict(corpus))
    if not isinstance(settings, HarvestConfig):
        settings = HarvestConfig.parse(dict(settings))
    return OnlineStore(model, corpus, settings)


def load(path: str | Path) -> Dictionary:
    """Load a finished dictionary; it takes raw activations."""
    return dictionaries.load(_artifact(path, "dictionary"))


def open_features(path: str | Path) -> Features:
    """Open a finished feature index, read-only."""
    return Features(_artifact(path, "features"))


def fit(
    config: Mapping[str, Any],
    activations: Store,
    train: TrainConfig | Mapping[str, Any],
    *,
    site: str | None = None,
    lr: float | None = None,
    seed: int = 0,
) -> Dictionary:
    """Train one dictionary in memory and return it; it takes raw activations.

    `config` holds the type's fields without `d_in`, for example `{"type": "topk", "d_sae": 4096,
    "k": 32}`; `train` at least `tokens`. Nothing is written.
    """
    site = choose_site(activations, site)
    full = {**config, "d_in": activations.width(site)}
    settings = train if isinstance(train, TrainConfig) else TrainConfig.parse(dict(train))
    member = Member("fit", dictionaries.create(full), site, lr=lr, seed=seed)
    return fit_members([member], activations, settings)[0].dictionary


def evaluate(
    dictionary: Dictionary,
    activations: Store,
    model: LanguageModel | None = None,
    *,
    config: CoreConfig | None = None,
    site: str | None = None,
) -> list[ResultRow]:
    """Score a dictionary with the core evaluator; without a model the downstream rows are left
    out."""
    return list(
        CoreEvaluator(config, choose_site(activations, site))(dictionary, activations, model)
    )


def evaluate_truth(
    dictionary: Dictionary,
    activations: Store,
    *,
    config: TruthConfig | None = None,
    site: str | None = None,
) -> list[ResultRow]:
    """Score a dictionary against what was planted in a store; see docs/truth.md.

    Raises ConfigError if nothing was planted in it.
    """
    return list(TruthEvaluator(config, choose_site(activations, site))(dictionary, activations))


def index(
    dictionary: Dictionary,
    activations: Store,
    out: str | Path,
    *,
    model: LanguageModel | None = None,
    name: str = "features",
    config: IndexConfig | None = None,
    site: str | None = None,
) -> Features:
    """Build a feature index under `out/features/` and open it."""
    settings, site = config or IndexConfig(), choose_site(activations, site)
    inputs = {
        "index": settings.plain(),
        "store": activations.content_hash,
        "site": site,
        "model": None if model is None else model.fingerprint,
        "dictionary": _weights_hash(dictionary),
    }
    key = artifacts.stage_key("features", 0, inputs, [])
    found = artifacts.find(Path(out), "features", name, key)
    if found is not None:
        return Features(found)
    with artifacts.open_draft(Path(out), "features", name, key) as draft:
        if not draft.is_finished:
            facts = build(draft, dictionary, activations, model, settings, site=site)
            draft.finish(stage="features", name=name, inputs=inputs, parents=[], facts=facts)
    return Features(draft.target)


def _weights_hash(dictionary: Dictionary) -> str:
    with tempfile.TemporaryDirectory() as folder:
        dictionary.save(Path(folder))
        return artifacts.hash_file(Path(folder) / "weights.safetensors")


def _artifact(path: str | Path, stage: str) -> Path:
    """Check that a folder is a finished artifact of a stage."""
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.stage != stage:
        raise ArtifactError(f"{path} is a {manifest.stage}, but a {stage} is wanted")
    return path


def choose_site(activations: Store, site: str | None) -> str:
    """Return the asked site, or the only one. Raises ConfigError or SiteError otherwise."""
    if site is None:
        first, *others = activations.sites
        if others:
            raise ConfigError(
                f"the store has the sites {', '.join(activations.sites)}; say which with `site:`"
            )
        return first
    if site not in activations.sites:
        raise SiteError(f"the store has no site {site!r}; {nearest(site, activations.sites)}")
    return site


# ------------------------------------------------------------------------------- the store's stage


def store_inputs(
    identity: models.ModelIdentity, corpus: CorpusConfig, settings: HarvestConfig
) -> dict[str, Any]:
    """Return the fields that change a store's bytes: resolved dtypes, checksums, no speed
    settings."""
    dtype = getattr(torch, identity.dtype)
    return {
        "model": identity.fingerprint,
        "corpus": corpora.identity(corpus),
        "harvest": settings.key_fields() | {"dtype": store_dtype(settings, dtype)},
    }


def store_bytes(model: LanguageModel, corpus: CorpusConfig, settings: HarvestConfig) -> int:
    """Return about how many bytes a store will take. Raises SiteError for an unknown site."""
    width = sum(model.site(name).width for name in settings.sites)
    width += sum(model.site(name).width for name in settings.grad_sites)
    itemsize = 4 if store_dtype(settings, model.dtype) == "float32" else 2
    per_token = width * itemsize + len(settings.sites) + 36
    text = 6
    return corpus.tokens * (per_token + text)


def make_store(
    draft: Draft, model: LanguageModel, corpus: CorpusConfig, settings: HarvestConfig
) -> dict[str, Any]:
    """Harvest a corpus into a store's draft; return the manifest's facts."""
    sites = {name: model.site(name).width for name in settings.sites}
    dtype = store_dtype(settings, model.dtype)
    with (
        Bar("harvest", corpus.tokens, "tokens") as bar,
        store.StoreWriter(
            draft, sites, dtype,
            rows_per_shard=settings.rows_per_shard, grad_sites=settings.grad_sites,
        ) as writer,
    ):  # fmt: skip
        return harvest(model, corpus, settings, writer, report=lambda done, *_: bar.update(done))


def make_synthetic_store(draft: Draft, config: SyntheticConfig) -> dict[str, Any]:
    """Fill a store's draft with a planted dictionary's activations."""
    return fill_synthetic(draft, config)


def store_from_arrays(
    sites: Mapping[str, Path], out: Path, *, name: str = "arrays", **options: Any
) -> Path:
    """Make a store from `.npy` files, one per site, and return its folder.

    Options: gradients, documents, masked, holdout, dtype, window; see `store.ArraysConfig`.
    """
    config = ArraysConfig.parse({"sites": dict(sites), **options})
    return from_arrays(config, out, name)


# ------------------------------------------------------------------------- the dictionaries' stage


@dataclass(frozen=True)
class MemberSpec:
    """A dictionary to train, as a run describes it."""

    name: str
    inputs: dict[str, Any]
    """The key's fields: the type's configuration as `dictionary`, lr, seed, site."""
    init: str | None
    """A finished dictionary to continue from."""
    tokens: int | None
    """Rows that it sees, if fewer than the run's."""
    draft: Draft


_STEP_MATRICES = 8
"""Matrices of batch × latents that a step holds at most: a gated type's."""


def training_load(member: int, site: str, config: dict[str, Any], settings: TrainConfig) -> Load:
    """Return about how much memory training a member takes; nothing is allocated."""
    with torch.device("meta"):
        dictionary = dictionaries.create(config)
    weights = 4 * sum(p.numel() for p in dictionary.parameters())
    reading = BUFFER_BYTES + 2 * 4 * CALIBRATION_ROWS * dictionary.d_in
    if isinstance(dictionary, Solved):
        return Load(member, site, 2 * weights, dictionary.working_bytes, reading)
    step = _STEP_MATRICES * 4 * settings.batch * dictionary.d_sae
    checkpoint = 6 * weights
    return Load(member, site, 4 * weights, max(step, checkpoint), reading)


def train(
    specs: Sequence[MemberSpec],
    path: Path,
    settings: TrainConfig,
    *,
    device: torch.device,
    done: Done | None = None,
) -> list[Fitted]:
    """Train the members on one stream and save each into its draft; see `train.fit.fit`."""
    activations = open_store(path)
    with Bar("train", settings.steps, "steps") as bar:
        return fit_members(
            (_member(spec, device) for spec in specs), activations, settings, done=done,
            report=lambda info: bar.update(
                settings.steps * info["step"] // info["steps"], describe(info)
            ),
        )  # fmt: skip


def _member(spec: MemberSpec, device: torch.device) -> Member:
    inputs = spec.inputs
    dictionary = dictionaries.create(inputs["dictionary"])
    if spec.init is not None:
        dictionary = dictionaries.load(_artifact(spec.init, "dictionary"))
        if dictionary.config.plain() != inputs["dictionary"]:
            raise ConfigError(
                f"{spec.name} continues from {spec.init}, which has another configuration: "
                f"{dictionary.config.plain()} instead of {inputs['dictionary']}"
            )
    return Member(
        spec.name, dictionary.to(device), inputs["site"],
        lr=inputs["lr"], seed=inputs["seed"], tokens=spec.tokens, draft=spec.draft,
        initialised=spec.init is not None,
    )  # fmt: skip


# ----------------------------------------------------------------- the results and features stages


def evaluation_inputs(
    evals: Sequence[str], configs: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Return what of the evaluation goes into a results key: versions, settings, judges."""
    versions = {name: _EVALUATORS[name].version for name in evals}
    inputs = {name: {"version": versions[name], "config": configs[name].plain()} for name in evals}
    identify = functools.partial(models.identify, device=device)
    return {"evals": inputs} | judge_inputs([configs[name] for name in evals], identify)


_KINDS = (
    CoreEvaluator, TruthEvaluator, ProbingEvaluator, ConceptsEvaluator, TppEvaluator,
    ScrEvaluator, *STEERING,
)  # fmt: skip
_EVALUATORS: dict[str, type[Any]] = {kind.name: kind for kind in _KINDS}
_load_once = functools.lru_cache(maxsize=2)(load_model)


@functools.lru_cache(maxsize=6)
def _evaluator(name: str, config: Config, site: str) -> Evaluator:
    """Return the evaluator that a run's dictionaries of one site share: it keeps their controls."""
    kind = _EVALUATORS[name]
    return kind(config, site, **({"load": _load_once} if kind in READING else {}))


def write_results(
    draft: Draft,
    dictionary: Path,
    path: Path,
    model: LanguageModel | None,
    *,
    evals: Sequence[str],
    configs: Mapping[str, Any],
) -> dict[str, Any]:
    """Score a dictionary into a results draft; return the manifest's facts."""
    manifest = read_manifest(dictionary)
    activations, site = open_store(path), manifest.facts["site"]
    origin = {
        "dictionary": manifest.content_hash, "store": activations.content_hash,
        "model": activations.model_fingerprint, "site": site,
    }  # fmt: skip
    loaded = dictionaries.load(dictionary).to(model.device if model is not None else "cpu")
    rows: list[ResultRow] = []
    for name in evals:
        with spinner(f"evaluate {name}"):
            rows += _evaluator(name, configs[name], site)(loaded, activations, model)
    n = write_rows(draft, rows, origin)
    return {"n_results": n, "evals": list(evals), "site": site}


def write_features(
    draft: Draft, dictionary: Path, path: Path, model: LanguageModel | None, config: IndexConfig
) -> dict[str, Any]:
    """Index a dictionary's features into a draft; return the manifest's facts."""
    manifest, source = read_manifest(dictionary), read_manifest(path)
    meta = {
        "dictionary": {
            "name": manifest.name,
            "content_hash": manifest.content_hash,
            "facts": manifest.facts,
        },
        "model": source.facts.get("model"),
        "store": source.content_hash,
    }
    loaded = dictionaries.load(dictionary).to(model.device if model is not None else "cpu")
    site = manifest.facts["site"]
    with Bar("index", 100, "%") as bar:
        return build(
            draft, loaded, open_store(path), model, config,
            site=site, meta=meta,
            report=lambda step, share: bar.update(round(100 * share), f"{step}, {share:.0%}"),
        )  # fmt: skip
