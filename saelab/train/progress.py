"""What a person sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class TrainProgress:
    """A report callback; use it as a context manager, so that the bar is closed on errors too."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on `console`, by default standard error."""
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last = float("-inf")

    def __enter__(self) -> "TrainProgress":
        """Open the bar if the console is a terminal."""
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, info: dict[str, Any]) -> None:
        """Draw the newest numbers."""
        text = describe(info)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=info["step"], total=info["steps"], description=text
            )
        elif (
            info["step"] == info["steps"] or time.monotonic() - self._last > _SECONDS_BETWEEN_LINES
        ):
            self._last = time.monotonic()
            eta = round(info["eta_seconds"])
            log.info("train %d/%d, %d s left, %s", info["step"], info["steps"], eta, text)


def describe(info: dict[str, Any]) -> str:
    """Return speed, where the time goes, and the loss of the worst member."""
    losses = {name: line["loss"] for name, line in info["members"].items()}
    worst = max(losses, key=losses.__getitem__, default="")
    shown = f"{'loss' if len(losses) == 1 else worst} {losses[worst]:.4f}" if losses else ""
    shares = " ".join(
        f"{what} {info[f'share_{what}']:.0%}" for what in ("reading", "stepping", "logging")
    )
    return f"{info['tokens_per_second']:,.0f} tokens/s · {shares} · {shown}"
