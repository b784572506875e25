"""Judges on text alone, what they do without an answer, and fluency at both of its ends."""

import http.client
import json
import math

import pytest
import torch

from saelab.errors import ConfigError
from saelab.steering import fluency
from saelab.steering.judges import (
    LexiconJudge,
    ModelJudge,
    NgramJudge,
    UrlJudge,
    Validation,
    validate,
)
from saelab.steering.sweep import Continuations

GOOD = [f"a good and lovely {noun}" for noun in ("film", "book", "day", "song", "meal")]
BAD = [f"an awful and dull {noun}" for noun in ("film", "book", "day", "song", "meal")]
LABELS = torch.tensor([True] * 5 + [False] * 5)


def test_ngrams_tell_classes_apart_and_know_nothing_of_other_texts():
    judge = NgramJudge(GOOD + BAD, LABELS, corpus="reviews")
    scores = judge(["a lovely play", "a dull play", ""])
    assert scores[0] > 0.6
    assert scores[1] < 0.4
    assert 0 <= scores[2] <= 1
    assert judge.name == "ngrams(reviews)"
    with pytest.raises(ConfigError, match="with and without"):
        NgramJudge(GOOD, torch.ones(5, dtype=torch.bool), corpus="reviews")


def test_a_lexicon_counts_distinct_lemmas_up_to_three():
    judge = LexiconJudge({"good": ["better", "best"], "love": ["loved"], "fine": [], "sweet": []},
                         source="test")  # fmt: skip
    texts = ["", "Good, better, best!", "loved goods", "good love fine", "good love fine sweet"]
    wanted = torch.tensor([0, 1, 1, 3, 3]) / 3
    torch.testing.assert_close(judge(texts), wanted)
    fewer = judge.without([" best", " tree"])
    torch.testing.assert_close(fewer(texts), torch.tensor([0, 0, 1, 2, 3]) / 3)
    assert fewer.name == "lexicon(test, without 1 shown)"


def test_a_models_odds_are_those_of_its_logits(toy_model):
    judge = ModelJudge(toy_model, "{text} is that", yes=" good", no=" old")
    texts = ["the people", "this state of life"]
    good, old = (int(run.ids[0]) for run in toy_model.tokenize([" good", " old"]))
    for text, score in zip(texts, judge(texts), strict=True):
        ids = toy_model.tokenize([f"{text} is that"])[0].ids
        last = toy_model.logits(ids[None])[0, -1]
        chances = last[[good, old]].softmax(-1)
        assert float(score) == pytest.approx(float(chances[0]), abs=1e-5)
    with pytest.raises(ConfigError, match="one token"):
        ModelJudge(toy_model, "{text}", yes="zz", no="zx")


def test_a_text_that_is_too_long_for_the_model_is_cut_and_the_question_is_not(toy_model):
    judge = ModelJudge(toy_model, "{text} is that", yes=" good", no=" old")
    long = "the people of this state " * 200
    whole = len(toy_model.tokenize([f"{long} is that"])[0])
    assert whole > toy_model.context
    n_asked = len(toy_model.tokenize([" is that"])[0])
    fits = long[: int(toy_model.tokenize([long])[0].end[toy_model.context - n_asked - 5])]
    ids = toy_model.tokenize([f"{fits} is that"])[0].ids
    assert toy_model.context - 5 <= len(ids) <= toy_model.context
    good, old = (int(run.ids[0]) for run in toy_model.tokenize([" good", " old"]))
    chances = toy_model.logits(ids[None])[0, -1][[good, old]].softmax(-1)
    assert float(judge([long])) == pytest.approx(float(chances[0]), abs=1e-5)


def make_url_judge(answers):
    pauses, requests = [], []

    def post(request, timeout):
        requests.append(request)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return json.dumps({"choices": [{"message": {"content": answer}}]}).encode()

    judge = UrlJudge(
        "http://localhost:1/v1/", "small", "How glad is this: {text}", key="k",
        pause=pauses.append, post=post,
    )  # fmt: skip
    return judge, pauses, requests


