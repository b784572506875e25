"""A run whose documents have labels, scored by the evaluators of labels, on the toy model."""

import io
import re

import pytest
from rich.console import Console
from saelab_experiments import labelled
from test_line import toy

import saelab
from saelab import artifacts, leaderboard, pipeline, planning, report
from saelab.errors import ConfigError
from saelab.results import read_rows

EVALUATE = {
    "evals": ["core", "probing", "concepts", "tpp", "scr"],
    "core": {"resamples": 20, "windows": 0, "pursuit_rows": 0},
    "probing": {"ks": [1, 5], "resamples": 20, "per_label": 4, "words": 50},
    "concepts": {"resamples": 20, "per_label": 2, "words": 50},
    "tpp": {"ns": [1, 5], "resamples": 20, "per_label": 4, "draws": 2},
    "scr": {
        "attributes": {"pairs": [["garden", "kitchen"]], "pattern": "anna|boris"},
        **{"ns": [1, 5], "resamples": 20, "per_label": 2, "draws": 2},
    },
}
LABELLED = {"source": "toy", "context": 32, "tokens": 40_000, "holdout": 0.4}


def shown(what):
    out = io.StringIO()
    Console(file=out, width=200).print(what)
    return out.getvalue()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of two dictionaries on the toy's four topics."""
    root = tmp_path_factory.mktemp("labelled")
    members = [
        {"type": "topk", "d_sae": 48, "k": 4},
        {"type": "abs_topk", "d_sae": 24, "k": 4},
        {"type": "supervised", "d_sae": 4, "per_label": 4},
    ]
    config = toy(root / "out", corpus=LABELLED, evaluate=EVALUATE, dictionaries=members)
    del config["index"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(root / "cache"))
        planned = shown(planning.plan(pipeline.load_config(config)))
        assert "train supervised 4" in planned
        saelab.run(config)
        yield [path for path, _ in artifacts.find_all(root / "out", "results")], root / "out"


def test_topics_are_told_from_activations_and_words(results):
    paths, _ = results
    assert len(paths) == 3
    for path in paths:
        cells = {(row["arm"], row["name"]): row for row in read_rows(path)}
        assert cells["corpus", "probing_labels"]["value"] == 4
        assert cells["bag_of_words", "probe_auc[all,max]"]["value"] > 0.9
        assert cells["raw", "probe_auc[all,mean]"]["value"] > 0.65
        assert cells["dictionary", "probe_auc[k=5,mean]"]["standard_error"] > 0
        assert 0.4 < cells["dictionary", "concept_auc[mean]"]["value"] <= 1
        assert cells["linear_probe", "concept_auc[mean](garden)"]["evaluator"] == "concepts"
        assert cells["probe", "tpp_accuracy"]["value"] > 0.52
        assert cells["linear_probe", "tpp[n=1](garden)"]["evaluator"] == "tpp"
        assert cells["dictionary", "scr[n=5](garden or kitchen)"]["n"] > 10


def test_controls_are_the_same_for_every_dictionary(results):
    first, *others = (
        {
            row["name"]: (row["value"], row["standard_error"])
            for row in read_rows(path)
            if row["arm"] == arm and row["evaluator"] in ("probing", "concepts", "tpp", "scr")
        }
        for path in results[0]
        for arm in ("raw",)
    )
    assert first
    assert all(other == first for other in others)


def test_the_table_of_labels_pairs_every_row_with_one_member(results):
    said: list[str] = []
    labelled.main([str(results[1]), "--against", "abs_topk"], said.append)
    text = "".join(said)
    assert "4 labels, " in text
    titles = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert titles == [
        "A single latent",
        "Probes on each latent's largest value in a document",
        "Probes on each latent's mean over a document",
        "What ablating latents does",
    ]
    latent, largest, mean, ablating = (
        {line.split(" | ")[0].strip("| *"): line for line in part.splitlines() if "|" in line}
        for part in text.split("\n### ")[1:]
    )
    for table in (latent, largest, mean, ablating):
        assert "<br>" not in table["toy-abs_topk-24-4"]
        for name in ("toy-topk-48-4", "toy-supervised-4", "raw", "linear_probe"):
            assert "<br>" in table[name]
    assert "bag_of_words" in mean and "bag_of_words" not in ablating
    assert latent[""].endswith("| SNMF score | above 0 | clamped | candidates |")
    assert latent["mean_difference"].endswith("| 2 |")
    with pytest.raises(ConfigError, match="--against top: no member of this run; did you mean"):
        labelled.main([str(results[1]), "--against", "top"])


def test_the_scorecard_and_the_ranking_show_them(results):
    paths, out = results
    card = shown(report.scorecard(paths[0]))
    titles = "targeted probe perturbation", "spurious correlation removed", "n=5"
    for words in ("k=5 max", "all mean", "SNMF score", "linear_probe", "4 labels of", *titles):
        assert words in card
    board = shown(leaderboard.compare([out], "probe_auc[k=1,max]"))
    assert "topk-48-4" in board
    assert "concept_auc[max]" in report.markdown(paths[0])
    for metric in ("tpp[n=5]", "scr[n=1]"):
        assert "topk-48-4" in shown(leaderboard.compare([out], metric))


def test_labels_that_a_run_will_not_have_are_refused_before_it_starts(tmp_path):
    table = tmp_path / "texts.csv"
    table.write_text("text,topic\na,b\n", encoding="utf-8")
    for corpus, match in (
        ({"source": str(table), "tokens": 100}, "label_field"),
        ({"source": "toy", "tokens": 100, "packing": "concat"}, "packing"),
    ):
        with pytest.raises(ConfigError, match=match):
            saelab.run(toy(tmp_path, corpus=corpus, evaluate={"evals": ["probing"]}))
    planted = {"kind": "flat", "n_features": 8, "d": 8, "l0": 2, "n_rows": 100}
    config = toy(tmp_path, synthetic=planted, evaluate={"evals": ["concepts"]})
    for key in ("model", "corpus", "harvest"):
        del config[key]
    with pytest.raises(ConfigError, match="planted stores"):
        saelab.run(config)
