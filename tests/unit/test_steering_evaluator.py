"""The steering evaluator on the toy: a planted handle is found and beats what it should."""

import math
import random

import pytest
import torch

from saelab import artifacts, dictionaries
from saelab.errors import ConfigError
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.harvest import HarvestConfig, harvest
from saelab.steering import evaluator as module
from saelab.steering.evaluator import SteeringConfig, SteeringEvaluator
from saelab.steering.sweep import Matched
from saelab.steering.trial import Response
from saelab.store import StoreWriter, open_store

SITE = "blocks.1.hook_resid_post"
COMMON = ("the", "people", "of", "this", "state", "say", "that", "time", "and", "work")
OWN = {"glad": ("good", "great"), "slow": ("old", "long")}
CONFIG = SteeringConfig(
    concepts=("glad",), doses=(1.5,), new_tokens=3, candidates=1, per_label=3, rows=300,
    resamples=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory, toy_model):
    folder, chance = tmp_path_factory.mktemp("steering"), random.Random(0)
    lines = ["label,text"]
    for number in range(110):
        label = ("glad", "slow")[number % 2]
        words = chance.choices(COMMON + 3 * OWN[label], k=12)
        lines.append(f"{label},d{number}: {' '.join(words)}")
    path = folder / "corpus.csv"
    path.write_text("\n".join(lines) + "\n")
    corpus = CorpusConfig(
        source=str(path), tokens=1800, context=32, holdout=0.4, min_tail=4, label_field="label"
    )
    config = HarvestConfig(sites=(SITE,), batch_tokens=512)
    with artifacts.open_draft(folder, "store", "toy", "c" * 64) as draft:
        with StoreWriter(draft, {SITE: 32}, "float32", rows_per_shard=2000) as writer:
            facts = harvest(toy_model, corpus, config, writer)
        draft.finish(stage="store", name="toy", inputs={}, parents=[], facts=facts)
    return open_store(draft.target)


def make_dictionary(toy_model, seed: int):
    """Random latents, and latent 0 with the direction that writes the glad words."""
    dictionary = dictionaries.create({"type": "topk", "d_in": 32, "d_sae": 20, "k": 8})
    generator = torch.Generator().manual_seed(seed)
    dictionary.init_(torch.randn(100, 32, generator=generator), generator)
    ids = [int(run.ids[0]) for run in toy_model.tokenize([" good", " great"])]
    unembed = toy_model._network.unembed.weight
    with torch.no_grad():
        dictionary.W_dec[0] = unembed[ids].mean(0) - unembed.mean(0)
    return dictionary


def test_a_handle_is_found_and_stands_beside_its_controls(toy_model, store, monkeypatch):
    monkeypatch.setattr(module, "N_RANDOM", 2)
    evaluate = SteeringEvaluator(CONFIG, SITE)
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
    assert found["steering_dose(glad)", "dictionary"].value == 1.5
    assert ("steering_dose(glad)", "prompt") not in found
    score = {arm: found["steering_score(glad)", arm].value for arm in arms}
    assert score["oracle"] >= score["dictionary"]
    lead = found["steering_score_over(isotropic)(glad)", "dictionary"]
    assert lead.value == pytest.approx(score["dictionary"] - score["isotropic"])
    assert found["steering_judge_heldout_auroc(glad)", "judge"].value > 0.9
    assert found["steering_ce_change(glad)", "dictionary"].value != 0
    assert found["steering_others_change(glad)", "dictionary"].value >= 0
    for row in rows:
        assert row.encoder.startswith("ngrams(held-out half)")
        assert (row.n, row.evaluator) == (8, "steering")
        assert math.isfinite(row.value), row.name
    # what needs no dictionary is steered once
    again = list(evaluate(make_dictionary(toy_model, 1), store, toy_model))
    shared = {row.name: row for row in again if row.arm == "isotropic"}
    assert all(found[name, "isotropic"] == row for name, row in shared.items())


def test_an_arm_that_reaches_no_dose_says_so_and_nothing_else(toy_model, store, monkeypatch):
    missed = Matched(1.5, None, 0.2, True)
    nothing = Response("any", 1.5, (missed,), None, "none", torch.full((16, 5), math.nan), ())
    monkeypatch.setattr(SteeringEvaluator, "_responses", lambda *_: [nothing])
    rows = list(SteeringEvaluator(CONFIG, SITE)(make_dictionary(toy_model, 0), store, toy_model))
    assert {row.value for row in rows if row.name == "steering_reached(glad)"} == {0.0, 1.0}
    assert {row.arm for row in rows if row.name == "steering_score(glad)"} == {"prompt"}


def test_steering_needs_a_model_and_labels_that_exist(toy_model, store):
    dictionary = make_dictionary(toy_model, 0)
    with pytest.raises(ConfigError, match="live `model:`"):
        list(SteeringEvaluator(CONFIG, SITE)(dictionary, store, None))
    other = CONFIG.model_copy(update={"concepts": ("sad",)})
    with pytest.raises(ConfigError, match="there are glad, slow"):
        list(SteeringEvaluator(other, SITE)(dictionary, store, toy_model))
