"""From texts to windows of tokens: splitting, packing, and where every token came from.

A document is held out if the hash of its text says so: before packing, in any order, streamed or
not. Exact duplicates are dropped. Windows are cut from one document at a time, or from documents
of one split that are joined into groups; a group never shares a window with another one, so it is
the unit of the bootstrap.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from saelab.config import Config
from saelab.errors import ConfigError, CorpusError
from saelab.harvest.sources import Record, Request, SampleBy, checksum, records
from saelab.protocols import LanguageModel
from saelab.types import Document, TokenRun, is_heldout

_GROUP_WINDOWS = 4
_CHUNK_TEXTS = 64
_CHUNK_CHARACTERS = 1_000_000
_SHUFFLE_BUFFER = 10_000
_MANY_CHARACTERS = 8


class CorpusConfig(Config):
    """Which texts, and how they become windows."""

    source: str
    """A named asset, `hub:org/name[:config][@revision]`, a file, folder or pattern, or `toy`."""
    tokens: int = Field(gt=0)
    """How many positions to keep; the last window is cut to make exactly that many."""
    context: int = Field(128, ge=2)
    """Length of a window, in tokens."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the documents that is held out, by the hash of their text (or of `split_field`)."""
    packing: Literal["document", "concat", "whole"] = "document"
    """`document`: a window holds one document. `concat`: documents of one split are joined, with
    EOS between, into groups of at least 4 windows. `whole`: as many whole documents as fit share a
    window."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether each window starts with BOS; `auto`: as the tokenizer does by itself."""
    min_tail: int = Field(32, ge=1)
    """Windows shorter than this, at the end of a document or group, are dropped and counted."""
    text_field: str | None = None
    """Column of the text; by default `text`, or the only column that holds text."""
    label_field: str | None = None
    """Column whose value is kept with each document."""
    split_field: str | None = None
    """Column whose values are held out as a whole, such as the thread or the film that a text is
    about; by default each text by itself. `thread` of `20newsgroups`: the first two words of the
    subject that a post begins with."""
    sample_by: SampleBy = "file"
    """What a document is in plain text files."""
    split: str = "train"
    """Which split of a hub data set to read."""
    streaming: bool = False
    """Read a hub data set while it is downloaded; the corpus cannot be counted beforehand then."""
    shuffle: int | None = None
    """Seed for shuffling documents through a buffer of 10,000; None keeps the source's order."""


@dataclass
class CorpusReport:
    """What became of the source's texts; `tokens` counts positions in windows."""

    documents: int = 0
    heldout_documents: int = 0
    windows: int = 0
    tokens: int = 0
    duplicates: int = 0
    empty: int = 0
    dropped_tails: int = 0
    dropped_tokens: int = 0
    """Tokens in dropped tails."""


@dataclass(frozen=True)
class TextWindow:
    """Tokens that the model is to see together."""

    ids: Int[Tensor, " pos"]
    document: Int[Tensor, " pos"]
    char_start: Int[Tensor, " pos"]
    char_end: Int[Tensor, " pos"]
    heldout: bool
    begins: tuple[Document, ...]
    """The documents whose first position is in this window."""

    def __len__(self) -> int:
        """Return the number of positions."""
        return self.ids.shape[0]

    def first(self, n: int) -> "TextWindow":
        """Return the window cut to its first n positions."""
        if n >= len(self):
            return self
        seen = set(self.document[:n].tolist())
        return TextWindow(
            self.ids[:n],
            self.document[:n],
            self.char_start[:n],
            self.char_end[:n],
            self.heldout,
            tuple(document for document in self.begins if document.number in seen),
        )


def identity(config: CorpusConfig) -> dict[str, Any]:
    """Return what of a corpus goes into a stage key: its fields and the source's checksum."""
    fields = config.plain()
    del fields["streaming"]
    if config.split_field is None:  # it came later: older stores keep their keys
        del fields["split_field"]
    else:
        fields["keeps"] = "split_hash"  # stores of before do not
    return fields | {"checksum": checksum(config.source)}


def survey(config: CorpusConfig, model: LanguageModel) -> CorpusReport:
    """Tokenize the corpus without running the model; return what it holds, up to the asked tokens.

    Raises CorpusError if there is less than was asked for or one split is empty, ConfigError if
    windows do not fit the model.
    """
    report = CorpusReport()
    for _ in windows(config, model, report):
        pass
    check_split(config, report.documents, report.heldout_documents)
    return report


