"""The exported graph is what the schema of circuit-tracer's viewer requires."""

import copy

import jsonschema
import pytest

from saelab.circuits.graph import METRIC, Edge, Graph, GraphSite, Node
from saelab.circuits.viewer import Prompt, cantor, schema, viewer_graph
from saelab.errors import ArtifactError

SITES = (GraphSite("blocks.3.hook_resid_post", 3, 8, "topk-3"), GraphSite("blocks.7.x", 7, 8))
NODES = (
    Node("blocks.3.hook_resid_post", "s2", 5, 2.0, 0.1, 1.5, 2.0),
    Node("blocks.7.x", "end", None, -1.0, 0.1, 0.5, -0.5),
    Node("blocks.7.x", "end", 0, 1.0, 0.1, 0.5, 1.0),
    Node("blocks.3.hook_resid_post", "elsewhere", 1, 0.5, 0.1, 0.5, 0.5),
)
EDGES = (
    Edge(NODES[0].id, NODES[1].id, 0.7),
    Edge(NODES[1].id, METRIC, -1.0),
    Edge(NODES[3].id, METRIC, 0.5),
)
GRAPH = Graph("ioi circuit", SITES, ("s2", "end", "elsewhere"), NODES, EDGES, 3.0, -2.0, 16, 0.4)
PROMPT = Prompt((4, 9, 2), ("Then", " Mary", " to"), {"s2": 1, "end": 2}, [(6, " Mary", 0.8)])


@pytest.fixture
def exported():
    return viewer_graph(GRAPH, PROMPT, labels={NODES[0].id: "names"})


def test_the_exported_graph_validates(exported):
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(exported, schema())


@pytest.mark.parametrize("part", ["metadata", "qParams", "nodes", "links"])
def test_every_field_of_the_format_is_required(exported, part):
    piece = exported[part][0] if isinstance(exported[part], list) else exported[part]
    for key in piece:
        broken = copy.deepcopy(exported)
        del (broken[part][0] if isinstance(broken[part], list) else broken[part])[key]
        with pytest.raises(jsonschema.ValidationError, match=key):
            jsonschema.validate(broken, schema())


def test_nodes_are_where_the_prompt_has_their_slots(exported):
    by_id = {node["node_id"]: node for node in exported["nodes"]}
    assert list(by_id) == ["3_5_1", "7_-1_2", "7_0_2", "E_4_0", "E_9_1", "E_2_2", "8_6_2"]
    assert by_id["3_5_1"]["feature"] == cantor(3, 5) == 41
    assert by_id["3_5_1"]["clerp"] == "blocks.3.hook_resid_post/5@s2 · names"
    assert by_id["7_-1_2"]["feature_type"] == "mlp reconstruction error"
    assert [by_id[i]["influence"] for i in ("3_5_1", "7_-1_2", "7_0_2")] == [0.5, 0.75, 1.0]
    assert by_id["8_6_2"]["is_target_logit"] and by_id["8_6_2"]["token_prob"] == 0.8
    assert exported["links"] == [
        {"source": "3_5_1", "target": "7_-1_2", "weight": 0.7},
        {"source": "7_-1_2", "target": "8_6_2", "weight": -1.0},
    ]
    assert exported["metadata"]["prompt"] == "Then Mary to"
    assert exported["metadata"]["slug"] == "ioi-circuit"


def test_sites_that_share_a_layer_are_numbered_in_forward_order():
    sites = (SITES[0], GraphSite("blocks.3.hook_mlp_out", 3, 8))
    shared = Graph("g", sites, GRAPH.slots, NODES[:1], (), 1.0, None, 1, 1.0)
    assert viewer_graph(shared, PROMPT)["nodes"][0]["layer"] == "0"


def test_a_prompt_of_another_task_is_refused():
    with pytest.raises(ArtifactError, match="none of the slots"):
        viewer_graph(GRAPH, Prompt((1,), ("a",), {"other": 0}, [(6, "b", 0.1)]))
