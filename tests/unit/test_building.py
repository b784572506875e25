"""The table of dictionaries built from activations: which rows it has, and what stands in them."""

import re

import pytest
from fabricated import member, row, scores, store
from saelab_experiments import building

from saelab import leaderboard, pipeline
from saelab.errors import ArtifactError


def of(l0, fvu, pursued=None):
    found = scores(l0, fvu)
    if pursued is not None:
        found += [row("fvu", pursued, 0.01, "re-encoded"), row("l0", l0, 0.0, "re-encoded")]
    return found


def board(tmp_path):
    kept = store(tmp_path)
    went = {"resumed_at": 0, "steps_taken": 100, "init_seconds": 3.0, "step_seconds": 5.0}
    member(tmp_path, kept, "a", of(30, 0.4, 0.4), type="itda", k=32, center=True, run=went)
    member(tmp_path, kept, "b", of(40, 0.2, 0.2), type="itda", k=40, center=True)
    member(tmp_path, kept, "c", of(32, 0.5, 0.3), type="topk", k=32)
    [found] = leaderboard.boards(leaderboard.scored(tmp_path), "fvu")
    return found


def test_a_type_with_an_encoder_has_a_second_row_with_pursuit_and_one_without_has_not(tmp_path):
    rows = building.rows_of(board(tmp_path), 32)
    assert [row.label for row in rows] == ["itda", "topk", "topk, decoder with pursuit"]
    assert [row.pursued for row in rows] == [False, False, True]
    assert rows[0].member.name == "a"  # 30 is nearer to 32 than 40 is


def test_seconds_with_harvest_count_different_tokens_once(tmp_path):
    rows = building.rows_of(board(tmp_path), 32)
    _, _, itda, topk, pursued = building.table(rows, 32, 600, 0.01, [1.0, 2.0, 3.0])
    assert "| 1,000 | 600 |" in itda
    assert itda.endswith("| 3.0 | 8.0 | 14.0 | 1.0 |")
    assert topk.endswith("|  | 5.0 | 11.0 | 2.0 |")
    assert "| 0.50" in topk
    assert "| 0.30" in pursued


def test_a_member_that_was_full_early_is_charged_for_what_it_saw(tmp_path):
    kept = store(tmp_path)
    made = {"tokens_seen": 100, "full": True}
    member(tmp_path, kept, "a", of(30, 0.4), type="random_rows", k=32, made=made)
    short = {"tokens_seen": 1000, "full": False, "d_sae": 50}
    member(tmp_path, kept, "b", of(30, 0.4), type="itda", k=32, made=short)
    member(tmp_path, kept, "c", of(33, 0.3), type="itda", k=40, made=short | {"d_sae": 64})
    for seed, made in enumerate([{"tokens_seen": 1000, "full": False}, {}]):  # k-means; TopK
        member(tmp_path, kept, f"d{seed}", of(32, 0.4), type=f"d{seed}", made=made)
    [found] = leaderboard.boards(leaderboard.scored(tmp_path), "fvu")
    rows = building.rows_of(found, 32)
    head, _, kmeans, topk, itda, random = building.table(rows, 32, 600, 0.01, [1.0] * 4)
    assert "| tokens | unique | atoms |" in head
    assert "| **random_rows** | 1,000 | 100 | 64 |" in random
    assert random.endswith("| 5.0 | 6.0 | 1.0 |")
    assert "| **itda** | 1,000 | 600 | 50–64 ‡ |" in itda
    assert "| **d0** | 1,000 | 600 | 64 |" in kmeans
    assert "| **d1** | 1,000 | 600 | 64 |" in topk


def test_the_page_of_a_run_on_planted_rows(tmp_path):
    config = {
        "name": "built",
        "synthetic": {"kind": "flat", "d": 8, "n_features": 12, "n_rows": 2000, "l0": 2},
        "grid": {
            "type": ["itda", "k_means", "random_rows", "topk"],
            "d_sae": 16,
            "k": [2, 4],
            "tokens": [256, 512],
        },
        "train": {"batch": 64, "tokens": 512},
        "evaluate": {"evals": ["core"], "core": {"resamples": 20, "pursuit_rows": 64}},
        "out": str(tmp_path / "out"),
    }
    pipeline.run(config, until="evaluate")
    said: list[str] = []
    building.main([str(tmp_path / "out"), "--l0", "3", "--rounds", "1"], said.append)
    text = "".join(said)
    assert re.search(r"\*\*itda, tokens 256\*\* \| 256 \| \d+ \| \d+", text)
    for name in ("k_means", "topk"):
        assert f"| **{name}, tokens 256** | 256 | 256 | 16" in text
    assert "| **topk, tokens 512, decoder with pursuit** | 512 | 512 | 16 |" in text
    random = "|".join(re.findall(r"\*\*random_rows\*\*[^.]*", text))
    assert "| 64 | 16 |" in random  # full after a batch, however many may come


def test_a_folder_without_scores_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="should hold members scored on one site of one store"):
        building.page(tmp_path, 32, 1)
