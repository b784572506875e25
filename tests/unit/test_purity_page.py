"""The console page of label purity, on the tiny index with a hierarchy."""

import re

import pytest
from saelab_experiments import purity
from test_features import make
from test_relations import Grouped, LabelledTiny

from saelab import api
from saelab.errors import ArtifactError, ConfigError
from saelab.features import relations
from saelab.metrics.purity import Purity


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("purity")
    make(out, dictionary=Grouped(), store=LabelledTiny())
    return out


@pytest.fixture(scope="module")
def features(run):
    ((_, path),) = purity.indexes(run)
    opened = api.open_features(path)
    yield opened
    opened.close()


def printed(run, *options):
    said = []
    purity.main([str(run), *options], said.append)
    return "".join(said)


def test_drawn_nodes_stand_in_the_table_with_their_purity(run, features):
    text = printed(run, "--nodes", "6")
    known = relations.purities(features)
    rows = re.findall(r"^\| (\d+) \| (\d) \| .* \| (.+) \| .* \((\d+) of (\d+)\)", text, re.M)
    assert rows
    for node, level, label, hits, n in rows:
        found = known[int(node)]
        assert (found.label, found.hits, found.n) == (label, int(hits), int(n))
        assert features.level_of(int(node)) == int(level)
    assert len(re.findall(r"^\| \d+ \|", text, re.M)) == 6
    assert re.search(r"^\d of 6 nodes have a label at 2 times", text, re.M)
    assert "Levels 13 → 5 → 2, seed 0." in text


def test_the_seed_decides_what_is_drawn(run):
    assert printed(run) == printed(run, "--seed", "0")
    assert printed(run, "--nodes", "5") != printed(run, "--nodes", "5", "--seed", "1")


def test_trees_are_nested_lists_of_all_nodes_below(run, features):
    text = printed(run, "--trees", "9")
    lines = re.findall(r"^( *)- \*\*(\d+)\*\*", text, re.M)
    drawn = [n for root in relations.forest(features) if root.children for n in root.walk()]
    assert [int(node) for _, node in lines] == [node.id for node in drawn]
    assert {len(spaces) // 2 for spaces, _ in lines} == {0, 1, 2}
    assert "**" not in printed(run, "--trees", "0")


def test_pure_nodes_reach_twice_their_base_rate_and_others_and_dead_ones_do_not(features):
    known = {0: Purity("sky", 8, 8, 0.25), 1: Purity("a|b", 2, 8, 0.25)}
    *_, last = purity.table(features, [0, 1, 12], known)
    chance = known[0].chance_of(2.0) + known[1].chance_of(2.0)
    assert last.startswith("1 of 3 nodes")
    assert f"by chance {chance:.1f} would" in last
    rows = purity.table(features, [0, 1, 12], known)[2:5]
    assert "sky | 1.00 (8 of 8) | 0.250 | 4.0 |" in rows[0]
    assert "a\\|b | 0.25 (2 of 8) | 0.250 | 1.0 |" in rows[1]
    assert rows[2] == "| 12 | 0 | never | – | – | – | – | – |"


def test_what_is_missing_is_said_in_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="no feature index with a hierarchy"):
        printed(tmp_path)
    make(tmp_path, dictionary=Grouped())
    with pytest.raises(ArtifactError, match="label_field"):
        printed(tmp_path)
    with pytest.raises(ConfigError, match="--nodes should be at least 1"):
        printed(tmp_path, "--nodes", "0")
