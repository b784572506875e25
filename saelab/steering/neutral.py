"""Neutral text: what an edit should leave alone, and at which of its positions losses count.

Text that steering should not touch has nothing to do with the concept. It is another corpus where
one is given, else held-out documents that have neither the concept's label nor its opposite's.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import torch
from jaxtyping import Bool, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from saelab.config import Config
from saelab.edits.placement import pad_of
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.forward import HarvestConfig
from saelab.harvest.online import OnlineStore
from saelab.protocols import LabelledStore, LanguageModel, Store
from saelab.types import Window

N_WINDOWS = 16


class NeutralConfig(Config):
    """A corpus that has nothing to do with any concept, and how much of it is read."""

    source: str
    """A named asset, `hub:org/name[:config][@revision]`, a file, folder or pattern."""
    text_field: str | None = None
    """Column of the text; by default `text`, or the only column that holds text."""
    windows: PositiveInt = N_WINDOWS
    """Windows that are read."""
    context: Annotated[int, Field(ge=2)] = 64
    """Length of a window, in tokens."""


@dataclass(frozen=True)
class Neutral:
    """Windows, right-padded."""

    name: str
    """What text it is."""
    tokens: Int[Tensor, "windows pos"]
    lengths: Int[Tensor, " windows"]
    scored: Bool[Tensor, "windows pos"]
    """Positions whose loss counts: their own activation is kept, and what follows is in the same
    document and not special."""


def corpus_windows(config: NeutralConfig, model: LanguageModel, site: str) -> Neutral:
    """Return the first windows of a corpus, masked at a site as a harvest masks them.

    Raises AssetError or CorpusError if it cannot be read or holds less text than that.
    """
    corpus = CorpusConfig(
        source=config.source, text_field=config.text_field, context=config.context, holdout=0,
        min_tail=config.context, tokens=config.windows * config.context,
    )  # fmt: skip
    store = OnlineStore(model, corpus, HarvestConfig.parse({"sites": [site]}))
    return _neutral(config.source, list(store.windows(site)), model)


def windows_without(
    store: LabelledStore,
    site: str,
    model: LanguageModel,
    labels: Collection[str],
    n: int = N_WINDOWS,
) -> Neutral | None:
    """Return the first held-out windows of documents that have none of these labels, or none at
    all; None where there is no such document."""
    windows = (
        window
        for window in store.windows(site, split="heldout")
        if str(store.document(int(window.document[0])).label) not in labels
    )
    found = list(islice(windows, n))
    return _neutral("held-out text of other labels", found, model) if found else None


def heldout_windows(store: Store, site: str, model: LanguageModel, n: int = N_WINDOWS) -> Neutral:
    """Return the first held-out windows of a store, whatever they are about."""
    windows = list(store.windows(site, split="heldout", limit=n))
    return _neutral("held-out text", windows, model)


def _neutral(name: str, windows: Sequence[Window], model: LanguageModel) -> Neutral:
    lengths = torch.tensor([len(window) for window in windows])
    tokens = torch.full((len(windows), int(lengths.max())), pad_of(model))
    scored = torch.zeros(tokens.shape, dtype=torch.bool)
    special = torch.tensor(sorted(model.special_ids), dtype=torch.int64)
    for i, window in enumerate(windows):
        ids, n = window.ids.long(), len(window)
        tokens[i, :n] = ids
        same = window.document[1:] == window.document[:-1]
        scored[i, : n - 1] = window.kept[:-1] & same & ~torch.isin(ids[1:], special)
    return Neutral(name, tokens, lengths, scored)
