"""Tasks: what each version of a prompt says, and what fits no tokenizer."""

from collections import Counter

import pytest
import torch
from doubles import WordTokenizer

from saelab.circuits import ability, tasks
from saelab.circuits.examples import Example
from saelab.errors import ConfigError, TaskError
from saelab.protocols import LanguageModel

NAMES = list(tasks.TASKS)


def text(tokenizer, data, version, row):
    ids = getattr(data, version)[row, : data.lengths[row]].tolist()
    return "".join(tokenizer.to_strings(ids))


def draw(name, n=16, seed=0, **options):
    tokenizer = WordTokenizer(**options)
    return tokenizer, tasks.draw(name, tokenizer, n, seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_all_versions_of_a_prompt_are_equally_long_and_aligned_by_slot(name):
    _, data = draw(name)
    assert len(data) == 16 and bool((data.slots["end"] == data.lengths - 1).all())
    for template in data.templates.unique():
        mine = data.templates == template
        assert all(len(column[mine].unique()) == 1 for column in data.slots.values())
    real = torch.arange(data.clean.shape[1]) < data.lengths[:, None]
    for version in (data.clean, data.corrupted, data.unpredictable, data.off_task):
        assert bool((version[real] > 0).all()) and not bool(version[~real].any())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_draws_the_same_prompts_and_another_seed_others(name):
    (_, first), (_, again), (_, other) = draw(name), draw(name), draw(name, seed=1)
    assert torch.equal(first.clean, again.clean) and torch.equal(first.off_task, again.off_task)
    assert first.clean.shape != other.clean.shape or not torch.equal(first.clean, other.clean)


@pytest.mark.parametrize("name", ["greater_than", "agreement"])
def test_unpredictable_prompts_have_the_tokens_of_the_clean_ones(name):
    _, data = draw(name)
    for clean, other in zip(data.clean.tolist(), data.unpredictable.tolist(), strict=True):
        assert Counter(clean) == Counter(other) and clean != other


def test_in_ioi_the_one_who_does_not_act_is_meant():
    tokenizer, data = draw("ioi")
    for row in range(len(data)):
        io, subject = (data.attributes[key][row] for key in ("io", "subject"))
        clean = text(tokenizer, data, "clean", row)
        assert (clean.count(io), clean.count(subject)) == (1, 2)
        assert tokenizer.to_strings(data.right[row].tolist()) == [f" {io}"]
        corrupted = text(tokenizer, data, "corrupted", row)
        assert (corrupted.count(io), corrupted.count(subject)) == (2, 1)
        assert tokenizer.to_strings([data.clean[row, data.slots["s2"][row]]]) == [f" {subject}"]
        first = data.slots["io"][row] < data.slots["s1"][row]
        assert data.attributes["order"][row] == ("ABBA" if first else "BABA")


def test_years_in_digits_ask_for_the_tens_and_years_in_pairs_for_both_digits():
    tokenizer, data = draw("greater_than")
    digits = "".join(tokenizer.to_strings([data.clean[0, data.slots["tens"][0]]]))
    right = tokenizer.to_strings([i for i in data.right[0].tolist() if i >= 0])
    wrong = tokenizer.to_strings([i for i in data.wrong[0].tolist() if i >= 0])
    assert right == [str(d) for d in range(int(digits) + 1, 10)]
    assert wrong == [str(d) for d in range(int(digits))]
    tokenizer, data = draw("greater_than", digits=2)
    year = "".join(tokenizer.to_strings([data.clean[0, data.slots["year"][0]]]))
    right = tokenizer.to_strings([i for i in data.right[0].tolist() if i >= 0])
    assert right == [f"{y:02d}" for y in range(int(year) + 1, 100)]


def test_in_a_docstring_the_third_argument_is_next():
    tokenizer, data = draw("docstring", n=3)
    third = data.clean[torch.arange(3), data.slots["c"]]
    assert torch.equal(third[:, None], data.right)
    assert text(tokenizer, data, "clean", 0).endswith(":param")
    documented = data.unpredictable[torch.arange(3), data.slots["doc_a"]]
    assert not bool((documented == data.clean[torch.arange(3), data.slots["a"]]).any())


def test_a_bos_token_is_put_in_front_and_moves_the_slots():
    _, plain = draw("ioi", n=4)
    _, led = draw("ioi", n=4, bos_id=3)
    assert bool((led.clean[:, 0] == 3).all()) and torch.equal(led.lengths, plain.lengths + 1)
    assert torch.equal(led.slots["io"], plain.slots["io"] + 1)


def test_too_few_single_tokens_are_refused_with_how_many_there_are(toy_model):
    with pytest.raises(TaskError, match=r"8 names .* toy has 0 of the 102"):
        tasks.draw("ioi", toy_model, 4, seed=0)
    with pytest.raises(TaskError, match="splits them otherwise"):
        tasks.draw("greater_than", WordTokenizer(digits=3), 4, seed=0)


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'docstring'"):
        draw("docstrings")


@pytest.mark.parametrize("name", NAMES)
def test_more_examples_of_a_seed_begin_with_the_same_ones(name):
    tokenizer = WordTokenizer()
    few, many = (tasks.draw(name, tokenizer, n, seed=0) for n in (6, 40))
    first = many.rows(torch.arange(6))
    width = few.clean.shape[1]
    for version in ("clean", "corrupted", "unpredictable", "off_task"):
        assert torch.equal(getattr(first, version)[:, :width], getattr(few, version))
    assert torch.equal(first.templates, few.templates)
    assert first.attributes == few.attributes


@pytest.mark.parametrize("name", NAMES)
def test_shuffled_prompts_have_the_same_tokens_and_stay_aligned(name):
    tokenizer = WordTokenizer(bos_id=3)
    plain = tasks.draw(name, tokenizer, 16, seed=0)
    mixed = tasks.draw_shuffled(name, tokenizer, 16, seed=0)
    rows = torch.arange(16)
    assert not torch.equal(mixed.clean, plain.clean) and torch.equal(mixed.right, plain.right)
    for version in ("clean", "corrupted", "unpredictable", "off_task"):
        before, after = getattr(plain, version), getattr(mixed, version)
        assert torch.equal(before.sort(1).values, after.sort(1).values)
        assert bool((after[:, 0] == 3).all())
        for slot in set(plain.slots) - {"end"}:
            has = plain.slots[slot] >= 0
            assert torch.equal((mixed.slots[slot] >= 0), has)
            there, here = before[rows, plain.slots[slot]], after[rows, mixed.slots[slot]]
            assert torch.equal(there[has], here[has])
    assert torch.equal(mixed.slots["end"], plain.slots["end"])
    changed = (plain.clean != plain.corrupted).sum(1)
    assert torch.equal((mixed.clean != mixed.corrupted).sum(1), changed)
    more = tasks.draw_shuffled(name, tokenizer, 40, seed=0)
    assert torch.equal(more.clean[:16, : mixed.clean.shape[1]], mixed.clean)


def prompts(data):
    return [row[:n] for row, n in zip(data.clean.tolist(), data.lengths.tolist(), strict=True)]


def test_prompts_that_were_seen_are_replaced_by_those_that_follow(monkeypatch):
    from saelab.circuits import examples

    monkeypatch.setattr(examples, "_NOUNS", ("key/keys", "book/books", "door/doors"))
    monkeypatch.setattr(examples, "_LINKS", ("near", "by"))
    tokenizer = WordTokenizer()  # 3 · 2 subjects, 2 · 2 attractors, 2 links: 48 prompts

    def stream(n):
        return tasks.draw("agreement", tokenizer, n, seed=0)

    truth = tasks.draw("agreement", tokenizer, 16, seed=5)
    plain = prompts(stream(400))
    assert any(p in prompts(truth) for p in plain[:20])
    found = tasks.distinct(stream, 20, known=truth)
    expected = [p for p in dict.fromkeys(map(tuple, plain)) if list(p) not in prompts(truth)]
    assert [tuple(p) for p in prompts(found)] == expected[:20]
    assert len(tasks.distinct(stream, 48)) == 48
    with pytest.raises(TaskError, match=r"49 prompts of agreement .* 3136 draws gave 48"):
        tasks.distinct(stream, 49)
    with pytest.raises(TaskError, match="and from 16 others"):
        tasks.distinct(stream, 48, known=truth)
    assert torch.equal(tasks.distinct(stream, 2).clean, stream(2).clean)


def example(**changes):
    fills = {"who": "Anna", "what": "book"}
    return Example("The {who} has a {what} for", fills, fills, fills, ["her"], ["him"], **changes)


def test_versions_of_unequal_length_are_refused():
    bad = Example("The {who} has", {"who": "cat"}, {"who": "old cat"}, {"who": "cat"}, ["a"], ["b"])
    with pytest.raises(TaskError, match=r"equally long, .* has 3 tokens and .* 4"):
        tasks.encode(WordTokenizer(), "own", "logit_difference", [bad], seed=0)


def test_prompts_of_one_frame_have_to_be_aligned():
    long = {"who": "old cat", "what": "book"}
    other = Example(example().frame, long, long, long, ["her"], ["him"])
    with pytest.raises(TaskError, match="all prompts of a frame"):
        tasks.encode(WordTokenizer(), "own", "logit_difference", [example(), other], seed=0)


def test_an_answer_of_several_tokens_is_refused():
    bad = Example("The {who} has", {"who": "cat"}, {"who": "cat"}, {"who": "cat"}, ["a b"], ["c"])
    with pytest.raises(TaskError, match="'a b' is 2 tokens"):
        tasks.encode(WordTokenizer(), "own", "logit_difference", [bad], seed=0)
    with pytest.raises(TaskError, match="no example"):
        tasks.encode(WordTokenizer(), "own", "logit_difference", [], seed=0)


def test_the_metric_takes_the_mean_logit_or_the_summed_probability():
    _, data = draw("greater_than", n=1)
    logits = torch.zeros(1, 2000)
    logits[0, data.right[0][data.right[0] >= 0]] = 20.0
    torch.testing.assert_close(data.measure(logits), torch.ones(1))
    torch.testing.assert_close(data.measure(-logits).abs() < 1, torch.tensor([True]))
    assert data.is_right(logits).all() and not data.is_right(-logits).any()
    _, data = draw("docstring", n=1)
    logits = torch.zeros(1, 2000)
    logits[0, data.right[0]], logits[0, data.wrong[0, 0]] = 3.0, 1.5
    torch.testing.assert_close(data.measure(logits), torch.tensor([2.5]))
    assert data.chance == 0.25


def test_rows_may_be_chosen_in_any_order_and_repeat():
    _, data = draw("ioi", n=20)
    twice = data.rows(torch.tensor([3, 0, 3]))
    assert torch.equal(twice.clean[0], data.clean[3]) and torch.equal(twice.clean[2], data.clean[3])
    assert twice.attributes["io"] == tuple(data.attributes["io"][i] for i in (3, 0, 3))
    assert torch.equal(twice.slots["s2"], data.slots["s2"][[3, 0, 3]])


class Answerer(LanguageModel):
    """A model whose last logits prefer an answer: of clean prompts the right one."""

    def __init__(self, data, strength):
        self.data, self.strength = data, strength

    def logits(self, tokens, edits=None, lengths=None):
        logits = torch.zeros(*tokens.shape, 3000)
        for row, prompt in enumerate(tokens):
            width = int(lengths[row])
            for version, column in (("clean", "right"), ("corrupted", "wrong")):
                known = getattr(self.data, version)[:, :width]
                places = (known == prompt[:width]).all(1).nonzero()[:, 0]
                if len(places):
                    answer = getattr(self.data, column)[places[0], 0]
                    logits[row, width - 1, answer] += self.strength
                    break
        return logits


def test_a_model_that_answers_right_can_do_the_task_and_one_that_knows_nothing_cannot():
    _, data = draw("ioi")
    able = ability.score(Answerer(data, 2.0), data, batch=5)
    assert (able.accuracy, able.clean, able.corrupted, able.gap) == (1.0, 2.0, -2.0, 4.0)
    ability.require_able(able)
    blind = ability.score(Answerer(data, 0.0), data)
    assert (blind.accuracy, blind.gap, blind.can_do) == (0.0, 0.0, False)
    with pytest.raises(TaskError, match=r"cannot do .* 0% right of 16 \(chance 50%\)"):
        ability.require_able(blind)
    ability.require_able(blind, force=True)
