"""Where texts come from: named assets, local files, and what Hugging Face `datasets` reads.

Plain text and tables (txt, csv, tsv, Orange's tab; also in zip, gz and bz2) are read line by line
here, so that a fault is named with its file and line. JSON lines, parquet and the hub go through
`datasets`.
"""

import bz2
import csv
import gzip
import json
import logging
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from saelab import assets
from saelab.artifacts import write_json
from saelab.config import digest
from saelab.errors import CorpusError, nearest
from saelab.harvest import newsgroups, rated, toytext

_log = logging.getLogger(__name__)

SampleBy = Literal["file", "paragraph", "line"]
Label = str | int | float | None

_TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_DATASETS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXTS = (".txt", ".text", ".md")
_READABLE = (*_TEXTS, *_TABLES, *_DATASETS, ".zip")


@dataclass(frozen=True)
class Request:
    """What to read out of a source."""

    source: str
    split: str
    text_field: str | None
    label_field: str | None
    sample_by: SampleBy
    streaming: bool
    split_field: str | None = None


@dataclass(frozen=True)
class Record:
    """One text of a source."""

    text: str
    label: Label
    origin: str
    """File and line, or number in the data set: for messages."""
    group: Label = None
    """Value of the column that splits."""


def records(request: Request) -> Iterator[Record]:
    """Yield the source's texts in its own order.

    Raises AssetError or CorpusError if the source is unknown, holds no readable file, is not UTF-8
    or is damaged.
    """
    if request.source == "toy":
        for number, (text, topic) in enumerate(toytext.documents()):
            yield Record(text, topic, f"toy document {number}")
        return
    if request.source.startswith("hub:"):
        yield from _hub(request)
        return
    files = _files(request.source)
    for suffix in sorted({suffix for suffix in map(_suffix, files) if suffix in _DATASETS}):
        yield from _local_dataset([f for f in files if _suffix(f) == suffix], request)
    for file in files:
        if _suffix(file) not in _DATASETS:
            for entry in _entries(file):
                yield from _read(entry, request)


def checksum(source: str) -> str:
    """Return the content checksum of a source, for stage keys; nothing is read out of it."""
    if source == "toy":
        return digest({"toy": toytext.VERSION})
    if source.startswith("hub:"):
        return _hub_commit(*_hub_name(source))
    if _is_glob(source):
        return digest({file.name: assets.hash_of(file) for file in _files(source)})
    return assets.identity(source, "text")


# ------------------------------------------------------------------------------------ local files


def _is_glob(source: str) -> bool:
    return any(c in source for c in "*?[") and not Path(source).exists()


def _files(source: str) -> list[Path]:
    """Return the readable files behind a name, a file, a folder or a pattern, in sorted order."""
    if _is_glob(source):
        files = [Path(name) for name in sorted(glob(source, recursive=True))]
    else:
        path = assets.resolve(source, "text").path
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
    visible = [f for f in files if f.is_file() and not f.name.startswith(".")]
    found = [f for f in visible if _suffix(f) in _READABLE]
    if not found:
        came = f"only {visible[0].name!r}" if len(visible) == 1 else f"{len(visible)} other files"
        raise CorpusError(
            f"{source} should hold {', '.join(_READABLE)} (also .gz, .bz2), but holds {came}"
        )
    return found


def _suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix in {".gz", ".bz2"} else path
    return inner.suffix.lower()


@dataclass(frozen=True)
class _Entry:
    """A file, or a file inside a zip, that can be opened."""

    name: str
    suffix: str
    open: Callable[[], AbstractContextManager[Iterable[bytes]]]


def _entries(path: Path) -> Iterator[_Entry]:
    if path.suffix != ".zip":
        openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open}
        opener = openers.get(path.suffix, lambda p: p.open("rb"))
        yield _Entry(str(path), _suffix(path), lambda: opener(path))
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if _suffix(Path(name)) in (*_TEXTS, *_TABLES):
                    yield _Entry(
                        f"{path}/{name}", _suffix(Path(name)), lambda n=name: archive.open(n)
                    )
    except zipfile.BadZipFile:
        raise CorpusError(f"{path} is not a whole zip file; fetch it again") from None


