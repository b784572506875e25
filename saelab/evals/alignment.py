"""Rows of several stores that stand at the same place of the same text, whatever the tokenizers.

A causal model's activation at a token is a function of the text up to that token's end. Two rows
stand at the same place if they are of the same document (by the hash of its text) and end at the
same character; how far left each token begins does not matter. The place of a row is that pair.

*No place* have rows without text (BOS, EOS) and, where a character is written as several tokens,
all but the last of these: the others have read only a part of it. So with one tokenizer all rows of
text align, up to such parts; with two, those at which both end a token. What is not compared is
where a row's window begins: a later window of a document holds the same text as another model's
only from about there on, and `packing: document` with a short context keeps the difference small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelab.errors import ArtifactError
from saelab.evals.similarity import Kept
from saelab.protocols import Split
from saelab.types import Document, TokenTable

LEAST_SHARED = 0.5
"""Share of the smallest store's documents that all stores must have."""
LEAST_ALIGNED = 0.1
"""Share of the fewest rows in the shared documents that must align."""


@runtime_checkable
class Located(Protocol):
    """A store that knows where in the text its rows stand."""

    n_rows: int
    n_documents: int

    def kept_rows(self, site: str, *, split: Split = "all") -> Int[Tensor, " n"]:
        """Return the row numbers that the site's mask keeps, ascending."""
        ...

    def table(self, refs: Int[Tensor, " n"]) -> TokenTable:
        """Return where these rows came from; `refs` ascend."""
        ...

    def document(self, number: int) -> Document:
        """Return one document with the hash of its text."""
        ...


@dataclass(frozen=True)
class Alignment:
    """Rows of several stores that stand at the same places, by the first one's documents."""

    rows: Int[Tensor, "stores n"]
    """Row numbers: column j of every store is the same place."""
    documents: Int[Tensor, " n"]
    """Document number of each place in the first store: the unit of the bootstrap."""
    hashes: tuple[str, ...]
    """Hash of each document of the first store, by number."""
    n_shared: int
    """Documents that all stores have."""


def align(stores: Sequence[Located], sites: Sequence[str]) -> Alignment:
    """Return the places that the masks of all stores keep; `sites[i]` is a site of store i.

    Raises ArtifactError, saying how many are shared, if fewer than half of the smallest store's
    documents are in all of them, or if fewer than a tenth of their rows end at the same characters.
    """
    known = [[s.document(i).hash for i in range(s.n_documents)] for s in stores]
    common = set(known[0]).intersection(*known[1:])
    sizes = [len(hashes) for hashes in known]
    if len(common) < LEAST_SHARED * min(sizes) or not common:
        raise ArtifactError(
            f"the stores share {len(common)} documents, of {' and '.join(map(str, sizes))}: to be "
            f"compared they should hold the same text, at least {LEAST_SHARED:.0%} of the "
            "smallest's. Harvest them from one corpus, with equal `corpus.tokens` and `shuffle`"
        )
    number = {text: place for place, text in enumerate(known[0]) if text in common}
    places = [
        _places(store, site, torch.tensor([number.get(text, -1) for text in hashes]))
        for store, site, hashes in zip(stores, sites, known, strict=True)
    ]
    found = places[0]
    for other in places[1:]:
        found = _Places(*(column[torch.isin(found.keys, other.keys)] for column in found.columns))
    fewest = min(len(some.keys) for some in places)
    if len(found.keys) < LEAST_ALIGNED * fewest or not len(found.keys):
        raise ArtifactError(
            f"of {fewest} rows in the {len(common)} documents that the stores share, only "
            f"{len(found.keys)} end at the same character: these texts cannot be aligned by "
            "character spans. Were they harvested with another tokenizer's spans, or from arrays, "
            "which have none?"
        )
    rows = [some.rows[torch.searchsorted(some.keys, found.keys)] for some in places]
    return Alignment(torch.stack(rows), found.documents, tuple(known[0]), len(common))


def place_keys(dictionary: Kept, store: Located) -> set[tuple[str, int]]:
    """Return the places (hash of the document, end in characters) of the rows that a dictionary
    kept from a store: comparable between models with other tokenizers. See `align` for rows that
    have no place; they are left out."""
    refs = dictionary.rows[dictionary.rows >= 0].cpu().sort().values
    table = store.table(refs)
    hashes = [store.document(int(number)).hash for number in table.document]
    ends = zip(hashes, table.char_end.tolist(), strict=True)
    return {end for end, whole in zip(ends, _has_place(store, refs).tolist(), strict=True) if whole}


@dataclass(frozen=True)
class _Places:
    """Rows with a place, by ascending key: equal keys of two stores are equal places."""

    keys: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]
    documents: Int[Tensor, " n"]

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.rows, self.documents


_CHARACTERS = 1 << 32


def _places(store: Located, site: str, numbers: Int[Tensor, " docs"]) -> _Places:
    """Return the kept rows with a place; `numbers` renumbers documents, −1 leaves them out."""
    rows = store.kept_rows(site)
    rows = rows[_has_place(store, rows)]
    table = store.table(rows)
    document = numbers[table.document.long()]
    keys = document * _CHARACTERS + table.char_end.long()
    inside = document >= 0
    keys, order = keys[inside].sort()
    return _Places(keys, rows[inside][order], document[inside][order])


def _has_place(store: Located, refs: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether rows have text, and no later row of the document ends at the same character."""
    table, after = store.table(refs), store.table((refs + 1).clamp(max=store.n_rows - 1))
    has_text = table.char_end > table.char_start
    goes_on = (after.document == table.document) & (after.char_end == table.char_end)
    goes_on &= (after.char_end > after.char_start) & (refs + 1 < store.n_rows)
    return has_text & ~goes_on
