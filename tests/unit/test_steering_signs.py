"""Both signs: the smaller of two effects, and what signed codes tell of labels unsteered."""

import math
from dataclasses import replace

import pytest
import torch
from steering_toys import OWN, SITE, dictionary_with, labelled_store, word_direction

from saelab.errors import ConfigError
from saelab.metrics.pooling import Pooled
from saelab.steering import scene, signs
from saelab.steering.evaluator import OWN as OWN_ARM
from saelab.steering.judges import Validation
from saelab.steering.rows import Rows
from saelab.steering.scene import SteeringConfig
from saelab.steering.signed_codes import best_signed, separated, two_sided
from saelab.steering.signs import Pair, SignsEvaluator, choose
from saelab.steering.sweep import Continuations
from saelab.steering.trial import Response

WRITTEN = (Continuations(("a",), ("b",)),)


def response(scores: list[float], usual: float = 0.5) -> Response:
    sums = torch.ones(len(scores), 5, dtype=torch.float64)
    sums[:, 0], sums[:, 1] = torch.tensor(scores), usual
    return Response("some", 0.1, (), None, "none", sums, ())


def value(statistic, pair: Pair) -> float:
    return float(statistic(pair.sums(reported=True).sum(0, keepdim=True)))


@pytest.mark.parametrize(
    ("up", "down", "least", "opposed"),
    [
        (0.9, 0.2, 0.3, 0.3),  # both ways, the smaller counts
        (0.9, 0.5, 0.0, 0.0),  # one side alone
        (0.9, 0.8, 0.3, 0.0),  # both the same way
        (0.5, 0.5, 0.0, 0.0),
    ],
)
def test_the_smaller_of_both_effects_counts(up, down, least, opposed):
    pair = Pair(response(4 * [up]), response(4 * [down]))
    assert value(signs.least, pair) == pytest.approx(least)
    assert value(signs.opposed, pair) == pytest.approx(opposed)


def test_the_pair_is_chosen_on_the_first_half_and_read_on_the_second():
    even = Pair(response(4 * [0.7]), response(4 * [0.3]))
    lucky = Pair(response([1.0, 0.5, 1.0, 0.5]), response([0.0, 0.5, 0.0, 0.5]))
    missed = Pair(response(4 * [math.nan]), response(4 * [math.nan]))
    assert choose([missed, even, lucky]) is lucky
    assert value(signs.least, lucky) == 0
    assert choose([missed]) is None


def test_differences_are_at_equal_doses_too():
    def pair(dose: float, effect: float) -> Pair:
        sides = (response(16 * [0.5 + side * effect]) for side in (1, -1))
        return Pair(*(replace(one, target=dose, written=WRITTEN) for one in sides))

    arms = {
        OWN_ARM: [pair(0.1, 0.1), pair(0.4, 0.2)],
        "random": [pair(0.1, 0.3), pair(0.4, 0.05), pair(0.4, math.nan)],
    }
    config = CONFIG.model_copy(update={"doses": (0.1, 0.4)})
    rows = Rows("glad", Validation("some", 0.9, 0.9), 8, "signs", 2, 20, 0, "fluency(some)")
    found = {(row.name, row.arm): row.value for row in SignsEvaluator(config)._steered(rows, arms)}
    lead = "signs_least_over(random)"
    assert found[f"{lead}(glad)", OWN_ARM] == pytest.approx(0.2 - 0.3)  # each at its best dose
    assert found[f"{lead}[dose=0.1](glad)", OWN_ARM] == pytest.approx(0.1 - 0.3)
    assert found[f"{lead}[dose=0.4](glad)", OWN_ARM] == pytest.approx(0.2 - 0.05)
    assert found["signs_least[dose=0.4](glad)", "random"] == pytest.approx(0.05)
    assert found["signs_dose(glad)", "random"] == 0.1


# ------------------------------------------------------------------------------------ signed codes


