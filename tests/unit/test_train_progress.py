"""What a person sees while a run trains."""

import io
import logging

from rich.console import Console

from saelab.train.progress import TrainProgress, describe

INFO = {
    "step": 10,
    "steps": 20,
    "eta_seconds": 3.0,
    "tokens_per_second": 12345.6,
    "share_reading": 0.1,
    "share_stepping": 0.85,
    "share_logging": 0.05,
    "members": {"a": {"loss": 0.25}, "b": {"loss": 0.5}},
}


def test_the_line_tells_speed_shares_and_the_worst_members_loss():
    text = describe(INFO)
    assert text == "12,346 tokens/s · reading 10% stepping 85% logging 5% · b 0.5000"
    assert describe(INFO | {"members": {"a": {"loss": 0.25}}}).endswith("loss 0.2500")


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with TrainProgress(console) as progress:
        progress(INFO)
    assert "10/20" in out.getvalue()


def test_elsewhere_a_line_now_and_then_is_logged(caplog):
    console = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO), TrainProgress(console) as progress:
        for step in (1, 2, 3, 20):
            progress(INFO | {"step": step})
    assert [r.args[0] for r in caplog.records] == [1, 20]
