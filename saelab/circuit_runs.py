"""Runs of circuits: a configuration, the prompts, the dictionaries, and one artifact.

`features` makes a *circuit*: `graph.json`, what is needed to run it again in `tensors.safetensors`
(prompts, means), its curves in `results.jsonl`, and `viewer.json` for circuit-tracer's viewer.
`supervised` makes a *supervised* evaluation: `results.jsonl`. Both are found again by their key.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from saelab import api, artifacts, assets, dictionaries
from saelab.artifacts import Draft, Manifest, canonical_line
from saelab.circuit_config import (
    CircuitConfig,
    FeaturesConfig,
    RandomDecoderConfig,
    SupervisedRunConfig,
)
from saelab.circuits import curves as curves_of
from saelab.circuits import examples
from saelab.circuits.ability import TaskScore, require_able, score
from saelab.circuits.ablation import Faithfulness, Means
from saelab.circuits.attribution import attribute
from saelab.circuits.contrast import Contrast, contrast_of
from saelab.circuits.curves import Curves
from saelab.circuits.graph import Graph, build, positions
from saelab.circuits.supervised import SupervisedEvaluation
from saelab.circuits.tasks import TaskData, draw
from saelab.circuits.vectors import vectors
from saelab.circuits.viewer import Prompt, viewer_graph
from saelab.config import Config
from saelab.errors import ArtifactError, ConfigError
from saelab.models import resolve_device
from saelab.protocols import Dictionary, LanguageModel
from saelab.stages import Stages, Work
from saelab.stats import ResultRow

log = logging.getLogger(__name__)

GRAPH, TENSORS, RESULTS, VIEWER = (
    "graph.json",
    "tensors.safetensors",
    "results.jsonl",
    "viewer.json",
)
RANDOM = "random decoder"
VERSION = 1
"""Of the rows of a circuit's results."""


# ------------------------------------------------------------------------------------------- stages


def features(config: FeaturesConfig, *, wait: float = 0.0) -> Path:
    """Find or make a feature circuit; return its folder.

    Raises ArtifactError for dictionaries of another model or two of one site, TaskError if the
    model cannot do the task, ResourceError if the graph is too large.
    """
    chosen = _dictionaries(config)
    by_site = {manifest.facts["site"]: path for path, manifest in chosen.items()}
    if len(by_site) < len(chosen):
        raise ConfigError("a circuit takes one dictionary per site, but two are of the same site")
    model = _model(config)
    inputs = {
        "model": model.fingerprint,
        "task": config.task.plain() | {"version": examples.VERSION},
        "attribution": _numbers(config.attribution),
        "graph": config.graph.plain(),
        "curves": config.curves.plain(),
    }

    def fill(draft: Draft) -> dict[str, Any]:
        return _write_circuit(draft, model, config, by_site)

    return _find_or_make(config, "circuit", inputs, list(chosen), fill, wait)


def supervised(config: SupervisedRunConfig, *, wait: float = 0.0) -> Path:
    """Find or make a supervised evaluation; return its folder.

    Raises ArtifactError for dictionaries of another model, ConfigError if they are of several
    sites, or for a task whose prompts have no attributes.
    """
    chosen = _dictionaries(config)
    sites = {manifest.facts["site"] for manifest in chosen.values()}
    if len(sites) > 1:
        raise ConfigError(
            f"dictionaries are compared at one site, but these are of {', '.join(sorted(sites))}"
        )
    model, (site,) = _model(config), sites
    inputs = {
        "model": model.fingerprint,
        "task": config.task.plain() | {"version": examples.VERSION},
        "supervised": _numbers(config.supervised),
        "random_decoder": config.random_decoder and config.random_decoder.plain(),
    }

    def fill(draft: Draft) -> dict[str, Any]:
        return _write_supervised(draft, model, config, chosen, site)

    return _find_or_make(config, "supervised", inputs, list(chosen), fill, wait)


def _find_or_make(
    config: CircuitConfig,
    stage: str,
    inputs: dict[str, Any],
    parents: list[Path],
    fill: Any,
    wait: float,
) -> Path:
    stages = Stages(assets.cache_dir(), dry=False, wait=wait)
    work = Work(stage, config.name, inputs, [artifacts.parent_of(path) for path in parents])
    found = stages.find(work, config.out)
    if found is None:
        found = stages.make(work, config.out, fill, config.device)
        assert found is not None
    return found


def _numbers(config: Config) -> dict[str, Any]:
    """Return the fields that change the numbers: all but the size of batches."""
    return {key: value for key, value in config.plain().items() if key != "batch"}


def _model(config: CircuitConfig) -> LanguageModel:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    return api.load_model(config.model.source, dtype=config.model.dtype, device=device)


