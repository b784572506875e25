"""Values as they stand in the tables of the index."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from saelab.config import canonical_json
from saelab.types import Window


def window_row(window: Window) -> tuple[Any, ...]:
    """Return a window as a row: number, split, and as JSON strings, documents, masked positions."""
    documents = window.document
    changes = [0, *((documents.diff() != 0).nonzero().squeeze(1) + 1).tolist()]
    return (
        window.number,
        int(window.heldout),
        canonical_json(list(window.strings)),
        canonical_json([[int(documents[at]), at] for at in changes]),
        canonical_json((~window.kept).nonzero().squeeze(1).tolist()),
    )


def word(token: str) -> str:
    """Return a token for a gist: without the spaces around, line ends as a mark."""
    return token.strip(" ").replace("\n", "↵") or "␣"


def short(value: float) -> float:
    """Return six significant digits: what a page can show."""
    return float(f"{value:.6g}")


def shorts(values: Float[Tensor, " n"]) -> list[float]:
    """Return several values in short."""
    return [short(v) for v in values.tolist()]


def pairs(ids: list[int], values: list[float]) -> list[list[Any]]:
    """Return [id, value in short] pairs."""
    return [[i, short(v)] for i, v in zip(ids, values, strict=True)]


def named(
    ids: Int[Tensor, " n"], values: Float[Tensor, " n"], names: dict[int, str]
) -> list[list[Any]]:
    """Return [token's text, value in short] pairs."""
    return [[names[i], short(v)] for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
