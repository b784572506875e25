"""Semi-NMF through the whole line on the toy model's neurons, and what stops it early."""

import io
import json
from contextlib import closing

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import saelab
from saelab import artifacts, pipeline, planning
from saelab.errors import ConfigError
from saelab.features import relations

SITE = "blocks.1.mlp.hook_post"
STAGES = ["store", "dictionary", "results", "features"]


def toy(out, **changes):
    member = {"type": "semi_nmf", "d_sae": 16, "keep": 0.1, "iterations": 60, "levels": [16, 8, 4]}
    data = {
        "name": "toy",
        "model": {"source": "toy", "dtype": "float32"},
        "corpus": {"source": "toy", "context": 32, "tokens": 3000, "holdout": 0.3},
        "harvest": {"sites": [SITE], "dtype": "float32"},
        "dictionaries": [member],
        "train": {"batch": 128, "tokens": 2560},
        "evaluate": {
            "evals": ["core"],
            "core": {"resamples": 20, "windows": 8, "pursuit_rows": 128},
        },
        "index": {},
        "out": str(out),
    }
    return data | changes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("semi_nmf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(root / "cache"))
        steps = saelab.run(toy(root / "out"))
        yield root, {step.stage: step for step in steps}


def test_one_call_solves_scores_and_indexes_it_and_the_next_finds_it(made):
    root, steps = made
    assert [(s.stage, s.status) for s in steps.values()] == [(stage, "made") for stage in STAGES]
    assert [s.status for s in saelab.run(toy(root / "out"))] == ["found"] * 4
    for step in steps.values():
        artifacts.verify(step.path)


def test_two_runs_make_identical_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    _, steps = made
    again = {s.stage: s for s in pipeline.run(toy(tmp_path / "out"), until="train")}
    for name in ("config.json", "weights.safetensors", "metrics.jsonl"):
        one, two = (s["dictionary"].path / name for s in (steps, again))
        assert one.read_bytes() == two.read_bytes()


def test_the_weights_hold_every_level_and_the_tree(made):
    path = made[1]["dictionary"].path
    shapes = {k: tuple(t.shape) for k, t in load_file(path / "weights.safetensors").items()}
    assert shapes == {
        "W_dec": (16, 128), "b_dec": (128,), "features_1": (8, 128), "tree_1": (16, 8),
        "features_2": (4, 128), "tree_2": (8, 4),
    }  # fmt: skip
    loaded = saelab.load(path)
    assert loaded.b_dec.count_nonzero() == 0
    assert ((loaded.W_dec != 0).sum(1) <= 13).all()


def test_the_scorecard_counts_what_is_above_a_hundredth_of_the_rows_largest(made):
    _, steps = made
    rows = [
        json.loads(line)
        for line in (steps["results"].path / "results.jsonl").read_text().splitlines()
    ]
    scores = {row["name"]: row["value"] for row in rows if row["arm"] == "dictionary"}
    dictionary = saelab.load(steps["dictionary"].path)
    store = saelab.open_store(steps["store"].path)
    x = torch.cat([b.x for b in store.scan(SITE, batch=512, split="heldout")])
    z = dictionary.encode(x).detach()
    counted = (z > 0) & (z >= 0.01 * z.amax(1, keepdim=True))
    assert scores["l0"] == pytest.approx(float(counted.sum() / len(z)), rel=1e-6)
    assert scores["l0"] < float((z > 0).sum() / len(z))
    error = (x - dictionary.reconstruct(x).detach()).square().sum()
    fvu = float(error / (x - x.mean(0)).square().sum())
    assert scores["fvu"] == pytest.approx(fvu, rel=1e-2)
    assert 0 < fvu < 1
    assert {"kl", "ce_recovered_zero"} <= scores.keys()


def test_the_index_has_a_page_for_every_concept_of_its_tree(made):
    steps = made[1]
    dictionary = saelab.load(steps["dictionary"].path)
    with closing(saelab.open_features(steps["features"].path)) as features:
        assert (features.levels, features.n_nodes) == ([16, 8, 4], 28)
        for latent in range(16):
            kept = dictionary.W_dec[latent].detach()
            for use in relations.neurons(features, latent):
                assert use.weight == pytest.approx(float(kept[use.neuron]), rel=1e-5)
            amounts = {link.id - 16: link.weight for link in relations.parents(features, latent)}
            tree = dictionary.tree(1)[latent]
            assert amounts == pytest.approx(
                {j: float(tree[j]) for j in tree.nonzero()[:, 0].tolist()}, rel=1e-5
            )
        assert any(features.latent(node).groups for node in range(16, 28))
        assert relations.purities(features)


def test_a_plan_says_what_it_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    both = [*toy(tmp_path)["dictionaries"], {"type": "topk", "d_sae": 48, "k": 4}]
    render = Console(record=True, width=120, file=io.StringIO())
    render.print(planning.plan(pipeline.load_config(toy(tmp_path / "out", dictionaries=both))))
    text = render.export_text()
    assert "at most 180 iterations" in text
    assert "20 steps of 128" in text


@pytest.mark.parametrize("site", ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"])
def test_a_site_without_neurons_is_refused_before_harvest(tmp_path, site):
    changes = {"harvest": {"sites": [SITE, site], "dtype": "float32"}}
    members = [toy(tmp_path)["dictionaries"][0] | {"site": s} for s in (SITE, site)]
    with pytest.raises(
        ConfigError, match=rf"dictionaries.1: semi_nmf .*'{site}' has none.*harvest"
    ):
        pipeline.load_config(toy(tmp_path, dictionaries=members, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_above_the_width_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    config = toy(tmp_path / "out", dictionaries=[{"type": "semi_nmf", "d_sae": 129}])
    with pytest.raises(ConfigError, match="d_sae=129 exceeds the site's width 128"):
        pipeline.run(config, until="train")
