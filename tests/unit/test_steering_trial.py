"""Arms in one trial: the concept that a direction writes is found, and nothing else is."""

import math

import pytest
import torch

from saelab.edits import Directions, Handle
from saelab.steering.judges import LexiconJudge
from saelab.steering.trial import Trial, adding

SITE = "blocks.1.hook_resid_post"
WORDS = ("can", "may", "will", "must", "should", "would", "could", "did")
PROMPTS = [f"the people {word} of" for word in WORDS]


@pytest.fixture(scope="module")
def trial(toy_model) -> Trial:
    judge = LexiconJudge({"good": [], "great": []}, source="two words")
    return Trial(toy_model, PROMPTS, judge, max_new_tokens=3, samples=2)


@pytest.fixture(scope="module")
def towards(toy_model) -> Handle:
    """The direction that writes the two words of the lexicon into the logits, and a fixed other."""
    ids = [int(run.ids[0]) for run in toy_model.tokenize([" good", " great"])]
    rows = toy_model._network.unembed.weight
    concept = rows[ids].sum(0) - rows.mean(0)
    other = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return Handle(Directions(torch.stack([concept, other])), SITE)


def test_the_concept_is_lifted_by_its_direction_alone(trial, towards):
    arms = {"concept": adding(towards, [0]), "random": adding(towards, [1, 1])}
    concept, random = trial.responses(arms, [3.0], largest=200.0)
    assert concept.judge == "lexicon(two words)"
    assert concept.matched[0].kl == pytest.approx(3.0, rel=0.011)
    assert concept.kl_last_prompt > 0
    assert concept.lift > random.lift
    scores = trial._judge(concept.written[0].texts).double()
    assert concept.lift == pytest.approx(float((scores - trial.unsteered).mean()))
    # two directions that are the same count as one
    assert torch.equal(random.sums[:, 4], torch.ones(8).double())
    assert random.written[0] == random.written[1]
    lead = concept.over(random)
    assert lead.low <= lead.value <= lead.high
    assert lead.value == pytest.approx(concept.score - random.score)
    assert concept.over(concept).value == concept.over(concept).high == 0
    assert concept.interval().value == concept.score


def test_a_dose_out_of_reach_has_no_score(trial, towards):
    (found,) = trial.responses({"concept": adding(towards, [0])}, [1e6], largest=4.0)
    assert found.matched[0].strength is None
    assert found.written == ()
    assert math.isnan(found.lift)
    assert found.kl_last_prompt is None


def test_a_prompt_is_an_arm_without_a_dose(trial):
    found = trial.prompted("say that all is good")
    assert found.target is None
    assert found.written[0].prompts == tuple(PROMPTS)
    assert 0 <= found.fluency <= 1
