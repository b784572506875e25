"""Types at one L0: interpolation, seeds, controls, figures."""

import math
import sys

import pytest
import torch
from fabricated import member, row, scores, store
from saelab_experiments import curves, labelled, plots
from saelab_experiments.lines import Line, Point, Score, at, controls, lead, lines_of, weights

from saelab import artifacts, pipeline
from saelab.errors import ArtifactError, ConfigError, SaelabError


def point(budget, l0, fvu, error=0.0, seed=0):
    return Point(budget, seed, l0, {"fvu": Score(fvu, error)})


# ---------------------------------------------------------------------------------- interpolation


def test_half_way_between_16_and_64_is_32():
    found = at(Line("a", [point(16, 16, 0.4, 0.02), point(64, 64, 0.2, 0.01)]), "fvu", 32)
    assert found.value == pytest.approx(0.3)
    assert found.error == pytest.approx(0.015)
    assert (found.spread, found.n_seeds, found.inside) == (None, 1, True)


def test_interpolation_uses_the_measured_l0_and_only_the_neighbours():
    line = Line("a", [point(16, 20, 0.5), point(32, 40, 0.3), point(64, 80, 9.0)])
    share = math.log(32 / 20) / math.log(2)
    assert at(line, "fvu", 32).value == pytest.approx(0.5 - 0.2 * share)
    assert weights([20, 40, 80], 32)[0] == pytest.approx({0: 1 - share, 1: share})


def test_a_measured_l0_is_taken_as_it_is():
    line = Line("a", [point(16, 16, 0.4), point(32, 32, 0.25), point(64, 64, 0.2)])
    assert at(line, "fvu", 32).value == 0.25
    assert at(Line("b", [point(32, 32, 0.25)]), "fvu", 32).inside


@pytest.mark.parametrize(("l0", "value"), [(8, 0.4), (100, 0.2)])
def test_outside_the_measured_range_the_nearest_point_stands_and_is_marked(l0, value):
    found = at(Line("a", [point(16, 16, 0.4), point(64, 64, 0.2)]), "fvu", l0)
    assert (found.value, found.inside) == (value, False)
    assert str(found).endswith("†")


def test_a_metric_that_was_not_measured_and_a_silent_dictionary_give_no_value():
    assert at(Line("a", [point(16, 16, 0.4)]), "kl", 16) is None
    assert at(Line("a", [point(16, 0, 1.0)]), "fvu", 16) is None


# ------------------------------------------------------------------------------------------ seeds


def test_seeds_at_one_budget_lean_on_the_curve_of_the_seed_that_has_one():
    line = Line(
        "a",
        [point(16, 16, 0.4), point(64, 64, 0.2, 0.03)]
        + [point(32, 30, 0.30 + 0.01 * seed, 0.02, seed) for seed in (0, 1, 2)],
    )
    share = math.log(32 / 30) / math.log(64 / 30)
    values = [(1 - share) * (0.30 + 0.01 * seed) + share * 0.2 for seed in (0, 1, 2)]
    found = at(line, "fvu", 32)
    assert found.value == pytest.approx(sum(values) / 3)
    assert found.spread == pytest.approx(0.01 * (1 - share))
    assert found.error == pytest.approx((1 - share) * 0.02 + share * 0.03)
    assert (found.n_seeds, found.inside) == (3, True)
    assert "; seeds 0.0091" in str(found)


def test_a_seed_far_from_the_l0_does_not_count():
    line = Line("a", [point(16, 16, 0.4), point(32, 32, 0.3), point(64, 64, 0.1, 0.0, 1)])
    found = at(line, "fvu", 32)
    assert (found.value, found.n_seeds, found.spread) == (0.3, 1, None)


def test_an_error_that_is_not_known_somewhere_is_not_known():
    line = Line("a", [point(16, 16, 0.4, None), point(64, 64, 0.2)])
    assert at(line, "fvu", 32).error is None


