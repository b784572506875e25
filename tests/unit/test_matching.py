"""The study of layer matching, on toy rows and toy models."""

import json
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from doubles import ArrayStore
from saelab_experiments import matching, subjects
from saelab_experiments.layer_parts import (
    MeasureConfig,
    Sample,
    draw_documents,
    keep_rows,
    measure,
)
from saelab_experiments.matching import METHODS, MatchingConfig, number, split_texts, truth_numbers
from saelab_experiments.subjects import ArmConfig, DamageArm, Subject
from tiny_models import save_llama

from saelab.errors import AssetError, ConfigError, CorpusError
from saelab.evals.alignment import Alignment

N, D, L = 128, 8, 3
ARM = ArmConfig(layers=[0, 1, 2], tokens=N, atoms=12, resamples=2)
MEASURE = MeasureConfig(k=2, most_atoms=30, anchors=16, context=64)
DOCUMENTS = torch.arange(N) // 16


def layers(seed=0):
    """Sparse layers, each with a pattern of its own of which rows are large."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for depth in range(L):
        directions = torch.randn(6 + 6 * depth, D, generator=generator)
        chosen = torch.rand(N, len(directions), generator=generator).topk(2 + depth, dim=1)
        x = torch.zeros(N, len(directions)).scatter(1, chosen.indices, 1 + chosen.values)
        found.append(x @ directions + 0.2 * torch.randn(N, D, generator=generator))
    return found


def sample_of(*stacks):
    numbers = range(len(stacks[0]))
    models = [
        Subject(f"m{i}", {}, tuple(numbers), L, lambda: nullcontext("")) for i in range(len(stacks))
    ]
    stores = [ArrayStore(dict(zip(models[0].sites, stack, strict=True))) for stack in stacks]
    rows = torch.arange(N).repeat(len(stacks), 1)
    places = Alignment(rows, DOCUMENTS, tuple(map(str, range(N // 16))), N // 16)
    return Sample(models, stores, places)


def parts_of(sample, pairs):
    """One text sample with two rebuilds."""
    row = []
    for r in range(3):
        draw = draw_documents(DOCUMENTS, r, anchors=MEASURE.anchors, seed=0)
        row.append(measure(sample, pairs, draw, ARM, MEASURE, row[0] if row else None))
    return [json.loads(json.dumps(row))]


@pytest.fixture(scope="module")
def copies():
    """A model beside itself, and beside a copy with its layers in another order."""
    own = layers()
    return parts_of(sample_of(own, [own[i] for i in (2, 0, 1)]), [(0, 0), (0, 1)])


def test_every_method_finds_every_layer_of_an_identical_copy(copies):
    numbers = {
        (n.method, n.metric): n for n in truth_numbers("a", "r", copies, ["0-0"], ARM.layers)
    }
    for method in METHODS:
        right, wrong = numbers[method, "accuracy"], numbers[method, "layer_error"]
        if method != "size":
            assert (right.value, right.half, wrong.value) == (1, 0, 0)
    assert numbers["itda", "jaccard_of_counterparts"].value == 1
    assert numbers["size", "accuracy"].value >= 0.5


def test_layers_in_another_order_are_found_where_they_went(copies):
    for method in METHODS:
        forth = torch.tensor(copies[0][0]["likeness"]["0-1"][method]["forth"])
        if method != "size":
            assert forth.argmax(1).tolist() == [1, 2, 0]


def test_all_dictionaries_are_full_also_on_resampled_documents(copies):
    assert [part["fewest_atoms"] for row in copies for part in row] == [ARM.atoms] * 3
    assert copies[0][0]["thresholds"] == copies[0][2]["thresholds"]
    assert copies[0][0]["likeness"] != copies[0][1]["likeness"]


def test_rows_are_compared_at_the_places_that_the_models_share():
    own = layers()
    sample = sample_of(own, [x.flip(0) for x in own])
    turned = replace(sample.places, rows=torch.stack([torch.arange(N), N - 1 - torch.arange(N)]))
    for first, second in zip(*map(replace(sample, places=turned).layers, (0, 1)), strict=True):
        assert torch.equal(first, second)


def test_draw_0_is_the_sample_and_others_draw_documents_with_replacement():
    whole = draw_documents(DOCUMENTS, 0, anchors=5, seed=3)
    assert torch.equal(whole.rows, torch.arange(N))
    assert torch.equal(whole.order.sort().values, torch.arange(N))
    assert not torch.equal(whole.order, whole.rows)
    drawn = draw_documents(DOCUMENTS, 1, anchors=5, seed=3)
    counts = DOCUMENTS[drawn.rows].bincount(minlength=N // 16)
    assert set((counts % 16).tolist()) == {0}
    assert len(drawn.rows) == N
    assert 0 < len(drawn.order) < N
    assert torch.equal(drawn.order.sort().values, drawn.rows.unique())
    again = draw_documents(DOCUMENTS, 1, anchors=5, seed=3)
    assert torch.equal(drawn.order, again.order)
    assert not torch.equal(drawn.order, draw_documents(DOCUMENTS, 2, anchors=5, seed=3).order)


def test_a_dictionary_keeps_rows_of_the_draw_and_knows_them_by_their_place():
    x, draw = layers()[0], draw_documents(DOCUMENTS, 1, anchors=5, seed=0)
    rows, threshold = keep_rows(x, draw, {"d_sae": 12, "k": 2, "target_size": 19})
    assert len(set(rows.tolist())) == 12
    assert set(rows.tolist()) <= set(draw.order.tolist())
    same, _ = keep_rows(x, draw, {"d_sae": 12, "k": 2, "threshold": threshold})
    assert torch.equal(same, rows)


# ------------------------------------------------------------------------------------- intervals


def test_the_interval_is_students_over_the_rebuilds_of_the_samples():
    values = torch.tensor([[[0.8, 0.6, 0.7, 0.8], [0.6, 0.3, 0.5, 0.7]]]).double()
    found = number(values, arm="a", row="r", method="m", metric="x")
    assert found.value == pytest.approx(0.7)
    variance = (0.01 + 0.04) / 2 / 2
    assert found.half == pytest.approx(2.776 * variance**0.5, rel=1e-3)
    assert found.spread == pytest.approx(0.02**0.5)
    assert found.over_pairs is None
    two = number(values.repeat(2, 1, 1), arm="a", row="r", method="m", metric="x")
    assert (two.value, two.half, two.over_pairs) == (found.value, pytest.approx(found.half), 0)
    with pytest.raises(ConfigError, match="two resamples"):
        number(values[..., :2], arm="a", row="r", method="m", metric="x")


# ---------------------------------------------------------------------------------- toy models


TINY = {"vocabulary": 300, "n_layers": 3, "d_model": 16, "heads": 2, "context": 64, "steps": 2}
WORDS = "the people of this great state say that time and work can make life good for us all"


@pytest.fixture
def texts(tmp_path):
    chance = random.Random(0)
    lines = [f"d{i} " + " ".join(chance.choices(WORDS.split(), k=40)) for i in range(60)]
    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(lines) + "\n")
    return tmp_path / "texts.csv"


def study(tmp_path, texts, **arms):
    fields = {
        "out": tmp_path / "run", "source": str(texts), "samples": 2, "documents": 12,
        "measure": MEASURE.plain() | {"anchors": 8},
    }  # fmt: skip
    return fields | arms


READ = {"tokens": 260, "atoms": 12, "resamples": 2, "dtype": "float32"}


def test_the_arm_of_known_truth_runs_and_goes_on_where_it_was_stopped(tmp_path, texts, monkeypatch):
    known = READ | {"layers": [0, 1, 2], "seeds": [0, 1], "tiny": TINY}
    config = MatchingConfig.parse(study(tmp_path, texts, samples=1, known=known))
    measured, stop_at = [], 1

    def counted(*args):
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(*args)

    monkeypatch.setattr("saelab_experiments.layer_parts.measure", counted)
    with pytest.raises(KeyboardInterrupt):
        matching.run_known(config, config.known)
    stop_at = 100
    text, numbers = matching.run_known(config, config.known)
    assert len(measured) == 3
    again, _ = matching.run_known(config, config.known)
    assert (again, len(measured)) == (text, 3)
    assert "## Known truth" in text
    assert "of unigrams" in text
    assert {n.method for n in numbers} == set(METHODS)
    assert all(0 <= n.value <= 1 for n in numbers if n.metric == "accuracy")


def test_damaged_copies_are_folders_that_go_away_and_no_noise_is_no_damage(tmp_path):
    from saelab import models

    folder = save_llama(tmp_path / "llama")
    fields = READ | {"layers": [0, 1, 2], "model": str(folder), "steps": [1]}
    arm = DamageArm.parse(fields | {"noise": [0.0, 0.3], "bits": [2]})
    found = subjects.damaged(arm, [WORDS] * 40, tmp_path / "out")
    assert [s.name for s in found[1:]] == ["noise 0", "noise 0.3", "2 bits", "tuned 1 steps"]
    assert found[0].depths == [0, 0.5, 1]
    tokens = torch.arange(3, 19)[None]
    logits = []
    for subject in found:
        with subject.open() as source:
            logits.append(models.load_model(source, dtype="float32", device="cpu").logits(tokens))
    assert torch.equal(logits[0], logits[1])
    assert all(not torch.allclose(logits[0], other) for other in logits[2:])
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    with pytest.raises(AssetError, match="no folder of weights"):
        subjects.damaged(DamageArm.parse(fields | {"model": "toy"}), [], tmp_path)


def test_another_family_is_judged_by_the_order_of_depths(tmp_path, texts):
    folder = save_llama(tmp_path / "llama")
    family = READ | {
        "models": [str(folder), str(folder)], "layers": [0, 1, 2], "other_layers": [0, 1, 2],
        "permutations": 50, "tokens": 120, "atoms": 6,
    }  # fmt: skip
    config = MatchingConfig.parse(study(tmp_path, texts, samples=1, family=family))
    text, numbers = matching.run_family(config, config.family)
    cka = [n for n in numbers if n.method == "cka"]
    assert [n.value for n in cka] == pytest.approx([1, 1])
    assert "; p " in text


def test_samples_share_no_document_with_each_other_or_with_the_training_texts(tmp_path, texts):
    config = MatchingConfig.parse(study(tmp_path, texts))
    files, others = split_texts(config)
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert len(set(lines)) == 24
    assert len(others) == 36
    assert not {line.split()[0] for line in lines} & {text.split()[0] for text in others}
    with pytest.raises(CorpusError, match="60 documents, but 2 samples of 30"):
        split_texts(config.model_copy(update={"documents": 30}))


def test_the_shipped_study_is_valid_and_unknown_arms_are_refused(tmp_path):
    path = matching.Path(matching.__file__).parent / "layers" / "matching.yaml"
    with pytest.raises(ConfigError, match="no arm 'knwon'"):
        matching.main([str(path), "knwon", f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
