"""The training loop: what it learns, and that neither company nor interruption changes it."""

import json
import signal
import sys
import types
from dataclasses import replace

import pytest
import torch
from doubles import ArrayStore, planted_store

from saelab import artifacts, dictionaries
from saelab.dictionaries.base import BaseDictionary
from saelab.dictionaries.topk import TopK, TopKConfig
from saelab.errors import ConfigError, DivergedError, Interrupted, NonFiniteError, ShapeError
from saelab.train import checkpoint, schedules
from saelab.train.fit import Member, TrainConfig, fit

TOPK = {"type": "topk", "d_in": 16, "d_sae": 24, "k": 2}
SHORT = TrainConfig(batch=64, tokens=64 * 20, log_every=3, checkpoint_every=0.2)


def member(name="a", *, lr=3e-3, seed=0, site="site", draft=None, **fields):
    return Member(name, dictionaries.create(TOPK | fields), site, lr, seed, draft)


def train_in(out, store, *, config=SHORT, report=None, **fields):
    """Train one member into an artifact under `out`, as a run's stage does; return its folder."""
    key = "0" * 64
    with artifacts.open_draft(out, "dictionary", "a", key) as draft:
        if draft.is_finished:
            return draft.target
        fit([member(draft=draft, **fields)], store, config, report=report)
        draft.finish(stage="dictionary", name="a", inputs={}, parents=[])
    return artifacts.artifact_path(out, "dictionary", "a", key)


def files_of(folder):
    names = ("config.json", "weights.safetensors", "metrics.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


def test_training_recovers_a_planted_dictionary():
    store, directions = planted_store()
    config = TrainConfig(batch=256, tokens=256 * 200)
    (fitted,) = fit([member(lr=1e-2)], store, config)
    cosines = torch.nn.functional.normalize(fitted.dictionary.W_dec.detach(), dim=1) @ directions.T
    assert cosines.max(0).values.mean() > 0.9
    assert fitted.metrics[-1]["fvu"] < 0.05


def test_the_returned_dictionary_takes_raw_activations_and_has_unit_directions():
    store, _ = planted_store()
    big = ArrayStore({"site": store._x["site"] * 100})
    results = [fit([member()], s, SHORT)[0] for s in (store, big)]
    z, z_big = (
        r.dictionary.encode(s.rows("site", torch.arange(50)))
        for r, s in zip(results, (store, big), strict=True)
    )
    torch.testing.assert_close(z_big / 100, z, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(results[0].dictionary.W_dec.norm(dim=1), torch.ones(24))


def test_the_members_own_dictionary_is_left_as_it_was():
    store, _ = planted_store(n=400)
    mine = member()
    before = {k: v.clone() for k, v in mine.dictionary.state_dict().items()}
    fit([mine], store, SHORT)
    assert all(torch.equal(before[k], v) for k, v in mine.dictionary.state_dict().items())


def test_a_members_weights_in_a_sweep_are_those_of_its_solo_run():
    store, _ = planted_store(n=1000)
    store = ArrayStore({"site": store._x["site"], "other": store._x["site"].flip(1) * 3})
    sweep = [
        member("a"),
        member("b", lr=1e-2, seed=1),
        member("c", site="other", k=3),
        member("d", seed=2),
    ]
    together = fit(sweep, store, SHORT)
    for one, fitted in zip(sweep, together, strict=True):
        (alone,) = fit([one], store, SHORT)
        assert alone.metrics == fitted.metrics
        theirs = fitted.dictionary.state_dict()
        assert all(torch.equal(theirs[k], v) for k, v in alone.dictionary.state_dict().items())


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5, 8, 11, 16, 19, 20])
def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path, stop_at):
    store, _ = planted_store(n=1000)
    config = SHORT.model_copy(update={"log_every": 1, "dead_window": 128})
    expected = files_of(train_in(tmp_path / "whole", store, config=config))

    def crash(info):
        if info["step"] == stop_at:
            raise _Stop

    with pytest.raises(_Stop):
        train_in(tmp_path / "torn", store, config=config, report=crash)
    assert files_of(train_in(tmp_path / "torn", store, config=config)) == expected


