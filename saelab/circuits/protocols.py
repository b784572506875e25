"""What circuits ask of a model beyond `saelab.protocols.LanguageModel`."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from saelab.protocols import Edit, LanguageModel
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


@runtime_checkable
class PatchableModel(LanguageModel, Protocol):
    """A model that can go on from the middle, which makes patching cheap."""

    n_heads: int

    def remember(self, tokens: Int[Tensor, "batch pos"]) -> Any:
        """Return the keys and values of a prompt's beginning, for `resume`; it is not changed."""
        ...

    def resume(
        self,
        resid: Float[Tensor, "rows pos d_model"],
        layer: int,
        edits: Mapping[str, Edit] | None = None,
        past: Any = None,
    ) -> Float[Tensor, "rows d_vocab"]:
        """Return the float32 logits at the last position, from the stream that enters a block.

        Only blocks from `layer` on are run, and of the positions only those of `resid`; they attend
        to those of `past` before them. Each of its rows stands for equally many rows of `resid`.
        """
        ...
