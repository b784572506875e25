"""Members that are built in one pass: they share the sweep, stop when full, and resume exactly."""

from contextlib import ExitStack

import pytest
import torch
from doubles import ArrayStore, planted_store

from saelab import artifacts, dictionaries
from saelab.errors import ArtifactError, ConfigError, DivergedError, ShapeError
from saelab.members import expand
from saelab.train.fit import Member, Sweep, TrainConfig, fit

ITDA = {"type": "itda", "d_in": 16, "d_sae": 60, "k": 3, "threshold": 0.3}
TOPK = {"type": "topk", "d_in": 16, "d_sae": 24, "k": 2}
SHORT = TrainConfig(batch=16, tokens=16 * 30, log_every=4, checkpoint_every=0.1)
FILES = ("config.json", "weights.safetensors", "metrics.jsonl")


def member(name="a", config=ITDA, *, draft=None, lr=None, site="site", **fields):
    return Member(name, dictionaries.create(config | fields), site, lr, 0, draft)


def equal(a, b):
    states = a.dictionary.state_dict(), b.dictionary.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def files_of(out, store, members=("a",), stop_at=None, config=SHORT, **fields):
    """Train members into artifacts as a run does; return the bytes of the first one's files."""

    def crash(info):
        if info["step"] == stop_at:
            raise _Stop

    folder = artifacts.artifact_path(out, "dictionary", "a", "0" * 64)
    with ExitStack() as stack:
        opened = [artifacts.open_draft(out, "dictionary", name, "0" * 64) for name in members]
        first, *others = map(stack.enter_context, opened)
        if first.is_finished:
            return [(folder / name).read_bytes() for name in FILES]
        todo = [member(draft=first, **fields)]
        todo += [member("b", TOPK, draft=other) for other in others]
        fit(todo, store, config, report=crash)
        first.finish(stage="dictionary", name="a", inputs={}, parents=[])
    return [(folder / name).read_bytes() for name in FILES]


class _Stop(Exception):
    pass


@pytest.fixture(scope="module")
def store():
    return planted_store(n=1000)[0]


def test_every_line_says_how_many_tokens_atoms_and_failures_there_were(store):
    (fitted,) = fit([member()], store, SHORT)
    assert [line["step"] for line in fitted.metrics] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert [line["tokens"] for line in fitted.metrics][-2:] == [28 * 16, 30 * 16]
    atoms = [line["atoms"] for line in fitted.metrics]
    assert atoms == sorted(atoms)
    assert atoms[-1] == fitted.dictionary.d_sae < 60
    grown = [new - old for old, new in zip([0, *atoms], atoms, strict=False)]
    rows = [64] * 7 + [32]
    assert [round(n * line["failed"]) for n, line in zip(rows, fitted.metrics, strict=True)] == (
        grown
    )
    assert fitted.metrics[0]["loss"] > fitted.metrics[-1]["loss"] > 0
    assert fitted.facts["tokens_seen"] == 480
    assert not fitted.facts["full"]


def test_a_full_member_takes_no_more_batches_and_the_others_go_on(store):
    small = member(d_sae=12)
    (alone,) = fit([small], store, SHORT)
    beside = fit([member("b", TOPK), small, member("c")], store, SHORT)
    assert equal(beside[1], alone)
    assert alone.metrics == beside[1].metrics
    assert alone.metrics[-1]["step"] < 10
    assert alone.metrics[-1]["tokens"] == alone.facts["tokens_seen"]
    assert alone.facts["full"]
    assert [f.metrics[-1]["step"] for f in beside] == [30, alone.metrics[-1]["step"], 30]
    for one, fitted in zip([member("b", TOPK), member("c")], beside[::2], strict=True):
        assert equal(fit([one], store, SHORT)[0], fitted)


def test_nothing_is_read_once_all_members_are_full(store):
    sweep = Sweep([member(d_sae=12)], store, SHORT)
    while not sweep.is_full:
        sweep.step()
    seconds = sweep.clock.seconds["reading"]
    sweep.step()
    assert sweep.clock.seconds["reading"] == seconds


@pytest.mark.parametrize("stop_at", [4, 8, 12, 20, 28])
def test_an_interrupted_build_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path, store, stop_at):
    expected = files_of(tmp_path / "whole", store)
    with pytest.raises(_Stop):
        files_of(tmp_path / "torn", store, stop_at=stop_at)
    assert files_of(tmp_path / "torn", store) == expected


@pytest.mark.parametrize("stop_at", [4, 12, 28])
def test_a_full_member_resumes_beside_one_that_goes_on(tmp_path, store, stop_at):
    config = SHORT.model_copy(update={"log_every": 1})
    expected = files_of(tmp_path / "whole", store, config=config, d_sae=12)
    with pytest.raises(_Stop):
        files_of(tmp_path / "torn", store, "ab", stop_at, config, d_sae=12)
    assert files_of(tmp_path / "torn", store, "ab", config=config, d_sae=12) == expected


def test_a_crash_at_any_write_is_made_good_by_the_same_call(tmp_path, monkeypatch, store):
    config = TrainConfig(batch=64, tokens=64 * 2, log_every=1, checkpoint_every=0.5)
    expected = files_of(tmp_path / "whole", store, config=config)
    for number in range(200):
        calls = iter(range(10**6))

        def fail(kind, path, calls=calls, number=number):
            if next(calls) == number:
                raise _Stop

        out = tmp_path / str(number)
        monkeypatch.setattr(artifacts, "_syscall", fail)
        try:
            files_of(out, store, config=config)
            break
        except _Stop:
            monkeypatch.undo()
        assert files_of(out, store, config=config) == expected
    assert number > 15


