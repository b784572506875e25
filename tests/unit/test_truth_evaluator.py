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
from saelab.evals.oracles import known_of, probed_features
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
    for name in (
        "mcc", "mcc_weighted", "mcc_signed", "uniqueness", "splitting", "matched_share",
        "coverage", "precision", "recall", "f1", "f1_balanced", "support_precision",
        "support_recall", "support_f1",
    ):  # fmt: skip
        assert own[name] == pytest.approx(1), name
    assert found["best_latent"]["average_precision"] == 1
    for name in ("precision", "recall", "f1", "f1_balanced"):
        assert found["best_latent"][name] > 0.99, name  # thresholds are fitted on few rows
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
    assert floor["coverage"] == 0
    assert abs(floor["mcc_signed"]) < 0.2
    assert max(floor["support_precision"], floor["support_recall"], floor["support_f1"]) < 0.6
    assert found["oracle(support)"]["f1"] == found["oracle(support)"]["support_f1"] == 1
    assert found["oracle(support)"]["r2"] == pytest.approx(1, abs=1e-6)
    assert found["oracle(linear)"]["f1"] > 0.98
    assert found["oracle(linear)"]["support_f1"] > 0.98
    for name in ("f1", "f1_balanced", "average_precision"):
        assert found["probe"][name] > 0.95, name
    assert "mcc" not in found["oracle(linear)"]


def test_a_narrow_oracle_stands_for_the_most_frequent_features(easy):
    narrow = TopK(TopKConfig.parse({"type": "topk", "d_in": 24, "d_sae": 4, "k": 2}))
    narrow.init_(easy.rows("synthetic", torch.arange(64)), torch.Generator().manual_seed(0))
    found = scores(narrow, easy)
    assert found["oracle(support)"]["recall"] == 1
    assert found["oracle(support)"]["support_precision"] == 1
    assert found["oracle(support)"]["support_recall"] < 0.9
    assert found["oracle(support)"]["r2"] < 0.9


def test_signed_concepts_are_matched_by_absolute_cosine_and_fire_either_way(tmp_path):
    config = FlatConfig(kind="bidirectional", n_features=12, d=20, l0=1.5, n_rows=2500, holdout=0.3)
    store = plant(tmp_path, config)
    flipped = Planted(store)
    with torch.no_grad():
        flipped.W_dec.mul_(-1)
    own = scores(flipped, store)["dictionary"]
    assert own["mcc"] == pytest.approx(1)
    assert own["mcc_signed"] == pytest.approx(-1)
    assert own["f1"] == own["support_f1"] == pytest.approx(1)
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


def test_the_planted_dictionary_of_a_hierarchy_neither_absorbs_nor_hedges(tmp_path):
    config = HierarchyConfig(kind="hierarchy", n_rows=6000, holdout=0.5, correlation=0.3)
    settings = QUICK.model_copy(update={"rows": 3000})
    found = scores(Planted(store := plant(tmp_path, config)), store, settings)
    own, floor = found["dictionary"], found["random_dictionary"]
    for name in ("absorption", "hedging", "gram_within", "gram_across"):
        assert own[name] == pytest.approx(0, abs=1e-6), name
    for name in ("matched_children", "coverage[root]", "coverage[level 1]", "coverage[alone]"):
        assert own[name] == 1, name
        assert floor[name] == 0, name
    assert floor["gram_within"] > 0.03
    for arm in ("dictionary", "oracle(support)"):
        assert found[arm]["edge_recall[level 1]"] == pytest.approx(1), arm
        assert found[arm]["edge_absorption[level 1]"] == pytest.approx(0), arm
    assert found["planted"]["overlap"] == pytest.approx(0.3, abs=1e-5)
    assert found["planted"]["overlap_p99"] == pytest.approx(0.3, abs=1e-5)


def test_a_dictionary_that_absorbs_a_parent_under_its_children_is_told(tmp_path):
    config = HierarchyConfig(kind="hierarchy", n_rows=6000, holdout=0.5, sd=0, child_sd=0)
    store = plant(tmp_path, config)
    above = store.truth().parents

    class Absorbing(Planted):
        """Each child's latent holds its parent as well, whose own latent is then silent."""

        def __init__(self):
            super().__init__(store)
            with torch.no_grad():
                self.W_dec[above >= 0] += self.W_dec[above[above >= 0]]

    own = scores(Absorbing(), store, QUICK.model_copy(update={"rows": 3000}))["dictionary"]
    assert own["absorption"] == pytest.approx(0.5**0.5)
    assert own["hedging"] == pytest.approx(0, abs=1e-6)
    assert own["edge_recall[level 1]"] == 0
    assert own["edge_absorption[level 1]"] == 1
    assert own["r2"] == pytest.approx(1, abs=1e-6)
    assert own["support_precision"] == 1
    assert own["support_recall"] == pytest.approx(1 / 1.36, abs=0.02)


def test_worlds_without_parents_have_no_rows_of_trees(easy):
    own = scores(Planted(easy), easy)["dictionary"]
    assert not [name for name in own if "[" in name or "gram" in name]
    assert not {"matched_children", "absorption", "hedging"} & own.keys()


def test_support_has_an_error_over_documents(easy):
    rows = list(TruthEvaluator(QUICK)(Planted(easy), easy, None))
    found = [row for row in rows if row.name.startswith("support_")]
    assert len(found) == 3 * 5
    for row in found:
        if row.arm == "dictionary":
            assert row.standard_error == 0
        if row.arm == "random_dictionary":
            assert 0.001 < row.standard_error < 0.1


def test_probed_features_are_spread_over_levels_and_are_often_enough_on(tmp_path):
    store = plant(tmp_path, HierarchyConfig(kind="hierarchy", n_rows=2500, holdout=0.3))
    known = known_of(store, "synthetic", store.truth(), 20, rows=1500, batch=500, seed=0)
    places = probed_features(known, 10, 30)
    assert len(set(places.tolist())) == 10
    assert 3 <= int((known.truth.parents[known.features[places]] >= 0).sum()) <= 6
    assert set(probed_features(known, 99, 150).tolist()) == {0, 1, 2}  # p = .2; others have .05
    assert len(probed_features(known, 10, 10_000)) == 0


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
