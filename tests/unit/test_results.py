"""Rows and their resamples: what is written is read again, and nothing else."""

import torch

from saelab import artifacts
from saelab.results import read_replicates, read_rows, write_rows
from saelab.stats import ResultRow


def test_rows_and_resamples_are_read_as_they_were_written(tmp_path):
    drawn = torch.tensor([0.25, 0.5, 0.125])
    rows = [
        ResultRow("fvu", 0.3, "share", 10, 0.01, 1, "dictionary", replicates=drawn),
        ResultRow("dead_share", 0.0, "share", 10, None, 1, "dictionary"),
    ]
    with artifacts.open_draft(tmp_path, "results", "r", "0" * 64) as draft:
        assert write_rows(draft, rows, {"site": "s"}) == 2
        draft.finish(stage="results", name="r", inputs={}, parents=[])
    path = draft.target
    assert [row["name"] for row in read_rows(path)] == ["fvu", "dead_share"]
    assert read_rows(path)[0]["site"] == "s"
    assert "replicates" not in read_rows(path)[0]
    assert torch.equal(read_replicates(path, "core", "dictionary", "fvu"), drawn.double())
    assert read_replicates(path, "core", "dictionary", "dead_share") is None
    assert read_replicates(tmp_path, "core", "dictionary", "fvu") is None
