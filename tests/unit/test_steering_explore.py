"""A first look at a latent: one call gives its dose and response beside controls."""

from dataclasses import replace

import pytest
import torch
from steering_toys import OWN, SITE, dictionary_with, labelled_store, word_direction

import saelab
from saelab.edits import Handle, Scales, add
from saelab.errors import ConfigError
from saelab.steering.judges import LexiconJudge
from saelab.steering.sweep import dose

PROMPTS = [
    f"the people {word}"
    for word in ("can", "may", "will", "must", "should", "would", "could", "did")
]
JUDGE = LexiconJudge({"good": [], "great": []}, source="two words")
SMALL = {"prompts": PROMPTS, "doses": [0.5, 2.0], "n_random": 2, "max_new_tokens": 3}


@pytest.fixture
def handle(toy_model):
    return Handle(dictionary_with(word_direction(toy_model, OWN["glad"]), 0), SITE, "glad")


def test_a_latent_stands_beside_its_controls(toy_model, handle, tmp_path):
    store = labelled_store(tmp_path, toy_model)
    found = saelab.dose_response(
        toy_model, handle, 0, JUDGE, store=store, instruction="say good", **SMALL
    )
    arms = {one.arm: [] for one in found.responses}
    for one in found.responses:
        arms[one.arm].append(one.target)
    both = [0.5, 2.0]
    assert arms == {
        "latent 0": both, "isotropic": both, "covariance": both, "matched_latents": both,
        "prompt": [None],
    }  # fmt: skip
    assert len(found.at("isotropic", 2.0).matched) == 2
    assert found.at("latent 0", 2.0).lift > found.at("isotropic", 2.0).lift
    assert {trace.name for trace in found.figure("good").data if trace.name} >= set(arms)
    with pytest.raises(ConfigError, match=r"nothing was steered by latent 1 at 2.0; there is"):
        found.at("latent 1", 2.0)


def test_the_other_way_is_the_other_direction(toy_model, handle):
    found = saelab.dose_response(toy_model, handle, 0, JUDGE, sign=-1, **SMALL)
    assert {one.arm for one in found.responses} == {"latent 0", "isotropic"}
    ahead = saelab.dose_response(toy_model, handle, 0, JUDGE, **SMALL)
    assert found.at("latent 0", 2.0).lift < ahead.at("latent 0", 2.0).lift
    assert found.at("isotropic", 2.0).lift == ahead.at("isotropic", 2.0).lift
    with pytest.raises(ConfigError, match="there is no latent 20"):
        saelab.dose_response(toy_model, handle, 20, JUDGE, **SMALL)


def test_multiples_of_the_typical_maximum_say_the_doses(toy_model, handle):
    with pytest.raises(ConfigError, match="need to know how large things are"):
        saelab.dose_response(toy_model, handle, 0, JUDGE, multiples=[1.0], **SMALL)
    scaled = replace(handle, scales=Scales(torch.full((20,), 4.0), 6.0))
    good = [int(run.ids[0]) for run in toy_model.tokenize([" good"])]
    found = saelab.dose_response(
        toy_model, scaled, 0, JUDGE, multiples=[1.0, 2.0], tokens=good, **SMALL
    )
    (once, small), (twice, large) = found.multiples
    assert (once, twice) == (1, 2) and small < large
    alone = dose(toy_model, [add(scaled, 0, 8.0)], found.trial.text)
    assert large == pytest.approx(alone.kl, rel=0.01)
    own = found.at("latent 0", large)
    # controls are at the dose, and so is the latent, by a direction of length 1
    length = float(scaled.dictionary.W_dec[0].detach().norm())
    assert own.matched[0].strength == pytest.approx(8.0 * length, rel=0.05)
    assert all(
        one.kl == pytest.approx(large, rel=0.06) for one in found.at("isotropic", large).matched
    )
    assert own.target_shift > found.at("isotropic", large).target_shift
    fires = found.presence("latent 0", large)
    assert fires.shape == (20,) and 0 <= fires.min() <= fires.max() <= 1
