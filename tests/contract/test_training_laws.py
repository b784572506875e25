"""Every type of the registry that can be trained: company and interruption change no bit."""

import json

import pytest
import torch
from doubles import ArrayStore, planted_store

from saelab import artifacts, dictionaries
from saelab.dictionaries import REGISTRY
from saelab.protocols import GradientTrained, Solved, Streamed
from saelab.train.fit import Member, TrainConfig, fit

CONFIG = TrainConfig(batch=32, tokens=32 * 12, log_every=1, checkpoint_every=0.2, dead_window=64)
RESAMPLED = TrainConfig(
    batch=4, tokens=4 * 12, log_every=1, checkpoint_every=0.2, dead_window=4, resample_every=0.15
)
"""A latent is dead when no row of the last batch had it: resampled after steps 2, 4, 6 and 8."""
CONFIGS = pytest.mark.parametrize("config", [CONFIG, RESAMPLED], ids=["plain", "resampled"])
KINDS = (GradientTrained, Streamed)
TRAINED = sorted(name for name, kind in REGISTRY.items() if issubclass(kind, KINDS))
SOLVED = sorted(name for name, kind in REGISTRY.items() if issubclass(kind, Solved))


@pytest.fixture(autouse=True)
def _few_rows_to_calibrate_on(monkeypatch):
    monkeypatch.setattr("saelab.train.fit.CALIBRATION_ROWS", 1000)


class _Stop(Exception):
    pass


def member(name, seed=0, draft=None):
    config = dictionaries.config_class(name).example()
    lr = 1e-2 if config.has_lr else None
    return Member(name, dictionaries.create(config), "site", lr, seed, draft)


@pytest.fixture(scope="module")
def store() -> ArrayStore:
    x = planted_store(n=300, d=8, latents=12)[0].rows("site", torch.arange(300))
    return ArrayStore({"site": x}, grads={"site": torch.sin(3 * x)})


@CONFIGS
def test_members_of_all_types_in_one_sweep_are_those_of_their_solo_runs(store, config):
    sweep = [member(name, seed) for seed, name in enumerate(TRAINED + SOLVED)]
    for one, fitted in zip(sweep, fit(sweep, store, config), strict=True):
        (alone,) = fit([one], store, config)
        resampled = config is RESAMPLED and isinstance(one.dictionary, GradientTrained)
        assert not resampled or any(line["revived"] for line in alone.metrics)
        assert alone.metrics == fitted.metrics
        theirs = fitted.dictionary.state_dict()
        assert all(torch.equal(theirs[k], v) for k, v in alone.dictionary.state_dict().items())


@CONFIGS
@pytest.mark.parametrize("name", TRAINED + SOLVED)
def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(
    name, config, store, tmp_path
):
    def files(out, stop_at):
        def crash(info):
            if info["step"] == stop_at:
                raise _Stop

        with artifacts.open_draft(out, "dictionary", "a", "0" * 64) as draft:
            fit([member(name, draft=draft)], store, config, report=crash)
            draft.finish(stage="dictionary", name="a", inputs={}, parents=[])
        folder = artifacts.artifact_path(out, "dictionary", "a", "0" * 64)
        names = ("config.json", "weights.safetensors", "metrics.jsonl")
        return [(folder / file).read_bytes() for file in names]

    expected = files(tmp_path / "whole", None)
    assert files(tmp_path / "again", None) == expected
    steps = [json.loads(line)["step"] for line in expected[2].splitlines()]
    for stop_at in (steps[len(steps) // 3], steps[2 * len(steps) // 3]):
        with pytest.raises(_Stop):
            files(tmp_path / "torn", stop_at)
    assert files(tmp_path / "torn", None) == expected
