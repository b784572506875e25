"""The steering evaluator on the toy: a planted handle is found and beats what it should."""

import math
from dataclasses import replace

import pytest
import torch
from steering_toys import OWN, SITE, dictionary_with, labelled_store, word_direction

from saelab.errors import ConfigError
from saelab.models import load_model
from saelab.steering import evaluator as module
from saelab.steering import fluency, scene
from saelab.steering.candidates import Candidate
from saelab.steering.evaluator import SteeringConfig, SteeringEvaluator
from saelab.steering.neutral import NeutralConfig
from saelab.steering.sweep import Continuations, Matched
from saelab.steering.trial import Response, Trial

NO_DOSE = {"oracle", "prompt"}
CONFIG = SteeringConfig(
    concepts=("glad",), doses=(1.5,), new_tokens=3, candidates=1, per_label=3, rows=300,
    resamples=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory, toy_model):
    return labelled_store(tmp_path_factory.mktemp("steering"), toy_model)


@pytest.fixture
def neutral(tmp_path) -> NeutralConfig:
    path = tmp_path / "news.csv"
    lines = [f"on day {n} the people of this state did the work of the time" for n in range(9)]
    path.write_text("text\n" + "\n".join(lines) + "\n")
    return NeutralConfig(source=str(path), windows=5, context=10)


def make_dictionary(toy_model, seed: int):
    return dictionary_with(word_direction(toy_model, OWN["glad"]), seed)


def test_a_handle_is_found_and_stands_beside_its_controls(toy_model, store, neutral, monkeypatch):
    monkeypatch.setattr(module, "N_RANDOM", 2)
    evaluate = SteeringEvaluator(CONFIG.model_copy(update={"neutral": neutral}), SITE)
    rows = list(evaluate(make_dictionary(toy_model, 0), store, toy_model))
    found = {(row.name, row.arm): row for row in rows}
    arms = {row.arm for row in rows if row.name == "steering_score(glad)"}
    assert arms == {
        "dictionary", "oracle", "prompt", "mean_difference", "linear_probe", "isotropic",
        "covariance", "shuffled_labels", "matched_latents",
    }  # fmt: skip
    lift = {arm: found["steering_lift(glad)", arm].value for arm in arms}
    assert lift["dictionary"] > max(lift["isotropic"], lift["covariance"])
    assert found["steering_candidates(glad)", "dictionary"].value == 2
    assert found["steering_latent(glad)", "dictionary"].value == 0
    assert found["steering_sign(glad)", "dictionary"].value == 1
    # one candidate under each rule: the better is the chosen one, and both are told
    rules = ("detection", "logit_effect")
    won = [found[f"steering_rule[{rule}](glad)", "dictionary"].value for rule in rules]
    assert sorted(won) == [0, 1]
    best = [found[f"steering_score[rule={rule}](glad)", "dictionary"] for rule in rules]
    assert best[won.index(1)].value == found["steering_score(glad)", "dictionary"].value
    assert len(best[0].replicates) == 20
    latents = [found[f"steering_latent[rule={rule}](glad)", "dictionary"].value for rule in rules]
    assert latents[won.index(1)] == 0
    assert found["steering_dose(glad)", "dictionary"].value == 1.5
    assert ("steering_dose(glad)", "prompt") not in found
    score = {arm: found["steering_score(glad)", arm].value for arm in arms}
    assert score["oracle"] >= score["dictionary"]
    lead = found["steering_score_over(isotropic)(glad)", "dictionary"]
    assert lead.value == pytest.approx(score["dictionary"] - score["isotropic"])
    assert found["steering_judge_heldout_auroc(glad)", "judge"].value > 0.9
    assert found["steering_ce_change(glad)", "dictionary"].value != 0
    # what is predicted and what fires, at each dose and at the chosen one
    for name in ("kl_last_prompt", "target_shift"):
        for arm in ("dictionary", "isotropic"):
            at_dose = found[f"steering_{name}[dose=1.5](glad)", arm].value
            assert at_dose == found[f"steering_{name}(glad)", arm].value
    shift = {arm: found["steering_target_shift(glad)", arm].value for arm in lift.keys() - NO_DOSE}
    assert shift["dictionary"] > max(shift["isotropic"], shift["covariance"])
    for name in ("presence", "presence_gain", "presence_others"):
        at_dose = found[f"steering_{name}[dose=1.5](glad)", "dictionary"].value
        assert at_dose == found[f"steering_{name}(glad)", "dictionary"].value
    # of two labels the other is the opposite, and no side effect
    assert not [name for name, _ in found if "others_change" in name]
    for row in rows:
        on_neutral = row.name.startswith("steering_ce_change")
        reader = "fluency(toy, unsteered)" if "fluency" in row.name else "ngrams(held-out half)"
        assert row.encoder.startswith(neutral.source if on_neutral else reader)
        assert row.evaluator == "steering"
        if "directions_reached" not in row.name and "non_monotone" not in row.name:
            assert row.n == (5 if on_neutral else 8)
        assert math.isfinite(row.value), row.name
        if row.name.startswith(("steering_score", "steering_ce")):
            assert len(row.replicates) == 20
    # the only dose is the chosen one; an instruction has none
    assert {arm for name, arm in found if name == "steering_lift[dose=1.5](glad)"} == arms - {
        "oracle", "prompt"
    }  # fmt: skip
    for arm in ("dictionary", "isotropic"):
        at_dose = found["steering_lift[dose=1.5](glad)", arm]
        assert torch.equal(at_dose.replicates, found["steering_lift(glad)", arm].replicates)
    assert {arm for name, arm in found if name == "steering_ce_change(glad)"} == arms - {
        "oracle", "prompt"
    }  # fmt: skip
    # what needs no dictionary is steered once
    again = list(evaluate(make_dictionary(toy_model, 1), store, toy_model))
    shared = {row.name: row for row in again if row.arm == "isotropic"}
    assert all(found[name, "isotropic"] == row for name, row in shared.items())


