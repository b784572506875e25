"""A first look at a latent: one call gives its dose and response beside controls."""

import pytest
from steering_toys import OWN, SITE, dictionary_with, labelled_store, word_direction

import saelab
from saelab.edits import Handle
from saelab.errors import ConfigError
from saelab.steering.judges import LexiconJudge

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
