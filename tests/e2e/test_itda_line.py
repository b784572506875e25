"""A member that is built in one pass goes through the whole line beside one that is trained."""

import io
import json
from contextlib import closing

import pytest
import torch
from rich.console import Console

import saelab
from saelab import artifacts, pipeline, planning

ITDA = {"type": "itda", "d_sae": 48, "k": 4, "threshold": 0.1}
FILLED = {"type": "itda", "d_sae": 32, "k": 4, "name": "filled"}


def config(out, **changes):
    data = {
        "name": "toy",
        "model": {"source": "toy", "dtype": "float32"},
        "corpus": {"source": "toy", "context": 32, "tokens": 3000, "holdout": 0.3},
        "harvest": {"sites": ["blocks.1.hook_resid_post"], "dtype": "float32"},
        "dictionaries": [ITDA, FILLED, {"type": "topk", "d_sae": 48, "k": 4}],
        "train": {"batch": 128, "tokens": 1280},
        "evaluate": {"core": {"resamples": 20, "windows": 8, "pursuit_rows": 128}},
        "index": {},
        "out": str(out),
    }
    return data | changes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("itda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(root / "cache"))
        yield root, saelab.run(config(root / "out"))


def paths(steps, stage):
    return [step.path for step in steps if step.stage == stage]


def test_it_is_built_scored_and_indexed_and_found_again(made):
    root, steps = made
    assert len(paths(steps, "features")) == 3
    assert {step.status for step in steps} == {"made"}
    again = saelab.run(config(root / "out"))
    assert {step.status for step in again} == {"found"}


def test_its_rows_of_the_scorecard_and_its_controls_are_there(made):
    for path in paths(made[1], "results")[:2]:
        rows = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
        values = {(row["arm"].split("(")[0], row["name"]): row["value"] for row in rows}
        assert 0 < values["dictionary", "fvu"] < 1
        assert 0 < values["dictionary", "l0"] <= 4
        assert ("random_atoms", "fvu") in values


def test_every_atom_is_the_stores_row_at_its_document_position_and_token(made):
    store = saelab.open_store(paths(made[1], "store")[0].resolve())
    d = saelab.load(paths(made[1], "dictionary")[1])
    assert d.d_sae == len(d.W_dec) == 32
    away = store.rows(store.sites[0], d.rows) - d.b_dec.detach()
    unit = torch.nn.functional.normalize(away)
    torch.testing.assert_close(d.W_dec.detach(), unit, atol=1e-5, rtol=1e-5)
    for row, number, position, token in zip(
        d.rows.tolist(), d.documents.tolist(), d.positions.tolist(), d.tokens.tolist(), strict=True
    ):
        window = store.window(store.sites[0], int(store.window_of(torch.tensor([row]))))
        assert row == window.first_row + position
        assert token == window.ids[position]
        assert number == window.document[position]
        assert window.kept[position]
        assert not window.heldout


def test_the_index_has_a_latent_for_each_atom(made):
    dictionaries = map(saelab.load, paths(made[1], "dictionary"))
    for d, path in zip(dictionaries, paths(made[1], "features"), strict=True):
        with closing(saelab.open_features(path)) as features:
            assert features.n_latents == d.d_sae
        facts = artifacts.read_manifest(path).facts
        assert facts["d_sae"] == d.d_sae


def test_every_atom_opens_on_the_place_that_it_is_from(made):
    store = saelab.open_store(paths(made[1], "store")[0].resolve())
    d = saelab.load(paths(made[1], "dictionary")[1])
    with closing(saelab.open_features(paths(made[1], "features")[1])) as features:
        for latent in range(d.d_sae):
            origin = features.latent(latent).origin
            window = store.window(store.sites[0], origin.window)
            assert window.first_row + origin.position == d.rows[latent]
            assert origin.document == d.documents[latent]
            assert origin.strings == list(window.strings)
            assert origin.value > 0


def test_a_plan_says_what_it_will_take(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    table = planning.plan(pipeline.load_config(config(tmp_path / "out")))
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(table)
    text = console.export_text()
    for line in ("train itda 48", "train itda 32", "evaluate itda 48", "index itda 32"):
        assert line in text