def test_a_crash_at_any_write_is_made_good_by_the_same_command(tmp_path, monkeypatch):
    store, _ = planted_store(n=400)
    config = TrainConfig(batch=64, tokens=64 * 2, log_every=1, checkpoint_every=0.5)
    expected = files_of(train_in(tmp_path / "whole", store, config=config))
    for number in range(200):
        calls = iter(range(10**6))

        def fail(kind, path, calls=calls, number=number):
            if next(calls) == number:
                raise _Stop

        out = tmp_path / str(number)
        monkeypatch.setattr(artifacts, "_syscall", fail)
        try:
            train_in(out, store, config=config)
            break
        except _Stop:
            monkeypatch.undo()
        assert files_of(train_in(out, store, config=config)) == expected
    assert number > 15


def test_members_of_a_sweep_that_stopped_at_different_steps_go_on_together(tmp_path):
    store, _ = planted_store(n=1000)

    def sweep(out, report=None):
        with (
            artifacts.open_draft(out, "dictionary", "a", "0" * 64) as first,
            artifacts.open_draft(out, "dictionary", "b", "1" * 64) as second,
        ):
            members = [member("a", draft=first), member("b", seed=5, draft=second)]
            return fit(members, store, SHORT, report=report)

    expected = sweep(tmp_path / "whole")

    def crash(info):
        if info["step"] == 12:
            raise _Stop

    with pytest.raises(_Stop):
        sweep(tmp_path / "torn", crash)
    (tmp_path / "torn/dictionary/.b-11111111.partial/scratch/checkpoint.safetensors").unlink()
    resumed = sweep(tmp_path / "torn")
    assert [f.provenance["resumed_at"] for f in resumed] == [8, 0]
    for one, other in zip(expected, resumed, strict=True):
        assert one.metrics == other.metrics
        weights = other.dictionary.state_dict()
        assert all(torch.equal(weights[k], v) for k, v in one.dictionary.state_dict().items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, number):
    store, _ = planted_store(n=400)
    expected = files_of(train_in(tmp_path / "whole", store))

    def ask(info):
        if info["step"] == 6:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"after step 6 of 20.*run the same command to go on"):
        train_in(tmp_path / "torn", store, report=ask)
    assert signal.getsignal(number) == before
    resumed = []
    folder = train_in(tmp_path / "torn", store, report=lambda info: resumed.append(info["step"]))
    assert resumed[0] == 9
    assert files_of(folder) == expected


def test_a_resume_with_other_threads_is_warned_about(tmp_path, monkeypatch, caplog):
    store, _ = planted_store(n=400)

    def crash(info):
        if info["step"] == 12:
            raise _Stop

    with pytest.raises(_Stop):
        train_in(tmp_path, store, report=crash)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    train_in(tmp_path, store)
    assert "→ 77" in caplog.text


def test_an_altered_checkpoint_is_named(tmp_path):
    store, _ = planted_store(n=400)

    def crash(info):
        if info["step"] == 12:
            raise _Stop

    with pytest.raises(_Stop):
        train_in(tmp_path, store, report=crash)
    (file,) = tmp_path.rglob("checkpoint.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(artifacts.ArtifactError, match=r"checkpoint\.safetensors"):
        train_in(tmp_path, store)


def test_going_on_from_a_dictionary_starts_where_it_was():
    store, _ = planted_store(n=1000)
    (first,) = fit([member(lr=1e-2)], store, SHORT)
    again = Member("a", first.dictionary, "site", 1e-9, initialised=True)
    (second,) = fit([again], store, SHORT)
    x = store.rows("site", torch.arange(50))
    torch.testing.assert_close(
        second.dictionary.encode(x), first.dictionary.encode(x), atol=1e-4, rtol=1e-4
    )


def test_metrics_hold_what_happened_and_no_time(tmp_path):
    store, _ = planted_store(n=400)
    folder = train_in(tmp_path, store)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 20]
    assert lines[-1]["tokens"] == 20 * 64
    names = {"step", "tokens", "loss", "fvu", "aux", "l0", "dead", "grad_norm", "lr"}
    assert set(lines[0]) == names
    assert 0 < lines[-1]["l0"] <= 2


