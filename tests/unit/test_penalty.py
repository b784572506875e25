"""The weight of a penalty rises, and is steered to a target L0."""

import pytest
import torch
from doubles import planted_store

from saelab.dictionaries import create
from saelab.ops import control
from saelab.protocols import Loss
from saelab.train.fit import Member, TrainConfig, fit

STEERED = [
    {"type": "relu", "form": "april"},
    {"type": "relu", "form": "bricken"},
    {"type": "gated"},
]


def scalar(value):
    return torch.tensor(float(value))


def observed(progress, l0):
    zero = torch.zeros(())
    return Loss(zero, {}, torch.zeros(0).long(), scalar(l0), {"progress": scalar(progress)})


def test_the_ramp_rises_linearly_and_stays():
    rise = [control.ramp(p, until=0.2) for p in (0.0, 0.1, 0.2, 1.0)]
    assert rise == [0, 0.5, 1, 1]
    assert control.ramp(0.0, until=0.0) == 1


def test_the_error_is_a_bounded_log_ratio():
    errors = [float(control.l0_error(scalar(l0), 8.0)) for l0 in (8, 16, 4000, 0)]
    assert errors == pytest.approx([0, 0.6931, control.LARGEST, -control.LARGEST], abs=1e-4)


def test_the_weight_moves_with_the_error_and_the_share_of_the_run():
    moved = control.integrate(scalar(-2), scalar(0.5), scalar(0.01))
    assert float(moved) == pytest.approx(-2 + control.GAIN * 0.005)


def test_the_weight_is_steered_only_after_its_rise_and_only_if_asked():
    config = {"type": "relu", "d_in": 4, "d_sae": 16, "sparsity_weight": 0.2}
    for target, moves in ((4, True), (None, False)):
        d = create(config | ({"target_l0": target} if target else {}))
        for progress in (0.0, 0.1, 0.2):
            d.observe_(observed(progress, 9))
            assert float(d._weight(1.0)) == pytest.approx(0.2)
        d.observe_(observed(0.3, 9))
        assert (float(d._weight(1.0)) > 0.21) == moves


def test_a_second_training_starts_its_clock_again():
    d = create({"type": "relu", "d_in": 4, "d_sae": 16, "target_l0": 4})
    d.observe_(observed(0.9, 4))
    d.observe_(observed(0.3, 8))
    before = float(d.log_weight)
    d.observe_(observed(0.4, 8))
    assert float(d.log_weight) > before == pytest.approx(float(scalar(0.1).log()))


@pytest.mark.parametrize("fields", STEERED, ids=lambda f: "-".join(f.values()))
@pytest.mark.parametrize("target", [5, 50])
def test_the_held_out_l0_comes_within_a_tenth_of_the_target(fields, target):
    store, _ = planted_store(n=24000, d=32, latents=128, active=6)
    d = create(fields | {"d_in": 32, "d_sae": 160, "target_l0": target})
    config = TrainConfig(batch=128, tokens=128 * 250)
    (fitted,) = fit([Member("a", d, "site", 1e-2)], store, config)
    x = torch.cat([batch.x for batch in store.scan("site", batch=512, split="heldout")])
    l0 = (fitted.dictionary.encode(x) != 0).sum(-1).float().mean()
    assert float(l0) == pytest.approx(target, rel=0.1)
