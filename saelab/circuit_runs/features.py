"""`saelab circuits features`: a sparse feature circuit as an artifact.

A *circuit* holds `graph.json`, what runs it again in `tensors.safetensors` (test prompts, means),
its curves in `results.jsonl`, and `viewer.json` for circuit-tracer's viewer.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from saelab import artifacts
from saelab.artifacts import Draft, Manifest, canonical_line
from saelab.circuit_runs import api as circuits_api
from saelab.circuit_runs.config import FeaturesConfig
from saelab.circuit_runs.inputs import (
    check_sites,
    chosen_dictionaries,
    find_or_make,
    load_dictionary,
    numbers,
    open_model,
    parted,
    prompts,
)
from saelab.circuits import curves as curves_of
from saelab.circuits import examples
from saelab.circuits.ability import TaskScore, require_able, score
from saelab.circuits.ablation import Faithfulness, Means
from saelab.circuits.attribution import passages
from saelab.circuits.contrast import Contrast, contrast_of
from saelab.circuits.curves import Curves
from saelab.circuits.edges import check_budget
from saelab.circuits.graph import Graph, build, positions, read_graph
from saelab.circuits.tasks import TaskData, draw
from saelab.circuits.viewer import Prompt, viewer_graph
from saelab.errors import ArtifactError, ConfigError, nearest
from saelab.protocols import LanguageModel
from saelab.results import read_rows
from saelab.stats import ResultRow

log = logging.getLogger(__name__)

GRAPH, TENSORS = "graph.json", "tensors.safetensors"
RESULTS, VIEWER = "results.jsonl", "viewer.json"
CEILING = "all latents, no errors"
"""Arm of the circuit of all latents."""
CURVES = {
    "faithfulness": "faithfulness",
    "completeness": "faithfulness of all other nodes",
    "faithfulness_of_ceiling": "share of the ceiling",
}
"""What is measured of circuits of growing size: names of rows, and what they are called."""
VERSION = 2
"""Of the rows of a circuit's results."""


def features(config: FeaturesConfig, *, wait: float = 0.0) -> Path:
    """Find or make a feature circuit; return its folder.

    Raises ArtifactError for dictionaries of another model, ConfigError for two of one site,
    SiteError for one of a site that the model lacks, TaskError if the model cannot do the task,
    ResourceError if the graph is too large.
    """
    chosen = chosen_dictionaries(config)
    by_site: dict[str, Path] = {}
    for path, manifest in chosen.items():
        first = by_site.setdefault(manifest.facts["site"], path)
        if first != path:
            raise ConfigError(
                f"a circuit takes one dictionary per site, but {first} and {path} are both of "
                f"{manifest.facts['site']}; drop one"
            )
    model = open_model(config)
    check_sites(model, chosen)
    inputs = {
        "model": model.fingerprint,
        "task": numbers(config.task) | {"version": examples.VERSION},
        "attribution": numbers(config.attribution),
        "graph": numbers(config.graph),
        "curves": config.curves.plain(),
    }

    def fill(draft: Draft) -> dict[str, Any]:
        return _write_circuit(draft, model, config, by_site)

    found = find_or_make(config, "circuit", inputs, list(chosen), fill, wait=wait)
    circuits_api.require_able(found, force=config.task.force)
    return found


def _write_circuit(
    draft: Draft, model: LanguageModel, config: FeaturesConfig, by_site: Mapping[str, Path]
) -> dict[str, Any]:
    """Find a circuit and measure it; return the manifest's facts."""
    own = {site: load_dictionary(path, model) for site, path in by_site.items()}
    n = config.task.pairs + config.task.test_pairs
    stream = partial(draw, config.task.name, model, seed=config.task.seed)
    data = prompts(stream, n, config.task)
    able = score(model, data, batch=config.attribution.batch)
    log.info("%s", able)
    require_able(able, force=config.task.force)
    first, others = parted(data, config.task.pairs)
    tested, pairs = data.rows(others), contrast_of(data, leave=model.special_ids)
    discovery, test = pairs.select(first), pairs.select(others)
    batch, seed = config.attribution.batch, config.task.seed
    check_budget(model, discovery, own, config.graph.nodes, batch=batch, gb=config.graph.memory_gb)
    measure = Faithfulness(model, test, own, batch=batch, seed=seed)
    between = passages(model, discovery, own, config.attribution)
    graph = build(
        model, discovery, own, between=between, name=config.name, config=config.attribution,
        n_nodes=config.graph.nodes, edge_share=config.graph.edge_share,
    )  # fmt: skip
    graph = _with_lineage(graph, by_site)
    log.info("graph of %d nodes and %d edges", len(graph.nodes), len(graph.edges))
    measured = curves_of.curves(measure, discovery, between, config.curves, seed=seed)
    artifacts.write_json(draft.folder / GRAPH, graph.plain())
    artifacts.write_json(draft.folder / VIEWER, viewer_graph(graph, _shown(model, tested, test)))
    draft.write(TENSORS, safetensors.torch.save(_tensors(tested, measure.means)))
    rows = list(_circuit_rows(able, measured, config))
    draft.write(RESULTS, [canonical_line(row.plain()) for row in rows])
    return {
        "task": config.task.name,
        "metric": data.metric,
        "ability": vars(able),
        "attributes": {name: list(values) for name, values in tested.attributes.items()},
        "model": config.model.plain() | {"name": model.name},
        "sites": list(own),
        "n_nodes": len(graph.nodes),
        "n_edges": len(graph.edges),
        "ceiling": measured.ceiling.value,
        "clean": measured.clean,
        "empty": measured.empty,
    }


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


def _circuit_rows(able: TaskScore, measured: Curves, config: FeaturesConfig) -> Iterator[ResultRow]:
    """Yield a circuit's numbers as result rows."""
    n = measured.n_prompts

    def row(
        name: str, value: float, error: float | None, arm: str, unit: str = "share"
    ) -> ResultRow:
        return ResultRow(name, value, unit, n, error, VERSION, arm, evaluator="circuit")

    yield row("accuracy", able.accuracy, able.accuracy_error, "model")
    yield row("metric", measured.clean, None, "model", "metric")
    yield row("metric", measured.empty, None, "no nodes", "metric")
    ceiling = measured.ceiling
    yield row("faithfulness", ceiling.value, ceiling.standard_error, CEILING)
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
            yield row(f"nodes_at_{config.curves.enough:.0%}", float(reached), None, arm, "nodes")


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
    graph = read_graph(path / GRAPH)
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


@dataclass(frozen=True)
class CurvePoint:
    """One number of one measured circuit."""

    n_nodes: int
    value: float
    standard_error: float | None


def read_curves(path: Path, name: str = "faithfulness") -> dict[str, list[CurvePoint]]:
    """Return the curves of one of `CURVES` of a finished circuit: by arm, smallest first.

    Arms of which it is not measured are left out. Raises ConfigError for another name.
    """
    if name not in CURVES:
        raise ConfigError(f"circuits have no curve {name!r}; {nearest(name, list(CURVES))}")
    found: dict[str, list[CurvePoint]] = {}
    for row in read_rows(path):
        arm, is_point, n = row["arm"].partition("(n=")
        if row["name"] == name and is_point:
            point = CurvePoint(int(n.rstrip(")")), row["value"], row["standard_error"])
            found.setdefault(arm, []).append(point)
    return {arm: sorted(points, key=lambda p: p.n_nodes) for arm, points in found.items()}
