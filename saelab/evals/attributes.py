"""Two attributes of documents, each of two values: what is to be told, and what it goes along with.

Both stand in the label (`professor/male`), or the second is whether a pattern is found in the text.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from saelab.config import Config
from saelab.errors import ConfigError, nearest
from saelab.types import Document

MATCHES = ("with", "without")
"""Values of a second attribute that is a pattern's."""
SHOWN = 12
"""Values that a message lists."""


class AttributesConfig(Config):
    """Which two attributes documents have; all four combinations of their values are needed."""

    pairs: tuple[tuple[str, str], ...] = ()
    """Pairs of values of the first attribute, each scored by itself; by default its only two."""
    second: tuple[str, str] | None = None
    """The two values of the second, in labels that hold both; by default its only two. The first
    one goes with the first of each pair."""
    separator: Annotated[str, Field(min_length=1)] = "/"
    """What stands between the two attributes in a label, as in `professor/male`; the last one
    counts."""
    pattern: str | None = None
    """For labels that hold one attribute: a regular expression, upper and lower case alike. The
    second attribute is whether it is found in the document's text."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _one_second(self) -> "AttributesConfig":
        if self.pattern is not None and self.second is not None:
            raise ValueError("give the second attribute's values or a pattern, not both")
        return self


@dataclass(frozen=True)
class Attributes:
    """The values that are meant."""

    pairs: tuple[tuple[str, str], ...]
    """Of the first attribute."""
    second: tuple[str, str]
    separator: str

    def combinations(self, pair: tuple[str, str]) -> tuple[str, ...]:
        """Return the labels of a pair's four combinations: both first values, only that of the
        pair, only that of the second attribute, neither."""
        return tuple(f"{v}{self.separator}{w}" for v in pair for w in self.second)


def both_of(document: Document, config: AttributesConfig) -> str | None:
    """Return a document's attributes as one label; None if it has no label.

    Raises ConfigError if the label should hold two and does not.
    """
    if document.label is None:
        return None
    label = str(document.label)
    if config.pattern is not None:
        found = re.search(config.pattern, document.text, re.IGNORECASE) is not None
        return f"{label}{config.separator}{MATCHES[0] if found else MATCHES[1]}"
    if config.separator not in label:
        raise ConfigError(
            f"two attributes of each document are needed, but the label {label!r} holds one: take "
            f"a column with both and {config.separator!r} between (professor/male), or give "
            "attributes.pattern, a regular expression that tells the second one by the text"
        )
    return label


def attributes_of(labels: Iterable[str], config: AttributesConfig) -> Attributes:
    """Return the attributes that are meant among labels that hold both.

    Raises ConfigError if a named value is unknown, or none is named and there are not just two.
    """
    parts = [label.rpartition(config.separator)[::2] for label in set(labels)]
    first, values = (sorted({part[side] for part in parts}) for side in (0, 1))
    check_known([value for pair in config.pairs for value in pair], first, "attributes.pairs")
    pairs = config.pairs or (_only_two(first, "pairs"),)
    if config.pattern is not None:
        return Attributes(pairs, MATCHES, config.separator)
    check_known(config.second or (), values, "attributes.second")
    second = config.second or _only_two(values, "second")
    return Attributes(pairs, second, config.separator)


def check_known(names: Iterable[str], known: Iterable[str], key: str) -> None:
    """Raise ConfigError, naming the nearest, if one of the names is none of the known."""
    there = sorted(set(known))
    for name in names:
        if name not in there:
            raise ConfigError(f"{key}: no document is labelled {name!r}; {nearest(name, there)}")


def _only_two(values: Sequence[str], key: str) -> tuple[str, str]:
    if len(values) == 2:
        return values[0], values[1]
    shown = ", ".join(values[:SHOWN]) + (", …" if len(values) > SHOWN else "")
    raise ConfigError(
        f"attributes.{key}: name two values, since there are {len(values)} ({shown or 'no labels'})"
    )
