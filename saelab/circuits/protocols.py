"""What circuits ask of a model beyond `saelab.protocols.LanguageModel`."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from saelab.types import TokenRun


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a language model that turns text into tokens."""

    name: str
    bos_id: int | None
    pad_id: int | None
    adds_bos: bool

    def tokenize(self, texts: Sequence[str]) -> list[TokenRun]:
        """Return ids and character spans of each text, without special tokens."""
        ...
