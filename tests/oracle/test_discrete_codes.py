"""Scores of heads by their codes, beside sets of Python and by hand."""

import pytest
import torch
from circuit_tasks import WORDS, induction, random_pairs
from doubles import WordTokenizer

from saelab.circuits import baselines, tasks
from saelab.circuits import heads as scores_of_heads
from saelab.circuits.discrete_codes import (
    SILENT,
    Codes,
    HeadOutputs,
    code,
    distinct,
    edge_counts,
    edge_scores,
    learn_codes,
    node_scores,
    share_of_layer,
)
from saelab.circuits.head_outputs import head_outputs
from saelab.circuits.published import GPT2_SMALL_IOI
from saelab.circuits.strata import half
from saelab.errors import ConfigError, SiteError
from saelab.models.handwired import induction_model
from saelab.stats import auc


def heads(*columns):
    return torch.tensor(columns).T


def random_codes(seed=0, n=6, n_heads=5, n_codes=4):
    g = torch.Generator().manual_seed(seed)
    return Codes(*(torch.randint(n_codes, (n, n_heads), generator=g) for _ in range(2)))


def test_two_heads_by_hand():
    codes = Codes(heads([1, 2], [1, 1]), heads([3, 3], [1, 1]))
    assert node_scores(codes).tolist() == [2, 0]
    assert node_scores(codes, normalised=True).tolist() == pytest.approx([2 / 3, 0])
    assert auc(node_scores(codes), torch.tensor([True, False])) == 1


def test_equal_sets_score_zero_and_tell_nothing():
    codes = random_codes()
    same = Codes(codes.positive, codes.positive.flip(0))
    for scores in (node_scores(same), node_scores(same, normalised=True)):
        assert not scores.any()
        assert auc(scores, torch.tensor([True, False, True, False, True])) == 0.5
    assert not edge_scores(same).any()


def test_sets_without_a_common_code_score_all_of_them():
    codes = random_codes()
    apart = Codes(codes.positive, codes.negative + 100)
    assert torch.equal(node_scores(apart), distinct(codes.positive))


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_heads_and_of_pairs_equal_sets_of_python(seed):
    codes = random_codes(seed)
    p, n = codes.positive.tolist(), codes.negative.tolist()
    for a in range(5):
        mine, others = {row[a] for row in p}, {row[a] for row in n}
        assert node_scores(codes)[a] == len(mine - others)
        whole = node_scores(codes, normalised=True)[a]
        assert float(whole) == pytest.approx(len(mine - others) / len(mine | others))
        for b in range(5):
            pairs, other = ({(row[a], row[b]) for row in rows} for rows in (p, n))
            assert edge_scores(codes)[a, b] == len(pairs - other)
            share = len(pairs - other) / (len(pairs) + len(other))
            assert float(edge_scores(codes, normalised=True)[a, b]) == pytest.approx(share)


def test_the_softmax_over_a_layer_sums_to_one_and_changes_ranks_between_layers_only():
    scores, layers = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1])
    shares = share_of_layer(scores, layers)
    assert [float(shares[layers == layer].sum()) for layer in (0, 1)] == pytest.approx([1, 1])
    assert shares[0] > shares[1] and shares[2] == shares[3] == 0.5


def test_heads_are_counted_in_the_best_pairs_and_level_pairs_share_what_is_left():
    layers = torch.tensor([0, 0, 1])
    edges = torch.tensor([[9.0, 9, 3], [9, 9, 1], [3, 1, 9]])
    assert edge_counts(edges, layers, top=1).tolist() == [1, 0, 1]
    assert edge_counts(edges, layers, top=2).tolist() == [1, 1, 2]
    level = torch.ones(3, 3)
    assert edge_counts(level, layers, top=1).tolist() == [0.5, 0.5, 1]
    with pytest.raises(SiteError, match="two layers"):
        edge_counts(level, torch.zeros(3, dtype=torch.int64), top=1)


