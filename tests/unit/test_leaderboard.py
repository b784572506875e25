"""Which member is best: boards of a run, and comparisons."""

import io
import math

import pytest
from fabricated import SITE, member, row, scores, store
from rich.console import Console
from typer.testing import CliRunner

from saelab import cli, leaderboard
from saelab.errors import ArtifactError, ConfigError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three members at one site and one at another."""
    out = tmp_path_factory.mktemp("run")
    kept = store(out)
    paths = {
        "good": member(out, kept, "good", scores(32, 0.10, kl=0.5, dead_share=0.2)),
        "close": member(out, kept, "close", scores(31, 0.11, kl=0.4, dead_share=0.1), k=31),
        "bad": member(out, kept, "bad", scores(16, 0.30, kl=0.6, dead_share=0.0), k=16),
        "else": member(out, kept, "else", scores(32, 0.05), site="blocks.15.hook_mlp_out"),
    }
    return out, paths


def text(shown) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_each_site_has_a_board_of_its_own_sorted_by_the_metric(run):
    members = leaderboard.scored(run[0])
    names = [[one.name for one in board] for board in leaderboard.boards(members, "fvu")]
    assert names == [["good", "close", "bad"], ["else"]]
    by_kl = leaderboard.boards(members, "kl")[0]
    assert [one.name for one in by_kl] == ["close", "good", "bad"]


def test_a_metric_that_is_better_high_sorts_downwards_and_gaps_go_last(tmp_path):
    kept = store(tmp_path)
    values = {"low": 0.5, "high": 0.9, "nan": math.nan, "none": None}
    for name, value in values.items():
        more = {} if value is None else {"ce_recovered_zero": value}
        member(tmp_path, kept, name, scores(32, 0.1, **more))
    (board,) = leaderboard.boards(leaderboard.scored(tmp_path), "ce_recovered_zero")
    assert [one.name for one in board[:2]] == ["high", "low"]
    assert {one.name for one in board[2:]} == {"nan", "none"}


def test_members_of_two_stores_are_not_ranked_together(tmp_path):
    for name in ("a", "b"):
        member(tmp_path, store(tmp_path, f"store-{name}"), name, scores(32, 0.1))
    assert len(leaderboard.boards(leaderboard.scored(tmp_path), "fvu")) == 2


def test_the_newest_results_of_a_dictionary_count_and_core_goes_before_truth(tmp_path):
    kept = store(tmp_path)
    rows = [*scores(32, 0.2), row("l0", 30, evaluator="truth")]
    member(tmp_path, kept, "a", scores(32, 0.3))
    member(tmp_path, kept, "a", rows)
    (one,) = leaderboard.scored(tmp_path)
    assert (one.row("fvu")["value"], one.row("l0")["value"]) == (0.2, 32)


def test_an_unknown_metric_names_the_nearest_and_one_without_a_better_end_is_refused(run):
    members = leaderboard.scored(run[0])
    with pytest.raises(ConfigError, match="did you mean 'fvu'"):
        leaderboard.metric_of(members, "fuv")
    with pytest.raises(ConfigError, match="neither end"):
        leaderboard.metric_of(members, "l0")
    result = command("report", run[0], "--by", "fuv")
    assert isinstance(result.exception, ConfigError)


def test_a_planted_run_without_fvu_is_ranked_by_r2(tmp_path):
    kept = store(tmp_path)
    for name, value in (("a", 0.2), ("b", 0.7)):
        member(tmp_path, kept, name, [row("r2", value, 0.1, evaluator="truth")])
    members = leaderboard.scored(tmp_path)
    assert leaderboard.metric_of(members, None) == "r2"
    assert leaderboard.boards(members, "r2")[0][0].name == "b"


def test_report_shows_the_board_before_the_scorecards_with_the_best_one_marked(run):
    shown = command("report", run[0]).output
    assert shown.index("★ good") < shown.index("  close") < shown.index("  bad")
    assert "0.100 ± 0.010" in shown
    assert "L0 goes from 16 to 32" in " ".join(shown.split())
    assert shown.index("★ else") < shown.index("of the dictionary")


def test_report_of_one_member_has_no_board_on_screen_or_in_markdown(tmp_path):
    member(tmp_path, store(tmp_path), "only", scores(32, 0.1))
    assert "★" not in command("report", tmp_path).output
    command("report", tmp_path, "--output", tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text().startswith("## only\n")


def test_the_markdown_report_begins_with_the_boards(run, tmp_path):
    command("report", run[0], "--output", tmp_path / "report.md", "--by", "kl")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[0] == "## blocks.10.hook_resid_post, 3 members on rows"
    assert lines[2] == "| member | type | L0 | FVU | KL ↓ | dead |"
    assert lines[4] == "| ★ **close** | topk | 31 ± 0 | 0.110 ± 0.010 | 0.4 | 0.1 |"
    assert "## good" in lines


def test_comparing_a_run_says_which_is_best_and_which_are_not_told_apart(run):
    shown = text(leaderboard.compare([run[0]], None))
    assert "Best by FVU at blocks.10.hook_resid_post: good" in shown
    assert "Not told apart from it: 1 of 2 (close)." in shown
    half = 1.96 * math.hypot(0.01, 0.01)
    assert f"{0.2 - half:+.4g} to {0.2 + half:+.4g}" in shown
    assert "Scored on rows that no other one was scored on: else" in shown
    assert "upper bound" in shown


def test_two_dictionaries_are_also_shown_side_by_side(run):
    _, paths = run
    shown = text(leaderboard.compare([paths["good"], paths["bad"]], None))
    assert "made with" in shown
    assert "interval of every difference to it leaves out 0" in shown
    three = text(leaderboard.compare([paths["good"], paths["close"], paths["bad"]], "kl"))
    assert "made with" not in three
    assert "Best by KL at blocks.10.hook_resid_post: close" in three
    assert "Not every difference has an error" in three
    assert command("compare", paths["good"], paths["bad"]).exit_code == 0


def test_what_cannot_be_compared_is_refused(run, tmp_path):
    out, paths = run
    with pytest.raises(ArtifactError, match="two or more"):
        leaderboard.compare([paths["good"]], None)
    with pytest.raises(ArtifactError, match="holds no results"):
        leaderboard.compare([tmp_path], None)
    results = next((out / "results").glob("good-*"))
    with pytest.raises(ArtifactError, match="compare takes dictionaries"):
        leaderboard.named([results])


def test_members_whose_codes_are_not_k_sparse_are_ranked_apart(tmp_path):
    kept = store(tmp_path)
    member(tmp_path, kept, "a", scores(32, 0.2))
    member(tmp_path, kept, "b", scores(70, 0.1), type="semi_nmf", k=None)
    text = leaderboard.markdown(leaderboard.scored(tmp_path), None)
    first, second = text.split("## ")[1:]
    assert "★ **a**" in first
    assert "semi_nmf" not in first
    assert second.startswith(f"{SITE}, 1 members on rows, codes that are not k-sparse")
    assert "★ **b**" in second
