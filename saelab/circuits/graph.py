"""A circuit as a graph: nodes with readable ids, edges between them, and what of the effect it has.

Ids say where a node is: `blocks.10.hook_resid_post/417@end` is latent 417 at slot `end`,
`blocks.10.hook_resid_post/error@end` the error there; `metric` is where edges end. The nodes are
chosen by attribution before an edge is computed, so that a graph's size is known beforehand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab import artifacts
from saelab.circuits.attribution import (
    AttributionConfig,
    Passage,
    SiteEffects,
    effects_of,
    passages,
)
from saelab.circuits.bases import Directions, in_forward_order
from saelab.circuits.contrast import Contrast, clean_metric
from saelab.circuits.edges import check_budget, edges, outflow
from saelab.circuits.nodes import Place, places, ranked
from saelab.errors import ArtifactError
from saelab.protocols import LanguageModel

SCHEMA = 2
METRIC = "metric"
"""Id of the node at which edges end."""

Kind = Literal["latent", "error"]


@dataclass(frozen=True)
class Node:
    """A latent, or a dictionary's error, at one slot of one site."""

    site: str
    slot: str
    latent: int | None
    """None: the error."""
    effect: float
    """How much the metric falls when it takes its value in the corrupted prompt."""
    standard_error: float
    """Of the effect, over prompts."""
    activation: float
    """Mean |f| over clean prompts, or ‖r‖ of an error."""
    outflow: float
    """Sum of its edges into everything after it, whether in the graph or not (`edges.outflow`)."""

    @property
    def id(self) -> str:
        """Its readable name."""
        return node_id(self.site, self.latent, self.slot)

    @property
    def kind(self) -> Kind:
        """What it is."""
        return "error" if self.latent is None else "latent"


@dataclass(frozen=True)
class Edge:
    """The part of `source`'s effect that goes through `target`, and through no site between."""

    source: str
    target: str
    weight: float


@dataclass(frozen=True)
class GraphSite:
    """A site of a graph, and the dictionary that its latents are of."""

    name: str
    layer: int | None
    d_sae: int
    dictionary: str = ""
    """What the dictionary is called."""
    content_hash: str = ""
    """Of the dictionary's artifact; empty for one that lies nowhere."""


@dataclass(frozen=True)
class Graph:
    """A circuit of some prompts; averages are over them."""

    name: str
    sites: tuple[GraphSite, ...]
    """In forward order."""
    slots: tuple[str, ...]
    """A slot's number is its place here."""
    nodes: tuple[Node, ...]
    """By |effect|, largest first."""
    edges: tuple[Edge, ...]
    clean: float
    """Mean metric of the clean prompts."""
    corrupted: float | None
    """The same of the corrupted ones; None where there are none."""
    n_prompts: int
    share: float
    """Σ|effect| of the nodes, of that of all nodes there are."""

    @property
    def mismatch(self) -> float:
        """How far edges are from adding up to effects: Σ|outflow − effect| / Σ|effect| over nodes.

        0 with effects of method `attribution`.
        """
        off = sum(abs(node.outflow - node.effect) for node in self.nodes)
        whole = sum(abs(node.effect) for node in self.nodes)
        return off / whole if whole else 0.0

    def node(self, name: str) -> Node:
        """Return a node by its id. Raises ArtifactError if there is none."""
        for node in self.nodes:
            if node.id == name:
                return node
        raise ArtifactError(f"the graph {self.name} has no node {name!r}; it has {len(self.nodes)}")

    def place(self, node: Node) -> Place:
        """Return the site, slot number and column of a node."""
        site = next(s for s in self.sites if s.name == node.site)
        column = site.d_sae if node.latent is None else node.latent
        return Place(node.site, self.slots.index(node.slot), column)

    def plain(self) -> dict[str, Any]:
        """Return JSON-ready data; nodes carry their ids and kinds."""
        data = asdict(self)
        data["nodes"] = [asdict(n) | {"id": n.id, "kind": n.kind} for n in self.nodes]
        return {"schema": SCHEMA} | data

    @staticmethod
    def parse(data: Any, origin: str = "the graph") -> "Graph":
        """Take up what `plain` gave. Raises ArtifactError if it is something else."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ArtifactError(f"{origin} does not describe a circuit of schema {SCHEMA}")
        fields = {k: v for k, v in data.items() if k != "schema"}
        try:
            nodes = [{k: v for k, v in n.items() if k not in ("id", "kind")} for n in data["nodes"]]
            return Graph(
                **fields
                | {
                    "sites": tuple(GraphSite(**site) for site in data["sites"]),
                    "slots": tuple(data["slots"]),
                    "nodes": tuple(Node(**node) for node in nodes),
                    "edges": tuple(Edge(**edge) for edge in data["edges"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{origin} is no circuit, or was altered: {error}") from None


def read_graph(path: Path) -> Graph:
    """Read a `graph.json`. Raises ArtifactError if it is none."""
    return Graph.parse(artifacts.read_json(path), str(path))


def node_id(site: str, latent: int | None, slot: str) -> str:
    """Return a node's readable name: `site/latent@slot`."""
    return f"{site}/{'error' if latent is None else latent}@{slot}"


