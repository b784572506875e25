"""First-order effects beside exact ones."""

import pytest
import torch
from circuit_tasks import induction, inhibition, random_pairs

from saelab.circuits.effects import agreement
from saelab.circuits.linear import attribution_patching
from saelab.circuits.patching import PatchConfig, patch
from saelab.errors import ConfigError
from saelab.models.handwired import WORDS, induction_model, named


@pytest.mark.parametrize("position", ["all", "end"])
@pytest.mark.parametrize("steps", [1, 4])
def test_where_all_is_linear_attribution_is_the_exact_effect(position, steps):
    model, data = inhibition()
    exact = patch(model, data, PatchConfig(position=position))
    first = attribution_patching(model, data, position=position, steps=steps)
    torch.testing.assert_close(first.changes, exact.changes, atol=1e-5, rtol=1e-5)
    assert agreement(first, exact)["largest_error"] < 1e-6


def test_the_effects_of_all_parts_of_a_linear_model_sum_to_one():
    model, data = inhibition()
    assert float(attribution_patching(model, data).effect().sum()) == pytest.approx(1.0, abs=1e-6)


def test_no_gradient_passes_through_attention_that_is_saturated_and_some_does_otherwise():
    model, data = induction(sharpness=1e3)
    assert attribution_patching(model, data).effect().tolist() == [0, 0, 1, 0]
    model, data = induction(sharpness=5.0)
    exact, first = patch(model, data, PatchConfig()), attribution_patching(model, data)
    assert bool((first.effect()[[0, 2]] > 0.01).all())
    assert bool((first.effect()[[1, 3]] == 0).all())
    assert agreement(first, exact)["spearman"] > 0.7


def test_a_hand_wired_models_name_may_say_how_sharply_it_attends():
    for name, sharpness in (("", 1e3), (":sharpness=5", 5.0), (":sharpness=2.5", 2.5)):
        made = induction_model(WORDS, sharpness=sharpness)
        assert named(f"handwired:induction{name}").fingerprint == made.fingerprint
    with pytest.raises(ConfigError, match=r":sharpness=5.*'handwired:other' came"):
        named("handwired:other")


def test_integrated_gradients_are_nearer_to_the_exact_effect_of_a_soft_head():
    model, data = induction(sharpness=5.0)
    exact = patch(model, data, PatchConfig()).effect()[0]
    first, integrated = (
        attribution_patching(model, data, steps=steps).effect()[0] for steps in (1, 16)
    )
    assert abs(integrated - exact) < abs(first - exact)


def test_a_small_change_has_its_first_order_effect(toy_model):
    """Halving the change of one head's output halves the error twice."""
    data = random_pairs(toy_model)
    rows = data.rows(torch.tensor([1, 3]))
    site = "blocks.1.attn.hook_z"
    clean, other = (
        toy_model.capture(tokens, [site])[site] for tokens in (rows.clean, rows.corrupted)
    )
    first = attribution_patching(toy_model, data).changes[[1, 3], 4:].sum(1)

    def error(share):
        moved = clean + share * (other - clean)
        after = rows.measure(rows.at_end(toy_model.logits(rows.clean, {site: lambda _: moved})))
        before = rows.measure(rows.at_end(toy_model.logits(rows.clean)))
        return float(((before - after) / share - first).abs().mean())

    assert error(0.05) == pytest.approx(error(0.1) / 2, rel=0.3)
