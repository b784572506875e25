"""Which judge says how much of a concept a text holds, as a run's configuration names it.

A tagged union: `kind` is `ngrams` (the default, offline), `lexicon` (offline), `model` (a local
language model) or `url` (any server with OpenAI's chat completions). Every kind is validated alike,
and every row says which judge it is by.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from saelab.config import Config, canonical_json

RATED = ("positive", "negative")
"""The two sides of a list of rated words: what a concept has to be called to have a lexicon."""


class _JudgeConfig(Config):
    """What all kinds say."""

    labels: dict[str, str] = {}
    """What the judge calls each concept; by default the same. `positive` and `negative` are the
    concepts that lists of rated words know."""

    def called(self, label: str) -> str:
        """Return what the judge calls a label."""
        return self.labels.get(label, label)

    def __hash__(self) -> int:
        return hash(canonical_json(self.plain()))


class NgramsConfig(_JudgeConfig):
    """A classifier of word and character n-grams, which learns from labelled texts."""

    kind: Literal["ngrams"] = "ngrams"
    """A classifier of n-grams."""
    source: str | None = None
    """Another labelled corpus to learn from: a named asset, `hub:org/name[:config][@revision]`, a
    file, folder or pattern; by default one half of the held-out documents."""
    label_field: str | None = None
    """Column of that corpus's labels."""
    text_field: str | None = None
    """Column of its text; by default `text`, or the only column that holds text."""
    texts: PositiveInt = 20_000
    """Texts that are read, at most."""

    @model_validator(mode="after")
    def _whole_corpus(self) -> "NgramsConfig":
        if (self.source is None) != (self.label_field is None):
            raise ValueError("a judge learns from another corpus by both source and label_field")
        return self


class LexiconConfig(_JudgeConfig):
    """A count of distinct words of a list, at most three per text."""

    kind: Literal["lexicon"]
    """A list of words."""
    source: str = "rated-words"
    """A named asset or a file with a word and its mean rating in each line, between tabs. It knows
    the concepts called `positive` and `negative`."""
    least: PositiveFloat = 1.0
    """Size of a rating above which a word counts."""
    words: dict[str, tuple[str, ...]] = {}
    """Words by what the judge calls a concept, for concepts of which there are no ratings."""

    def knows(self, name: str) -> bool:
        """Return whether there are words of what is called so."""
        return name in self.words or name in RATED


def _asks(question: str) -> str:
    if "{text}" not in question:
        raise ValueError("the question should say where the text goes ({text})")
    return question


class ModelJudgeConfig(_JudgeConfig):
    """A local language model's odds of one answer against another."""

    kind: Literal["model"]
    """A local language model."""
    source: str | None = None
    """The model, named as in `model.source`; by default the one that is steered, unsteered."""
    question: str = "Text: {text}\nIs this text {label}? Answer yes or no.\nAnswer:"
    """What it is asked; `{text}` stands for the text, `{label}` for what the judge calls the
    concept."""
    answers: tuple[str, str] = (" yes", " no")
    """How the answer begins that says that the concept is there, and how the other does."""

    _question = field_validator("question")(_asks)


class UrlJudgeConfig(_JudgeConfig):
    """A server with OpenAI's chat completions, which is asked for a number from 0 to 2."""

    kind: Literal["url"]
    """A server."""
    url: str
    """Base URL, for example `http://localhost:8000/v1`."""
    model: str
    """Name of the server's model."""
    question: str = (
        "How {label} is the following text? Answer with one number alone: 0 (not at all), "
        "1 (somewhat) or 2 (very).\n\n{text}"
    )
    """What it is asked; `{text}` stands for the text, `{label}` for what the judge calls the
    concept."""
    key_variable: str | None = None
    """Environment variable that holds the key; the key itself is written nowhere."""
    tries: PositiveInt = 3
    """Requests for each text before it counts as missing."""
    timeout: PositiveFloat = 60.0
    """Seconds to wait for an answer."""

    _question = field_validator("question")(_asks)

    @field_validator("url")
    @classmethod
    def _web(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("a judge's URL should begin with http:// or https://")
        return url


def _kind(data: Any) -> str:
    kind = data.get("kind", "ngrams") if isinstance(data, dict) else getattr(data, "kind", None)
    return f"kind {kind}"


JudgeConfig = Annotated[
    Annotated[NgramsConfig, Tag("kind ngrams")]
    | Annotated[LexiconConfig, Tag("kind lexicon")]
    | Annotated[ModelJudgeConfig, Tag("kind model")]
    | Annotated[UrlJudgeConfig, Tag("kind url")],
    Discriminator(
        _kind,
        custom_error_type="unknown_judge",
        custom_error_message="kind should be ngrams, lexicon, model or url",
    ),
]
"""The judge of a run; without `kind` it is one of n-grams."""