def build(
    model: LanguageModel,
    contrast: Contrast,
    dictionaries: Mapping[str, Directions],
    *,
    n_nodes: int,
    config: AttributionConfig | None = None,
    edge_share: float = 0.01,
    memory_gb: float | None = None,
    name: str = "circuit",
    between: Mapping[str, Passage] | None = None,
) -> Graph:
    """Return the graph of the `n_nodes` nodes with the largest |effect|.

    Edges below `edge_share` of the metric's difference between clean and corrupted prompts (of its
    clean value, where there are none) are left out. `between`, the prompts' `passages`, is reused.
    Raises ResourceError, with the number of nodes that fits, before anything is computed if that
    would take more than `memory_gb`.
    """
    config = config or AttributionConfig()
    dictionaries = in_forward_order(model, dictionaries)
    check_budget(model, contrast, dictionaries, n_nodes, batch=config.batch, gb=memory_gb)
    if between is None:
        between = passages(model, contrast, dictionaries, config)
    effects = {
        site: effects_of(contrast, dictionary, between[site], batch=config.batch)
        for site, dictionary in dictionaries.items()
    }
    scores = {site: found.mean for site, found in effects.items()}
    chosen = places(scores, ranked(scores)[:n_nodes])
    weights = edges(model, contrast, dictionaries, chosen, between, batch=config.batch)
    sent = outflow(model, contrast, dictionaries, chosen, between, batch=config.batch).tolist()
    nodes = [
        _node(place, effects[place.site], contrast.slot_names, out)
        for place, out in zip(chosen, sent, strict=True)
    ]
    clean = float(clean_metric(model, contrast, batch=config.batch).mean())
    corrupted = None
    if contrast.corrupted is not None:
        corrupted = float(clean_metric(model, contrast, batch=config.batch, corrupted=True).mean())
    least = edge_share * abs(clean - (corrupted or 0.0))
    everything = sum(float(s.abs().sum()) for s in scores.values())
    return Graph(
        name=name,
        sites=tuple(
            GraphSite(site, model.site(site).layer, d.d_sae) for site, d in dictionaries.items()
        ),
        slots=contrast.slot_names,
        nodes=tuple(nodes),
        edges=tuple(_edges([node.id for node in nodes], weights, least)),
        clean=clean,
        corrupted=corrupted,
        n_prompts=len(contrast),
        share=sum(abs(node.effect) for node in nodes) / everything if everything else 1.0,
    )  # fmt: skip


def _node(place: Place, effects: SiteEffects, slot_names: Sequence[str], outflow: float) -> Node:
    tables = (effects.mean, effects.standard_error, effects.activation)
    effect, error, activation = (float(table[place.slot, place.column]) for table in tables)
    latent = None if place.column == effects.mean.shape[1] - 1 else place.column
    return Node(place.site, slot_names[place.slot], latent, effect, error, activation, outflow)


def _edges(ids: Sequence[str], weights: Float[Tensor, "nodes targets"], least: float) -> list[Edge]:
    targets = [*ids, METRIC]
    kept = ((weights.abs() >= least) & (weights != 0)).nonzero().tolist()
    return [Edge(ids[int(i)], targets[int(j)], float(weights[i, j])) for i, j in kept]


def positions(contrast: Contrast, row: int = 0) -> Int[Tensor, " slots"]:
    """Return where each slot first stands in a prompt, −1 where it does not."""
    slots = contrast.slots[row]
    found = torch.full((contrast.n_slots,), -1)
    for place in reversed(range(len(slots))):
        if slots[place] >= 0:
            found[slots[place]] = place
    return found
