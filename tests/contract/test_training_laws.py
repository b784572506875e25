"""What training promises for every type that is learnt by gradient steps."""

import pytest
from doubles import planted_store

from saelab import artifacts
from saelab.dictionaries import REGISTRY, create
from saelab.protocols import GradientTrained
from saelab.train.fit import Member, TrainConfig, fit

TRAINED = sorted(name for name, kind in REGISTRY.items() if issubclass(kind, GradientTrained))
CONFIG = TrainConfig(batch=32, tokens=32 * 12, log_every=1, checkpoint_every=0.25, dead_window=64)


class _Stop(Exception):
    pass


def train_in(out, store, name, report=None):
    key = "0" * 64
    dictionary = create(REGISTRY[name].config_class.example())
    with artifacts.open_draft(out, "dictionary", "a", key) as draft:
        fit([Member("a", dictionary, "site", 1e-2, 0, draft)], store, CONFIG, report=report)
        draft.finish(stage="dictionary", name="a", inputs={}, parents=[])
    folder = artifacts.artifact_path(out, "dictionary", "a", key)
    names = ("config.json", "weights.safetensors", "metrics.jsonl")
    return [(folder / name).read_bytes() for name in names]


@pytest.mark.parametrize("name", TRAINED)
def test_an_interrupted_run_of_every_type_ends_with_the_same_bytes(tmp_path, name):
    store, _ = planted_store(n=400, d=8)

    def crash(info):
        if info["step"] == 8:
            raise _Stop

    with pytest.raises(_Stop):
        train_in(tmp_path / "torn", store, name, crash)
    assert train_in(tmp_path / "torn", store, name) == train_in(tmp_path / "whole", store, name)


@pytest.mark.parametrize("name", TRAINED)
def test_a_member_of_every_type_is_the_same_in_a_sweep_and_alone(name):
    store, _ = planted_store(n=400, d=8)
    config = REGISTRY[name].config_class.example()
    members = [Member(str(seed), create(config), "site", 1e-2, seed) for seed in range(2)]
    together, (alone,) = fit(members, store, CONFIG), fit(members[1:], store, CONFIG)
    assert together[1].metrics == alone.metrics
    expected = alone.dictionary.state_dict()
    got = together[1].dictionary.state_dict()
    assert all(got[key].equal(value) for key, value in expected.items())
