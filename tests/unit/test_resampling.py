"""Dead latents come back in training, if it is asked for."""

import pytest
import torch
from doubles import planted_store

from saelab import artifacts, dictionaries
from saelab.dictionaries.topk import TopK, TopKConfig
from saelab.errors import ConfigError, DivergedError
from saelab.protocols import GradientTrained
from saelab.train import resample
from saelab.train.fit import Member, Sweep, TrainConfig, fit
from saelab.types import Batch

TOPK = {"type": "topk", "d_in": 16, "d_sae": 24, "k": 2}
SHORT = TrainConfig(batch=64, tokens=64 * 20, log_every=1, dead_window=64, resample_every=0.2)
KILLED = 12


def half_dead(store, **fields):
    """A member whose first latents never fire, whatever the row."""
    dictionary = dictionaries.create(TOPK | fields)
    dictionary.init_(store.rows("site", torch.arange(500)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        dictionary.b_enc[:KILLED] = -1e4
    return Member("a", dictionary, "site", 1e-2, initialised=True)


def test_latents_that_auxk_cannot_reach_come_back_in_a_planted_world_and_explain_it():
    store, _ = planted_store()
    config = TrainConfig(batch=256, tokens=256 * 200)
    dead, resampled = (
        fit([half_dead(store)], store, config.model_copy(update={"resample_every": every}))[0]
        for every in (None, 0.2)
    )
    rows = store.rows("site", torch.arange(2000))
    alive = [(f.dictionary.encode(rows) != 0).any(0)[:KILLED].sum() for f in (dead, resampled)]
    assert alive[0] == 0
    assert alive[1] > KILLED / 2
    assert dead.metrics[-1]["dead"] == 0.5
    assert resampled.metrics[-1]["dead"] < 0.2
    assert resampled.metrics[-1]["fvu"] < 0.5 * dead.metrics[-1]["fvu"]


def test_all_dead_latents_and_only_they_are_pointed_at_rows_of_the_batch():
    store, _ = planted_store(n=1000)
    sweep = Sweep([half_dead(store)], store, SHORT)
    given = []

    def note(ids, rows):
        given.append((ids, rows, sweep.active[0].silent.clone()))

    sweep.active[0].dictionary.revive_ = note
    for _ in range(4):
        sweep.step()
    ((ids, rows, silent),) = given
    assert ids.tolist() == (silent >= 64).nonzero()[:, 0].tolist()
    assert set(range(KILLED)) <= set(ids.tolist())
    batches = store.batches("site", batch=64, seed=0)
    fourth = [next(batches).x for _ in range(4)][-1] * sweep.active[0].scale
    assert len(rows.unique(dim=0)) == len(ids)
    assert ((fourth[:, None] == rows).all(2).any(0)).all()
    assert not sweep.active[0].silent[ids].any()


def test_moments_of_parameters_without_a_row_per_latent_are_kept_also_where_widths_agree():
    store, _ = planted_store(n=1000, d=24)
    trainer = Sweep([half_dead(store, d_in=24)], store, SHORT)
    trainer.step()
    trainer = trainer.active[0]
    before = trainer.optimizer.state[trainer.dictionary.b_dec]["exp_avg"].clone()
    resample.forget_moments_(trainer.optimizer, trainer.dictionary, torch.arange(24))
    assert torch.equal(trainer.optimizer.state[trainer.dictionary.b_dec]["exp_avg"], before)
    assert not trainer.optimizer.state[trainer.dictionary.b_enc]["exp_avg_sq"].any()


def test_rows_are_drawn_in_proportion_to_their_errors():
    generator = torch.Generator().manual_seed(0)
    errors = torch.tensor([1.0, 0.0, 3.0, 6.0])
    drawn = torch.cat([resample.draw_rows(errors, 1, generator) for _ in range(4000)])
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, errors / 10, atol=0.025, rtol=0)  # three standard errors


def test_no_row_is_drawn_twice_and_none_that_is_reconstructed_perfectly():
    generator = torch.Generator().manual_seed(0)
    errors = torch.tensor([0.0, 1.0, 1e-9, 1e6])
    for wanted in (3, 4, 50):
        assert sorted(resample.draw_rows(errors, wanted, generator).tolist()) == [1, 2, 3]
    assert len(resample.draw_rows(torch.zeros(4), 2, generator)) == 0


@pytest.mark.parametrize(
    "name", ["topk", "abs_topk", "batch_topk", "mutual_choice", "relu", "jump_relu",
             "matching_pursuit"]
)  # fmt: skip
def test_errors_of_rows_are_those_of_the_codes_that_training_makes(name):
    generator = torch.Generator().manual_seed(1)
    dictionary = dictionaries.create(dictionaries.config_class(name).example())
    x = torch.randn(200, 8, generator=generator)
    dictionary.init_(x, generator)
    number = torch.arange(200)
    batch = Batch(x, x, number, number)
    before = {key: value.clone() for key, value in dictionary.state_dict().items()}
    errors = resample.row_errors(dictionary, batch)
    fvu = dictionary.loss(batch, 0.0, torch.zeros(24).bool()).terms["fvu"]
    torch.testing.assert_close(errors.mean() / dictionary.variance, fvu, atol=1e-3, rtol=1e-3)
    after = dictionary.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_log_tells_the_share_revived_and_nothing_is_revived_while_the_rate_falls():
    store, _ = planted_store(n=1000)
    (fitted,) = fit([half_dead(store)], store, SHORT)
    steps = [line["step"] for line in fitted.metrics if line["revived"]]
    assert steps
    assert set(steps) <= {4, 8, 12}
    first = fitted.metrics[3]
    assert first["revived"] >= KILLED / 24
    assert first["dead"] == 0
    assert not [s for s in range(1, 21) if SHORT.resamples_after(s) and s not in (4, 8, 12)]
    (silent,) = fit(
        [half_dead(store)], store, SHORT.model_copy(update={"resample_every": None})
    )  # fmt: skip
    assert "revived" not in silent.metrics[0]


def test_what_was_revived_between_two_lines_of_the_log_survives_an_interruption(tmp_path):
    store, _ = planted_store(n=1000)
    config = SHORT.model_copy(update={"log_every": 3, "checkpoint_every": 0.2})

    class Stopped(Exception):
        pass

    def files(out, stop_at=None):
        def crash(info):
            if info["step"] == stop_at:
                raise Stopped

        with artifacts.open_draft(out, "dictionary", "a", "0" * 64) as draft:
            start = half_dead(store).dictionary
            member = Member("a", start, "site", 1e-2, draft=draft, initialised=True)
            fit([member], store, config, report=crash)
            draft.finish(stage="dictionary", name="a", inputs={}, parents=[])
        folder = artifacts.artifact_path(out, "dictionary", "a", "0" * 64)
        return [(folder / f).read_bytes() for f in ("weights.safetensors", "metrics.jsonl")]

    expected = files(tmp_path / "whole")
    assert b'"revived":0.' in expected[1]
    with pytest.raises(Stopped):
        files(tmp_path / "torn", stop_at=6)  # on a checkpoint of step 4, where it was revived
    assert files(tmp_path / "torn") == expected


def test_perfect_reconstruction_revives_nothing():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    x /= x.norm(dim=1).mean() / 2
    dictionary = TopK(TopKConfig.parse({"type": "topk", "d_in": 4, "d_sae": 6, "k": 4}))
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.eye(6, 4))
        dictionary.W_enc.copy_(torch.eye(6, 4))
    number = torch.arange(200)
    errors = resample.row_errors(dictionary, Batch(x, x, number, number))
    assert not resample.draw_rows(errors, 2, torch.Generator()).numel()


