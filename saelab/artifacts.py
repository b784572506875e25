"""Finished folders: keys, manifests, atomic writes, locks, lineage. Nothing else writes artifacts.

An artifact is a folder written under a hidden temporary name and renamed when complete:

    <out>/<stage>/<name>-<key8>/manifest.json   what it is: schema, stage, key, inputs, parents,
    file hashes /run.json        how it came to be: times, host, versions (outside the hash)
                               /…               its files

The *key* is the hash of what went in, known before the work starts; the *content hash* is the hash
of what came out. Children are keyed by their parents' content hashes, so equal content never
re-runs a child.
"""

import datetime as dt
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from saelab.config import canonical_json, digest
from saelab.errors import ArtifactError, Interrupted, LockedError, SaelabError

SCHEMA = 1
MANIFEST = "manifest.json"
RUN = "run.json"


def _syscall(kind: str, path: Path) -> None:
    """Mark the moment before a write, fsync or rename; the crash tests replace it to stop there."""


# ---------------------------------------------------------------------------------- atomic files


def write_file(path: Path, data: bytes | Iterable[bytes]) -> str:
    """Write a file under a temporary name, flush it to disk, rename it; return its sha256 as
    hex."""
    temporary = path.with_name(f".{path.name}.tmp")
    sha = hashlib.sha256()
    with temporary.open("wb") as file:
        for chunk in [data] if isinstance(data, bytes) else data:
            _syscall("write", path)
            file.write(chunk)
            sha.update(chunk)
        file.flush()
        _syscall("fsync", path)
        os.fsync(file.fileno())
    rename(temporary, path)
    return sha.hexdigest()


