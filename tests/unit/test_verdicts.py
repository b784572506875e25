"""Claims: their files, and what decides them."""

import re
from pathlib import Path

import pytest
import torch
from saelab_experiments import verdicts
from saelab_experiments.verdicts import Claim, Claims, RunOf, Score, judge

from saelab.errors import ConfigError
from saelab.run_config import load_config

SHIPPED = sorted((Path(__file__).parents[2] / "experiments" / "claims").glob("*/claims.yaml"))


def claim(**changes) -> Claim:
    fields = {
        "says": "a beats b", "metric": "fvu", "first": "run/a", "second": "run/b",
        "direction": "lower", "smallest": 0.01,
    }  # fmt: skip
    return Claim.parse(fields | changes)


def measured(**sides):
    return {
        (f"run/{name}:dictionary", metric): {i: Score(v, 0.0) for i, v in enumerate(values)}
        for name, metrics in sides.items()
        for metric, values in metrics.items()
    }


LOW, HIGH = [0.10, 0.11, 0.12, 0.10, 0.11], [0.20, 0.22, 0.21, 0.20, 0.23]


def test_a_claim_that_holds_in_every_run_is_supported_and_its_opposite_refuted():
    scores = measured(a={"fvu": LOW}, b={"fvu": HIGH})
    found = judge(claim(), scores, planted=True)
    assert found.word == "supported"
    assert found.mean == pytest.approx(0.104)
    assert found.interval[0] < 0.104 < found.interval[1]
    assert found.p < 1e-3
    assert judge(claim(direction="higher"), scores, planted=True).word == "refuted"
    assert judge(claim(smallest=0.5), scores, planted=True).word.startswith("supported, but")


def test_one_run_the_other_way_leaves_a_claim_undecided():
    scores = measured(a={"fvu": [*LOW[:4], 0.3]}, b={"fvu": HIGH})
    assert judge(claim(), scores, planted=True).word == "undecided"


def test_an_interval_over_zero_leaves_a_claim_undecided():
    scores = measured(a={"fvu": LOW}, b={"fvu": HIGH})
    noisy = {key: {u: Score(s.value, 0.2) for u, s in d.items()} for key, d in scores.items()}
    assert judge(claim(), noisy, planted=True).word == "undecided"


def test_units_of_one_store_share_the_error_of_its_documents():
    exact = measured(a={"fvu": [0.1] * 4}, b={"fvu": [0.2] * 4})
    scores = {key: {u: Score(s.value, 0.01) for u, s in d.items()} for key, d in exact.items()}
    shared, apart = (judge(claim(), scores, planted=p).interval for p in (False, True))
    assert shared[1] - shared[0] == pytest.approx(2 * 1.96 * 0.01 * 2**0.5, rel=0.05)
    assert apart[1] - apart[0] == pytest.approx((shared[1] - shared[0]) / 2, rel=0.05)


def test_documents_that_both_sides_share_cancel():
    drawn = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def side(value: float, own: float) -> dict[int, Score]:
        return {i: Score(value, 1.0, value + drawn + own * drawn.flip(0)) for i in range(3)}

    scores = {
        ("run/a:dictionary", "fvu"): side(0.1, 0.0),
        ("run/b:dictionary", "fvu"): side(0.2, 0.0),
    }
    found = judge(claim(), scores, planted=False)
    assert found.word == "supported"
    assert found.interval == pytest.approx((0.1, 0.1))
    scores["run/b:dictionary", "fvu"] = side(0.2, 0.02)  # what they do not share stays
    low, high = judge(claim(), scores, planted=False).interval
    assert high - low == pytest.approx(2 * 1.96 * 0.02, rel=0.15)
    scores["run/b:dictionary", "fvu"] = {i: Score(0.2, 1.0) for i in range(3)}  # nothing kept
    assert judge(claim(), scores, planted=False).word == "undecided"


def test_few_runs_decide_nothing_and_runs_may_be_left_out():
    scores = measured(a={"fvu": LOW, "found": [1, 1, 0, 1, 1]}, b={"fvu": HIGH})
    few = judge(claim(where="found"), scores, planted=True)
    assert few.word.startswith("undecided (too few")
    assert few.n_left_out == 1
    assert judge(claim(where="found"), scores, planted=False).word == "supported"


def test_a_claim_may_name_a_number_and_a_control():
    scores = measured(a={"fvu": LOW}) | {
        ("run/a:pca", "fvu"): {i: Score(0.5, 0.0) for i in range(5)}
    }
    assert judge(claim(second=0.2), scores, planted=True).word == "supported"
    assert judge(claim(second="run/a:pca"), scores, planted=True).word == "supported"
    with pytest.raises(ConfigError, match="run/b"):
        judge(claim(), scores, planted=True)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.parent.name)
def test_shipped_claims_speak_of_members_of_their_runs(path):
    found = verdicts.read_claims(path.parent)
    names = {}
    for name, spec in found.runs.items():
        names[name] = members(path.parent, spec)
    for one in found.claims:
        for side in (one.first, one.second):
            if isinstance(side, str):
                run, member = side.split(":")[0].split("/")
                assert member in names[run], side


def members(folder: Path, spec: RunOf) -> set[str]:
    world = [] if spec.seeds is None else [f"synthetic.seed={spec.seeds[0]}"]
    config = load_config(folder / spec.config, [*spec.overrides, *world])
    names = {re.sub(r"-seed\d+$", "", member.name) for member in config.members()}
    return names | {f"{name}-sign-tied" for name in spec.sign_tied}


def test_verdicts_of_a_planted_run_from_its_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "run.yaml").write_text(
        "name: run\n"
        "synthetic: {kind: bidirectional, n_features: 6, d: 8, l0: 1, n_rows: 2000}\n"
        "dictionaries:\n"
        "  - {name: signed, type: abs_topk, d_sae: 6, k: 1, lr: 0.01}\n"
        "  - {name: plain, type: topk, d_sae: 6, k: 1, lr: 0.01}\n"
        "train: {batch: 100, tokens: 3000}\n"
        "evaluate: {evals: [truth], truth: {fit_rows: 200, oracles: [], probes: 0}}\n"
        "out: x\nthreads: 1\n"
    )
    (tmp_path / "claims.yaml").write_text(
        "paper: none\n"
        "runs: {r: {config: run.yaml, seeds: [0, 1, 2, 3, 4], sign_tied: [signed]}}\n"
        "claims:\n"
        "  - {says: s, metric: r2, first: r/signed, second: r/plain, direction: higher,"
        " smallest: 0.01}\n"
        "  - {says: t, metric: r2, first: r/signed-sign-tied, second: r/signed,"
        " direction: higher, smallest: 0.01}\n"
    )
    said: list[str] = []
    drawn = [tmp_path / "a" / "once.svg", tmp_path / "twice.svg"]
    verdicts.main([str(tmp_path), "--figure", str(drawn[0])], said.append)
    text = "".join(said)
    assert "| signed | 5 |" in text
    assert "**supported**" in text.splitlines()[-2]
    assert "+0.0000" in text.splitlines()[-1]
    assert Claims.parse({"paper": "p", "runs": {}}).claims == []
    verdicts.main([str(tmp_path), "r", "--figure", str(drawn[1])], said.append)
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    assert b"<svg" in drawn[0].read_bytes()