def test_an_arm_that_nobody_judges_has_reached_its_dose(toy_model, store, monkeypatch):
    written = Continuations(("the",), ("of",))
    sums = torch.ones(16, 5, dtype=torch.float64)
    sums[:, :3] = 0
    silent = Response("any", 1.5, (), None, "none", sums, (written,))
    monkeypatch.setattr(Trial, "responses", lambda _, arms, *__, **___: len(arms) * [silent])
    rows = list(SteeringEvaluator(CONFIG, SITE)(make_dictionary(toy_model, 0), store, toy_model))
    own = {row.name: row.value for row in rows if row.arm == "dictionary"}
    assert own == {"steering_reached(glad)": 1.0, "steering_missing(glad)": 1.0}


def test_side_effects_are_on_labels_that_are_not_the_opposite(toy_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "N_RANDOM", 2)
    three = OWN | {"small": ("little", "small")}
    store = labelled_store(tmp_path, toy_model, three)
    lines = [f"{label},{word} {n}" for label, own in three.items() for word in own for n in "1234"]
    (tmp_path / "other.csv").write_text("\n".join(["label,text", *lines]) + "\n")
    judge = {"source": str(tmp_path / "other.csv"), "label_field": "label"}
    config = CONFIG.plain() | {"judge": judge, "opposites": [["slow", "glad"]], "per_label": 2}
    evaluate = SteeringEvaluator(SteeringConfig.parse(config), SITE)
    rows = list(evaluate(make_dictionary(toy_model, 0), store, toy_model))
    others = [row for row in rows if row.name == "steering_others_change(glad)"]
    assert {row.arm for row in others} >= {"dictionary", "isotropic", "prompt"}
    assert {row.encoder.split(", ")[0] for row in others} == {"ngrams(held-out half)"}
    assert all(row.value >= 0 and len(row.replicates) == 20 for row in others)
    # documents with neither the label nor its opposite are neutral
    neutral = [row for row in rows if row.name == "steering_ce_change(glad)"]
    assert {row.encoder for row in neutral} == {"held-out text of other labels"}
    score = next(row for row in rows if row.name == "steering_score(glad)")
    assert score.encoder.startswith(f"ngrams({judge['source']})")
    (places,) = {
        tuple(one[1].others(place) for place in range(3))
        for one in evaluate._prepared.concepts(make_dictionary(toy_model, 0), store, toy_model)
    }
    assert places == ((2,), (2,), (0, 1))


def test_without_neutral_text_its_row_is_left_out_and_said_so(
    toy_model, store, monkeypatch, caplog
):
    monkeypatch.setattr(module, "N_RANDOM", 2)
    rows = list(SteeringEvaluator(CONFIG, SITE)(make_dictionary(toy_model, 0), store, toy_model))
    assert not [row for row in rows if "ce_change" in row.name]
    assert "every held-out document is labelled glad or slow; name a corpus" in caplog.text


def test_an_arm_that_reaches_no_dose_says_so_and_nothing_else(toy_model, store, monkeypatch):
    missed = Matched(1.5, None, 0.2, False)
    nothing = Response("any", 1.5, (missed,), None, "none", torch.full((16, 5), math.nan), ())
    monkeypatch.setattr(Trial, "responses", lambda _, arms, *__, **___: len(arms) * [nothing])
    rows = list(SteeringEvaluator(CONFIG, SITE)(make_dictionary(toy_model, 0), store, toy_model))
    assert {row.value for row in rows if row.name == "steering_reached(glad)"} == {0.0, 1.0}
    assert {row.arm for row in rows if row.name == "steering_score(glad)"} == {"prompt"}
    shares = {
        (row.arm, row.name): (row.value, row.n)
        for row in rows
        if row.name.startswith(("steering_directions_reached", "steering_non_monotone"))
    }
    reached = "steering_directions_reached[dose=1.5](glad)"
    assert shares["dictionary", reached] == (0, 2)  # of two candidates
    assert shares["isotropic", reached] == (0, 1)
    assert shares["isotropic", "steering_non_monotone[dose=1.5](glad)"] == (1, 1)


