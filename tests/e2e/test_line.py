"""The whole line on the toy model: what is made, what is found again, and why."""

import io
import json

import pytest
from rich.console import Console

import saelab
from saelab import artifacts, pipeline, planning
from saelab.errors import ArtifactError, ConfigError, ResourceError

STAGES = ["store", "dictionary", "results", "features"]


def toy(out, **changes):
    data = {
        "name": "toy",
        "model": {"source": "toy", "dtype": "float32"},
        "corpus": {"source": "toy", "context": 32, "tokens": 3000, "holdout": 0.3},
        "harvest": {"sites": ["blocks.1.hook_resid_post"], "dtype": "float32"},
        "dictionaries": [{"type": "topk", "d_sae": 48, "k": 4}],
        "train": {"batch": 128, "tokens": 2560},
        "evaluate": {
            "evals": ["core"],
            "core": {"resamples": 20, "windows": 8, "pursuit_rows": 128},
        },
        "index": {},
        "out": str(out),
    }
    return data | changes


def statuses(steps):
    return [(step.stage, step.status) for step in steps]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished toy run in a cache of its own."""
    root = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(root / "cache"))
        steps = saelab.run(toy(root / "out"))
        yield root, steps


def test_one_call_makes_all_four_artifacts(made):
    root, steps = made
    assert statuses(steps) == [(stage, "made") for stage in STAGES]
    for step in steps:
        artifacts.verify(step.path)
        assert step.path.resolve().is_dir()
    hidden = [p for p in root.rglob(".*") if p.suffix in {".partial", ".tmp", ".holder"}]
    assert hidden == []


def test_the_same_call_again_finds_everything(made):
    root, _ = made
    assert statuses(saelab.run(toy(root / "out"))) == [(stage, "found") for stage in STAGES]


def test_another_out_device_or_thread_count_re_runs_nothing(made):
    root, _ = made
    steps = saelab.run(toy(root / "elsewhere", device="cpu", threads=1))
    assert statuses(steps) == [(stage, "found") for stage in STAGES]
    for step in steps:
        assert root / "elsewhere" in step.path.parents or step.stage == "store"
        artifacts.verify(step.path)


def test_another_k_trains_one_member_on_the_same_store(made):
    root, _ = made
    config = toy(root / "out", dictionaries=[{"type": "topk", "d_sae": 48, "k": 2}])
    explained = pipeline.explain(pipeline.load_config(config))
    expected = ["found", "missing", "missing", "missing"]
    assert statuses(explained) == list(zip(STAGES, expected, strict=True))
    steps = pipeline.run(config, until="train")
    assert statuses(steps) == [("store", "found"), ("dictionary", "made")]


def test_adding_a_member_trains_only_that_one(made):
    root, _ = made
    both = [{"type": "topk", "d_sae": 48, "k": 4}, {"type": "topk", "d_sae": 48, "k": 3}]
    steps = pipeline.run(toy(root / "out", dictionaries=both), until="train")
    assert statuses(steps) == [("store", "found"), ("dictionary", "found"), ("dictionary", "made")]


def test_a_grid_adds_what_is_not_there_yet_to_the_list(made):
    root, _ = made
    grid = {"type": ["topk", "relu"], "d_sae": 48, "k": [4, 5], "target_l0": 4}
    explained = pipeline.explain(pipeline.load_config(toy(root / "out", grid=grid)), until="train")
    assert [(s.name, s.status) for s in explained[1:]] == [
        ("toy-topk-48-4", "found"), ("toy-topk-48-5", "missing"), ("toy-relu-48-4", "missing"),
    ]  # fmt: skip


def test_explain_names_the_field_that_differs(made):
    root, _ = made
    changed = toy(root / "out", train={"batch": 128, "tokens": 1280})
    steps = pipeline.explain(pipeline.load_config(changed), until="train")
    assert "train.tokens: 2560 → 1280" in steps[-1].reason


def test_a_finished_store_can_be_named_instead_of_a_corpus(made):
    root, steps = made
    config = toy(root / "out", store=str(steps[0].path))
    del config["corpus"], config["harvest"]
    assert statuses(saelab.run(config)) == [(stage, "found") for stage in STAGES]


def test_the_scorecard_has_the_controls_and_their_errors(made):
    _, steps = made
    rows = [json.loads(line) for line in (steps[2].path / "results.jsonl").read_text().splitlines()]
    arms = {row["arm"].split("(")[0] for row in rows}
    assert {"dictionary", "pca", "token_mean", "random_atoms"} <= arms
    fvu = next(row for row in rows if row["name"] == "fvu" and row["arm"] == "dictionary")
    assert 0 < fvu["value"] < 1
    assert fvu["standard_error"] > 0
    assert {"dictionary", "store", "model", "metric_version", "encoder", "n"} <= fvu.keys()


def test_a_store_that_was_altered_is_named_before_training(made, tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    steps = pipeline.run(toy(tmp_path / "out"), until="harvest")
    shard = next(steps[0].path.resolve().glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=shard.name):
        pipeline.run(toy(tmp_path / "out"), until="train")


def test_a_disk_that_is_too_small_is_said_before_starting(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="GB free"):
        pipeline.run(toy(tmp_path / "out"), until="harvest")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"evaluate": {"core": {"seed": 5}}}, {"index": {"top": 7}}])
def test_a_store_that_was_altered_is_named_before_it_is_scored(
    made, changes, tmp_path, monkeypatch
):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    steps = pipeline.run(toy(tmp_path / "out"), until="train")
    shard = next(steps[0].path.resolve().glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=shard.name):
        pipeline.run(toy(tmp_path / "out", **changes))


def test_a_plan_costs_what_is_missing_and_nothing_else(made):
    root, _ = made
    render = Console(record=True, width=120, file=io.StringIO())
    seeds = [{"type": "topk", "d_sae": 48, "k": 4, "seed": seed} for seed in (0, 1)]
    render.print(planning.plan(pipeline.load_config(toy(root / "out", dictionaries=seeds))))
    text = render.export_text()
    words = ("store ", "train ", "evaluate ", "index ")
    assert [text.count(word) for word in words] == [0, 1, 1, 1]


def test_a_plan_refuses_what_cannot_fit_before_allocating_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    wide = [{"type": "topk", "d_sae": 2_000_000_000, "k": 4}]
    with pytest.raises(ResourceError, match="GB of memory"):
        planning.plan(pipeline.load_config(toy(tmp_path / "out", dictionaries=wide)))
    with pytest.raises(ResourceError, match="GB of memory"):
        pipeline.run(toy(tmp_path / "out", dictionaries=wide), until="train")


def test_overrides_reach_plain_data_too(tmp_path):
    config = pipeline.load_config(toy(tmp_path), overrides=["dictionaries.0.k=7", "name=other"])
    assert config.dictionaries[0]["k"] == 7
    assert config.name == "other"


def test_a_dictionary_continues_from_a_finished_one(made):
    root, steps = made
    init = str(steps[1].path)
    member = {"type": "topk", "d_sae": 48, "k": 4, "init": init, "name": "more"}
    assert statuses(pipeline.run(toy(root / "out", dictionaries=[member]), until="train"))[1] == (
        "dictionary", "made",
    )  # fmt: skip
    as_it_was = toy(root / "out", dictionaries=[member | {"freeze_decoder": False}])
    assert statuses(pipeline.run(as_it_was, until="train"))[1] == ("dictionary", "found")
    for other in ({"d_sae": 64}, {"freeze_decoder": True}):
        config = toy(root / "out", dictionaries=[member | other])
        with pytest.raises(ConfigError, match=f"init: .* other values of {next(iter(other))}"):
            pipeline.run(config, until="train")


def test_a_dictionary_says_whose_activations_it_was_trained_on(made):
    facts = artifacts.read_manifest(made[1][1].path).facts
    assert facts["model"]["source"] == "toy"
    assert facts["model_fingerprint"] == saelab.load_model("toy").fingerprint


def test_an_index_in_memory_knows_which_model_it_was_made_with(made, tmp_path):
    _, steps = made
    dictionary, store = saelab.load(steps[1].path), saelab.open_store(steps[0].path)
    without = saelab.index(dictionary, store, tmp_path)
    with_model = saelab.index(dictionary, store, tmp_path, model=saelab.load_model("toy"))
    assert without.latent(0).logits is None
    assert with_model.latent(0).logits is not None
    rows = saelab.evaluate(dictionary, store)
    assert {row.arm for row in rows} >= {"dictionary", "token_mean"}
    fitted = saelab.fit({"type": "topk", "d_sae": 16, "k": 2}, store, {"batch": 64, "tokens": 128})
    assert fitted.d_sae == 16


def test_a_dictionary_can_be_trained_without_a_disk():
    corpus = {"source": "toy", "context": 32, "tokens": 1200, "holdout": 0.3}
    store = saelab.open_online(
        saelab.load_model("toy"), corpus, {"sites": ["blocks.1.hook_resid_post"]}
    )
    trained = saelab.fit({"type": "topk", "d_sae": 16, "k": 2}, store, {"batch": 64, "tokens": 640})
    batch = next(iter(store.scan(store.sites[0], batch=32, split="heldout")))
    assert trained.encode_sparse(batch.x).l0().max() <= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dictionares": []}, "did you mean 'dictionaries'"),
        ({"dictionaries": [{"type": "topk", "d_sae": 48, "k": 49}]}, "dictionaries.0: .*k"),
        ({"dictionaries": [{"type": "topkk", "d_sae": 48, "k": 4}]}, "did you mean 'topk'"),
        ({"dictionaries": [{"type": "topk", "d_sae": 48, "kk": 4}]}, "did you mean 'k'"),
        ({"dictionaries": [{"d_sae": 48}]}, "dictionaries.0.type: this key is required"),
        ({"train": {"batch": 128, "tokens": -1}}, "train.tokens"),
        ({"train": None}, "need a train section"),
        ({"corpus": None}, "exactly one of corpus, store and synthetic"),
        ({"name": "../up"}, "name"),
        ({"dictionaries": [{"type": "topk", "d_sae": 48, "k": 4}] * 2}, "are the same"),
        ({"dictionaries": [{"type": "topk", "d_sae": 48, "k": 4, "lr": -1}]}, "dictionaries.0: lr"),
        ({"dictionaries": [{"type": ["topk"]}]}, "dictionaries.0.type"),
        ({"dictionaries": [{"type": "topk", "d_sae": 4, "k": 4, "site": "x"}]}, "not harvested"),
        ({"corpus": {"source": "toy", "tokens": 99, "holdout": 0}}, "needs held-out documents"),
        ({"grid": {"type": "topk", "d_sae": 4, "k": 4, "site": ["x"]}}, r"grid \(site x\).site"),
        ({"grid": {"type": "topk", "d_sae": 48, "k": [4, 49]}}, r"grid \(k 49\): k=49 exceeds"),
        ({"dictionaries": [], "grid": {"type": "relu"}, "train": None}, "need a train section"),
    ],
)
def test_bad_configurations_are_one_clear_error(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.load_config(toy(tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"source": "smollm-135m"}}, "did you mean 'smollm2-135m'"),
        ({"corpus": {"source": "news-artikles", "tokens": 100}}, "did you mean 'news-articles'"),
        ({"harvest": {"sites": ["blocks.1.hook_resid_pst"]}}, "blocks.1.hook_resid_post"),
        ({"corpus": {"source": "toy", "context": 4096, "tokens": 100}}, "256"),
    ],
)
def test_unknown_names_list_the_nearest_and_leave_nothing(tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(saelab.errors.SaelabError, match=message):
        pipeline.run(toy(tmp_path / "out", **changes), until="harvest")
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in {".lock", ".holder"}]
    assert [p.name for p in left if p.name != "dtype.json"] == []


def test_a_planted_dictionary_goes_through_the_same_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    config = toy(tmp_path / "out", synthetic={"n_features": 32, "d": 16, "n_rows": 2000})
    del config["corpus"], config["harvest"], config["model"]
    steps = saelab.run(config)
    assert statuses(steps) == [(stage, "made") for stage in STAGES]