def _dictionaries(config: CircuitConfig) -> dict[Path, Manifest]:
    """Return the finished dictionaries of a configuration, all of its model."""
    if not config.dictionaries:
        raise ConfigError("dictionaries: give at least one finished dictionary's folder")
    chosen = {path: artifacts.read_manifest(path) for path in map(_finished, config.dictionaries)}
    for path, manifest in chosen.items():
        if manifest.stage != "dictionary":
            raise ArtifactError(f"{path} is a {manifest.stage}, but a dictionary is wanted")
        source = (manifest.facts.get("model") or {}).get("source")
        if source is not None and source != config.model.source:
            raise ArtifactError(
                f"{path} was trained on activations of {source}, but the circuit is of "
                f"{config.model.source}: give dictionaries of this model"
            )
    return chosen


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


# ------------------------------------------------------------------------------- feature circuits


def _write_circuit(
    draft: Draft, model: LanguageModel, config: FeaturesConfig, by_site: Mapping[str, Path]
) -> dict[str, Any]:
    """Find a circuit and measure it; return the manifest's facts."""
    own = {site: _load(path, model) for site, path in by_site.items()}
    n = config.task.pairs + config.task.test_pairs
    data = draw(config.task.name, model, n, seed=config.task.seed)
    able = score(model, data, batch=config.attribution.batch)
    log.info("%s", able)
    require_able(able, force=config.task.force)
    first, others = _interleaved(data, config.task.pairs)
    tested, pairs = data.rows(others), contrast_of(data, leave=model.special_ids)
    discovery, test = pairs.select(first), pairs.select(others)
    batch, seed = config.attribution.batch, config.task.seed
    measure = Faithfulness(model, test, own, batch=batch, seed=seed)
    effects = attribute(model, discovery, own, config.attribution)
    log.info("effects of %d nodes", sum(e.mean.numel() for e in effects.values()))
    graph = build(
        model, discovery, own, effects=effects, name=config.name, config=config.attribution,
        n_nodes=config.graph.nodes, edge_share=config.graph.edge_share,
        memory_gb=config.graph.memory_gb,
    )  # fmt: skip
    graph = _with_lineage(graph, by_site)
    log.info("graph of %d nodes and %d edges", len(graph.nodes), len(graph.edges))
    measured = curves_of.curves(
        measure, discovery, effects, config.curves, attribution=config.attribution, seed=seed
    )
    artifacts.write_json(draft.folder / GRAPH, graph.plain())
    artifacts.write_json(draft.folder / VIEWER, viewer_graph(graph, _shown(model, tested, test)))
    draft.write(TENSORS, safetensors.torch.save(_tensors(tested, measure.means)))
    rows = list(_circuit_rows(able, measured, config))
    draft.write(RESULTS, [canonical_line(row.plain()) for row in rows])
    return {
        "task": config.task.name,
        "metric": data.metric,
        "attributes": {name: list(values) for name, values in tested.attributes.items()},
        "model": config.model.plain() | {"name": model.name},
        "sites": list(own),
        "n_nodes": len(graph.nodes),
        "n_edges": len(graph.edges),
        "ceiling": measured.ceiling.value,
        "clean": measured.clean,
        "empty": measured.empty,
    }


def _interleaved(data: TaskData, pairs: int) -> tuple[Tensor, Tensor]:
    """Return the rows for discovery and for test: both have every template as often as they can."""
    order = data.templates.argsort(stable=True)
    number, n = torch.arange(len(order)), len(order)
    first = (number + 1) * pairs // n > number * pairs // n
    return order[first].sort().values, order[~first].sort().values


def _load(path: Path, model: LanguageModel) -> Any:
    return dictionaries.load(path).to(model.device)


def _with_lineage(graph: Graph, by_site: Mapping[str, Path]) -> Graph:
    sites = []
    for site in graph.sites:
        manifest = artifacts.read_manifest(by_site[site.name])
        sites.append(replace(site, dictionary=manifest.name, content_hash=manifest.content_hash))
    return replace(graph, sites=tuple(sites))


def _shown(model: LanguageModel, data: TaskData, contrast: Contrast) -> Prompt:
    """Return the first test prompt, as the viewer shows it."""
    length = int(data.lengths[0])
    tokens = data.clean[0, :length].tolist()
    at = positions(contrast)
    logits = model.logits(data.clean[:1, :length])[0, -1].softmax(-1)
    right = [i for i in data.right[0].tolist() if i >= 0]
    names = model.to_strings(right)
    return Prompt(
        tokens, model.to_strings(tokens),
        {name: int(at[i]) for i, name in enumerate(contrast.slot_names) if int(at[i]) >= 0},
        [(i, name, float(logits[i])) for i, name in zip(right, names, strict=True)],
    )  # fmt: skip


