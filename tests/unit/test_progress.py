import io
import logging

from rich.console import Console

from saelab.progress import Bar
from saelab.train.progress import describe

INFO = {
    "step": 3,
    "steps": 9,
    "eta_seconds": 12.4,
    "tokens_per_second": 1234.5,
    "share_reading": 0.1,
    "share_stepping": 0.85,
    "share_logging": 0.05,
    "members": {"a": {"loss": 0.5}, "b": {"loss": 0.75}},
}


def test_training_is_described_with_speed_shares_and_the_worst_member():
    text = describe(INFO)
    assert text.startswith("3/9, 12 s left, 1,234 tokens/s")
    assert "reading 10% stepping 85% logging 5%" in text
    assert text.endswith("b 0.7500")


def test_a_single_member_is_just_the_loss():
    assert describe(INFO | {"members": {"a": {"loss": 0.5}}}).endswith("· loss 0.5000")


def test_a_terminal_gets_a_bar_and_no_log(caplog):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with caplog.at_level(logging.INFO), Bar("work", 9, "steps", console) as bar:
        bar.update(3, "three")
        bar.update(9, "nine")
    assert "work" in screen.getvalue()
    assert caplog.messages == []


def test_elsewhere_the_last_line_is_logged_and_not_every_step(caplog):
    console = Console(file=io.StringIO())
    with caplog.at_level(logging.INFO), Bar("work", 9, "rows", console) as bar:
        for done in range(1, 10):
            bar.update(done)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("work: 9 of 9 rows")


def test_without_a_total_a_bar_only_says_what_it_is_told(caplog):
    console = Console(file=io.StringIO())
    with caplog.at_level(logging.INFO), Bar("work", None, "", console) as bar:
        bar.update(1)
        bar.note("done")
    assert caplog.messages == ["done"]
