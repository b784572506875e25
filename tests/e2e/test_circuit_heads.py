"""`saelab circuits heads` from a configuration to its tables, on a model whose heads are known."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from fabricated import artifact
from typer.testing import CliRunner

from saelab import api, artifacts
from saelab.circuit_runs import api as circuits_api
from saelab.circuit_runs import heads as circuits_run
from saelab.circuits import ability
from saelab.cli import app
from saelab.errors import ConfigError, SiteError, TaskError


def settings(out, **changes):
    return {
        "name": "known",
        "model": {"source": "handwired:induction"},
        "tasks": ["induction"],
        "effects": {"pairs": 8, "positions": ["all", "end"], "gradient_steps": 2},
        "codes": {
            "dictionary": {"type": "topk", "d_sae": 16, "k": 2},
            "train": {"batch": 8, "tokens": 64},
            "examples": [4],
            "draws": 1,
        },
        "ranking": {"precision_at": [2], "cutoffs": [0.05], "least": 1},
        "claim": {"score": "codes", "examples": 4},
        "controls": ["shuffled"],
        "out": str(out),
        "threads": 1,
    } | changes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run, started from the command line."""
    folder = tmp_path_factory.mktemp("heads")
    path = folder / "heads.yaml"
    path.write_text(yaml.safe_dump(settings(folder / "out")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(folder / "cache"))
        result = CliRunner().invoke(app, ["circuits", "heads", str(path)])
        assert result.exit_code == 0, result.output
        yield folder / "out", result.output


def test_effects_of_the_known_circuit_are_found_and_reused(made):
    out, _ = made
    found = artifacts.find_all(out, "effects")
    truths = [m for _, m in found if m.inputs["method"].get("ablation") == "resample"]
    assert len(truths) == 4 and all(m.facts["flops"] > 0 for m in truths)
    steps = circuits_run.Heads(circuits_run.load_heads(settings(out))).execute()
    assert {step.status for step in steps} == {"found"} and len(steps) == len(found) + 1
    changed = settings(out, ranking={"precision_at": [1], "cutoffs": [0.05], "least": 1})
    again = circuits_run.Heads(circuits_run.load_heads(changed)).execute()
    assert [s.stage for s in again if s.status == "made"] == ["heads"]


def test_every_score_is_compared_with_every_truth(made):
    out, printed = made
    (folder, manifest), *_ = artifacts.find_all(out, "heads")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    methods = {row["method"] for row in rows}
    assert {"codes", "codes_pairs", "direct_logits", "probe", "codes_k_means", "distinct_codes",
            "codes_permuted", "attribution_patching", "zero_patching"} <= methods  # fmt: skip
    assert len({(row["position"], row["direction"]) for row in rows}) == 4
    exact = [r for r in rows if r["method"] == "direct_logits" and r["position"] == "end"]
    assert exact and all(row["auc@0.05"] == 1 for row in exact)
    for truth in manifest.facts["truths"]:
        assert truth["ceiling"]["kendall"] == pytest.approx(1.0)
        assert truth["counts"]["negatives"] == (2 if truth["position"] == "all" else 3)
    assert "control, shuffled: induction: refused: the model cannot do the task" in printed
    assert "codes − best baseline" in printed and "undecided (too few draws)" in printed
    for word in ("ceiling", "codes_normalised", "TFLOP", "noising", "of the gap off", "codes took"):
        assert word in printed


def test_a_control_that_can_do_the_task_is_shown_beside(made, monkeypatch):
    out, _ = made
    monkeypatch.setattr(circuits_run, "controls", lambda config: [("shuffled", config)])
    result = CliRunner().invoke(app, ["circuits", "heads", str(out.parent / "heads.yaml")])
    assert result.exit_code == 0, result.output
    first, second = result.output.split("control, shuffled: induction\n")
    assert "codes − best baseline" in first and "codes − best baseline" in second


def test_controls_differ_in_one_thing_and_are_not_forced(tmp_path):
    config = circuits_run.load_heads(
        settings(
            tmp_path, model={"source": "smollm2-135m"}, tasks=["ioi", "induction"], force=True,
            controls=["redrawn", "shuffled"],
        )
    )  # fmt: skip
    found = list(circuits_run.controls(config))
    assert [(name, c.tasks[0]) for name, c in found] == [
        (control, task) for control in ("redrawn", "shuffled") for task in ("ioi", "induction")
    ]
    assert {c.model.source for _, c in found[:2]} == {"redrawn:0:smollm2-135m"}
    assert [c.shuffled for _, c in found] == [False, False, True, True]
    assert not any(c.force or c.controls for _, c in found)
    with pytest.raises(ConfigError, match="handwired:induction has no trained weights to draw"):
        circuits_run.load_heads(settings(tmp_path, controls=["redrawn"]))
    assert all(c.codes == config.codes and c.effects == config.effects for _, c in found)


def test_what_a_run_cannot_do_is_said(tmp_path):
    with pytest.raises(ConfigError, match="leaves no codes to differ"):
        circuits_run.load_heads(
            settings(tmp_path, codes={"dictionary": {"type": "topk", "d_sae": 4}}, claim=None)
        )
    with pytest.raises(ConfigError, match="also the seed of a draw"):
        circuits_run.load_heads(settings(tmp_path, effects={"seed": 1000}))
    with pytest.raises(ConfigError, match=r"lists heads of ioi, greater_than, .* has induction"):
        circuits_run.load_heads(settings(tmp_path, ranking={"published": "gpt2_small"}))
    with pytest.raises(ConfigError, match=r"claim\.examples=10 is not among what is run: 4"):
        circuits_run.load_heads(settings(tmp_path, claim={}))
    with pytest.raises(ConfigError, match=r"tasks\.0: input should be"):
        circuits_run.load_heads(settings(tmp_path, tasks=["inductoin"]))
    config = circuits_run.load_heads(settings(tmp_path, model={"source": "toy"}))
    with pytest.raises(
        TaskError, match=r"15 words that are single tokens are needed, but toy has \d+"
    ):
        circuits_run.Heads(config).execute()


def test_one_example_is_refused_before_anything_is_patched(tmp_path):
    with pytest.raises(
        ConfigError, match=r"codes\.examples\.1: input should be greater than or eq"
    ):
        circuits_run.load_heads(
            settings(tmp_path, codes=settings(tmp_path)["codes"] | {"examples": [4, 1]})
        )


def test_a_model_that_cannot_do_the_task_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    unable = settings(tmp_path, model={"source": "handwired:induction:sharpness=0"})
    with pytest.raises(TaskError, match="cannot do the task"):
        circuits_run.Heads(circuits_run.load_heads(unable)).execute()


def test_a_model_that_cannot_be_entered_midway_is_refused(monkeypatch):
    monkeypatch.setattr(api, "load_model", lambda *_, **__: SimpleNamespace(name="closed"))
    with pytest.raises(SiteError, match="closed has no `remember` and `resume`"):
        circuits_api.load_model("closed", "float32", torch.device("cpu"))


def test_effects_that_were_forced_are_refused_without_force(tmp_path):
    score = ability.TaskScore("ioi", "logit_difference", 9, 0.4, 0.1, 0.5, 0.1, 0.2, 0.0, 0.1, 0.2)
    folder = artifact(tmp_path, "effects", "forced", {}, facts={"ability": vars(score)})
    with pytest.raises(TaskError, match="40% right of 9"):
        circuits_api.require_able(folder)


def test_the_table_of_tasks_says_which_a_model_can_do_and_which_have_no_words():
    result = CliRunner().invoke(app, ["circuits", "tasks", "handwired:induction", "--pairs", "8"])
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("induction"))
    assert "100%" in line and line.rstrip().endswith("can")
    assert "single tokens are needed" in " ".join(result.output.split())


def test_the_shipped_configuration_fixes_the_scores_and_their_cut_offs():
    config = circuits_run.load_heads("circuits/heads")
    assert config.effects.pairs >= 64 and config.codes.draws >= 5
    assert config.codes.examples == [5, 10, 20]
    assert (config.codes.draws, config.codes.seeds) == (5, [0]) and config.claim is not None
    assert config.ranking.precision_at == [10, 26]
    assert config.ranking.cutoffs == [0.01, 0.02, 0.05, 0.1] and config.ranking.negligible == 0.005