def _tensors(data: TaskData, means: Mapping[str, Means]) -> dict[str, Tensor]:
    """Return what is needed to run the circuit again: the test prompts, and the means."""
    found = {f"prompts.{k}": v for k, v in vars(data).items() if isinstance(v, Tensor)}
    found |= {f"slots.{name}": at for name, at in data.slots.items()}
    for site, mean in means.items():
        found |= {f"means.{site}.f": mean.f.cpu(), f"means.{site}.error": mean.error.cpu()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _circuit_rows(able: TaskScore, measured: Curves, config: FeaturesConfig) -> Any:
    """Yield a circuit's numbers as result rows."""
    n = measured.n_prompts

    def row(name: str, value: float, error: float | None, arm: str, unit: str = "share") -> Any:
        return ResultRow(name, value, unit, n, error, VERSION, arm, evaluator="circuit")

    yield row("accuracy", able.accuracy, able.accuracy_error, "model")
    yield row("metric", measured.clean, None, "model", "metric")
    yield row("metric", measured.empty, None, "no nodes", "metric")
    ceiling = measured.ceiling
    yield row("faithfulness", ceiling.value, ceiling.standard_error, "all latents, no errors")
    for point in measured.points:
        arm = f"{point.arm}(n={point.n_nodes})"
        for name, share in (
            ("faithfulness", point.faithfulness),
            ("completeness", point.completeness),
            ("faithfulness_of_ceiling", point.of_ceiling),
        ):
            if share is not None:
                yield row(name, share.value, share.standard_error, arm)
    for arm in (curves_of.CIRCUIT, curves_of.LATENTS):
        reached = measured.nodes_at(config.curves.enough, arm)
        if reached is not None:
            yield row(f"nodes_at_{config.curves.enough:.0%}", reached, None, arm, "nodes")


@dataclass(frozen=True)
class Circuit:
    """A finished circuit, with what runs it again."""

    graph: Graph
    prompts: TaskData
    """The test prompts."""
    means: dict[str, Means]
    """Per site, what nodes outside a circuit are held at."""
    manifest: Manifest


def open_circuit(path: Path) -> Circuit:
    """Read a finished circuit. Raises ArtifactError if it is none."""
    manifest = artifacts.read_manifest(path)
    if manifest.stage != "circuit":
        raise ArtifactError(f"{path} is a {manifest.stage}, but a circuit is wanted")
    graph = Graph.parse(artifacts.read_json(path / GRAPH), str(path / GRAPH))
    tensors, facts = safetensors.torch.load_file(path / TENSORS), manifest.facts
    parts = {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith("prompts.")}
    prompts = TaskData(
        name=facts["task"], metric=facts["metric"],
        slots={k.removeprefix("slots."): t for k, t in tensors.items() if k.startswith("slots.")},
        attributes={name: tuple(values) for name, values in facts["attributes"].items()},
        **parts,
    )  # fmt: skip
    means = {
        site.name: Means(tensors[f"means.{site.name}.f"], tensors[f"means.{site.name}.error"])
        for site in graph.sites
    }
    return Circuit(graph, prompts, means, manifest)


# --------------------------------------------------------------------------- supervised evaluation


def _write_supervised(
    draft: Draft,
    model: LanguageModel,
    config: SupervisedRunConfig,
    chosen: Mapping[Path, Manifest],
    site: str,
) -> dict[str, Any]:
    """Hold dictionaries against labels; return the manifest's facts."""
    n = config.task.fit + config.task.test
    data = draw(config.task.name, model, n, seed=config.task.seed)
    test, fit = (data.rows(rows) for rows in _interleaved(data, config.task.test))
    able = score(model, test, batch=config.supervised.batch)
    log.info("%s", able)
    require_able(able, force=config.task.force)
    evaluation = SupervisedEvaluation(
        model, site, fit, test, config.supervised, seed=config.task.seed
    )
    section = evaluation.section
    log.info("%s at %s: %.0f %%", section.site, ", ".join(section.slots), 100 * section.moved)
    arms = {manifest.name: _load(path, model) for path, manifest in chosen.items()}
    if config.random_decoder is not None:
        arms[RANDOM] = random_decoder(model, fit, site, config.random_decoder)
    origin = {"site": site, "model": model.fingerprint}
    rows = list(evaluation.rows(arms))
    draft.write(RESULTS, [canonical_line(row.plain() | origin) for row in rows])
    return {
        "task": config.task.name,
        "model": config.model.plain() | {"name": model.name},
        "site": site,
        "slots": list(section.slots),
        "moved": section.moved,
        "n_results": len(rows),
    }


def random_decoder(
    model: LanguageModel, data: TaskData, site: str, config: RandomDecoderConfig
) -> Dictionary:
    """Return an untrained TopK dictionary: random unit directions, an encoder tied to them, and the
    median of the prompts' activations as bias."""
    every = [name for name, at in data.slots.items() if bool((at >= 0).all())]
    x = vectors(model, data, site, every).flatten(0, 1)
    made = dictionaries.create(
        {"type": "topk", "d_in": x.shape[1], "d_sae": config.d_sae, "k": config.k}
    ).to(model.device)
    made.init_(x.float(), torch.Generator().manual_seed(config.seed))  # pyright: ignore[reportAttributeAccessIssue]
    return made
