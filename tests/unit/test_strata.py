"""Parts of prompts have every template, whatever the order that prompts come in."""

import pytest
import torch
from doubles import WordTokenizer

from saelab.circuits.strata import half, portion
from saelab.circuits.tasks import draw


@pytest.mark.parametrize(("n", "size"), [(24, 12), (37, 11), (5, 2), (8, 0), (8, 8)])
def test_a_portion_has_its_size_and_of_each_template_what_is_due(n, size):
    templates = torch.arange(n) % 3
    for seed in range(5):
        chosen = portion(templates, size, seed=seed)
        assert int(chosen.sum()) == size
        for template in range(3):
            mine = templates == template
            due = int(mine.sum()) * size / n
            assert abs(int((chosen & mine).sum()) - due) < 1


def test_halves_of_indirect_objects_have_both_orders_alike():
    data = draw("ioi", WordTokenizer(), 32, seed=0)
    first = half(data.templates, seed=0)
    order = [data.attributes["order"][i] for i in first.nonzero()[:, 0]]
    assert order.count("ABBA") == order.count("BABA") == 8


def test_the_seed_draws_the_part_also_where_every_template_stands_once():
    templates = torch.arange(8)
    drawn = {tuple(half(templates, seed=seed).tolist()) for seed in range(10)}
    assert len(drawn) > 5
    assert torch.equal(half(templates, seed=3), half(templates, seed=3))