# what the standard library raises for a file that is cut short, damaged, locked or gone
_FAULTS = (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@contextmanager
def _faults_of(name: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one error that names it."""
    try:
        yield
    except _FAULTS as error:
        raise CorpusError(
            f"{name} cannot be read ({_first_line(error)}); check that the file is whole"
        ) from None


def _read(entry: _Entry, request: Request) -> Iterator[Record]:
    with _faults_of(entry.name), entry.open() as stream:
        lines = _lines(stream, entry.name)
        if request.source in rated.SOURCES:
            lines, entry = rated.as_table(lines), replace(entry, suffix=".csv")
        if entry.suffix in _TABLES:
            yield from _table(lines, entry, request)
        else:
            yield from _plain(lines, entry.name, request.sample_by)


def _lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode line by line. Raises CorpusError naming file, line and offset of what is not UTF-8."""
    offset = 0
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{name} is not UTF-8: byte 0x{raw[error.start]:02x} in line {number} "
                f"(offset {offset + error.start}); convert the file to UTF-8"
            ) from None
        yield line.removeprefix("\ufeff") if number == 1 else line
        offset += len(raw)


def _plain(lines: Iterator[str], name: str, sample_by: SampleBy) -> Iterator[Record]:
    if sample_by == "file":
        yield Record("".join(lines), None, name)
        return
    waiting: list[str] = []
    number = 0
    for number, line in enumerate(lines, 1):
        if sample_by == "line":
            yield Record(line.rstrip("\r\n"), None, f"{name}, line {number}")
        elif line.strip():
            waiting.append(line)
        elif waiting:
            yield Record("".join(waiting), None, f"{name}, line {number}")
            waiting = []
    if waiting:
        yield Record("".join(waiting), None, f"{name}, line {number}")


def _table(lines: Iterator[str], entry: _Entry, request: Request) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(lines, delimiter=_TABLES[entry.suffix])
    try:
        yield from _table_records(rows, entry, request)
    except csv.Error as error:
        fault = str(error).split(" - ")[0]
        raise CorpusError(
            f"{entry.name}, line {rows.line_num} is no row of a table ({fault}); "
            "lines should end with LF or CR LF, and quotes be closed"
        ) from None


def _table_records(rows: Any, entry: _Entry, request: Request) -> Iterator[Record]:
    columns = next(rows, None)
    if columns is None:
        raise CorpusError(f"{entry.name} is empty; a first line with column names was expected")
    if entry.suffix == ".tab":  # Orange: the second line holds types, the third roles
        next(rows, None), next(rows, None)
    text = columns.index(_text_column(columns, columns, request, entry.name))
    threads = newsgroups.has_threads(request.source, request.split_field)
    label, group = (
        columns.index(_known(field, columns, entry.name)) if field else None
        for field in (request.label_field, None if threads else request.split_field)
    )
    for row in rows:
        if len(row) > max(text, label or 0, group or 0):
            own, whole = (None if place is None else row[place] for place in (label, group))
            whole = newsgroups.thread_of(row[text]) if threads else whole
            yield Record(row[text], own, f"{entry.name}, line {rows.line_num}", whole)


def _text_column(columns: list[str], textual: list[str], request: Request, name: str) -> str:
    """Return the asked column, else `text` in any case, else the only one that holds text."""
    if request.text_field is not None:
        return _known(request.text_field, columns, name)
    named = [column for column in textual if column.lower() == "text"]
    if named:
        return named[0]
    if len(textual) == 1:
        return textual[0]
    raise CorpusError(
        f"{name} has no column 'text'; name one with corpus.text_field: {', '.join(textual)}"
    )


def _known(field: str, columns: list[str], name: str) -> str:
    if field not in columns:
        raise CorpusError(f"{name} has no column {field!r}; {nearest(field, columns)}")
    return field


# --------------------------------------------------------------------------- Hugging Face datasets


def _local_dataset(files: list[Path], request: Request) -> Iterator[Record]:
    builder = _DATASETS[_suffix(files[0])]
    if builder == "json":
        for file in files:
            for entry in _entries(file):
                with _faults_of(entry.name), entry.open() as stream:
                    for _ in _lines(stream, entry.name):
                        pass
    name = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    arguments = {"data_files": [str(file) for file in files], "split": "train", "streaming": True}
    yield from _rows(name, request, builder, arguments)


def _hub(request: Request) -> Iterator[Record]:
    name, config, revision = _hub_name(request.source)
    arguments = {"name": config, "revision": revision}
    arguments |= {"split": request.split, "streaming": request.streaming}
    yield from _rows(request.source, request, name, arguments)


def _hub_name(source: str) -> tuple[str, str | None, str | None]:
    """Split `hub:org/name[:config][@revision]`."""
    rest, _, revision = source.removeprefix("hub:").partition("@")
    name, _, config = rest.partition(":")
    return name, config or None, revision or None


def _hub_commit(name: str, config: str | None, revision: str | None) -> str:
    if revision is None:
        revision = _newest_commit(name)
    return f"hub:{name}:{config or ''}@{revision}"


def _newest_commit(name: str) -> str:
    """Ask the hub for a data set's commit; without network, take the one it said last."""
    try:
        from huggingface_hub import HfApi

        commit = str(HfApi().dataset_info(name).sha)
    except Exception as error:  # its errors come from several libraries, by version
        known = _known_commits().get(name)
        if known is None:
            raise CorpusError(
                f"the hub could not be asked for the commit of the data set {name} "
                f"({_first_line(error)}). Without network, pin it: hub:{name}@COMMIT"
            ) from None
        _log.warning("the hub cannot be reached; taking %s as of commit %s", name, known)
        return known
    _remember_commit(name, commit)
    return commit


def _known_commits() -> dict[str, str]:
    """Return the commits that the hub named last; a torn record counts as none."""
    try:
        return json.loads((assets.cache_dir() / "hub.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remember_commit(name: str, commit: str) -> None:
    if _known_commits().get(name) == commit:
        return
    path = assets.cache_dir() / "hub.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".hub.json.lock")):
        write_json(path, _known_commits() | {name: commit})


def _rows(name: str, request: Request, builder: str, arguments: dict[str, Any]) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            f"reading {name} needs the package datasets: pip install 'saelab[lm]'"
        ) from None
    try:
        with _quiet("datasets"):
            yield from _dataset_records(datasets.load_dataset(builder, **arguments), name, request)
    except CorpusError:
        raise
    except Exception as error:  # its errors come from several libraries, by version
        raise CorpusError(f"{name} cannot be read: {_first_line(error)}") from error


def _dataset_records(rows: Any, name: str, request: Request) -> Iterator[Record]:
    column, fields = None, (request.label_field, request.split_field)
    for number, row in enumerate(rows):
        if column is None:
            textual = _textual(row, getattr(rows, "features", None) or {})
            column = _text_column(list(row), textual, request, name)
            for field in filter(None, fields):
                _known(field, list(row), name)
        text = "" if row[column] is None else row[column]
        if not isinstance(text, str):
            raise CorpusError(
                f"{name}, record {number}: column {column!r} should hold text, but holds "
                f"{type(text).__name__}; name another with corpus.text_field"
            )
        label, group = (row[field] if field else None for field in fields)
        yield Record(text, label, f"{name}, record {number}", group)


def _textual(row: dict[str, Any], features: Any) -> list[str]:
    """Return the columns that hold text; where the first record has none, by its declared type."""

    def holds_text(key: str) -> bool:
        if row[key] is None:
            declared = getattr(features.get(key), "dtype", None)
            return key.lower() == "text" or declared in ("string", "large_string")
        return isinstance(row[key], str)

    return [key for key in row if holds_text(key)]


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Keep a library from logging a fault that is raised as well."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