def test_a_server_is_asked_again_and_then_the_text_is_missing():
    cut = http.client.IncompleteRead(b"{", 99)
    answers = ["2", OSError("down"), "Score: 1.", "no idea", "10", cut, "0"]
    judge, pauses, requests = make_url_judge(answers)
    scores = judge(["a", "b", "c", "d"])
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.5, float("nan"), 0.0]), equal_nan=True)
    assert pauses == [1.0, 1.0, 2.0]
    assert requests[0].full_url == "http://localhost:1/v1/chat/completions"
    assert json.loads(requests[0].data)["messages"][0]["content"] == "How glad is this: a"
    assert requests[0].headers["Authorization"] == "Bearer k"
    with pytest.raises(ConfigError, match="http"):
        UrlJudge("ftp://somewhere", "small", "{text}")


def test_a_judge_is_validated_on_texts_and_on_generations():
    judge = NgramJudge(GOOD + BAD, LABELS, corpus="reviews")
    found = validate(judge, (GOOD + BAD, LABELS), (BAD + GOOD, LABELS))
    assert found == Validation("ngrams(reviews)", 1.0, 0.0)
    assert not found.validated
    assert validate(judge, (GOOD + BAD, LABELS), (GOOD + BAD, LABELS)).validated


@pytest.mark.parametrize(
    ("heldout", "generated", "wanted"),
    [(0.8, 0.9, True), (0.9, 0.79, False), (0.9, math.nan, False), (math.nan, 0.9, False)],
)
def test_a_judge_is_validated_by_two_areas_that_exist(heldout, generated, wanted):
    assert Validation("some", heldout, generated).validated is wanted


def test_several_judges_are_as_good_as_the_worst():
    first, second = Validation("some", 0.9, 0.7), Validation("some", 0.85, 0.95)
    assert Validation.of_all([first, second]) == Validation("some", 0.85, 0.7)
    unknown = Validation.of_all([first, Validation("some", math.nan, 0.9)])
    assert math.isnan(unknown.heldout_auroc)


def test_texts_of_one_side_validate_no_judge():
    judge = NgramJudge(GOOD + BAD, LABELS, corpus="reviews")
    found = validate(judge, (GOOD + BAD, LABELS), (GOOD, torch.ones(5, dtype=torch.bool)))
    assert math.isnan(found.generated_auroc)
    assert not found.validated


# ----------------------------------------------------------------------------------------- fluency


def test_losses_are_of_the_continuations_tokens(toy_model):
    written = Continuations(("the people", "we"), (" of this state", ""))
    found = fluency.token_losses(toy_model, written)
    ids = toy_model.tokenize(["the people of this state"])[0].ids
    start = len(toy_model.tokenize(["the people"])[0])
    log_probs = toy_model.logits(ids[None])[0].log_softmax(-1)
    wanted = -torch.stack([log_probs[i - 1, ids[i]] for i in range(start, len(ids))]).mean()
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-5)
    assert found[1].isnan()


def test_distinct_trigrams():
    texts = ["a b c d e", "a b c a b c a b c", "a a a a a a", "a b", ""]
    wanted = torch.tensor([1, 3 / 7, 1 / 4, 1, 1])
    torch.testing.assert_close(fluency.distinct_3(texts), wanted)


def test_fluency_has_two_sides(toy_model):
    usual = fluency.Band((1.0, 3.0), (0.5, 1.0))
    loss = torch.tensor([2.0, 0.1, 9.0, 2.0, float("nan")])
    distinct = torch.tensor([0.9, 0.9, 0.9, 0.1, 1.0])
    assert usual.holds(loss, distinct).tolist() == [True, False, False, False, False]
    words = ["people", "of", "this", "great", "state", "say", "that", "time", "and", "work"]
    texts = tuple(f" {a} {b}" for a, b in zip(words, reversed(words), strict=True))
    unsteered = Continuations(("the",) * len(words), texts)
    own = fluency.band(toy_model, unsteered)
    assert 0.6 <= float(fluency.fluent(toy_model, unsteered, own).float().mean()) <= 1
    with pytest.raises(ConfigError, match="8 unsteered"):
        fluency.band(toy_model, Continuations(("the",), (" of",)))


def test_the_score_needs_both_lift_and_fluency():
    assert fluency.steering_score(0.5, 0.5) == 0.5
    assert fluency.steering_score(1.0, 1.0) == 1.0
    assert fluency.steering_score(0.9, 0.0) == fluency.steering_score(-0.1, 1.0) == 0.0
