"""A circuit that is looked at: its place in the run's folder, and the model without some nodes.

No Streamlit here.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import artifacts
from saelab.circuit_runs.features import Circuit
from saelab.circuits.ablation import circuit_metric
from saelab.circuits.contrast import clean_metric, contrast_of
from saelab.circuits.graph import Edge, Graph, Node
from saelab.circuits.nodes import every
from saelab.protocols import Dictionary, LanguageModel
from saelab_app.library import Entry

PROMPTS = 8
"""Test prompts that are run while one waits."""


@dataclass(frozen=True)
class Switched:
    """The metric of some prompts in the whole model, and without some nodes."""

    before: Float[Tensor, " n"]
    after: Float[Tensor, " n"]


def folders(run: Path) -> list[Path]:
    """Return the finished circuits of a run, newest first. Raises ArtifactError for one of another
    schema."""
    return [path for path, _ in reversed(artifacts.find_all(run, "circuit"))]


def entries_of(graph: Graph, entries: Sequence[Entry]) -> dict[str, Entry]:
    """Return the dictionary of each site of a graph, where it lies in the run's folder."""
    known = {
        artifacts.read_manifest(entry.path).content_hash: entry
        for entry in entries
        if entry.path is not None and not entry.running
    }
    return {s.name: known[s.content_hash] for s in graph.sites if s.content_hash in known}


def switched_off(
    model: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    circuit: Circuit,
    off: Collection[str],
    *,
    prompts: int = PROMPTS,
) -> Switched:
    """Run test prompts with and without the nodes with these ids; they take their means.

    Raises ArtifactError for an id that the graph has not.
    """
    graph = circuit.graph
    data = circuit.prompts.rows(torch.arange(min(prompts, len(circuit.prompts))))
    contrast = contrast_of(data, leave=model.special_ids, slot_names=graph.slots)
    sizes = {site.name: torch.empty(len(graph.slots), site.d_sae + 1) for site in graph.sites}
    kept = every(sizes)
    for name in off:
        place = graph.place(graph.node(name))
        kept[place.site][place.slot, place.column] = False
    after = circuit_metric(model, contrast, dictionaries, kept, circuit.means)
    return Switched(clean_metric(model, contrast), after)


def largest(graph: Graph, n: int) -> tuple[list[Node], list[Edge]]:
    """Return the nodes with the largest effects, and the edges between them."""
    nodes = list(graph.nodes[:n])
    ids = {node.id for node in nodes}
    return nodes, [e for e in graph.edges if e.source in ids and e.target in ids]
