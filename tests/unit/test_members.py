"""What `dictionaries:` and `grid:` stand for, what members are called, and what is refused."""

import re

import pytest

from saelab.errors import ConfigError
from saelab.members import NAME, expand

TOPK = {"type": "topk", "d_sae": 64, "k": 4}


def names(listed, grids=()):
    return [member.name for member in expand(listed, grids)]


def test_a_grid_is_every_combination_of_its_lists_under_readable_names():
    grid = {"type": "topk", "d_sae": [64, 128], "k": 4, "seed": [0, 1], "lr": [1e-3]}
    members = expand([], grid)
    assert [m.name for m in members] == [
        "topk-64-4-seed0-lr0.001", "topk-64-4-seed1-lr0.001",
        "topk-128-4-seed0-lr0.001", "topk-128-4-seed1-lr0.001",
    ]  # fmt: skip
    assert [(m.fields["d_sae"], m.seed, m.lr) for m in members] == [
        (64, 0, 1e-3), (64, 1, 1e-3), (128, 0, 1e-3), (128, 1, 1e-3),
    ]  # fmt: skip


def test_each_type_takes_the_keys_that_it_has():
    grid = {"type": ["topk", "relu"], "d_sae": 64, "k": [2, 4], "target_l0": 3}
    members = expand([], grid)
    assert [m.name for m in members] == ["topk-64-2", "topk-64-4", "relu-64-3"]
    assert members[2].fields == {"type": "relu", "d_sae": 64, "target_l0": 3}


def test_sites_are_an_axis_and_a_name_says_the_place():
    sites = ["blocks.10.hook_resid_post", "blocks.15.hook_mlp_out"]
    members = expand([], TOPK | {"site": sites})
    assert [m.site for m in members] == sites
    assert [m.name for m in members] == ["topk-64-4-10.resid_post", "topk-64-4-15.mlp_out"]


def test_a_longer_axis_leaves_the_other_names_as_they_were():
    assert set(names([], TOPK | {"seed": [0]})) < set(names([], TOPK | {"seed": [0, 1, 2]}))


def test_a_field_that_is_a_list_goes_into_another_list():
    grid = {"type": "matryoshka", "d_sae": 64, "k": 4, "prefixes": [[16, 64], [8, 64]]}
    members = expand([], grid)
    assert [m.fields["prefixes"] for m in members] == [[16, 64], [8, 64]]
    assert [m.name for m in members] == [
        "matryoshka-64-4-prefixes16_64",
        "matryoshka-64-4-prefixes8_64",
    ]


def test_what_two_grids_share_is_one_member_and_the_list_comes_first():
    grids = [TOPK | {"k": [2, 4]}, TOPK | {"seed": [0, 1]}]
    assert names([TOPK | {"k": 8}], grids) == [
        "topk-64-8",
        "topk-64-2",
        "topk-64-4",
        "topk-64-4-seed1",
    ]
    assert names([TOPK | {"name": "mine"}], TOPK | {"seed": [0]}) == ["mine"]


def test_members_of_the_list_are_named_apart_and_earlier_names_stay():
    listed = [TOPK, TOPK | {"seed": 1}, TOPK | {"lr": 1e-2}, TOPK | {"aux_weight": 0, "seed": 1}]
    expected = ["topk-64-4", "topk-64-4-seed1", "topk-64-4-lr0.01", "topk-64-4-seed1-aux_weight0"]
    assert names(listed) == expected
    assert names(listed[:2]) == expected[:2]


def test_names_can_be_folders_and_differ_whatever_the_values_are():
    grid = {"type": "topk", "d_sae": 64, "k": 4, "lr": [1e-7, 2.5e-05], "threshold": [True, False]}
    grid |= {"site": ["a b/c", "a-b-c"]}
    found = names([], grid)
    assert len(set(found)) == 8
    assert all(re.match(NAME, name) for name in found)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"d_sae": 64}, r"grid\.type: this key is required"),
        ({"type": [["topk"]]}, r"grid\.type: this key is required"),
        ({"type": "topkk"}, r"grid\.type: .*did you mean 'topk'"),
        (TOPK | {"kk": 3}, r"unknown key 'grid\.kk'; did you mean 'k'"),
        (TOPK | {"d_in": 3}, r"unknown key 'grid\.d_in'"),
        (TOPK | {"k": []}, r"grid\.k: this list is empty"),
        (TOPK | {"name": "x"}, r"grid\.name: .*drop the key"),
        (TOPK | {"k": [2, 65]}, r"grid \(k 65\): k=65 exceeds d_sae=64"),
        (TOPK | {"seed": [0, -1]}, r"grid \(seed -1\): seed: .*greater than or equal to 0"),
        (TOPK | {"lr": ["high"]}, r"grid \(lr high\): lr"),
        ([TOPK, 3], r"grid\.1: a grid is a mapping"),
        ([TOPK | {"l1": 3}], r"unknown key 'grid\.0\.l1'"),
    ],
)
def test_a_bad_grid_is_one_clear_error(grid, message):
    with pytest.raises(ConfigError, match=message):
        expand([], grid)


def test_equal_entries_and_equal_names_are_refused():
    with pytest.raises(ConfigError, match=r"dictionaries\.0 and dictionaries\.1 are the same"):
        expand([TOPK, TOPK | {"name": "again"}], [])
    with pytest.raises(ConfigError, match=r"dictionaries\.0 and dictionaries\.1 are both called"):
        expand([TOPK | {"name": "x"}, TOPK | {"name": "x", "k": 2}], [])
    with pytest.raises(ConfigError, match=r"dictionaries\.0\.type: this key is required"):
        expand([{"d_sae": 64}], [])
