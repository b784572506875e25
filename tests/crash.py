"""Kill a stage at any write, fsync or rename, run it again, and compare every hashed byte."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from saelab import artifacts

Stage = Callable[[Path], Path]
"""Runs a whole stage under an `out` folder and returns the finished artifact's folder."""


class Crash(BaseException):
    """The process ends here; no handler of ordinary errors may see it."""


class Calls:
    """How many writes, fsyncs and renames there have been."""

    def __init__(self) -> None:
        self.seen: list[str] = []


@contextmanager
def crash_at(number: int | None) -> Iterator[Calls]:
    """Raise Crash at call `number` (from 0) and all later ones, in any thread; None: only count."""
    calls = Calls()

    def syscall(kind: str, path: Path) -> None:
        calls.seen.append(f"{kind} {path.name}")
        if number is not None and len(calls.seen) > number:
            raise Crash(f"at call {number}: {calls.seen[-1]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "_syscall", syscall)
        yield calls


def content(folder: Path) -> dict[str, bytes]:
    """Return every hashed file of a finished artifact, and its manifest."""
    manifest = artifacts.read_manifest(folder)
    names = [*manifest.files, artifacts.MANIFEST]
    return {name: (folder / name).read_bytes() for name in names}


def assert_survives_every_crash(stage: Stage, base: Path, *, stride: int = 1) -> None:
    """Crash the stage at each call in turn; running it again must give the uninterrupted bytes.

    `stride` takes every n-th call only. What a crash leaves never passes for a finished artifact.
    """
    with crash_at(None) as calls:
        whole = content(stage(base / "whole"))
    assert calls.seen, "the stage makes no call of artifacts._syscall"
    for number in range(0, len(calls.seen), stride):
        out = base / f"crash-{number}"
        with pytest.raises(Crash), crash_at(number):
            stage(out)
        assert not artifacts.find_all(out), f"a crash at {calls.seen[number]} left an artifact"
        again = content(stage(out))
        different = [name for name in whole if again.get(name) != whole[name]]
        assert not different, f"after a crash at {calls.seen[number]}: {different}"
        assert again.keys() == whole.keys()
