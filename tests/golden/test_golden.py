"""A tiny run's outputs, kept: a change in them without a bump of STAGE_VERSION fails here.

Formats are compared exactly, numbers to 1e-3 (other processors round differently). After a
deliberate change: bump `stages.STAGE_VERSION[stage]`, run `pytest tests/golden --update-golden`,
and review the diff.
"""

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import circuit_prompts
import pytest
from safetensors.torch import load_file

import saelab
from saelab import pipeline
from saelab.circuit_runs import features as circuits_features
from saelab.circuit_runs import supervised as circuits_supervised
from saelab.circuit_runs.config import FeaturesConfig, SupervisedRunConfig
from saelab.circuit_runs.heads import Heads, load_heads

GOLDEN = Path(__file__).parent / "toy_run.json"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    config = {
        "name": "golden",
        "model": {"source": "toy", "dtype": "float32"},
        "corpus": {"source": "toy", "context": 32, "tokens": 2000, "holdout": 0.3},
        "harvest": {"sites": ["blocks.1.hook_resid_post"], "dtype": "float32"},
        "dictionaries": [{"type": "topk", "d_sae": 32, "k": 4, "lr": 2e-3}],
        "train": {"batch": 128, "tokens": 1280},
        "evaluate": {
            "evals": ["core"],
            "core": {"resamples": 20, "windows": 8, "pursuit_rows": 128},
        },
        "index": {},
        "out": str(root / "out"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(root / "cache"))
        made = {step.stage: step.path for step in saelab.run(config)}
        for runs in (circuits_features, circuits_supervised):
            patch.setattr(runs, "draw", circuit_prompts.draw)
        return made | circuits(root / "out", made["dictionary"])


def circuits(out: Path, dictionary: Path) -> dict[str, Path]:
    heads = {
        "name": "golden", "model": {"source": "handwired:induction:sharpness=5"},
        "tasks": ["induction"], "out": str(out),
        "effects": {"pairs": 8, "positions": ["end"], "gradient_steps": 2},
        "codes": {
            "dictionary": {"type": "topk", "d_sae": 16, "k": 2}, "examples": [4], "draws": 2,
            "train": {"batch": 8, "tokens": 64}, "negatives": ["unpredictable"],
        },
        "ranking": {"precision_at": [2], "cutoffs": [0.05], "least": 1, "negligible": 0.02},
    }  # fmt: skip
    steps = Heads(load_heads(heads)).execute()
    common = {
        "name": "golden",
        "model": {"source": "toy"},
        "dictionaries": [dictionary],
        "out": out,
    }
    task = {"name": "ioi", "force": True}
    features = FeaturesConfig.parse(
        common | {
            "task": task | {"pairs": 8, "test_pairs": 12}, "graph": {"nodes": 6},
            "attribution": {"steps": 2}, "curves": {"sizes": [4], "draws": 1},
        }
    )  # fmt: skip
    supervised = SupervisedRunConfig.parse(
        common | {
            "task": task | {"fit": 160, "test": 48},
            "supervised": {"budgets": [2], "slots": ["end"], "shrink": [0]},
        }
    )  # fmt: skip
    return {step.stage: step.path for step in reversed(steps)} | {
        "circuit": circuits_features.features(features),
        "supervised": circuits_supervised.supervised(supervised),
    }


def describe_store(path: Path) -> dict:
    return tensors(path, "shard-*") | tensors(path, "tokens-*") | tensors(path, "stats*") | digests(
        path, "documents-*"
    )  # fmt: skip


def describe_dictionary(path: Path) -> dict:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((path / "config.json").read_text())
    config["weights_sha256"] = len(config["weights_sha256"])  # the bits are the processor's
    return tensors(path, "weights*") | {"config": config, "last_metrics": lines[-1]}


def describe_results(path: Path) -> dict:
    rows = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    return {
        f"{row['arm']}/{row['name']}": [row["value"], row["standard_error"], row["n"]]
        for row in rows
    }


def describe_features(path: Path) -> dict:
    with closing(sqlite3.connect(f"file:{path / 'features.db'}?mode=ro", uri=True)) as db:
        schema = dict(db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
        plain = [name for name in schema if not name.startswith(("sqlite_", "search"))]
        counts = {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in plain}
        return {"schema": schema, "counts": counts}


def describe_effects(path: Path) -> dict:
    return tensors(path, "effects*")


def describe_heads(path: Path) -> dict:
    rows = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    kept = {"codes", "direct_logits", "zero_patching"}
    return {"columns": sorted({key for row in rows for key in row})} | {
        f"{row['method']}, {row['direction']}, draw {row['draw']}": row["kendall"]
        if row["method"] in kept
        else "there"
        for row in rows
    }


def describe_circuit(path: Path) -> dict:
    graph = json.loads((path / "graph.json").read_text())
    graph["nodes"] = [[n["id"], n["effect"], n["outflow"]] for n in graph["nodes"]]
    del graph["sites"]  # content hashes are the processor's
    held = tensors(path, "tensors*")
    kept = {key: held[key] for key in held if ".clean" in key or ":means" in key}
    return describe_results(path) | kept | {"tensors": sorted(held), "graph": graph}


def tensors(path: Path, pattern: str) -> dict:
    described = {}
    for file in sorted(path.glob(pattern)):
        for name, tensor in sorted(load_file(file).items()):
            key = f"{file.name}:{name}"
            described[key] = [str(tensor.dtype), list(tensor.shape)]
            if tensor.is_floating_point():
                values = tensor.double()
                described[key] += [float(values.abs().mean()), float(values.flatten()[:64].sum())]
            else:
                described[key].append(hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
    return described


def digests(path: Path, pattern: str) -> dict:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.glob(pattern))}


DESCRIBE = {
    "store": describe_store,
    "dictionary": describe_dictionary,
    "results": describe_results,
    "features": describe_features,
    "effects": describe_effects,
    "heads": describe_heads,
    "circuit": describe_circuit,
    "supervised": describe_results,
}


@pytest.mark.parametrize("stage", DESCRIBE)
def test_outputs_change_only_with_the_stage_version(outputs, stage, request):
    now = {
        "version": pipeline.STAGE_VERSION[stage],
        "outputs": json.loads(json.dumps(DESCRIBE[stage](outputs[stage].resolve()))),
    }
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--update-golden"):
        golden[stage] = now
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        return
    kept = golden[stage]
    difference = first_change(kept["outputs"], now["outputs"])
    if difference and kept["version"] == now["version"]:
        pytest.fail(
            f"the {stage} stage's outputs changed ({difference}) but STAGE_VERSION[{stage!r}] is "
            f"still {now['version']}: bump it, then run pytest tests/golden --update-golden"
        )
    assert kept["version"] == now["version"], "run pytest tests/golden --update-golden"


def first_change(old, new, path="") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_change(old.get(key), new.get(key), f"{path}/{key}")
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        changes = (
            first_change(a, b, f"{path}/{i}") for i, (a, b) in enumerate(zip(old, new, strict=True))
        )
        return next((c for c in changes if c), None)
    if isinstance(old, float) and isinstance(new, int | float):
        return None if old == pytest.approx(new, rel=1e-3, abs=1e-5) else f"{path}: {old} → {new}"
    return None if old == new else f"{path}: {old!r} → {new!r}"


def test_a_changed_number_or_format_is_noticed():
    assert first_change({"a": [1.0, "x"]}, {"a": [1.0 + 1e-6, "x"]}) is None
    assert first_change({"a": [1.0, "x"]}, {"a": [1.01, "x"]}) == "/a/0: 1.0 → 1.01"
    assert first_change({"a": 1}, {"a": 1, "b": 2}) == "/b: None → 2"
