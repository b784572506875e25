"""Arms in one trial: the concept that a direction writes is found, and nothing else is."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saelab.edits import Directions, Handle, add
from saelab.errors import ConfigError
from saelab.metrics.pooling import Pooled
from saelab.steering.candidates import (
    Candidate,
    by_detection,
    by_logit_effect,
    concept_tokens,
)
from saelab.steering.judges import LexiconJudge
from saelab.steering.sweep import continuations, dose
from saelab.steering.trial import Response, Trial, adding, reported_half, select, shares

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
    assert 3.0 <= concept.matched[0].kl <= 3.15
    assert concept.kl_last_prompt == concept.matched[0].kl_last_prompt
    assert concept.kl_last_prompt > 0
    assert concept.lift > random.lift
    scores = trial._judge(concept.written[0].texts).double()
    assert concept.lift == pytest.approx(float((scores - trial.unsteered).mean()))
    # sums are means over directions
    assert torch.equal(random.sums[:, 4], torch.ones(8).double())
    assert random.matched[0] == random.matched[1]
    lead = concept.over(random)
    assert lead.low <= lead.value <= lead.high
    assert lead.value == pytest.approx(concept.score - random.score)
    assert concept.over(concept).value == concept.over(concept).high == 0
    assert concept.interval().value == concept.score
    lift = concept.interval("lift")
    assert lift.low <= lift.value == concept.lift <= lift.high


def test_an_arm_writes_the_same_alone_and_beside_others(trial, towards):
    concept = {"concept": adding(towards, [0])}
    (alone,) = trial.responses(concept, [1.0], largest=200.0)
    others = {"random": adding(towards, 3 * [1])}
    *_, beside = trial.responses(others | concept, [1.0], largest=200.0)
    assert trial._temperature == 1
    assert alone.written == beside.written
    # the smaller the dose, the more is written as without it, with the same noise
    small, large = trial.responses(concept, [1e-4, 3.0], largest=200.0)
    still = continuations(trial._model, PROMPTS, max_new_tokens=3, temperature=1.0, seed=2)
    same = [
        sum(a == b for a, b in zip(one.written[0].texts, still.texts, strict=True))
        for one in (small, large)
    ]
    assert same[0] > same[1]


@pytest.mark.parametrize(("n_directions", "n_prompts"), [(20, 16), (20, 8), (10, 12), (2, 3)])
def test_every_direction_writes_in_both_halves_and_every_prompt_has_its_writers(
    n_directions, n_prompts
):
    dealt = shares(n_directions, n_prompts)
    writers = min(n_directions, 5)
    assert all(sum(place in own for own in dealt) == writers for place in range(n_prompts))
    for half in (reported_half(n_prompts), ~reported_half(n_prompts)):
        assert all(half[list(own)].any() for own in dealt)
    if n_directions == 20:
        assert dealt[0] == (0, 1, 8, 9)[: n_prompts // 4]


def test_many_directions_share_the_prompts(trial, towards):
    (found,) = trial.responses({"concept": adding(towards, 10 * [0])}, [3.0], largest=200.0)
    assert found.asked == 5 * ((0, 1, 4, 5), (2, 3, 6, 7))
    assert [len(one.texts) for one in found.written] == 10 * [4]
    scores = torch.zeros(8).double()
    for own, one in zip(found.asked, found.written, strict=True):
        scores[list(own)] += trial._judge(one.texts).double() / 5
    torch.testing.assert_close(found.sums[:, 0], scores)
    assert torch.equal(found.sums[:, 4], torch.ones(8).double())
    torch.testing.assert_close(found.per_direction.sum(0), found.sums)
    torch.testing.assert_close(found.where(reported_half(8)).per_direction.sum(0), found.sums[1::2])


def test_the_spread_of_directions_is_in_the_interval():
    """Twenty directions of which half lift by 1 and half by 0, on every prompt alike."""
    cells = torch.zeros(20, 16, 5, dtype=torch.float64)
    for i, own in enumerate(shares(20, 16)):
        cells[i, list(own), 0], cells[i, list(own), 2:] = float(i < 10), 1
    cells /= 5
    both = Response("random", 0.1, (), None, "none", cells.sum(0), (), per_direction=cells)
    reported, drawn = both.where(reported_half(16)), {"resamples": 400}
    assert reported.lift == pytest.approx(0.5)
    error = float(reported.replicates("lift", **drawn).std())
    assert (
        0.5 / 20**0.5 < error < 1.5 * 0.5 / 20**0.5
    )  # prompts, and which directions met, add to it
    prompts = Response("random", 0.1, (), None, "none", cells.sum(0), ())
    steady = response(16 * [0.5], 16 * [1.0])
    assert prompts.over(steady, **drawn).standard_error < both.over(steady, **drawn).standard_error
    assert both.over(both, **drawn).standard_error == 0


def test_a_response_says_how_far_the_concepts_tokens_shift(toy_model, trial, towards):
    ids = [int(run.ids[0]) for run in toy_model.tokenize([" good", " great"])]
    judge = LexiconJudge({"good": []}, source="one word")
    asked = Trial(toy_model, PROMPTS, judge, max_new_tokens=3, samples=2, tokens=ids)
    arms = {"concept": adding(towards, [0]), "both": adding(towards, [0, 1])}
    concept, both = asked.responses(arms, [1.0], largest=200.0)
    strengths = [one.strength for one in both.matched]
    shifts = [
        dose(toy_model, [add(towards, i, strength)], asked.text, targets=ids).target_shift
        for i, strength in enumerate(strengths)
    ]
    assert concept.target_shift == pytest.approx(shifts[0], rel=1e-4) and shifts[0] > 1
    assert both.target_shift == pytest.approx(sum(shifts) / 2, rel=1e-4)
    (other,) = trial.responses({"concept": adding(towards, [0])}, [1.0], largest=200.0)
    assert other.target_shift is None


def test_a_dose_out_of_reach_has_no_score(trial, towards):
    (found,) = trial.responses({"concept": adding(towards, [0])}, [1e6], largest=4.0)
    assert found.matched[0].strength is None
    assert found.written == ()
    assert math.isnan(found.lift)
    assert found.kl_last_prompt is None


class SilentJudge:
    """Counts two words, but answers for no text of some kinds."""

    name = "sometimes silent"

    def __init__(self, silent) -> None:
        self._silent = silent

    def __call__(self, texts):
        scores = LexiconJudge({"good": [], "great": []}, source="two words")(texts)
        gone = torch.tensor([self._silent(text) for text in texts])
        return torch.where(gone, math.nan, scores)


def test_what_a_judge_does_not_answer_is_missing_and_not_zero(toy_model, towards, trial):
    (whole,) = trial.responses({"concept": adding(towards, [0])}, [3.0], largest=200.0)
    texts = whole.written[0].texts
    mute = set(texts[:3])
    partly = Trial(
        toy_model, PROMPTS, SilentJudge(lambda text: text in mute), max_new_tokens=3, samples=2
    )
    (found,) = partly.responses({"concept": adding(towards, [0])}, [3.0], largest=200.0)
    assert found.written[0].texts == texts
    heard = torch.tensor([text not in mute for text in texts])
    assert found.sums[:, 2].bool().tolist() == heard.tolist()
    assert found.n_answered == int(heard.sum()) < 8
    assert found.missing == pytest.approx(1 - float(heard.double().mean()))
    scores = trial._judge(texts).double()
    assert found.lift == pytest.approx(float((scores - partly.unsteered)[heard].mean()))
    # prompts without an answer count in fluency, as it needs no judge
    assert found.fluency == whole.fluency
    assert (whole.n_answered, whole.missing) == (8, 0.0)


def test_a_silent_judge_leaves_a_dose_that_was_reached(toy_model, towards):
    silent = Trial(toy_model, PROMPTS, SilentJudge(lambda _: True), max_new_tokens=3, samples=2)
    responses = list(silent.responses({"concept": adding(towards, [0])}, [3.0], largest=200.0))
    found = responses[0]
    assert (found.n_answered, found.missing) == (0, 1.0)
    assert math.isnan(found.lift)
    assert 0 <= found.fluency <= 1
    assert found.reached
    assert select(responses) is None


def test_a_resample_without_an_answer_is_left_out_of_the_interval():
    one = response(4 * [0.5], 4 * [1.0])
    sums = one.sums.clone()
    sums[1:, 0], sums[1:, 2] = 0.0, 0.0
    rare = replace(one, sums=sums)
    drawn = rare.replicates("lift", resamples=50)
    assert drawn.isnan().any()
    assert not drawn.isnan().all()
    interval = rare.interval("lift", resamples=50)
    assert (interval.low, interval.high, interval.standard_error) == (0.5, 0.5, 0.0)
    assert math.isfinite(rare.over(one, resamples=50).low)


def test_a_prompt_is_an_arm_without_a_dose(trial):
    found = trial.prompted("say that all is good")
    assert found.target is None
    assert found.written[0].prompts == tuple(PROMPTS)
    assert 0 <= found.fluency <= 1


def response(scores: list[float], fluent: list[float]) -> Response:
    sums = torch.zeros(len(scores), 5, dtype=torch.float64)
    sums[:, 0], sums[:, 2:] = torch.tensor(scores), 1
    sums[:, 3] = torch.tensor(fluent)
    return Response("some", 0.1, (), None, "none", sums, ())


def test_the_best_is_chosen_on_one_half_and_reported_on_the_other():
    good_then_bad = response([1.0, 0.2, 1.0, 0.2], 4 * [1.0])
    steady = response(4 * [0.5], 4 * [1.0])
    unreached = replace(steady, sums=torch.full((4, 5), math.nan, dtype=torch.float64))
    found = select([unreached, steady, good_then_bad])
    assert (found.chosen, found.n_candidates) == (2, 3)
    assert found.reported.lift == pytest.approx(0.2)
    assert found.oracle.lift == pytest.approx(0.5)
    assert [one.reached for one in (steady, unreached)] == [True, False]
    assert select([unreached]) is None
    with pytest.raises(ConfigError, match="no response"):
        select([])


# --------------------------------------------------------------------------------------- candidates


def pooled(z: Tensor) -> Pooled:
    """Documents of one position each."""
    return Pooled(z, -z, z)


def test_detection_finds_the_latent_and_its_side():
    positive = torch.arange(10) < 5
    z = torch.rand(10, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    z[positive, 2] = -3.0
    z[:5, 1] += torch.tensor([1.0, 1, 1, 1, 0])
    first, second = by_detection(pooled(z), positive, 2)
    assert first == Candidate(2, -1, 1.0, "detection")
    assert (second.latent, second.sign) == (1, 1)


def test_logit_effect_finds_the_direction_that_writes_the_words(toy_model, towards):
    ids = [int(run.ids[0]) for run in toy_model.tokenize([" good", " great"])]
    opposite = Handle(Directions(-towards.dictionary.W_dec), SITE)
    for handle, sign in ((towards, 1), (opposite, -1)):
        found = by_logit_effect(toy_model, handle, ids, 1)[0]
        assert (found.latent, found.sign, found.rule) == (0, sign, "logit_effect")
        unit = torch.nn.functional.normalize(handle.dictionary.W_dec, dim=1)
        effect = toy_model.logit_effect(SITE, unit)[0, ids].mean()
        assert found.score == pytest.approx(sign * float(effect), rel=1e-5)


def test_logit_effect_ranks_directions_as_they_are_steered_whatever_their_length(
    toy_model, towards
):
    ids = [int(run.ids[0]) for run in toy_model.tokenize([" good", " great"])]
    concept, other = towards.dictionary.W_dec
    rescaled = Handle(Directions(torch.stack([0.01 * concept, 100 * other])), SITE)
    wanted = by_logit_effect(toy_model, towards, ids, 2)
    found = by_logit_effect(toy_model, rescaled, ids, 2)
    assert [one.latent for one in found] == [one.latent for one in wanted] == [0, 1]
    assert [one.score for one in found] == pytest.approx([one.score for one in wanted], rel=1e-4)


def test_the_lexicon_is_what_only_the_concepts_documents_say(toy_model):
    texts = [
        "the good people",
        "the good state",
        "the good good life",
        "the long day",
        "the old day",
    ]
    positive = torch.tensor([True, True, True, False, False])
    good, day, the = (int(run.ids[0]) for run in toy_model.tokenize([" good", " day", " the"]))
    assert concept_tokens(toy_model, texts, positive, 1) == [good]
    assert concept_tokens(toy_model, texts, ~positive, 1) == [day]
    assert the not in concept_tokens(toy_model, texts, positive, 3)
    with pytest.raises(ConfigError, match="with and without"):
        concept_tokens(toy_model, texts, torch.ones(5, dtype=torch.bool))
