"""One progress bar for the stages: drawn on a terminal, a log line now and then elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """A context manager; `update(done)` moves it. Without a total it only pulses."""

    def __init__(
        self, title: str, total: int | None, unit: str, console: Console | None = None
    ) -> None:
        """Prepare a bar that counts to `total` in `unit`s, by default on standard error."""
        self.title = title
        self.total = total
        self.unit = unit
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = self._last = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> "Bar":
        """Open the bar if standard error is a terminal."""
        if self._console.is_terminal:
            columns = (
                TextColumn(self.title), BarColumn(), TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, text: str = "") -> None:
        """Move to `done`; say how fast it goes."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now
        rate = (done - self._first) / max(now - self._started, 1e-9)
        if not text and self.total:
            speed = f", {rate:,.0f}/s" if rate else ""
            text = f"{done:,} of {self.total:,} {self.unit}{speed}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif done == self.total or now - self._last > _SECONDS_BETWEEN_LINES:
            self._last = now
            log.info("%s: %s", self.title, text)

    def note(self, text: str) -> None:
        """Leave a line in the log."""
        log.info("%s", text)


@contextmanager
def spinner(title: str) -> Iterator[None]:
    """Pulse until the block ends, then log how long it took."""
    started = time.monotonic()
    with Bar(title, None, "") as bar:
        yield
        bar.note(f"{title}: {time.monotonic() - started:.0f} s")
