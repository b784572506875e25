"""Lexicons beside the judge: the whole list, and without what a direction writes by itself."""

import pytest
import torch
from steering_toys import OWN, SITE, dictionary_with, labelled_store, word_direction

from saelab.edits import Directions, Handle, add
from saelab.steering import evaluator as module
from saelab.steering import judging
from saelab.steering.evaluator import SteeringEvaluator
from saelab.steering.judges import LexiconJudge
from saelab.steering.lexicons import favoured_tokens, read_again, unshown
from saelab.steering.scene import SteeringConfig
from saelab.steering.trial import Trial, adding, reported_half

WORDS = ("can", "may", "will", "must", "should", "would", "could", "did")
PROMPTS = [f"the people {word} of" for word in WORDS]
LEXICON = LexiconJudge({"good": [], "great": [], "long": []}, source="test")


@pytest.fixture
def towards(toy_model) -> Handle:
    """A direction that writes two words of the lexicon, and one that writes the third."""
    rows = [word_direction(toy_model, words) for words in (("good", "great"), ("long",))]
    return Handle(Directions(torch.stack(rows)), SITE)


def test_the_tokens_that_an_edit_favours_are_those_of_its_logit_effect(toy_model, towards):
    for latent, strength in ((0, 2.0), (0, -2.0), (1, 0.5)):
        found = favoured_tokens(toy_model, [add(towards, latent, strength)], 5)
        effect = toy_model.logit_effect(SITE, towards.dictionary.W_dec[[latent]])[0] * strength
        assert found == toy_model.to_strings(effect.argsort(descending=True)[:5].tolist())
    both = favoured_tokens(toy_model, [add(towards, 0, 1.0), add(towards, 1, 3.0)], 5)
    effect = toy_model.logit_effect(SITE, towards.dictionary.W_dec)
    total = effect[0] + 3 * effect[1]
    assert both == toy_model.to_strings(total.argsort(descending=True)[:5].tolist())


def test_each_direction_is_read_without_its_own_words(toy_model, towards):
    trial = Trial(toy_model, PROMPTS, LEXICON, max_new_tokens=3, samples=2)
    arm = adding(towards, [0, 1])
    (response,) = trial.responses({"both": arm}, [2.0], largest=200.0)
    first, second = unshown(toy_model, LEXICON, arm, response)
    texts = ["a good day", "a long day"]
    assert (first(texts) * 3).tolist() == pytest.approx([0, 1])
    assert (second(texts) * 3).tolist() == pytest.approx([1, 0])
    half = reported_half(8)
    again = read_again(response.where(half), trial, [LEXICON, LEXICON])
    torch.testing.assert_close(again.sums, response.sums[half])
    apart = read_again(response.where(half), trial, [first, second])
    wanted = torch.zeros(8, dtype=torch.float64)
    for judge, one in zip((first, second), response.written, strict=True):
        usual = judge(trial.usual.texts).double().reshape(2, 8).mean(0)
        wanted += (judge(one.texts).double() - usual) / 2
    torch.testing.assert_close(apart.sums[:, 0] - apart.sums[:, 1], wanted[half])
    assert apart.lift < again.lift


def rows_of(config, toy_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "N_RANDOM", 2)
    small = {
        "concepts": ["glad"], "doses": [1.5], "new_tokens": 3, "candidates": 1, "per_label": 3,
        "rows": 300, "resamples": 20,
    }  # fmt: skip
    store = labelled_store(tmp_path, toy_model)
    dictionary = dictionary_with(word_direction(toy_model, OWN["glad"]), 0)
    evaluate = SteeringEvaluator(SteeringConfig.parse(small | config), SITE)
    return {(row.name, row.arm): row for row in evaluate(dictionary, store, toy_model)}


def test_a_lexicon_reads_beside_the_judge(toy_model, tmp_path, monkeypatch):
    words = LexiconJudge({word: [] for word in OWN["glad"]}, source="rated-words, positive")
    monkeypatch.setattr(judging, "rated_lexicon", lambda **_: words)
    judge = {"labels": {"glad": "positive"}}
    rows = rows_of({"judge": judge}, toy_model, tmp_path, monkeypatch)
    assert rows["steering_lift(glad)", "dictionary"].encoder.startswith("ngrams")
    lift = rows["steering_lexicon_lift(glad)", "dictionary"]
    assert lift.encoder.startswith("lexicon(rated-words, positive)")
    assert lift.value > 0
    assert len(lift.replicates) == 20
    fewer = rows["steering_unshown_lift(glad)", "dictionary"]
    assert fewer.encoder.startswith("lexicon(rated-words, positive, without 20 shown tokens)")
    # the direction favours both words by itself: nothing is left to count
    assert fewer.value == 0 == rows["steering_unshown_score(glad)", "dictionary"].value
    with_lexicon = {arm for name, arm in rows if name == "steering_lexicon_score(glad)"}
    assert with_lexicon == {arm for name, arm in rows if name == "steering_score(glad)"} - {
        "oracle"
    }  # fmt: skip
    without = {arm for name, arm in rows if name == "steering_unshown_score(glad)"}
    assert without == with_lexicon - {"prompt"}
    assert rows["steering_lexicon_heldout_auroc(glad)", "judge"].value > 0.8


def test_a_lexicon_that_is_the_judge_is_read_once(toy_model, tmp_path, monkeypatch):
    judge = {"kind": "lexicon", "words": {"glad": OWN["glad"], "slow": OWN["slow"]}}
    rows = rows_of({"judge": judge}, toy_model, tmp_path, monkeypatch)
    assert rows["steering_lift(glad)", "dictionary"].encoder.startswith("lexicon(words of glad)")
    assert not [name for name, _ in rows if "lexicon" in name]
    assert ("steering_unshown_lift(glad)", "dictionary") in rows