def test_latents_that_stay_silent_for_the_window_are_dead_and_auxk_sees_them():
    store, _ = planted_store(n=1000)
    config = SHORT.model_copy(update={"dead_window": 65, "log_every": 1})
    dictionary = dictionaries.create(TOPK | {"k": 1})
    dictionary.init_(store.rows("site", torch.arange(500)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        dictionary.b_enc[:6] = -1e4
    (fitted,) = fit([Member("a", dictionary, "site", initialised=True)], store, config)
    dead = [line["dead"] for line in fitted.metrics]
    assert dead[0] == 0
    assert dead[1] >= 6 / 24
    assert fitted.metrics[1]["aux"] == 0
    assert fitted.metrics[3]["aux"] > 0


def test_a_diverging_member_is_named_with_its_step_and_what_to_try():
    store, _ = planted_store(n=400)
    mine = member("wild")
    with torch.no_grad():
        mine.dictionary.W_dec.fill_(float("nan"))
    mine = Member("wild", mine.dictionary, "site", 1e-3, initialised=True)
    with pytest.raises(NonFiniteError, match=r"wild: the loss became nan at step 1 .* lower lr"):
        fit([mine], store, SHORT)


def wild(name, site="site", draft=None):
    """A member whose loss is NaN from the start."""
    mine = member(name)
    with torch.no_grad():
        mine.dictionary.W_dec.fill_(float("nan"))
    return Member(name, mine.dictionary, site, 1e-3, draft=draft, initialised=True)


class Exploding(TopK):
    """A TopK whose loss overflows halfway through the run."""

    def loss(self, batch, progress, dead):
        loss = super().loss(batch, progress, dead)
        return replace(loss, total=loss.total * (float("inf") if progress >= 0.5 else 1.0))


def test_a_member_that_diverges_leaves_nothing_and_changes_nothing_for_the_others(tmp_path):
    store, _ = planted_store(n=1000)
    store = ArrayStore({"site": store._x["site"], "other": store._x["site"].flip(1)})
    alone = [fit([member(n, seed=s)], store, SHORT)[0] for s, n in enumerate("ab")]
    found = {}
    with artifacts.open_draft(tmp_path, "dictionary", "wild", "0" * 64) as draft:
        late = Member("late", Exploding(TopKConfig.parse(TOPK)), "other", draft=draft)
        members = [wild("early"), member("a"), late, member("b", seed=1)]
        with pytest.raises(DivergedError) as caught:
            fit(members, store, SHORT, done=found.__setitem__)
    assert sorted(found) == [1, 3]
    for one, other in zip(alone, (found[1], found[3]), strict=True):
        assert one.metrics == other.metrics
        weights = other.dictionary.state_dict()
        assert all(torch.equal(weights[k], v) for k, v in one.dictionary.state_dict().items())
    assert list((tmp_path / "dictionary").glob(".wild*.partial")) == []
    assert sorted(caught.value.faults) == [0, 2]
    message = str(caught.value)
    assert "2 of 4 dictionaries diverged; the other 2 are trained" in message
    assert "early: the loss became nan at step 1 of 20 (peak lr 0.001). Try a lower lr" in message
    assert "late: the loss became inf at step 11 of 20" in message


def test_weights_that_overflow_in_the_last_step_are_not_handed_out():
    store, _ = planted_store(n=400)

    class Overflowing(TopK):
        def constrain_(self):
            super().constrain_()
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == SHORT.steps:
                with torch.no_grad():
                    self.W_enc[0, 0] = float("inf")

    mine = Member("a", Overflowing(TopKConfig.parse(TOPK)), "site")
    with pytest.raises(DivergedError, match="largest weight became inf at step 20 of 20"):
        fit([mine], store, SHORT)


def test_a_site_whose_members_all_diverged_is_read_no_further():
    store, _ = planted_store(n=400)
    read = []

    class Counting(ArrayStore):
        def batches(self, site, **how):
            for batch in super().batches(site, **how):
                read.append(site)
                yield batch

    store = Counting({"site": store._x["site"], "other": store._x["site"]})
    with pytest.raises(DivergedError):
        fit([wild("early", "other"), member("a")], store, SHORT)
    assert read.count("other") == 1
    assert read.count("site") == 21


def test_members_of_one_site_share_each_batch_and_the_rows_to_calibrate_on():
    base, _ = planted_store(n=400)
    read = []

    class Counting(ArrayStore):
        def batches(self, site, **how):
            for batch in super().batches(site, **how):
                read.append(site)
                yield batch

    store = Counting({"site": base._x["site"], "other": base._x["site"]})
    kinds = [{"type": "batch_topk", "site": s, "seed": n} for s in store.sites for n in range(3)]
    fit([member(**kind) for kind in kinds], store, SHORT)
    n_calibration = -(-50_000 // SHORT.batch)
    assert read.count("site") == read.count("other") == 1 + SHORT.steps + n_calibration


def test_a_dictionary_of_another_width_is_refused():
    store, _ = planted_store(n=400)
    with pytest.raises(ShapeError, match=r"'site' has width 16.*takes 8"):
        fit([member(d_in=8)], store, SHORT)


class Frozen(BaseDictionary):
    def encode(self, x):
        return x @ self.W_dec.T


def test_a_type_without_a_training_capability_is_refused():
    store, _ = planted_store(n=400)
    with pytest.raises(ConfigError, match="GradientTrained"):
        fit([Member("a", Frozen(TopKConfig.example()), "site")], store, SHORT)


def test_a_run_shorter_than_a_batch_is_refused():
    with pytest.raises(ConfigError, match="less than one batch"):
        TrainConfig.parse({"batch": 100, "tokens": 99})


def test_no_members_train_to_nothing():
    store, _ = planted_store(n=400)
    assert fit([], store, SHORT) == []


def test_reports_tell_speed_remaining_time_and_shares():
    store, _ = planted_store(n=400)
    infos = []
    fit([member()], store, SHORT, report=infos.append)
    assert infos[-1]["step"] == infos[-1]["steps"] == 20
    assert infos[-1]["eta_seconds"] == 0
    assert infos[0]["tokens_per_second"] > 0
    shares = sum(infos[-1][f"share_{w}"] for w in ("reading", "stepping", "logging"))
    assert shares == pytest.approx(1, abs=1e-3)


def test_bfloat16_autocast_trains_float32_weights_to_nearly_the_same():
    store, _ = planted_store(n=1000)
    plain, cast = (
        fit([member()], store, SHORT.model_copy(update={"autocast": a}))[0]
        for a in ("none", "bfloat16")
    )
    assert cast.dictionary.W_dec.dtype == torch.float32
    assert cast.metrics[-1]["loss"] == pytest.approx(plain.metrics[-1]["loss"], rel=0.1)
    assert cast.metrics != plain.metrics


def test_learning_rate_rises_stays_and_falls():
    factor = [
        schedules.lr_factor(p, warmup=0.1, decay=0.2) for p in (0.0, 0.05, 0.1, 0.5, 0.8, 0.9)
    ]
    assert factor == pytest.approx([0, 0.5, 1, 1, 1, 0.5])
    assert schedules.lr_factor(0.0, warmup=0.0, decay=0.0) == 1
    assert schedules.default_lr(4608) == 2e-3
    assert schedules.default_lr(4 * 4608) == 1e-3
    assert TrainConfig(tokens=800_000).window == 80_000
    assert TrainConfig(tokens=10**9).window == 10_000_000


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.modes, self.logged = [], []

    def init(self, *, project, config, mode=None):
        self.modes.append(mode)
        if mode is None:
            raise ConnectionError("no network")
        return self

    def log(self, data, step):
        self.logged.append((step, data))


def test_wandb_without_network_goes_offline_and_gets_every_members_line(monkeypatch, caplog):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    store, _ = planted_store(n=400)
    fit([member("m")], store, SHORT.model_copy(update={"wandb": "proj"}))
    assert fake.modes == [None, "offline"]
    assert fake.logged[-1][0] == 20
    assert "m/loss" in fake.logged[-1][1]
    assert "offline" in caplog.text


def test_wandb_that_is_not_installed_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    store, _ = planted_store(n=400)
    with pytest.raises(ConfigError, match=r"saelab\[wandb\]"):
        fit([member()], store, SHORT.model_copy(update={"wandb": "proj"}))


@pytest.mark.parametrize("note", range(1, 64, 9))
def test_a_checkpoints_tensors_are_aligned_however_long_its_header_is(tmp_path, note):
    tensors = {"a": torch.arange(3.0), "b": torch.arange(5.0)}
    checkpoint.write(tmp_path, tensors, {"step": 1, "note": "x" * note})
    found, _ = checkpoint.read(tmp_path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
