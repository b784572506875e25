"""Edits beside each other in one batch do what each does alone."""

import pytest
import torch

from saelab.edits import Directions, Handle, add, steer
from saelab.edits.placement import encode_prompts
from saelab.errors import ConfigError
from saelab.steering.beside import Beside, continuations_beside
from saelab.steering.sweep import continuations, seeds_of

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
PROMPTS = ["the people can of", "they will", "it"]


@pytest.fixture
def edits():
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    first, second = (Handle(Directions(rows), site) for site in SITES)
    return [
        [add(first, 0, 3.0)],
        [],
        [add(first, 1, 2.0, where="prompt"), add(second, 2, 2.0, where="after")],
    ]


def test_rows_beside_each_other_equal_each_alone(toy_model, edits):
    tokens, lengths = encode_prompts(toy_model, PROMPTS)
    beside = Beside(toy_model, edits, 3 * [len(PROMPTS)])
    assert beside.sites == SITES
    with toy_model.steered(beside):
        both = toy_model.logits(tokens.repeat(3, 1), lengths=lengths.repeat(3))
    for own, part in zip(edits, both.split(len(PROMPTS)), strict=True):
        with steer(toy_model, *own):
            alone = toy_model.logits(tokens, lengths=lengths)
        for row, other, n in zip(part, alone, lengths, strict=True):
            torch.testing.assert_close(row[:n], other[:n], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_rows", [3, 7, 100])
def test_what_is_written_beside_each_other_is_written_alone(
    toy_model, edits, max_rows, temperature
):
    prompts = [PROMPTS, PROMPTS[:1], PROMPTS[1:]]
    writing = {"max_new_tokens": 4, "temperature": temperature, "seed": 5}
    found = continuations_beside(toy_model, prompts, edits, max_rows=max_rows, **writing)
    assert found == [
        continuations(toy_model, given, own, batch=2, **writing)
        for given, own in zip(prompts, edits, strict=True)
    ]
    assert found[0].texts[0] != found[1].texts[0]
    assert continuations_beside(toy_model, [], []) == []


def test_each_list_of_edits_is_checked(toy_model, edits):
    wrong = [add(edits[0][0].handle, 7, 1.0)]
    with pytest.raises(ConfigError, match="has 3 latents"):
        Beside(toy_model, [edits[0], wrong], [2, 2])


def test_a_prompt_is_drawn_alike_wherever_it_stands_and_each_time_anew(toy_model):
    seeds = seeds_of(["a", "b", "a"], 3)
    assert len(set(seeds)) == 3
    assert seeds_of(["b", "a", "a"], 3) == [seeds[1], seeds[0], seeds[2]]
    assert seeds_of(["a"], 4) != seeds[:1]
    writing = {"max_new_tokens": 6, "temperature": 1.0}
    both = continuations(toy_model, ["it", *PROMPTS, "it"], **writing).texts
    assert both[:4] == continuations(toy_model, ["it", *PROMPTS], **writing).texts
    assert both[0] != both[-1]