# -------------------------------------------------------------------------------------- resamples


def drawn(budget, l0, fvu, noise, seed=0):
    return Point(budget, seed, l0, {"fvu": Score(fvu, 9.9, fvu + noise)})


def test_the_error_of_an_interpolated_value_is_that_of_its_resamples():
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    line = Line("a", [drawn(16, 16, 0.4, noise), drawn(64, 64, 0.2, -noise)])
    assert at(line, "fvu", 16).error == pytest.approx(float(noise.std()))
    assert at(line, "fvu", 32).error == pytest.approx(0, abs=1e-12)  # half of each


def test_a_lead_is_paired_by_documents():
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = (Line(name, [drawn(32, 32, fvu, noise)]) for name, fvu in (("a", 0.3), ("b", 0.2)))
    found = lead(a, b, "fvu", 32)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert lead(a, Line("c", [point(32, 32, 0.2)]), "fvu", 32) is None


def test_a_lead_over_seeds_is_as_wide_as_the_seeds_differ():
    none = torch.zeros(2000, dtype=torch.float64)
    a = Line("a", [drawn(32, 32, 0.3 + 0.1 * seed, none, seed) for seed in range(3)])
    b = Line("b", [drawn(32, 32, 0.2, none, seed) for seed in range(1, 4)])
    found = lead(a, b, "fvu", 32)  # seeds 1 and 2 are common: .2 and .3
    assert found.value == pytest.approx(0.25)
    assert (found.low, found.high) == (pytest.approx(0.2), pytest.approx(0.3))
    assert found.standard_error == pytest.approx(0.05 / 2**0.5, rel=0.05)


# ----------------------------------------------------------------------------------------- a folder


