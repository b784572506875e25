"""The truth evaluator on small planted stores: ceilings, floor, signs, refusals."""

import json
from pathlib import Path

import pytest
import torch
from doubles import ArrayStore
from rich.console import Console

import saelab
from saelab import api, artifacts, pipeline, report
from saelab.dictionaries.topk import TopK, TopKConfig
from saelab.errors import ArtifactError, ConfigError
from saelab.evals.truth import TruthConfig, TruthEvaluator
from saelab.store import open_store
from saelab.store.flat import FlatConfig
from saelab.store.hierarchy import HierarchyConfig
from saelab.store.synthetic import fill_synthetic
from saelab.types import SparseLatents

SHIPPED = Path(__file__).parents[2] / "experiments" / "quickstart" / "planted.yaml"
QUICK = TruthConfig(rows=800, fit_rows=1500, probes=6, resamples=20)


def plant(out, config):
    with artifacts.open_draft(out, "store", "planted", "9" * 64) as draft:
        facts = fill_synthetic(draft, config)
        draft.finish(stage="store", name="planted", inputs={}, parents=[], facts=facts)
    return open_store(artifacts.artifact_path(out, "store", "planted", "9" * 64))


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Sixteen concepts in twenty-four dimensions, one and a half on at a time."""
    config = FlatConfig(n_features=16, d=24, l0=1.5, n_rows=3000, holdout=0.3, bias=1.0)
    return plant(tmp_path_factory.mktemp("easy"), config)


class Planted(TopK):
    """The planted dictionary itself: it looks its codes up."""

    def __init__(self, store):
        truth = store.truth()
        n, d = truth.directions.shape
        super().__init__(TopKConfig.parse({"type": "topk", "d_in": d, "d_sae": n, "k": n}))
        self.store = store
        with torch.no_grad():
            self.W_dec.copy_(truth.directions)
            self.b_dec.copy_(truth.bias)

    def encode_sparse(self, x) -> SparseLatents:
        codes = (x - self.b_dec) @ torch.linalg.pinv(self.W_dec)
        return SparseLatents.from_dense(torch.where(codes.abs() < 1e-3, 0, codes))


def scores(dictionary, store, config=QUICK):
    rows = list(TruthEvaluator(config)(dictionary, store, None))
    assert {row.evaluator for row in rows} == {"truth"}
    assert len({(row.name, row.arm) for row in rows}) == len(rows)
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row.arm, {})[row.name] = row.value
    return found


def test_the_planted_dictionary_with_its_codes_scores_one_everywhere(easy):
    found = scores(Planted(easy), easy)
    own = found["dictionary"]
    for name in ("mcc", "uniqueness", "matched_share", "precision", "recall", "f1"):
        assert own[name] == pytest.approx(1), name
    assert own["r2"] == pytest.approx(1, abs=1e-6)
    assert own["shrinkage"] == pytest.approx(1, abs=1e-5)
    assert own["dead_share"] == 0
    assert own["l0"] == pytest.approx(found["planted"]["l0"])


def test_the_random_dictionary_is_the_floor_and_oracles_are_ceilings(easy):
    found = scores(Planted(easy), easy)
    floor = found["random_dictionary"]
    assert floor["mcc"] < 0.5
    assert floor["f1"] < 0.6
    assert floor["r2"] < 0.9
    assert found["oracle(support)"]["f1"] == 1
    assert found["oracle(support)"]["r2"] == pytest.approx(1, abs=1e-6)
    assert found["oracle(linear)"]["f1"] > 0.98
    assert found["probe"]["f1"] > 0.95
    assert "mcc" not in found["oracle(linear)"]


def test_a_narrow_oracle_stands_for_the_most_frequent_features(easy):
    narrow = TopK(TopKConfig.parse({"type": "topk", "d_in": 24, "d_sae": 4, "k": 2}))
    narrow.init_(easy.rows("synthetic", torch.arange(64)), torch.Generator().manual_seed(0))
    found = scores(narrow, easy)
    assert found["oracle(support)"]["recall"] == 1
    assert found["oracle(support)"]["r2"] < 0.9


def test_signed_concepts_are_matched_by_absolute_cosine_and_fire_either_way(tmp_path):
    config = FlatConfig(kind="bidirectional", n_features=12, d=20, l0=1.5, n_rows=2500, holdout=0.3)
    store = plant(tmp_path, config)
    flipped = Planted(store)
    with torch.no_grad():
        flipped.W_dec.mul_(-1)
    own = scores(flipped, store)["dictionary"]
    assert own["mcc"] == pytest.approx(1)
    assert own["f1"] == pytest.approx(1)
    assert own["r2"] == pytest.approx(1, abs=1e-6)


def test_a_signed_latent_that_holds_two_opposed_concepts_has_half_the_precision(tmp_path):
    config = FlatConfig(kind="opposed", n_features=12, d=20, l0=1.0, n_rows=2500, holdout=0.3)
    store = plant(tmp_path, config)
    truth = store.truth()
    merged = TopK(TopKConfig.parse({"type": "topk", "d_in": 20, "d_sae": 6, "k": 6}))
    with torch.no_grad():
        merged.W_dec.copy_(truth.directions[::2])

    class Signed(Planted):
        def __init__(self):
            TopK.__init__(self, merged.config)
            self.load_state_dict(merged.state_dict())

    own = scores(Signed(), store)["dictionary"]
    assert own["mcc"] == pytest.approx(1)
    assert own["r2"] == pytest.approx(1, abs=1e-6)
    assert own["precision"] == pytest.approx(0.5, abs=0.1)
    assert own["recall"] > 0.95


def test_a_hierarchy_has_an_absorption_row(tmp_path):
    config = HierarchyConfig(kind="hierarchy", n_rows=2500, holdout=0.3)
    found = scores(Planted(store := plant(tmp_path, config)), store)
    assert found["dictionary"]["absorption"] == pytest.approx(0, abs=1e-6)
    assert found["dictionary"]["matched_children"] == 1
    assert found["random_dictionary"]["matched_children"] == 0
    assert found["planted"]["overlap"] < 1e-5


def test_probes_and_oracles_can_be_left_out(easy):
    config = QUICK.model_copy(update={"probes": 0, "oracles": ()})
    assert set(scores(Planted(easy), easy, config)) == {
        "dictionary", "random_dictionary", "planted",
    }  # fmt: skip


def test_the_same_call_gives_the_same_rows(easy):
    first, second = (list(TruthEvaluator(QUICK)(Planted(easy), easy, None)) for _ in range(2))
    assert first == second


def test_what_cannot_be_scored_is_refused(easy):
    bare = ArrayStore({"synthetic": torch.randn(64, 24)})
    with pytest.raises(ConfigError, match="store with planted directions"):
        api.evaluate_truth(Planted(easy), bare)
    narrow = TopK(TopKConfig.parse({"type": "topk", "d_in": 8, "d_sae": 4, "k": 2}))
    with pytest.raises(ArtifactError, match="width 24"):
        api.evaluate_truth(narrow, easy)
    data = {
        "name": "x", "out": "o", "model": {"source": "toy"}, "evaluate": {"evals": ["truth"]},
        "corpus": {"source": "toy", "tokens": 100},
        "harvest": {"sites": ["blocks.0.hook_resid_post"]},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="truth needs a planted store"):
        pipeline.load_config(data)


def test_the_shipped_planted_run_goes_through_the_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    small = [
        f"out={tmp_path / 'out'}", "synthetic.n_rows=2000", "train.tokens=5120",
        "evaluate.truth.resamples=10", "evaluate.core.resamples=10", "evaluate.truth.probes=4",
    ]  # fmt: skip
    steps = saelab.run(SHIPPED, overrides=small)
    assert [step.stage for step in steps] == ["store", "dictionary", "results"]
    rows = [json.loads(line) for line in (steps[2].path / "results.jsonl").read_text().splitlines()]
    found = {(row["evaluator"], row["arm"]) for row in rows}
    assert {("core", "dictionary"), ("truth", "dictionary"), ("truth", "oracle(linear)")} <= found
    console = Console(width=200, record=True)
    console.print(report.scorecard(steps[2].path))
    assert "against the planted truth" in console.export_text()
    assert saelab.run(SHIPPED, overrides=small)[2].status == "found"
