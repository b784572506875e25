"""Judges learn from another corpus than the one that is steered by, and from no text of it."""

from dataclasses import replace

import pytest
import torch

from saelab.errors import ConfigError
from saelab.labels import Labelled, Part
from saelab.models import identify
from saelab.steering import judging
from saelab.steering.judge_configs import NgramsConfig
from saelab.steering.judges import Validation
from saelab.steering.judging import Judges, rated_lexicon, read_corpus
from saelab.steering.kinds import judge_inputs
from saelab.steering.scene import SteeringConfig
from saelab.steering.sweep import Continuations

KNOWN = ["Glad seen before."]
WORDS = {"good": ("fine", "lovely", "kind"), "bad": ("dull", "awful", "mean")}


def part(*texts: str) -> Part:
    labels = ("glad", "other", "sad")
    targets = torch.tensor([[text.split()[0] == label for label in labels] for text in texts])
    return Part(torch.arange(len(texts)), targets, texts)


@pytest.fixture
def labelled() -> Labelled:
    choose = part("glad dull dull", "sad fine fine", "other words", "glad dull")
    test = part("glad kind lovely", "sad awful mean", "other more words", "sad dull day")
    parts = {"train": part("glad seen before", "sad unseen"), "choose": choose, "test": test}
    return Labelled(("glad", "other", "sad"), parts, 0, 0)


@pytest.fixture
def config(tmp_path) -> NgramsConfig:
    lines = ["mood,text", "good,Glad: seen before!", "good,"]
    lines += [f"{label},{word} {number}" for label, words in WORDS.items() for word in words
              for number in range(4)]  # fmt: skip
    path = tmp_path / "other.csv"
    path.write_text("\n".join(lines) + "\n")
    labels = {"glad": "good", "sad": "bad"}
    return NgramsConfig(source=str(path), label_field="mood", labels=labels)


def test_texts_that_the_store_holds_teach_no_judge(config):
    found = read_corpus(config, KNOWN)
    assert (len(found.texts), found.n_shared) == (24, 1)
    assert set(found.labels) == {"good", "bad"}
    assert len(read_corpus(config.model_copy(update={"texts": 3}), []).texts) == 3


def test_a_judge_says_what_its_own_corpus_taught_it(config, labelled):
    judges = Judges(labelled, config, KNOWN)
    judge = judges.of(0)
    assert judge.name == f"ngrams({config.source})"
    low, high = judge(["dull, awful, mean", "fine and kind"]).tolist()
    assert low < 0.5 < high
    assert judges.of(0) is judge


def test_side_effects_are_read_by_judges_of_the_held_out_half(config, labelled, toy_model):
    judges = Judges(labelled, config, KNOWN)
    panel = judges.of_others([1, 2], toy_model, new_tokens=2, seed=0)
    assert [one.name for one in panel.judges] == 2 * ["ngrams(held-out half)"]
    alone = [judges.of_others([i], toy_model, new_tokens=2, seed=0).validation for i in (1, 2)]
    assert panel.validation.judge == "ngrams(held-out half)"
    assert panel.validation == Validation.of_all(alone)
    assert judges.of_others([], toy_model, new_tokens=2, seed=0) is None


def test_only_labels_that_the_corpus_tells_apart_validate_a_judge(config, labelled):
    texts, truth = Judges(labelled, config, KNOWN)._unseen(0)
    assert [text.split()[0] for text in texts] == ["glad", "sad", "sad", "glad", "sad", "glad"]
    assert truth.tolist() == [True, False, False, True, False, True]
    own, _ = Judges(labelled, NgramsConfig(), KNOWN)._unseen(0)
    assert own == list(labelled.parts["test"].texts)
    half = Judges(labelled, NgramsConfig(), KNOWN).of(0)
    assert half.name == "ngrams(held-out half)"


def test_every_fifth_text_of_a_judges_corpus_only_tests_it(config, toy_model, labelled):
    corpus = read_corpus(config, KNOWN)
    taught, held = (corpus.part("good", held=held) for held in (False, True))
    assert (len(taught[0]), len(held[0])) == (19, 5)
    assert not set(taught[0]) & set(held[0])
    assert held[1].tolist() == [text.split()[0] in WORDS["good"] for text in held[0]]
    found = Judges(labelled, config, KNOWN).validated(0, toy_model, new_tokens=2, seed=0)
    assert found.own_auroc == 1.0
    assert Judges(labelled, NgramsConfig(), KNOWN).validated(
        0, toy_model, new_tokens=2, seed=0
    ).own_auroc is None  # fmt: skip


def test_half_of_the_continued_documents_have_the_label(labelled, toy_model, monkeypatch):
    texts = [*(f"sad {n}" for n in range(100)), *(f"glad {n}" for n in range(40)), "glad last"]
    labelled = replace(labelled, parts=dict(labelled.parts) | {"test": part(*texts)})
    heads: list[str] = []

    def write(model, prompts, **how):
        heads.extend(prompts)
        return Continuations(tuple(prompts), tuple(prompts))

    monkeypatch.setattr(judging, "continuations", write)
    judges = Judges(labelled, NgramsConfig(), KNOWN)
    found = judges.validated(0, toy_model, new_tokens=2, seed=0)
    assert (len(heads), len(set(heads))) == (64, 64)
    assert sum(head.startswith("glad") for head in heads) == 32
    assert found.generated_auroc == pytest.approx(found.heldout_auroc, abs=0.2)
    assert heads[:32] != texts[100:132]
    few = replace(labelled, parts=dict(labelled.parts) | {"test": part(*texts[:101])})
    heads.clear()
    Judges(few, NgramsConfig(), KNOWN).validated(0, toy_model, new_tokens=2, seed=0)
    assert [head.startswith("glad") for head in heads].count(True) == 1


def test_a_concept_that_the_corpus_does_not_know_is_refused(config, labelled):
    with pytest.raises(ConfigError, match="has no text with the label 'other'"):
        Judges(labelled, config, KNOWN).of(1)


def test_results_know_the_content_that_judges_learnt_from(config):
    settings = SteeringConfig(judge=config)
    assert hash(settings) == hash(SteeringConfig.parse(settings.plain()))
    before = judge_inputs([settings], identify)["judges"][config.source]
    with open(config.source, "a") as file:
        file.write("good,more\n")
    assert judge_inputs([settings], identify)["judges"][config.source] != before
    assert judge_inputs([SteeringConfig()], identify) == {}


def test_rated_words_are_counted_by_lemma(tmp_path):
    path = tmp_path / "words.txt"
    rated = {"love": 3.2, "loved": 2.9, "lovely": 2.8, "win": 2.8, "winner": 2.8, "okay": 0.9,
             ":)": 2.0, "hate": -2.7, "hated": -3.2}  # fmt: skip
    path.write_text("".join(f"{word}\t{mean}\t0.5\t[1, 2]\n" for word, mean in rated.items()))
    judge = rated_lexicon(source=str(path))
    assert judge.name == f"lexicon({path}, positive)"
    found = judge(["loved, lovely love", "win and winner", "okay :) hated", "love win winner"])
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 0.0, 3.0]) / 3)
    hates = rated_lexicon(positive=False, source=str(path))
    assert hates(["hate, hated", "love"]).tolist() == [pytest.approx(1 / 3), 0.0]