def random_outputs(n=8, n_heads=3, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return HeadOutputs(*(torch.randn(n, n_heads, d, generator=g) for _ in range(2)))


def test_normalised_outputs_have_no_mean_and_unit_size_and_forget_each_heads_scale():
    raw = random_outputs()
    both = raw.normalised().both
    torch.testing.assert_close(both.mean(0), torch.zeros(3, 6), atol=1e-6, rtol=0)
    torch.testing.assert_close(both.square().mean((0, 2)), torch.ones(3))
    scale = torch.tensor([1.0, 50.0, 0.02])[:, None]
    scaled = HeadOutputs(raw.positive * scale + 3, raw.negative * scale + 3).normalised()
    torch.testing.assert_close(scaled.both, both, atol=1e-4, rtol=1e-4)
    constant = HeadOutputs(torch.ones(2, 1, 4), torch.ones(2, 1, 4)).normalised()
    assert not constant.both.any()


def test_codes_are_the_largest_latent_with_its_sign_and_none_where_none_fires():
    outputs = HeadOutputs(torch.zeros(2, 1, 3), torch.zeros(2, 1, 3))
    z = torch.tensor([[0.0, 2, 1], [0, 1, -2], [0, 0, 0], [0, -1, 0]])
    codes = code(outputs, lambda _: z)
    assert codes.positive[:, 0].tolist() == [2, 5]
    assert codes.negative[:, 0].tolist() == [SILENT, 3]
    assert codes.coded == 0.75


def test_a_fit_sees_the_outputs_that_are_not_zero_and_the_seed():
    outputs = random_outputs()
    outputs.positive[0, 1] = 0
    seen = {}

    def fit(rows, seed):
        seen.update(rows=rows, seed=seed)
        return lambda x: x

    codes = learn_codes(outputs, fit, seed=7)
    assert seen["rows"].shape == (47, 6) and seen["seed"] == 7
    assert codes.positive.shape == (8, 3) and codes.positive[0, 1] == SILENT


def test_unequal_numbers_of_examples_are_refused():
    with pytest.raises(ConfigError, match="there are 4 and 3"):
        HeadOutputs(torch.zeros(4, 1, 2), torch.zeros(3, 1, 2))


def test_what_heads_write_adds_up_to_the_attention_output(toy_model):
    data = random_pairs(toy_model)
    written = head_outputs(toy_model, data, "clean")
    site = "blocks.1.hook_attn_out"
    whole = data.at_end(toy_model.capture(data.clean, [site])[site])
    torch.testing.assert_close(written[:, 4:].sum(1), whole, atol=1e-5, rtol=1e-5)


def test_scores_come_from_other_prompts_than_the_truth(monkeypatch):
    model, _ = induction()
    config = scores_of_heads.CodesConfig(examples=[4], draws=1, first_seed=7)
    truth = tasks.draw("induction", model, 3, seed=7)
    used = []

    def outputs(model, data, version):
        used.append(data)
        raise LookupError

    monkeypatch.setattr(scores_of_heads, "head_outputs", outputs)
    with pytest.raises(LookupError):
        next(scores_of_heads.score_heads(model, truth, config, lambda rows, seed: None))
    following = tasks.draw("induction", model, 7, seed=7).clean[3:]
    assert torch.equal(used[0].clean, following)


def test_the_published_list_has_26_different_heads():
    listed = [head for heads in GPT2_SMALL_IOI.values() for head in heads]
    assert len(listed) == len(set(listed)) == 26
    assert max(listed).layer == 11 and {h.head for h in listed if h.layer == 9} == {6, 7, 9}


# ---------------------------------------------------------------------------------------- baselines


def telling_outputs(gap):
    """Three heads; the positives of the second one are shifted."""
    raw = random_outputs(n=20)
    raw.positive[:, 1] += gap
    return raw


def test_observational_baselines_see_a_head_whose_outputs_differ_and_are_level_without():
    first = half(torch.zeros(20, dtype=torch.int64), seed=0)
    told = baselines.of_outputs(telling_outputs(20.0), first)
    assert told["probe"][1] == 1.0 and int(told["mean_difference"].argmax()) == 1
    assert int(told["output_norm"].argmax()) == 1
    blind = baselines.of_outputs(telling_outputs(0.0), first)
    assert float(blind["probe"][1]) == pytest.approx(0.5, abs=0.3)
    same = random_outputs()
    equal = baselines.of_outputs(HeadOutputs(same.positive, same.positive), first[:8])
    assert not equal["mean_difference"].any()


def test_the_probe_is_read_on_the_templates_that_it_was_fitted_on():
    """Heads say it in one direction in even templates and in another one in odd ones."""
    templates = torch.arange(16) % 4
    positive = torch.nn.functional.one_hot(templates % 2, 3)[:, None].float()
    outputs = HeadOutputs(positive, torch.zeros_like(positive))
    assert baselines.of_outputs(outputs, half(templates, seed=0))["probe"].tolist() == [1.0]
    parity = baselines.of_outputs(outputs, templates % 2 == 0)
    assert parity["probe"].tolist() == [0.5]


def test_the_variance_of_a_constant_output_is_zero():
    raw = random_outputs()
    raw.positive[:, 2] = 5.0
    found = baselines.of_outputs(raw, torch.arange(8) < 4)["output_variance"]
    assert found[2] == 0 and bool((found[:2] > 0).all())


def test_direct_logits_find_the_head_that_says_the_answer():
    model, data = induction()
    found = baselines.direct_logits(model, data, head_outputs(model, data, "clean"))
    assert found[:, 2].tolist() == pytest.approx([10.0] * len(data))
    assert not found[:, [0, 1, 3]].any()


@pytest.mark.parametrize("name", ["codes_random", "codes_k_means", "codes_pca_signs"])
def test_other_codes_tell_clusters_apart_too(name):
    raw = telling_outputs(50.0)
    raw.negative[:, 1] -= 50.0
    found = baselines.of_other_codes(raw, 8, seed=0)[name]
    assert found[1] >= 1
    same = HeadOutputs(raw.positive, raw.positive)
    assert not baselines.of_other_codes(same, 8, seed=0)[name].any()


def test_without_labels_codes_are_counted_and_with_mixed_labels_nothing_is_told():
    codes = Codes(heads([1, 2, 3, 1], [0, 0, 0, 0]), heads([1, 2, 3, 1], [5, 5, 5, 5]))
    found = baselines.of_codes(codes, seed=0)
    assert found["distinct_codes"].tolist() == [3, 2]
    many = Codes(torch.arange(40)[:, None] % 2, torch.arange(40)[:, None] % 2)
    assert not baselines.of_codes(many, seed=0)["codes_permuted"].any()


@pytest.mark.parametrize("task", ["ioi", "greater_than", "docstring", "agreement"])
def test_unpredictable_prompts_are_not_told_by_their_words(task):
    data = tasks.draw(task, WordTokenizer(), 64, seed=0)
    assert baselines.bag_of_tokens_auc(data.clean, data.unpredictable, seed=0) < 0.6


def test_bags_of_tokens_tell_other_words_apart_but_not_the_same_words():
    data = tasks.draw("induction", induction_model(WORDS), 40, seed=0)
    assert baselines.bag_of_tokens_auc(data.clean, data.off_task, seed=0) > 0.95
    assert baselines.bag_of_tokens_auc(data.clean, data.unpredictable, seed=0) < 0.6
    assert baselines.bag_of_tokens_auc(data.clean, data.clean, seed=0) == pytest.approx(
        0.5, abs=0.1
    )