def test_a_member_that_overflows_in_a_step_is_stopped_before_its_latents_are_resampled():
    store, _ = planted_store(n=400)

    class Overflowing(TopK):
        def constrain_(self):
            super().constrain_()
            with torch.no_grad():
                self.W_enc[0, 0] = float("inf")

    fields = {"batch": 8, "tokens": 8 * 20, "resample_every": 0.05, "dead_window": 1}
    config = TrainConfig.parse(fields)
    mine = Member("a", Overflowing(TopKConfig.parse(TOPK | {"k": 1})), "site")
    with pytest.raises(DivergedError, match="largest weight became inf"):
        fit([mine], store, config)


class WithoutRule(TopK):
    revive_ = GradientTrained.revive_


def test_a_type_without_a_rule_is_refused_by_name_before_the_first_step():
    store, _ = planted_store(n=400)
    mine = Member("mine", WithoutRule(TopKConfig.parse(TOPK)), "site")
    with pytest.raises(ConfigError, match=r"mine: train\.resample_every .* WithoutRule has no"):
        fit([mine], store, SHORT)


@pytest.mark.parametrize("fields", [{"resample_every": 0.7}, {"resample_every": 1, "decay": 0}])
def test_a_resampling_that_would_never_come_is_refused(fields):
    with pytest.raises(ConfigError, match=r"resample_every=.* comes to nothing"):
        TrainConfig.parse({"batch": 10, "tokens": 1000} | fields)


def test_the_option_left_out_changes_no_stage_key():
    plain = TrainConfig(tokens=4096)
    assert set(plain.key_fields()) == {
        "batch", "tokens", "shuffle_seed", "clip", "warmup", "decay", "betas", "dead_window",
        "log_every", "autocast",
    }  # fmt: skip
    resampled = plain.model_copy(update={"resample_every": 0.1})
    assert resampled.key_fields() == plain.key_fields() | {"resample_every": 0.1}
