"""Solving beside gradient training: what is read, stopped, resumed and reported."""

import json
import os
import signal

import pytest
import torch
from doubles import ArrayStore, planted_store

from saelab import artifacts
from saelab.dictionaries import create
from saelab.errors import Interrupted, ShapeError
from saelab.protocols import Store
from saelab.train.fit import Member, TrainConfig, fit
from saelab.train.progress import describe
from saelab.train.solve import ScaledSite

TRAIN = TrainConfig(batch=32, tokens=32 * 4, log_every=3, checkpoint_every=0.25)
FIELDS = {"type": "semi_nmf", "d_in": 16, "d_sae": 6, "keep": 0.5, "iterations": 40}
FORMS = pytest.mark.parametrize(
    "fields",
    [{}, {"levels": [6, 4, 2], "iterations": 13}, {"rows": 100, "batch": 24}, {"start": "svd"}],
    ids=["whole", "levels", "minibatches", "svd"],
)
FILES = ("config.json", "weights.safetensors", "metrics.jsonl")


class _Stop(Exception):
    pass


def member(draft=None, seed=0, **fields):
    return Member("m", create(FIELDS | fields), "site", seed=seed, draft=draft)


@pytest.fixture(scope="module")
def store():
    return planted_store(n=400)[0]


def files(out, store, fields, at=None, act=None):
    """Solve into an artifact and return its bytes; act when a line of iteration `at` is there."""

    def report(info):
        if info["step"] == at:
            act()

    with artifacts.open_draft(out, "dictionary", "a", "0" * 64) as draft:
        fit([member(draft, **fields)], store, TRAIN, report=report)
        draft.finish(stage="dictionary", name="a", inputs={}, parents=[])
    folder = artifacts.artifact_path(out, "dictionary", "a", "0" * 64)
    return [(folder / name).read_bytes() for name in FILES]


def crash():
    raise _Stop


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@FORMS
def test_a_crash_anywhere_changes_no_byte(fields, store, tmp_path):
    expected = files(tmp_path / "whole", store, fields)
    for at in (3, 18, 30):
        with pytest.raises(_Stop):
            files(tmp_path / "torn", store, fields, at, crash)
    assert files(tmp_path / "torn", store, fields) == expected


@FORMS
def test_an_interrupt_keeps_the_iteration_and_the_same_call_goes_on(fields, store, tmp_path):
    expected = files(tmp_path / "whole", store, fields)
    with pytest.raises(Interrupted, match=r"after iteration 18 of at most .*same command to go on"):
        files(tmp_path / "torn", store, fields, 18, interrupt)
    assert files(tmp_path / "torn", store, fields) == expected


def test_an_interrupt_without_a_folder_says_that_nothing_was_kept(store):
    with pytest.raises(Interrupted, match="Nothing was kept"):
        fit([member()], store, TRAIN, report=lambda info: interrupt())


def test_lines_hold_fvu_l0_and_the_rows_read_and_come_as_often_as_asked(store, tmp_path):
    *_, text = files(tmp_path, store, {})
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [*range(3, 40, 3), 40]
    n = store.n_kept("site", "train")
    assert [line["tokens"] for line in lines] == [n * line["step"] for line in lines]
    assert all(line["loss"] == line["fvu"] > 0 for line in lines)
    assert all(0 < line["l0"] <= 6 and 0 <= line["dead"] <= 1 for line in lines)


def test_solved_and_stepped_members_are_trained_by_one_call(store):
    topk = create({"type": "topk", "d_in": 16, "d_sae": 24, "k": 2})
    members = [member(seed=1), Member("t", topk, "site"), member(seed=2)]
    order, told = [], []
    found = fit(
        members, store, TRAIN, done=lambda i, _: order.append(i),
        report=lambda info: told.append(describe(info)),
    )  # fmt: skip
    assert order == [1, 0, 2]
    assert [f.dictionary.config.type for f in found] == ["semi_nmf", "topk", "semi_nmf"]
    assert not torch.equal(found[0].dictionary.W_dec, found[2].dictionary.W_dec)
    assert told[-1].startswith("40/40, 0 s left")
    assert found[0].facts["iterations"] == 40
    assert found[0].facts["last_loss"] == found[0].metrics[-1]["loss"]


def test_the_unit_of_the_rows_changes_nothing_but_the_unit_of_the_codes(store):
    x = store.rows("site", torch.arange(400))
    one, other = (
        fit([member()], ArrayStore({"site": s * x}), TRAIN)[0].dictionary for s in (1.0, 8.0)
    )
    torch.testing.assert_close(other.W_dec, one.W_dec, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other.encode(8 * x), 8 * one.encode(x), atol=1e-3, rtol=1e-3)


def test_a_scaled_site_is_a_store_with_one_site(store):
    two = ArrayStore({"other": torch.ones(400, 3), "site": store._x["site"]})
    view = ScaledSite(two, "site", 2.0, torch.device("cpu"))
    assert isinstance(view, Store)
    assert view.sites == ("site",)
    x = torch.cat([b.x for b in view.scan("site", batch=64, split="train")])
    torch.testing.assert_close(view.stats("site").mean, x.double().mean(0))
    spread = (x - x.mean(0)).double().square().sum(1).mean()
    assert view.stats("site").total_variance == pytest.approx(float(spread), rel=1e-5)
    torch.testing.assert_close(view.rows("site", torch.arange(2)), 2 * two._x["site"][:2])
    assert next(view.batches("site", batch=5, seed=0)).x.shape == (5, 16)


def test_a_site_of_another_width_is_refused(store):
    with pytest.raises(ShapeError, match=r"'site' has width 16.*takes 8"):
        fit([member(d_in=8)], store, TRAIN)