def append_file(path: Path, data: bytes) -> None:
    """Append to a log and flush it to disk; a crash may leave a torn last line, which readers
    drop."""
    _syscall("write", path)
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        _syscall("fsync", path)
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Rename atomically and flush the folder entry."""
    _syscall("rename", target)
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where the system has such a call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file that a library wrote (an SQLite database, a NumPy array) to disk."""
    _syscall("fsync", path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_json(path: Path, data: Any) -> str:
    """Write indented JSON with sorted keys, atomically; return its sha256."""
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return write_file(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ArtifactError naming the file if it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ArtifactError(f"{path} is not valid JSON: it was truncated or altered") from None


def hash_file(path: Path) -> str:
    """Return a file's sha256 as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------- manifests


@dataclass(frozen=True)
class Parent:
    """An artifact that another one was made from."""

    stage: str
    name: str
    content_hash: str
    path: str
    """Where it was; a hint for people, not part of any hash."""


@dataclass(frozen=True)
class Manifest:
    """What an artifact is; written last, so that a folder with a manifest is complete."""

    stage: str
    name: str
    key: str
    content_hash: str
    inputs: dict[str, Any]
    """The resolved fields that changed the numbers, with the stage's version."""
    parents: list[Parent]
    files: dict[str, dict[str, Any]]
    """Per file its sha256 and size in bytes."""
    facts: dict[str, Any]
    """What the stage wants a reader to know without opening the files."""

    def parent(self, stage: str) -> Parent:
        """Return the parent of a stage. Raises ArtifactError if there is none."""
        for parent in self.parents:
            if parent.stage == stage:
                return parent
        raise ArtifactError(f"{self.stage} {self.name!r} was not made from a {stage}")


def stage_key(stage: str, version: int, inputs: dict[str, Any], parents: list[Parent]) -> str:
    """Return the key of the artifact that this stage would make from these inputs and parents."""
    return digest(
        {
            "stage": stage,
            "version": version,
            "inputs": inputs,
            "parents": sorted(f"{p.stage}:{p.content_hash}" for p in parents),
        }
    )


def read_manifest(folder: Path) -> Manifest:
    """Read a finished artifact's manifest. Raises ArtifactError if it is none, or of another
    schema."""
    if not (folder / MANIFEST).exists():
        raise ArtifactError(
            f"{folder} is not a finished artifact: it has no {MANIFEST}. "
            "`saelab list DIR` shows the finished ones."
        )
    data = read_json(folder / MANIFEST)
    schema = data.pop("schema", None)
    if schema != SCHEMA:
        raise ArtifactError(
            f"{folder} has schema {schema!r}; this version of saelab reads schema {SCHEMA}. "
            "Make the artifact again, or use the version that made it."
        )
    data["parents"] = [Parent(**p) for p in data["parents"]]
    return Manifest(**data)


def verify(folder: Path) -> None:
    """Compare every file with its recorded hash. Raises ArtifactError that names the altered
    file."""
    for name, entry in read_manifest(folder).files.items():
        path = folder / name
        if not path.exists():
            raise ArtifactError(f"{path} is missing from a finished artifact; make it again")
        size = path.stat().st_size
        if size != entry["size"]:
            raise ArtifactError(
                f"{path} should have {entry['size']} bytes but has {size}: it was truncated or "
                "altered; delete the folder and run the same command again"
            )
        if hash_file(path) != entry["sha256"]:
            raise ArtifactError(
                f"{path} does not have its recorded sha256: it was altered; delete the folder "
                "and run the same command again"
            )


def content_hash(files: dict[str, dict[str, Any]]) -> str:
    """Return the hash of a set of files from their names and hashes."""
    return digest({name: entry["sha256"] for name, entry in files.items()})


# ---------------------------------------------------------------------------------------- writing


class Draft:
    """An artifact being written: a hidden folder that survives a crash and is renamed when
    complete.

    Use `open_draft`. Files are written into `folder`, by `write` or by a library; `finish` hashes
    them, writes the manifest and renames the folder.
    """

    def __init__(self, folder: Path, target: Path, key: str) -> None:
        """Take over the hidden `folder`, which becomes `target`."""
        self.folder = folder
        self.target = target
        self.key = key
        self.scratch = folder / "scratch"
        """For checkpoints and partials: removed before the artifact is finished."""
        self._hashes: dict[str, str] = {}
        self._started = time.time()

    @property
    def is_finished(self) -> bool:
        """Whether the artifact is there already: another process, or a run cut off in `finish`."""
        return (self.target / MANIFEST).exists()

    def write(self, name: str, data: bytes | Iterable[bytes]) -> Path:
        """Write one of the artifact's files atomically and remember its hash."""
        path = self.folder / name
        self._hashes[name] = write_file(path, data)
        return path

    def discard(self) -> None:
        """Remove everything that was written so far, checkpoints too."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(
        self,
        *,
        stage: str,
        name: str,
        inputs: dict[str, Any],
        parents: list[Parent],
        facts: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Manifest:
        """Hash the files, write `run.json` and the manifest, rename the folder; return the
        manifest."""
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            relative = path.relative_to(self.folder).as_posix()
            if self.scratch in path.parents or path.name.startswith("."):
                continue
            if relative in {RUN, MANIFEST}:
                continue
            sha = self._hashes.get(relative) or hash_file(path)
            files[relative] = {"sha256": sha, "size": path.stat().st_size}
        manifest = Manifest(
            stage, name, self.key, content_hash(files), inputs, parents, files, facts or {}
        )
        write_json(self.folder / RUN, self._provenance() | (provenance or {}))
        write_json(self.folder / MANIFEST, {"schema": SCHEMA} | _plain(manifest))
        self.publish()
        return manifest

    def publish(self) -> None:
        """Take the last step of `finish`: drop the scratch folder and give the folder its name."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink()
        rename(self.folder, self.target)

    def _provenance(self) -> dict[str, Any]:
        from importlib.metadata import version

        import torch

        return {
            "started": dt.datetime.fromtimestamp(self._started, dt.UTC).isoformat(),
            "seconds": round(time.time() - self._started, 3),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "saelab": version("saelab"),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }


def _plain(manifest: Manifest) -> dict[str, Any]:
    data = dict(vars(manifest))
    data["parents"] = [vars(p) for p in manifest.parents]
    return data


@contextmanager
def open_draft(out: Path, stage: str, name: str, key: str, *, wait: float = 0.0) -> Iterator[Draft]:
    """Lock and open the hidden folder of the artifact with this key; what a crash left is kept in
    it.

    A draft whose manifest was written before a crash is complete: it gets its name here. The
    caller asks `is_finished` first: a process that it waited for may have made the artifact, too.
    Leaving without `finish` keeps the folder, so that the same command can resume from it; an
    error that the same command would only meet again removes it. Raises LockedError, saying who
    holds the lock, if another process writes the artifact for longer than `wait` seconds.
    """
    target = artifact_path(out, stage, name, key)
    folder = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target, wait):
        draft = Draft(folder, target, key)
        if (folder / MANIFEST).exists():
            draft.publish()
        folder.mkdir(exist_ok=True)
        try:
            yield draft
        except Interrupted:
            raise
        except SaelabError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            if not any(path.is_file() for path in folder.rglob("*")):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(target: Path, wait: float) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    holder = path.with_suffix(".holder")
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise LockedError(
            f"{target} is being written by {who}. Wait for it, or stop it and run this again."
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def artifact_path(out: Path, stage: str, name: str, key: str) -> Path:
    """Return where the artifact with this key lies, finished or not."""
    return out / stage / f"{name}-{key[:8]}"


# ---------------------------------------------------------------------------------------- finding


def find(out: Path, stage: str, name: str, key: str) -> Path | None:
    """Return the finished artifact with this key under `out`, if it is there and complete."""
    path = artifact_path(out, stage, name, key)
    if (path / MANIFEST).exists() and read_manifest(path).key == key:
        return path
    return None


def find_all(out: Path, stage: str | None = None) -> list[tuple[Path, Manifest]]:
    """Return every finished artifact under `out`, oldest first within a stage."""
    found = []
    for path in sorted(out.glob(f"{stage or '*'}/*/{MANIFEST}")):
        folder = path.parent
        if not folder.name.startswith("."):
            found.append((folder, read_manifest(folder)))
    return sorted(found, key=lambda item: (item[1].stage, (item[0] / MANIFEST).stat().st_mtime))


def parent_of(folder: Path) -> Parent:
    """Return the reference that children of a finished artifact keep."""
    manifest = read_manifest(folder)
    return Parent(manifest.stage, manifest.name, manifest.content_hash, str(folder.resolve()))


class Registry:
    """Remembers by key where artifacts were finished, so that another `out` finds them again."""

    def __init__(self, folder: Path) -> None:
        """Keep the records in `folder`, one small file per key."""
        self.folder = folder

    def record(self, manifest: Manifest, path: Path) -> None:
        """Remember where an artifact was finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{manifest.key}.json", {"path": str(path.resolve())})

    def find(self, key: str) -> Path | None:
        """Return a finished artifact with this key, if it is still where it was."""
        record = self.folder / f"{key}.json"
        if not record.exists():
            return None
        path = Path(read_json(record)["path"])
        if (path / MANIFEST).exists() and read_manifest(path).key == key:
            return path
        return None


def adopt(source: Path, target: Path) -> None:
    """Place a finished artifact in another `out`: hard links where possible, else copies."""

    def link(src: str, dst: str) -> None:
        try:
            os.link(src, dst)
        except OSError:
            shutil.copy2(src, dst)

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.adopt")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=link)
    rename(temporary, target)


def lineage(folder: Path) -> list[tuple[int, Path, Manifest]]:
    """Return the artifact and its ancestors as (depth, path, manifest), parents after children."""
    chain: list[tuple[int, Path, Manifest]] = []

    def visit(path: Path, depth: int) -> None:
        manifest = read_manifest(path)
        chain.append((depth, path, manifest))
        for parent in manifest.parents:
            if (Path(parent.path) / MANIFEST).exists():
                visit(Path(parent.path), depth + 1)

    visit(folder, 0)
    return chain


def canonical_line(data: dict[str, Any]) -> bytes:
    """Return one line of a jsonl file."""
    return (canonical_json(data) + "\n").encode()
