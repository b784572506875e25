"""Agreement of scores with effects: both ends, ties, and what is too little."""

import itertools

import pytest
import torch
from circuit_tasks import induction

from saelab.circuits import ranking
from saelab.circuits.effects import Effects, heads_of
from saelab.circuits.linear import attribution_patching
from saelab.circuits.patching import PatchConfig, patch
from saelab.circuits.published import is_listed
from saelab.circuits.ranking import RankingConfig
from saelab.errors import ConfigError, TaskError
from saelab.stats import auc


def truth(effects, n=16):
    effects = torch.as_tensor(effects)
    return Effects(heads_of(1, len(effects)), effects.expand(n, -1), torch.ones(n))


EFFECTS = [0.5, -0.3, 0.2, 0.08, 0.06, -0.06, 0.055, 0.001, 0, 0, 0, -0.001, 0.003, 0.007]
CONFIG = RankingConfig(precision_at=[3], cutoffs=[0.05], least=2)


def test_a_perfect_score_agrees_fully_and_its_opposite_not_at_all():
    found = truth([0.5, -0.3, 0.2, 0.1, 0.004, 0.003, -0.002, 0.001])
    exact = found.effect().abs()
    best = ranking.agreements(exact, found, CONFIG)
    assert [best["kendall"], best["spearman"]] == pytest.approx([1.0, 1.0])
    assert best["precision@3"] == best["auc@0.05"] == best["ap@0.05"] == 1
    worst = ranking.agreements(-exact, found, CONFIG)
    assert [worst["kendall"], worst["spearman"]] == pytest.approx([-1.0, -1.0])
    assert worst["precision@3"] == worst["auc@0.05"] == 0


def test_a_constant_score_is_chance():
    found = ranking.agreements(torch.zeros(len(EFFECTS)), truth(EFFECTS), CONFIG)
    assert found["kendall"] == found["spearman"] == 0
    assert found["precision@3"] == pytest.approx(3 / len(EFFECTS))
    assert found["auc@0.05"] == 0.5
    assert found["ap@0.05"] == pytest.approx(7 / 13)


def test_helpful_and_harmful_heads_are_told_apart():
    effects = truth(EFFECTS)
    found = ranking.agreements(effects.effect(), effects, CONFIG)
    assert found["auc_helpful@0.05"] == 1 and found["auc_harmful@0.05"] == 0


def test_precision_with_ties_is_the_mean_over_all_ways_to_break_them():
    scores, exact = torch.tensor([2.0, 1, 1, 1, 0]), torch.tensor([5.0, 4, 1, 3, 2])
    found = []
    for order in itertools.permutations(range(5)):
        best = sorted(order, key=lambda i: -float(scores[i]))[:2]
        found.append(len(set(best) & {0, 1}) / 2)
    assert ranking.precision_at(scores, exact, 2) == pytest.approx(sum(found) / len(found))


def test_heads_between_are_left_out_and_counted():
    effects = truth(EFFECTS)
    found = ranking.counts(effects, CONFIG)
    assert found["positives@0.05"] == 7 and found["left_out@0.05"] == 1
    assert found["heads"] == sum(found[k] for k in ("negatives", "positives@0.05", "left_out@0.05"))


def test_a_cut_off_with_too_few_positives_is_left_out_and_too_few_negatives_are_refused():
    effects = truth(EFFECTS)
    config = RankingConfig(precision_at=[3], cutoffs=[0.05, 0.4], least=2)
    assert "auc@0.4" not in ranking.agreements(effects.effect(), effects, config)
    noisy = Effects(effects.components, torch.randn(16, len(EFFECTS)), effects.gaps)
    with pytest.raises(TaskError, match="2 negatives are needed"):
        ranking.agreements(effects.effect(), noisy, config)


def test_the_ceiling_is_one_for_an_exact_truth():
    assert ranking.ceiling(truth(EFFECTS), CONFIG, splits=3, seed=0) == pytest.approx(
        {"kendall": 1.0, "spearman": 1.0, "precision@3": 1.0}
    )


def test_patching_and_attribution_give_the_heads_of_a_known_circuit_with_auc_one():
    circuit = torch.tensor([True, False, True, False])
    for sharpness in (1e3, 5.0):
        model, data = induction(sharpness=sharpness)
        exact = patch(model, data, PatchConfig()).effect()
        assert auc(exact.abs(), circuit) == 1 and bool((exact[~circuit] == 0).all())
        if sharpness == 5.0:
            assert auc(attribution_patching(model, data).effect().abs(), circuit) == 1


def test_the_published_list_stands_beside_the_truth_and_is_refused_for_another_model():
    config = RankingConfig(precision_at=[3], cutoffs=[], least=1)
    components = heads_of(12, 12)
    exact = Effects(components, torch.zeros(9, 144), torch.ones(9))
    for task, n in (("ioi", 26), ("greater_than", 9)):
        listed = is_listed("gpt2_small", task, components)
        assert int(listed.sum()) == n
        found = ranking.agreements(listed.double(), exact, config, listed)
        assert found["auc_published"] == found["ap_published"] == 1
        assert ranking.agreements(-listed.double(), exact, config, listed)["auc_published"] == 0
    assert "auc_published" not in ranking.agreements(listed.double(), exact, config)
    with pytest.raises(ConfigError, match=r"this one has no heads 2\.2, 3\.0"):
        is_listed("gpt2_small", "ioi", heads_of(2, 12))
