"""Graphs in the format that circuit-tracer writes, for its viewer and for Neuronpedia's.

`viewer_graph.schema.json` lists what the format requires. The format knows one prompt, and one
dictionary per layer: latents get the number of their site among the graph's sites as `layer` (its
layer in the model, where no two sites share one), and a slot becomes its position in the prompt
that is shown. `influence` is the share of Σ|effect| that nodes up to this one have, which is what
the viewer's pruning goes by; each node's readable id stands in `clerp`. Links carry edges as they
are; edges into the metric end at the first right answer.

The format: github.com/safety-research/circuit-tracer, `circuit_tracer/frontend/graph_models.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from saelab.circuits.graph import METRIC, Graph, Node
from saelab.errors import ArtifactError

_KINDS = {"latent": "cross layer transcoder", "error": "mlp reconstruction error"}
_ERROR = -1
"""Where the format has a latent's number."""


@dataclass(frozen=True)
class Prompt:
    """The prompt that a graph is shown on."""

    tokens: Sequence[int]
    strings: Sequence[str]
    """The tokens as text."""
    positions: Mapping[str, int]
    """Where each slot stands in it; slots that it has not are left out."""
    answers: Sequence[tuple[int, str, float]]
    """Right answers: token id, text, and the model's probability at the last position."""


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the format."""
    text = resources.files(__package__).joinpath("viewer_graph.schema.json").read_text("utf-8")
    return json.loads(text)


def viewer_graph(
    graph: Graph, prompt: Prompt, *, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a graph as JSON-ready data of the format.

    Nodes at slots that the prompt has not are left out, with their edges. `labels` gives nodes a
    text by id beside their id. Raises ArtifactError if the prompt has no answer, or none of the
    graph's slots.
    """
    shown = [node for node in graph.nodes if node.slot in prompt.positions]
    if not shown or not prompt.answers:
        raise ArtifactError(
            f"the prompt has none of the slots or no answer of the graph {graph.name}: export it "
            "with a prompt of the task that it was found on"
        )
    layers = _layers(graph)
    nodes = {n.id: _node(n, layers, prompt, labels or {}) for n in shown}
    _add_influence(shown, nodes)
    answers = [_answer(*answer, graph, prompt) for answer in prompt.answers]
    ids = {name: data["node_id"] for name, data in nodes.items()}
    ids[METRIC] = answers[0]["node_id"]
    tokens = [_token(position, token) for position, token in enumerate(prompt.tokens)]
    return {
        "metadata": {
            "slug": "".join(c if c.isalnum() or c in "._-" else "-" for c in graph.name),
            "scan": f"custom-{graph.name}",
            "transcoder_list": [site.dictionary or site.name for site in graph.sites],
            "prompt_tokens": list(prompt.strings),
            "prompt": "".join(prompt.strings),
            "node_threshold": None,
            "schema_version": 1,
        },
        "qParams": {
            "pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": "",
        },
        "nodes": [*nodes.values(), *tokens, *answers],
        "links": [
            {"source": ids[edge.source], "target": ids[edge.target], "weight": edge.weight}
            for edge in graph.edges
            if edge.source in ids and edge.target in ids
        ],
    }  # fmt: skip


def _layers(graph: Graph) -> dict[str, int]:
    """Return each site's layer: the model's, or the site's place in the graph where two share
    one."""
    own = {site.name: site.layer for site in graph.sites if site.layer is not None}
    if len(set(own.values())) == len(graph.sites):
        return own
    return {site.name: place for place, site in enumerate(graph.sites)}


def _node(
    node: Node, layers: Mapping[str, int], prompt: Prompt, labels: Mapping[str, str]
) -> dict[str, Any]:
    layer, position = layers[node.site], prompt.positions[node.slot]
    latent = _ERROR if node.latent is None else node.latent
    last = position if node.latent is None else 0
    label = labels.get(node.id)
    return {
        "node_id": f"{layer}_{latent}_{position}",
        "feature": _ERROR if node.latent is None else cantor(layer, latent),
        "layer": str(layer),
        "ctx_idx": position,
        "feature_type": _KINDS[node.kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "jsNodeId": f"{layer}_{latent}-{last}",
        "clerp": f"{node.id} · {label}" if label else node.id,
        "influence": None,
        "activation": node.activation,
    }


def _add_influence(shown: Sequence[Node], nodes: Mapping[str, dict[str, Any]]) -> None:
    """Give every node the share of Σ|effect| that it has with all larger ones."""
    total, so_far = sum(abs(node.effect) for node in shown), 0.0
    for node in sorted(shown, key=lambda node: -abs(node.effect)):
        so_far += abs(node.effect)
        nodes[node.id]["influence"] = min(so_far / total, 1.0) if total else 1.0


def _token(position: int, token: int) -> dict[str, Any]:
    return {
        "node_id": f"E_{token}_{position}", "feature": position, "layer": "E",
        "ctx_idx": position, "feature_type": "embedding", "token_prob": 0.0,
        "is_target_logit": False, "jsNodeId": f"E_{token}-{position}", "clerp": "",
        "influence": None, "activation": None,
    }  # fmt: skip


def _answer(
    token: int, text: str, probability: float, graph: Graph, prompt: Prompt
) -> dict[str, Any]:
    layer, last = max(_layers(graph).values()) + 1, len(prompt.tokens) - 1
    return {
        "node_id": f"{layer}_{token}_{last}", "feature": token, "layer": str(layer),
        "ctx_idx": last, "feature_type": "logit", "token_prob": probability,
        "is_target_logit": token == prompt.answers[0][0], "jsNodeId": f"L_{token}-{last}",
        "clerp": f'Output "{text}" (p={probability:.3f})', "influence": None, "activation": None,
    }  # fmt: skip


def cantor(a: int, b: int) -> int:
    """Return the one number that stands for a pair: (a + b)(a + b + 1) / 2 + b."""
    return (a + b) * (a + b + 1) // 2 + b