def test_the_best_signed_code_is_found_whichever_way_round():
    positive = torch.arange(8) < 4
    scores = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    scores[:, 1] = torch.where(positive, -1.0, 1.0)
    assert best_signed(scores, positive) == (1, -1)
    assert best_signed(-scores, positive) == (1, 1)
    assert best_signed(torch.zeros(8, 2), positive) == (0, 1)


def test_a_latent_is_separated_if_its_signs_lie_in_different_documents():
    positive = torch.arange(40) < 20
    z = torch.zeros(40, 3)
    z[:, 0] = torch.where(positive, 1.0, -1.0)
    z[:, 1] = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)
    z[:20, 2] = 1.0  # one sign only
    codes = Pooled(z.clamp(min=0), (-z).clamp(min=0), z)
    both = two_sided((z > 0).double().mean(0), (z < 0).double().mean(0))
    assert both.tolist() == [True, True, False]
    assert separated(codes, positive, both).tolist() == [True, False, False]
    assert not separated(codes, positive, torch.zeros(3, dtype=torch.bool)).any()
    assert not two_sided(torch.tensor([5e-4]), torch.tensor([0.5])).any()


# --------------------------------------------------------------------------------------- evaluator


CONFIG = SteeringConfig(
    concepts=("glad",), doses=(1.5,), new_tokens=6, candidates=1, per_label=3, rows=300,
    resamples=20,
)  # fmt: skip


def test_a_direction_between_two_labels_carries_both_signs(toy_model, tmp_path, monkeypatch):
    # of the toy's twenty most typical tokens only these are words of the label
    words = [int(run.ids[0]) for run in toy_model.tokenize([f" {word}" for word in OWN["glad"]])]
    monkeypatch.setattr(scene, "concept_tokens", lambda *_: words)
    store = labelled_store(tmp_path, toy_model)
    between = word_direction(toy_model, OWN["glad"]) - word_direction(toy_model, OWN["slow"])
    evaluate = SignsEvaluator(CONFIG, SITE)
    rows = list(evaluate(dictionary_with(between, 0, "abs_topk"), store, toy_model))
    found = {(row.name, row.arm): row for row in rows}
    arms = ("dictionary", "mean_difference", "covariance")
    least, opposed, up, down = (
        {arm: found[f"signs_{name}(glad)", arm].value for arm in arms}
        for name in ("least", "opposed", "up", "down")
    )
    for arm in arms:
        assert least[arm] == pytest.approx(min(abs(up[arm]), abs(down[arm])))
        assert opposed[arm] in (0, least[arm])
        assert found["signs_dose(glad)", arm].value == 1.5
    assert up["dictionary"] > 0 > down["dictionary"]
    assert least["dictionary"] > least["covariance"]
    lead = found["signs_least_over(covariance)(glad)", "dictionary"]
    assert lead.value == pytest.approx(least["dictionary"] - least["covariance"])
    assert len(lead.replicates) == 20
    # the only dose is the best one
    for name in ("least", "opposed", "least_over(covariance)"):
        at_dose = found[f"signs_{name}[dose=1.5](glad)", "dictionary"].value
        assert at_dose == found[f"signs_{name}(glad)", "dictionary"].value
    assert [found["signs_reached[dose=1.5](glad)", arm].value for arm in arms] == [1, 1, 1]
    assert [found["signs_candidates(glad)", arm].value for arm in arms] == [2, 1, 2]
    assert found["signs_auc(glad)", "dictionary"].value > 0.6
    assert 0 < found["signs_two_sided_share(glad)", "dictionary"].value <= 1
    # codes of one sign have no second side
    rows = list(evaluate(dictionary_with(between, 0), store, toy_model))
    assert [row.value for row in rows if "two_sided" in row.name] == [0, 0]
    with pytest.raises(ConfigError, match="live `model:`"):
        list(evaluate(dictionary_with(between, 0), store, None))