def test_instructions_say_the_judges_word_and_the_best_is_chosen(toy_model, store, monkeypatch):
    monkeypatch.setattr(module, "N_RANDOM", 2)
    told: list[str] = []
    real = Trial.prompted

    def prompted(trial, instruction):
        told.append(instruction)
        found = real(trial, instruction)
        return replace(found, sums=found.sums + torch.tensor([float(len(told)), 0, 0, 0, 0]))

    monkeypatch.setattr(Trial, "prompted", prompted)
    lines = [f"{label},{word} {n}" for label, word in (("fine", "great"), ("no", "old")) for n in
             "1234"]  # fmt: skip
    path = store.path / ".." / "fine.csv"
    path.write_text("\n".join(["label,text", *lines]) + "\n")
    judge = {"source": str(path), "label_field": "label", "labels": {"glad": "fine"}}
    config = SteeringConfig.parse(
        CONFIG.plain() | {"judge": judge, "instruction": ["{label}, {label}!", "Be {label}."]}
    )
    dictionary = make_dictionary(toy_model, 0)
    rows = {
        row.name: row.value
        for row in SteeringEvaluator(config, SITE)(dictionary, store, toy_model)
        if row.arm == "prompt"
    }
    assert told == ["fine, fine!", "Be fine."]
    assert rows["steering_candidates(glad)"] == 2
    assert rows["steering_instruction(glad)"] == 1
    assert SteeringConfig(instruction="one").instructions == ("one",)
    with pytest.raises(ConfigError, match="instruction"):
        SteeringConfig.parse({"instruction": []})


def test_another_model_reads_fluency_and_is_named(toy_model, store, monkeypatch):
    monkeypatch.setattr(module, "N_RANDOM", 2)
    other, read = load_model("toy:seed=1"), []
    real = fluency.token_losses

    def losses(model, written):
        read.append(model)
        return real(model, written)

    monkeypatch.setattr(fluency, "token_losses", losses)
    config = CONFIG.model_copy(update={"fluency_model": "toy:seed=1"})
    evaluate = SteeringEvaluator(config, SITE, load=lambda source, device: other)
    rows = list(evaluate(make_dictionary(toy_model, 0), store, toy_model))
    assert read
    assert all(model is other for model in read)
    named = {row.encoder for row in rows if row.name == "steering_fluency(glad)"}
    assert named == {f"fluency({other.name})"}
    with pytest.raises(ConfigError, match="no way to load"):
        list(SteeringEvaluator(config, SITE)(make_dictionary(toy_model, 0), store, toy_model))


def test_controls_are_like_the_latent_that_was_chosen(toy_model, store, monkeypatch):
    monkeypatch.setattr(module, "N_RANDOM", 2)
    asked: list[int] = []
    real = scene.baselines.matched_latents

    def matched(model, handle, latent, density, n, *, seed):
        asked.append(latent)
        return real(model, handle, latent, density, n, seed=seed)

    monkeypatch.setattr(scene.baselines, "matched_latents", matched)
    # the best detector is another latent than the one whose direction writes the words
    for detector in (3, 4):
        best = Candidate(detector, 1, 1.0, "detection")
        monkeypatch.setattr(scene, "by_detection", lambda *_, best=best: [best])
        rows = list(
            SteeringEvaluator(CONFIG, SITE)(make_dictionary(toy_model, 0), store, toy_model)
        )
        chosen = next(row.value for row in rows if row.name == "steering_latent(glad)")
        assert asked.pop() == chosen == 0
    assert not asked


def test_steering_needs_a_model_and_labels_that_exist(toy_model, store):
    dictionary = make_dictionary(toy_model, 0)
    with pytest.raises(ConfigError, match="live `model:`"):
        list(SteeringEvaluator(CONFIG, SITE)(dictionary, store, None))
    other = CONFIG.model_copy(update={"concepts": ("sad",)})
    with pytest.raises(ConfigError, match="there are glad, slow"):
        list(SteeringEvaluator(other, SITE)(dictionary, store, toy_model))
    other = CONFIG.model_copy(update={"opposites": (("glad", "sad"),)})
    with pytest.raises(ConfigError, match=r"steering.opposites: \['sad'\] are no labels"):
        list(SteeringEvaluator(other, SITE)(dictionary, store, toy_model))