def check_split(config: CorpusConfig, documents: int, heldout: int) -> None:
    """Raise CorpusError if none of the documents is left for training, or for scores."""
    if heldout < documents and (heldout or not config.holdout):
        return
    what = f"none of them is held out (corpus.holdout is {config.holdout}), so no score is possible"
    if heldout:
        what = "all of them are held out, so there is nothing to train on"
    raise CorpusError(
        f"{config.source} gives documents: {documents:,}, and {what}. Use more of them "
        "(corpus.tokens), cut plain text files into more with corpus.sample_by: paragraph, or "
        "change corpus.holdout (0 holds nothing out)"
    )


def surely_enough(config: CorpusConfig) -> bool:
    """Whether there are so many characters that counting tokens beforehand is not worth its time.

    Hardly any text has more than 8 characters per token; where one does, `windows` still raises
    CorpusError, only later. Both splits must have a document that begins among the first
    characters, one per token asked for: those are surely used. Raises CorpusError if the corpus
    is a single document that cannot be split.
    """
    characters = number = 0
    sides: set[bool] = set()
    for number, document in enumerate(_documents(config, CorpusReport()), 1):
        if characters < config.tokens:
            sides.add(document.heldout)
        characters += len(document.text)
        if characters >= _MANY_CHARACTERS * config.tokens:
            if number == 1:
                check_split(config, 1, int(document.heldout))
            return len(sides) == 2 or not config.holdout
    return False


def windows(
    config: CorpusConfig, model: LanguageModel, report: CorpusReport
) -> Iterator[TextWindow]:
    """Yield windows, exactly `config.tokens` positions together, and count into `report`.

    Raises CorpusError at the end of the source if it holds fewer positions than that.
    """
    cutter = _Cutter(config, model, report)
    for group in _groups(config, model, cutter, report):
        for window in cutter.cut(group):
            cut = window.first(config.tokens - report.tokens)
            report.windows += 1
            report.tokens += len(cut)
            report.documents += len(cut.begins)
            report.heldout_documents += sum(document.heldout for document in cut.begins)
            yield cut
            if report.tokens == config.tokens:
                return
    raise CorpusError(
        f"{config.source} holds {report.tokens:,} tokens in windows of {config.context}, but "
        f"{config.tokens:,} were asked for ({report.documents:,} documents, "
        f"{report.duplicates:,} duplicates, {report.empty:,} empty, {report.dropped_tokens:,} "
        f"tokens in tails under {config.min_tail}); set corpus.tokens to at most {report.tokens}"
    )


# ---------------------------------------------------------------------------------------- documents


def _documents(config: CorpusConfig, report: CorpusReport) -> Iterator[Document]:
    """Yield the distinct texts with their split; numbers are given later, to those in a window."""
    request = Request(
        config.source,
        config.split,
        config.text_field,
        config.label_field,
        config.sample_by,
        config.streaming,
        config.split_field,
    )
    seen: set[bytes] = set()
    for record in _shuffled(records(request), config.shuffle):
        if not record.text.strip():
            report.empty += 1
            continue
        sha = _hash(record)
        if sha.digest()[:16] in seen:
            report.duplicates += 1
            continue
        seen.add(sha.digest()[:16])
        found = Document(-1, sha.hexdigest(), False, record.text, record.label)
        if config.split_field:
            whole = hashlib.sha256(str(record.group).encode()).hexdigest()
            found = replace(found, split_hash=whole)
        yield replace(found, heldout=is_heldout(found.decisive_hash, config.holdout))


def _hash(record: Record) -> Any:
    try:
        return hashlib.sha256(record.text.encode())
    except UnicodeEncodeError:
        raise CorpusError(
            f"{record.origin} holds half a surrogate pair, which is no text; repair the record"
        ) from None


def _shuffled(source: Iterable[Record], seed: int | None) -> Iterator[Record]:
    """Yield records in random order, from a buffer that is refilled one by one."""
    if seed is None:
        yield from source
        return
    chance = random.Random(seed)  # noqa: S311 (an order, no secret)
    waiting: list[Record] = []
    for record in source:
        if len(waiting) < _SHUFFLE_BUFFER:
            waiting.append(record)
            continue
        place = chance.randrange(_SHUFFLE_BUFFER)
        yield waiting[place]
        waiting[place] = record
    chance.shuffle(waiting)
    yield from waiting


_Tokenized = tuple[Document, TokenRun]


def _tokenized(
    documents: Iterable[Document], model: LanguageModel, report: CorpusReport
) -> Iterator[_Tokenized]:
    for chunk in _chunks(documents):
        runs = model.tokenize([document.text for document in chunk])
        for document, run in zip(chunk, runs, strict=True):
            if len(run):
                yield document, run
            else:
                report.empty += 1


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if len(chunk) == _CHUNK_TEXTS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


