"""Which judge a configuration names: a tagged union, and what each kind of it becomes."""

import pytest
import torch

from saelab import api
from saelab.errors import AssetError, ConfigError
from saelab.harvest.sources import checksum
from saelab.labels import Labelled, Part
from saelab.models import identify, load_model
from saelab.steering import judging
from saelab.steering.judge_configs import LexiconConfig, NgramsConfig
from saelab.steering.judges import LexiconJudge, ModelJudge, UrlJudge
from saelab.steering.judging import Judges
from saelab.steering.kinds import judge_inputs
from saelab.steering.prepared import Prepared
from saelab.steering.scene import SteeringConfig


def config_of(**judge):
    return SteeringConfig.parse({"judge": judge}).judge


def labelled(classes=("glad", "slow")) -> Labelled:
    texts = tuple(f"{label} day {n}" for n in range(8) for label in classes)
    targets = torch.tensor(
        [[label == one for one in classes] for _ in range(8) for label in classes]
    )
    part = Part(torch.arange(len(texts)), targets, texts)
    return Labelled(classes, {"train": part, "choose": part, "test": part}, 0, 0)


@pytest.mark.parametrize(
    ("judge", "kind"),
    [
        ({}, "ngrams"),
        ({"source": "rated-films", "label_field": "sentiment"}, "ngrams"),
        ({"kind": "lexicon"}, "lexicon"),
        ({"kind": "model"}, "model"),
        ({"kind": "url", "url": "http://localhost:1/v1", "model": "small"}, "url"),
    ],
)
def test_a_judge_is_of_a_kind_by_default_n_grams(judge, kind):
    found = config_of(**judge)
    assert found.kind == kind
    assert found.called("glad") == "glad"
    whole = SteeringConfig(judge=found)
    assert hash(whole) == hash(SteeringConfig.parse(whole.plain()))
    assert SteeringConfig.parse(whole.plain()) == whole


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"kind": "oracle"}, "judge: kind should be ngrams, lexicon, model or url"),
        ({"source": "rated-films"}, "both source and label_field"),
        ({"kind": "lexicon", "sorce": "x"}, "did you mean 'source'"),
        ({"kind": "model", "question": "Is it?"}, "where the text goes"),
        ({"kind": "url", "url": "ftp://x", "model": "m"}, "http:// or https://"),
        ({"kind": "url", "model": "m"}, "judge.url: this key is required"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_with_the_reason(judge, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**judge)


def test_a_lexicon_counts_the_ratings_or_the_words_that_it_is_given(tmp_path):
    path = tmp_path / "rated.txt"
    path.write_text("fine\t2.0\ngrim\t-2.0\nmild\t0.5\n")
    labels = {"glad": "positive", "slow": "negative"}
    judges = Judges(labelled(), config_of(kind="lexicon", source=str(path), labels=labels), [])
    texts = ["fine mild", "grim"]
    assert (3 * judges.of(0)(texts)).tolist() == pytest.approx([1, 0])
    assert (3 * judges.of(1)(texts)).tolist() == pytest.approx([0, 1])
    assert judges.of(0).name == f"lexicon({path}, positive)"
    words = Judges(labelled(), config_of(kind="lexicon", words={"glad": ["fine"]}), [])
    assert words.of(0).name == "lexicon(words of glad)"
    with pytest.raises(ConfigError, match=r"positive and negative, but not 'slow'.*judge.labels"):
        words.of(1)


def test_a_model_and_a_server_are_asked_about_the_concept(toy_model, monkeypatch):
    asked = config_of(
        kind="model", question="{text} Is it {label}?", answers=[" good", " old"],
        labels={"glad": "happy"},
    )  # fmt: skip
    judge = Judges(labelled(), asked, [], toy_model).of(0)
    assert isinstance(judge, ModelJudge)
    wanted = ModelJudge(toy_model, "{text} Is it happy?", yes=" good", no=" old")
    assert torch.equal(judge(["the people"]), wanted(["the people"]))
    server = {"kind": "url", "url": "http://localhost:1/v1", "model": "small"}
    found = Judges(labelled(), config_of(**server), []).of(0)
    assert isinstance(found, UrlJudge)
    assert found.name == "url(small)"
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="no variable 'NO_SUCH_KEY'"):
        Judges(labelled(), config_of(**server, key_variable="NO_SUCH_KEY"), []).of(0)


def test_every_kind_is_validated_on_text_that_it_has_not_seen(toy_model):
    words = {"glad": ["glad"], "slow": ["slow"]}
    lexicon = Judges(labelled(), config_of(kind="lexicon", words=words), [])
    found = lexicon.validated(0, toy_model, new_tokens=2, seed=0)
    assert (found.judge, found.heldout_auroc) == ("lexicon(words of glad)", 1.0)
    asked = config_of(kind="model", answers=[" good", " old"])
    model = Judges(labelled(), asked, [], toy_model)
    assert 0 <= model.validated(0, toy_model, new_tokens=2, seed=0).heldout_auroc <= 1


def test_a_lexicon_stands_beside_where_the_concept_has_one(toy_model, monkeypatch, caplog):
    how = {"new_tokens": 2, "seed": 0}
    assert Judges(labelled(), NgramsConfig(), []).lexicon(0, toy_model, **how) is None
    called = NgramsConfig(labels={"glad": "positive", "slow": "negative"})
    words = LexiconJudge({"glad": []}, source="rated-words, positive")
    monkeypatch.setattr(judging, "rated_lexicon", lambda **_: words)
    found = Judges(labelled(), called, []).lexicon(0, toy_model, **how)
    assert (found.judge, found.is_chosen) == (words, False)
    assert found.validation.heldout_auroc == 1.0
    chosen = Judges(labelled(), LexiconConfig(kind="lexicon", words={"glad": ("glad",)}), [])
    assert chosen.lexicon(0, toy_model, **how).is_chosen

    def nowhere(**_):
        raise AssetError("no network")

    monkeypatch.setattr(judging, "rated_lexicon", nowhere)
    assert Judges(labelled(), called, []).lexicon(0, toy_model, **how) is None
    assert "no rows of a lexicon" in caplog.text


def test_results_know_the_models_and_the_lists_that_judge(tmp_path):
    path = tmp_path / "rated.txt"
    path.write_text("fine\t2.0\n")
    counted = SteeringConfig(judge=config_of(kind="lexicon", source=str(path)))
    asked = SteeringConfig(judge=config_of(kind="model", source="toy:seed=1"))
    assert judge_inputs([counted, asked], identify) == {
        "judges": {str(path): checksum(str(path))},
        "readers": {"toy:seed=1": identify("toy:seed=1").fingerprint},
    }
    inputs = api.evaluation_inputs(["steering"], {"steering": asked}, torch.device("cpu"))
    assert inputs["readers"] == {"toy:seed=1": load_model("toy:seed=1").fingerprint}
    read = SteeringConfig(fluency_model="toy:seed=2")
    assert set(judge_inputs([asked, read], identify)["readers"]) == {"toy:seed=1", "toy:seed=2"}
    plain = api.evaluation_inputs(["signs"], {"signs": SteeringConfig()}, torch.device("cpu"))
    assert set(plain) == {"evals"}


def test_another_model_is_loaded_by_whoever_can(toy_model):
    other = load_model("toy:seed=1")
    made = ("steering", SteeringConfig(), None, lambda *_: None)
    prepared = Prepared(*made, lambda source, device: other)
    assert prepared._loaded("toy:seed=1", toy_model) is other
    with pytest.raises(ConfigError, match="no way to load"):
        Prepared(*made)._loaded("toy:seed=1", toy_model)