def test_each_atom_knows_its_row_document_position_and_token(store):
    (fitted,) = fit([member()], store, SHORT)
    d = fitted.dictionary
    away = store.rows("site", d.rows) - d.b_dec.detach()
    torch.testing.assert_close(d.W_dec.detach(), torch.nn.functional.normalize(away))
    torch.testing.assert_close(d.b_dec.detach(), store.stats("site").mean.float())
    assert torch.equal(d.documents, d.rows // 16)
    assert torch.equal(d.positions, d.rows % 16)
    assert torch.equal(d.tokens, d.rows)


def test_a_store_that_keeps_no_windows_leaves_positions_open(store, monkeypatch):
    def refuse(*_):
        raise ArtifactError("no windows")

    monkeypatch.setattr(ArrayStore, "window_of", refuse)
    d = fit([member()], store, SHORT)[0].dictionary
    assert set(d.positions.tolist()) == set(d.tokens.tolist()) == {-1}
    assert (d.rows >= 0).all()


def test_a_finished_build_goes_on_from_where_it_ended(store):
    first = fit([member()], store, SHORT)[0].dictionary
    more = TrainConfig(batch=16, tokens=16 * 30, shuffle_seed=5)
    again = Member("a", first, "site", initialised=True)
    grown = fit([again], store, more)[0].dictionary
    assert first.d_sae < grown.d_sae
    assert torch.equal(grown.rows[: first.d_sae], first.rows)
    assert (grown.positions >= 0).all()
    full = fit([Member("a", grown, "site", initialised=True)], store, more)[0]
    assert full.dictionary.d_sae >= grown.d_sae


def test_a_size_is_met_by_default_before_the_run_ends(store):
    config = {k: v for k, v in ITDA.items() if k != "threshold"} | {"d_sae": 20}
    (fitted,) = fit([member(config=config)], store, SHORT)
    assert fitted.dictionary.d_sae == 20
    assert 100 < fitted.facts["tokens_seen"] <= 480


@pytest.fixture
def slow_start(monkeypatch):
    """A clock that stands, but for the five seconds that every beginning takes."""
    time = [0.0]
    kinds = {"itda": "begin_", "topk": "init_", "semi_nmf": "start"}

    def slowly(begin):
        def begun(*given):
            time[0] += 5
            return begin(*given)

        return begun

    for name, method in kinds.items():
        kind = dictionaries.REGISTRY[name]
        monkeypatch.setattr(kind, method, slowly(getattr(kind, method)))
    for module in ("fit", "gradient", "solve", "streaming"):
        monkeypatch.setattr(f"saelab.train.{module}.now", lambda: time[0])


def test_seconds_of_the_beginning_are_kept_apart_and_through_a_crash(tmp_path, store, slow_start):
    neurons = {"type": "semi_nmf", "d_in": 16, "d_sae": 4, "keep": 0.5, "iterations": 6}

    def train(crash_in=None):
        def crash(info):
            if crash_in in info["members"] and info["step"] > 3:
                raise _Stop

        with ExitStack() as stack:
            drafts = [
                stack.enter_context(artifacts.open_draft(tmp_path, "dictionary", name, "0" * 64))
                for name in "abc"
            ]
            wanted = zip("abc", (ITDA | {"d_sae": 12}, TOPK, neurons), drafts, strict=True)
            members = [member(name, config, draft=draft) for name, config, draft in wanted]
            return fit(members, store, SHORT, report=crash)

    for name in "bc":
        with pytest.raises(_Stop):
            train(crash_in=name)
    found = [fitted.provenance for fitted in train()]
    assert [went["init_seconds"] for went in found] == [5, 5, 5]
    assert [went["step_seconds"] for went in found] == [0, 0, 0]
    itda, topk, solved = found
    assert 0 < itda["resumed_at"] == itda["steps_taken"] < topk["steps_taken"] == 30
    assert 0 < solved["resumed_at"] < solved["steps_taken"] == 6


def test_a_learning_rate_is_refused_and_an_axis_of_them_is_not_taken(store):
    with pytest.raises(ConfigError, match="itda takes no gradient steps; drop lr"):
        fit([member(lr=1e-3)], store, SHORT)
    entry = {"type": "itda", "d_sae": 8, "k": 2}
    with pytest.raises(ConfigError, match=r"dictionaries\.0: lr: itda takes no gradient steps"):
        expand([entry | {"lr": 1e-3}], [])
    found = expand([], {"type": ["itda", "topk"], "d_sae": 8, "k": 2, "lr": [1e-3, 1e-2]})
    assert [(m.fields["type"], m.lr) for m in found] == [
        ("itda", None), ("topk", 1e-3), ("topk", 1e-2),
    ]  # fmt: skip


def test_another_width_is_refused(store):
    with pytest.raises(ShapeError, match="a: site 'site' has width 16"):
        fit([member(d_in=8)], store, SHORT)


def test_rows_that_are_not_finite_stop_the_member(store):
    x = store.rows("site", torch.arange(1000)).clone()
    bad = ArrayStore({"site": x})
    bad.stats = store.stats
    x[100] = torch.nan
    with pytest.raises(DivergedError, match=r"a: a row's error is nan at step \d+ of 60"):
        fit([member(d_sae=600)], bad, TrainConfig(batch=16, tokens=16 * 60))
