"""Where a forward pass is in its texts, and models that edits can stand in."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ConfigError
from saelab.protocols import Edit, LanguageModel


@dataclass(frozen=True)
class Placement:
    """The positions of one forward pass: a whole text, or with a cache its newest tokens."""

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    """False for padding."""
    prompt: Bool[Tensor, "batch pos"]
    """Whether a position belongs to the prompt."""

    @classmethod
    def of_texts(
        cls,
        tokens: Int[Tensor, "batch pos"],
        lengths: Int[Tensor, " batch"] | None,
        prompt_lengths: Int[Tensor, " batch"] | None,
    ) -> "Placement":
        """Place right-padded texts; without lengths all is real, and all is prompt."""
        return cls(tokens, _first(tokens, lengths), _first(tokens, prompt_lengths))


def _first(
    tokens: Int[Tensor, "batch pos"], lengths: Int[Tensor, " batch"] | None
) -> Bool[Tensor, "batch pos"]:
    if lengths is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    return place < lengths.to(tokens.device)[:, None]


@runtime_checkable
class SiteEdits(Protocol):
    """Edits of sites that know at which positions they act; they say what they are as text."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are changed."""
        ...

    def apply(
        self, site: str, x: Float[Tensor, "batch pos d"], at: Placement
    ) -> Float[Tensor, "batch pos d"]:
        """Return a site's activations, edited."""
        ...


@runtime_checkable
class Steerable(LanguageModel, Protocol):
    """A language model in which edits can stand, and that continues texts and padded batches."""

    def steered(
        self, edits: SiteEdits, prompt_lengths: Int[Tensor, " batch"] | None = None
    ) -> AbstractContextManager[None]:
        """Let edits stand in every pass of this thread until the block ends; they nest.

        Raises NonFiniteError from a pass whose logits they make infinite.
        """
        ...

    def to_text(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special tokens."""
        ...

    @overload
    def generate(
        self, tokens: Int[Tensor, "batch pos"], *, max_new_tokens: int, temperature: float = 0.0,
        seed: int | Sequence[int] = 0, edits: Mapping[str, Edit] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Int[Tensor, "batch total"]: ...  # fmt: skip

    @overload
    def generate(
        self, tokens: str, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
        edits: Mapping[str, Edit] | None = None, lengths: None = None,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, tokens: list[str], *, max_new_tokens: int, temperature: float = 0.0,
        seed: int | Sequence[int] = 0, edits: Mapping[str, Edit] | None = None,
        lengths: None = None,
    ) -> list[str]: ...  # fmt: skip


def where_in_text(model: LanguageModel, pattern: str) -> Bool[Tensor, " d_vocab"]:
    """Return which tokens of the vocabulary have a text in which a regular expression is found."""
    found = re.compile(pattern)
    strings = model.to_strings(range(model.d_vocab))
    return torch.tensor([found.search(text) is not None for text in strings])


def encode_prompts(
    model: LanguageModel, texts: Sequence[str]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Return texts as right-padded tokens with BOS where the model has it, and their lengths.

    Raises ConfigError without a text.
    """
    if not texts:
        raise ConfigError("there is no text to tokenize; give one prompt or more")
    head = [model.bos_id] if model.adds_bos and model.bos_id is not None else []
    runs = [
        torch.tensor(head + run.ids.tolist(), dtype=torch.int64) for run in model.tokenize(texts)
    ]
    lengths = torch.tensor([len(run) for run in runs])
    tokens = torch.nn.utils.rnn.pad_sequence(runs, batch_first=True, padding_value=pad_of(model))
    return tokens, lengths


def pad_of(model: LanguageModel) -> int:
    """Return the token that padding is written with; what it is changes no real position."""
    return model.pad_id if model.pad_id is not None else (model.eos_id or 0)