def arms(l0, k, size):
    """Controls of a member whose numbers tell where they came from."""
    return [
        row("l0", l0 - 2, arm="re-encoded"), row("fvu", 0.1 * size, 0.01, arm="re-encoded"),
        row("l0", l0 - 1, arm="random_atoms(n=64)"),
        row("fvu", 10 / (l0 - 1), 0.01, arm="random_atoms(n=64)"),
        row("l0", k, arm=f"pca(k={k})"), row("fvu", 0.5 + k / 1000, arm=f"pca(k={k})"),
        row("fvu", 0.77, 0.01, arm="token_mean"),
        row("kl", size, 0.1, arm="random_error(isotropic)"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A better and a worse type: curves at 16, 32, 64, three seeds at 32, and a wider TopK."""
    out = tmp_path_factory.mktemp("run")
    kept = store(out)
    for name, size in (("topk", 2.0), ("gated", 1.0)):
        for k in (16, 32, 64):
            for seed in range(3 if k == 32 else 1):
                rows = scores(k + 1, size * 4 / k + seed / 100, kl=size / k, dead_share=0.5)
                budget = {"k": k} if name == "topk" else {"k": None, "target_l0": float(k)}
                rows += arms(k + 1, k, size)
                if name == "topk":
                    rows.append(row("kl", size / k / 2, 0.01, arm="gradient_sampled"))
                member(out, kept, f"{name}-{k}", rows, seed=seed, type=name, **budget)
    half = {"resumed_at": 50, "step_seconds": 5.0}
    member(out, kept, "wide", scores(31.5, 0.2), d_sae=128, run=half)
    return out


@pytest.fixture(scope="module")
def board(run):
    return curves.read(run)[0]


def test_members_fall_into_lines_by_what_is_not_budget_or_seed(board):
    lines = {line.label: line for line in lines_of(board)}
    assert list(lines) == ["gated", "topk, d_sae 128", "topk, d_sae 64"]
    assert [(p.budget, p.seed) for p in lines["gated"].points] == [
        (16, 0), (32, 0), (32, 1), (32, 2), (64, 0),
    ]  # fmt: skip


def test_seconds_are_of_all_steps_even_if_the_run_was_resumed_half_way(board):
    seconds = {line.label: line.points[0].seconds for line in lines_of(board)}
    assert seconds == {"gated": 5.0, "topk, d_sae 64": 5.0, "topk, d_sae 128": 10.0}


def test_seconds_scale_by_the_steps_that_were_taken_and_hold_the_beginning(tmp_path):
    kept = store(tmp_path)
    went = {"resumed_at": 6, "steps_taken": 8, "init_seconds": 2.0, "step_seconds": 1.0}
    member(tmp_path, kept, "full", scores(31.5, 0.3), run=went)
    older = went | {"init_seconds": None}
    member(tmp_path, kept, "older", scores(31.5, 0.3), seed=1, run=older)
    ended = went | {"resumed_at": 8, "step_seconds": 0.0}
    member(tmp_path, kept, "ended", scores(31.5, 0.3), seed=2, run=ended)
    [line] = lines_of(curves.read(tmp_path)[0])
    assert [(p.init_seconds, p.seconds) for p in line.points] == [(2, 6), (None, 4), (2, None)]


def test_two_members_at_one_place_and_a_missing_dictionary_are_refused(tmp_path):
    kept = store(tmp_path)
    path = member(tmp_path, kept, "a", scores(32, 0.1))
    member(tmp_path, kept, "b", scores(32, 0.2))
    with pytest.raises(ConfigError, match="a and b have the same type"):
        lines_of(curves.read(tmp_path)[0])
    (path / artifacts.MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="its dictionary is not in this folder"):
        lines_of(curves.read(tmp_path)[0])
    with pytest.raises(ArtifactError, match="FVU and L0"):
        curves.read(tmp_path / "dictionary")


def test_controls_stand_at_the_l0_asked_for_or_where_they_have_none(board):
    found = {line.label: line for line in controls(board, lines_of(board), 32)}
    assert list(found) == [
        "pca(k=32)",
        "random_atoms(n=64)",
        "token_mean",
        "re-encoded: best of all, gated",
        "random_error(isotropic), as large as the error of gated",
        "topk, d_sae 64 told a gradient: gradient_sampled",
    ]
    assert at(found["pca(k=32)"], "fvu", 32).value == pytest.approx(0.532)
    assert at(found["random_atoms(n=64)"], "fvu", 32).value == pytest.approx(10 / 32)
    assert at(found["token_mean"], "fvu", found["token_mean"].points[0].l0).value == 0.77
    assert at(found["re-encoded: best of all, gated"], "fvu", 32).value == pytest.approx(0.1)
    assert at(found[list(found)[4]], "kl", 32).value == pytest.approx(1.0)
    told = found["topk, d_sae 64 told a gradient: gradient_sampled"]
    assert {p.l0 for p in told.points} == {17, 33, 65}


def test_the_table_has_a_line_per_type_by_fvu_and_then_the_controls(board):
    head, _, *rows = curves.at_table(board, 32)
    names = [line.split("|")[1].strip(" *") for line in rows]
    assert names[:4] == ["gated", "topk, d_sae 128", "topk, d_sae 64", "pca(k=32)"]
    assert "L0 at budget 32 | seconds" in head
    gated, wide = rows[0].split(" | "), rows[1].split(" | ")
    share = math.log(32 / 17) / math.log(33 / 17)
    value = (1 - share) * 0.25 + share * 0.135
    assert gated[1] == "3"
    assert gated[2] == f"{value:.3f} ± 0.010; seeds {0.01 * share:.2g}"
    assert gated[5:7] == ["", ""]  # no resamples were kept
    assert gated[7] == "33; seeds 0"
    assert wide[2] == "0.200 ± 0.010 †"
    assert wide[-1] == "10 |"


def test_every_member_is_listed_as_it_was_measured(board):
    rows = curves.member_table(board)[2:]
    assert len(rows) == 11
    assert rows[0] == "| gated | 16 | 0 | 17 | 0.250 ± 0.010 | 0.0625 | 0.5 | 5 |"


# ---------------------------------------------------------------------------------------- figures


def test_figures_are_the_same_bytes_each_time_and_name_every_line(run, tmp_path):
    said: list[str] = []
    for name in ("one", "two"):
        folder = tmp_path / name
        curves.main(
            [str(run), "--output", f"{folder}/docs/f.md", "--figure", f"{folder}/art/f"],
            said.append,
        )
    first, second = (
        (tmp_path / name / "art" / "f-10-resid_post.svg").read_bytes() for name in ("one", "two")
    )
    assert first == second
    assert b"<dc:date>" not in first
    page = (tmp_path / "one" / "docs" / "f.md").read_text()
    assert page == (tmp_path / "two" / "docs" / "f.md").read_text()
    assert "](../art/f-10-resid_post.svg)" in page
    assert said == [f"wrote {tmp_path / name / 'docs' / 'f.md'}\n" for name in ("one", "two")]


def test_without_matplotlib_one_error_says_what_to_install(board, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SaelabError, match=r"saelab\[plots\]"):
        plots.figure(board, 32)


def test_a_real_run_has_lines_seconds_of_each_member_and_a_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    config = {
        "name": "small",
        "synthetic": {"kind": "bidirectional", "n_features": 6, "d": 8, "l0": 1, "n_rows": 2000},
        "grid": {"type": ["topk", "abs_topk"], "d_sae": 12, "k": [1, 2, 4]},
        "train": {"batch": 100, "tokens": 2000},
        "evaluate": {"evals": ["core"], "core": {"resamples": 20, "pursuit_rows": 64}},
        "out": str(tmp_path / "out"),
    }
    steps = pipeline.run(config, until="evaluate")
    made = [artifacts.read_json(s.path / "run.json") for s in steps if s.stage == "dictionary"]
    assert all(run["step_seconds"] > 0 for run in made)
    assert sum(run["step_seconds"] for run in made) <= made[0]["train_seconds"]
    said: list[str] = []
    curves.main(
        [str(tmp_path / "out"), "--l0", "1.5", "--figure", str(tmp_path / "f")], said.append
    )
    text = "".join(said)
    assert "| **abs_topk** | 1 |" in text
    assert "| random_atoms(n=12) |" in text
    assert "†" not in text.split("### Every member")[0].split("**topk**")[1].splitlines()[0]
    assert (tmp_path / "f-synthetic.svg").stat().st_size > 1000


def test_codes_that_are_not_k_sparse_have_a_block_of_their_own(tmp_path):
    kept = store(tmp_path)
    for k in (16, 64):
        member(tmp_path, kept, f"topk-{k}", scores(k, 4 / k), k=k)
    member(tmp_path, kept, "snmf", scores(32, 0.01), type="semi_nmf", k=None)
    [board] = curves.read(tmp_path)
    text = curves.page([board], 32, [], "made")
    table, apart = text.split("### Codes that are not k-sparse")
    assert "semi_nmf" not in table
    assert "− best" in table
    assert "| **semi_nmf** | 1 | 0.010 ± 0.010 |" in apart.split("### Every member")[0]
    assert "− best" not in apart
    [only] = curves.read(tmp_path)
    alone = curves.page([[s for s in only if s.type == "semi_nmf"]], 32, [], "made")
    assert "− best |" not in alone


def test_tables_of_labels_mark_members_that_are_not_k_sparse_and_put_them_last(tmp_path):
    kept = store(tmp_path)
    found = [row("concept_auc[max]", 0.7, 0.1, evaluator="concepts")]
    member(tmp_path, kept, "a", found, type="semi_nmf", k=None)
    member(tmp_path, kept, "b", found)
    lines = labelled.page([tmp_path], "topk").splitlines()
    rows = [line for line in lines if line.startswith("| **")]
    assert [line.split(" | ")[0] for line in rows] == ["| **b**", "| **a**, not k-sparse"]