# ------------------------------------------------------------------------------------------ packing


def _groups(
    config: CorpusConfig, model: LanguageModel, cutter: "_Cutter", report: CorpusReport
) -> Iterator[list[_Tokenized]]:
    """Yield the documents that are cut into windows together: one, or several of one split."""
    waiting: dict[bool, list[_Tokenized]] = {False: [], True: []}
    size = {False: 0, True: 0}
    for document, run in _tokenized(_documents(config, report), model, report):
        if config.packing == "document":
            yield [(document, run)]
            continue
        side = document.heldout
        length = len(run) + (cutter.separator is not None)
        if config.packing == "whole" and size[side] and size[side] + length > cutter.span:
            yield waiting[side]
            waiting[side], size[side] = [], 0
        waiting[side].append((document, run))
        size[side] += length
        if config.packing == "concat" and size[side] >= _GROUP_WINDOWS * config.context:
            yield waiting[side]
            waiting[side], size[side] = [], 0
    yield from (group for group in waiting.values() if group)


class _Cutter:
    """Cuts groups into windows and numbers the documents in the order in which they appear."""

    def __init__(self, config: CorpusConfig, model: LanguageModel, report: CorpusReport) -> None:
        self.bos = _bos(config, model)
        self.separator = None
        if config.packing != "document":
            self.separator = model.bos_id if model.eos_id is None else model.eos_id
        self.span = config.context - (self.bos is not None)
        self._min_tail = min(config.min_tail, self.span)
        self._report = report
        self._numbered = 0

    def cut(self, group: list[_Tokenized]) -> Iterator[TextWindow]:
        """Yield the group's windows; drop and count a short one at the end."""
        ids, place, start, end = self._joined(group)
        numbers: dict[int, int] = {}
        for first in range(0, len(ids), self.span):
            part = slice(first, first + self.span)
            if len(ids[part]) < self._min_tail:
                self._report.dropped_tails += 1
                self._report.dropped_tokens += len(ids[part])
                return
            begins = []
            for member in place[part].unique().tolist():
                if member not in numbers:
                    numbers[member] = self._numbered
                    self._numbered += 1
                    group_number = numbers[min(numbers)]
                    begins.append(
                        replace(group[member][0], number=numbers[member], group=group_number)
                    )
            document = torch.tensor([numbers[m] for m in place[part].tolist()])
            window = TextWindow(
                ids[part], document, start[part], end[part], group[0][0].heldout, tuple(begins)
            )
            yield window if self.bos is None else _with_bos(window, self.bos)

    def _joined(self, group: list[_Tokenized]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Join the group's tokens: ids, number in the group, character start and end."""
        parts: list[list[Tensor]] = [[], [], [], []]
        for member, (document, run) in enumerate(group):
            columns = [run.ids, torch.full_like(run.ids, member), run.start, run.end]
            if self.separator is not None:
                last = len(document.text)
                extra = (self.separator, member, last, last)
                columns = [
                    torch.cat([c, c.new_tensor([v])]) for c, v in zip(columns, extra, strict=True)
                ]
            for part, column in zip(parts, columns, strict=True):
                part.append(column)
        ids, place, start, end = (torch.cat(part) for part in parts)
        return ids, place, start, end


def _with_bos(window: TextWindow, bos: int) -> TextWindow:
    """Put BOS in front; it belongs to the first document and covers no character."""

    def put(value: Any, column: Tensor) -> Tensor:
        return torch.cat([column.new_tensor([int(value)]), column])

    return replace(
        window,
        ids=put(bos, window.ids),
        document=put(window.document[0], window.document),
        char_start=put(window.char_start[0], window.char_start),
        char_end=put(window.char_start[0], window.char_end),
    )


def _bos(config: CorpusConfig, model: LanguageModel) -> int | None:
    """Return the id that starts each window. Raises ConfigError if windows do not fit the model."""
    if config.context > model.context:
        raise ConfigError(
            f"corpus.context is {config.context}, but {model.name} takes windows of at most "
            f"{model.context} tokens; set corpus.context to that or less"
        )
    wanted = model.adds_bos if config.bos == "auto" else config.bos == "always"
    if wanted and model.bos_id is None:
        raise ConfigError(f"corpus.bos is 'always', but {model.name} has no BOS token; use 'never'")
    return model.bos_id if wanted else None


def report_facts(report: CorpusReport) -> dict[str, int]:
    """Return the report as plain data for a manifest."""
    return asdict(report)
