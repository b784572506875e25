"""Side effects on neutral text: which text, at which positions, and by how much."""

import pytest
import torch
from steering_toys import OWN, SITE, dictionary_with, labelled_store

from saelab.edits import Directions, Handle, add, steer
from saelab.models import load_model
from saelab.steering.judges import LexiconJudge
from saelab.steering.kinds import judge_inputs
from saelab.steering.neutral import (
    Neutral,
    NeutralConfig,
    corpus_windows,
    heldout_windows,
    windows_without,
)
from saelab.steering.scene import SteeringConfig
from saelab.steering.side_effects import ce_sums, mean_change, presences, unsteered_losses
from saelab.steering.sweep import Continuations, presence
from saelab.steering.trial import Trial, adding


@pytest.fixture(scope="module")
def store(tmp_path_factory, toy_model):
    return labelled_store(tmp_path_factory.mktemp("neutral"), toy_model)


@pytest.fixture
def config(tmp_path) -> NeutralConfig:
    path = tmp_path / "news.csv"
    lines = [f"the state of the people and the time of day {n} was long and old" for n in range(9)]
    path.write_text("text\n" + "\n".join(lines) + "\n")
    return NeutralConfig(source=str(path), windows=3, context=8)


@pytest.fixture(scope="module")
def handle() -> Handle:
    rows = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    return Handle(Directions(rows), SITE)


def texts(toy_model, neutral: Neutral) -> list[str]:
    pairs = zip(neutral.tokens, neutral.lengths, strict=True)
    return [toy_model.to_text(row[:n].tolist()) for row, n in pairs]


def test_documents_with_the_label_are_no_neutral_text(toy_model, store):
    found = windows_without(store, SITE, toy_model, {"glad"}, 5)
    assert len(found.tokens) == 5
    written = " ".join(texts(toy_model, found))
    assert not any(word in written for word in OWN["glad"])
    assert all(word in written for word in OWN["slow"])
    assert windows_without(store, SITE, toy_model, {"glad", "slow"}) is None
    assert len(heldout_windows(store, SITE, toy_model, 3).tokens) == 3


def test_another_corpus_is_cut_and_masked_as_a_harvest_does(toy_model, config):
    found = corpus_windows(config, toy_model, SITE)
    assert found.tokens.shape == (3, 8)
    assert found.name == config.source
    special = torch.isin(found.tokens, torch.tensor(sorted(toy_model.special_ids)))
    assert not found.scored[:, 0].any()  # the first position is masked
    assert not found.scored[:, -1].any()  # nothing follows the last
    assert torch.equal(found.scored[:, 1:-1], ~(special[:, 1:-1] | special[:, 2:]))


def test_results_know_the_content_that_side_effects_are_read_on(config):
    settings = SteeringConfig(neutral=config)
    assert hash(settings) == hash(SteeringConfig.parse(settings.plain()))
    before = judge_inputs([settings], load_model)["neutral"][config.source]
    with open(config.source, "a") as file:
        file.write("more of it\n")
    assert judge_inputs([settings], load_model)["neutral"][config.source] != before


def test_the_change_of_cross_entropy_is_that_of_each_window_alone(toy_model, store, handle):
    neutral = heldout_windows(store, SITE, toy_model, 4)
    neutral.scored[3] = False
    edits = [add(handle, 3, 4.0)]
    (found,) = ce_sums(toy_model, [edits], neutral)
    for row, (n, scored) in enumerate(zip(neutral.lengths.tolist(), neutral.scored, strict=True)):
        alone = neutral.tokens[row : row + 1, :n]
        losses = []
        for chosen in ([], edits):
            with steer(toy_model, *chosen):
                log_probs = toy_model.logits(alone)[0].log_softmax(-1)
            own = [-log_probs[i, alone[0, i + 1]] for i in range(n - 1) if scored[i]]
            losses.append(torch.stack(own).mean() if own else torch.tensor(0.0))
        assert found[row, 0] == pytest.approx(float(losses[1] - losses[0]), abs=1e-5)
    assert found[:, 1].tolist() == [1, 1, 1, 0]
    known = unsteered_losses(toy_model, neutral)
    assert known.isnan().tolist() == [False, False, False, True]
    assert torch.equal(ce_sums(toy_model, [edits], neutral, unsteered=known)[0], found)
    assert torch.equal(ce_sums(toy_model, [[]], neutral)[..., 0], torch.zeros(1, 4).double())


def test_many_directions_share_the_windows_and_count_alike(toy_model, store, handle):
    neutral = heldout_windows(store, SITE, toy_model, 8)
    each = [[add(handle, place, 4.0)] for place in range(10)]
    found = ce_sums(toy_model, each, neutral)
    assert ((found[..., 1] > 0).sum(0) == 5).all()
    torch.testing.assert_close(found[..., 1].sum(0), torch.ones(8).double())
    alone = [ce_sums(toy_model, [edits], neutral)[0, :, 0] for edits in each]
    for one, direction in zip(alone, found, strict=True):
        read = direction[:, 1] > 0
        torch.testing.assert_close(direction[read, 0], one[read] / 5, atol=1e-6, rtol=1e-4)
    assert float(mean_change(found.sum((0, 1))[None])) == pytest.approx(
        float(found[..., 0].sum() / 8)
    )


def texts_of(written: Continuations, prompts: list[str]) -> list[tuple[str, str]]:
    """Every other prompt with what was written after it."""
    pairs = zip(written.prompts, written.texts, strict=True)
    return [(prompt, text) for prompt, text in pairs if prompts.index(prompt) % 2]


def test_presence_is_read_on_reported_prompts_against_unsteered_text(toy_model, handle):
    prompts = [f"the people {word}" for word in ("can", "may", "will", "must", "should", "did")]
    prompts += ["they say that", "of this time"]
    judge = LexiconJudge({"good": []}, source="one word")
    trial = Trial(toy_model, prompts, judge, max_new_tokens=4, samples=2)
    arms = {"two": adding(handle, [3, 5])}
    (response,) = trial.responses(arms, [0.5], largest=100.0)
    relu = Handle(dictionary_with(handle.dictionary.W_dec[3], 0), SITE)
    (found,) = presences(toy_model, relu, 0, [response], trial)
    kept = [pair for one in response.written for pair in texts_of(one, prompts)]
    usual = texts_of(trial.usual, prompts)
    own, before = (
        presence(toy_model, relu, Continuations(*map(tuple, zip(*pairs, strict=True))))
        for pairs in (kept, usual)
    )
    assert (len(kept), len(usual)) == (8, 8)
    assert found["presence"] == pytest.approx(float(own[0]))
    assert found["presence_gain"] == pytest.approx(float(own[0] - before[0]))
    assert found["presence_others"] == pytest.approx(float((own - before)[1:].abs().sum()))
