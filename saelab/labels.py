"""Which documents of a store are labelled, and how they are divided for choosing and for scoring.

A document's split is the store's. Which documents are taken where there are more than needed is
decided by other digits of its hash, and so is which half of the held-out ones a document belongs
to: by those of its text, or of what is divided as a whole (`corpus.split_field`), so that a film's
reviews lie in one part. It depends on nothing else. Classes with too few documents in any part are
left out with all their documents, and counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ConfigError, CorpusError
from saelab.protocols import LabelledStore, Store
from saelab.types import Document

Division = Literal["train", "split", "halves"]
"""Which parts there are: training documents; those and held-out ones; or these in two halves."""
LabelOf = Callable[[Document], str | int | float | None]
"""Gives a document its label; None: it has none, and is left out."""


@dataclass(frozen=True)
class Part:
    """Documents that are used for one purpose."""

    documents: Int[Tensor, " n"]
    """Their numbers, ascending."""
    targets: Bool[Tensor, "n classes"]
    """Which of the classes each belongs to: exactly one."""
    texts: tuple[str, ...]

    def where(self, seen: Bool[Tensor, " n"]) -> "Part":
        """Return these of the documents."""
        texts = tuple(text for text, kept in zip(self.texts, seen.tolist(), strict=True) if kept)
        return Part(self.documents[seen], self.targets[seen], texts)


@dataclass(frozen=True)
class Labelled:
    """The documents of a store that have one of the classes."""

    classes: tuple[str, ...]
    """Labels, as text, in order."""
    parts: Mapping[str, Part]
    """By purpose: `train`; `train` and `test`; or `train`, `choose` and `test`."""
    classes_left_out: int
    documents_left_out: int
    """Documents without a label, or of a class that was left out."""


def documents_of(store: Store) -> Iterator[Document]:
    """Yield a store's documents. Raises ConfigError if it has none, or some that share windows."""
    if not isinstance(store, LabelledStore):
        raise ConfigError(
            f"labels come from a store's documents, but {type(store).__name__} has none: harvest "
            "a corpus with corpus.label_field."
        )
    for number in range(store.n_documents):
        document = store.document(number)
        if document.group not in (None, number):
            raise ConfigError(
                f"documents {document.group} and {number} share a window, so that the one's "
                "activations tell of the other: harvest with corpus.packing: document."
            )
        yield document


def labelled_documents(
    store: Store,
    division: Division,
    *,
    at_most: int | None,
    per_class: int,
    label_of: LabelOf = lambda document: document.label,
) -> Labelled:
    """Return up to `at_most` labelled documents of each split, by default all.

    A class is kept if each part has `per_class` documents of it. Raises ConfigError if the store
    has no labels, documents that share windows, or fewer than two such classes.
    """
    found, n_unlabelled = _by_part(store, division, at_most, label_of)
    counts = {name: Counter(str(d.label) for d in part) for name, part in found.items()}
    names = sorted(set().union(*counts.values()))
    classes = [c for c in names if min(count[c] for count in counts.values()) >= per_class]
    if len(classes) < 2:
        raise ConfigError(_too_few(classes, names, counts, per_class))
    kept = {
        name: sorted((d for d in part if str(d.label) in classes), key=lambda d: d.number)
        for name, part in found.items()
    }
    n_dropped = sum(map(len, found.values())) - sum(map(len, kept.values()))
    return Labelled(
        tuple(classes),
        {name: _part(part, classes) for name, part in kept.items()},
        len(names) - len(classes),
        n_dropped + n_unlabelled,
    )


def seen_only(part: Part, seen: Bool[Tensor, " n"], labelled: Labelled, site: str) -> Part:
    """Return the documents that have rows. Raises CorpusError if a label is left with none."""
    kept = part.where(seen)
    for name, n in zip(labelled.classes, kept.targets.sum(0).tolist(), strict=True):
        if n == 0:
            raise CorpusError(
                f"no document with the label {name!r} keeps a row at {site} in one of the parts: "
                "the site's mask leaves them out; take more text, or a larger per_label."
            )
    return kept


def _too_few(
    classes: list[str], names: list[str], counts: Mapping[str, Counter[str]], per_class: int
) -> str:
    if not names:
        return "none of the store's documents has a label: harvest with corpus.label_field."
    smallest = ", ".join(f"{sum(count.values())} {part}" for part, count in counts.items())
    came = f"only {classes[0]!r} has" if classes else f"none of {len(names)} has"
    return (
        f"telling classes apart needs two labels with {per_class} documents in each part, but "
        f"{came} as many ({smallest} documents): take more text, another corpus.label_field, or "
        "a smaller per_label."
    )


def _by_part(
    store: Store, division: Division, at_most: int | None, label_of: LabelOf
) -> tuple[dict[str, list[Document]], int]:
    """Return the labelled documents of each part, those with the smallest hashes, and how many
    documents of the store have no label."""
    sides: dict[bool, list[Document]] = {False: [], True: []}
    n_unlabelled = 0
    for document in documents_of(store):
        label = label_of(document)
        if label is None:
            n_unlabelled += 1
        else:
            sides[document.heldout].append(replace(document, label=label))
    train, heldout = (sorted(d, key=lambda d: d.hash[8:24])[:at_most] for d in sides.values())
    if division == "train":
        return {"train": train}, n_unlabelled
    if division == "split":
        return {"train": train, "test": heldout}, n_unlabelled
    halves: dict[bool, list[Document]] = {False: [], True: []}
    for document in heldout:
        halves[int(document.decisive_hash[24:32], 16) % 2 == 1].append(document)
    return {"train": train, "choose": halves[False], "test": halves[True]}, n_unlabelled


def _part(documents: list[Document], classes: list[str]) -> Part:
    places = torch.tensor([classes.index(str(d.label)) for d in documents])
    return Part(
        torch.tensor([d.number for d in documents]),
        torch.nn.functional.one_hot(places, len(classes)).bool(),
        tuple(d.text for d in documents),
    )


def word_shares(
    texts: Mapping[str, tuple[str, ...]], n_words: int
) -> tuple[tuple[str, ...], dict[str, Float[Tensor, "n words"]]]:
    """Return the commonest words of the training texts, and each word's share of each text.

    A word is two letters or more, in lower case; common is what many training texts hold.
    """
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer

    seen = CountVectorizer(binary=True)
    try:
        held = np.asarray(sparse.csr_matrix(seen.fit_transform(texts["train"])).sum(0)).ravel()
    except ValueError:  # not a single word
        return (), {part: torch.zeros(len(mine), 0) for part, mine in texts.items()}
    words = seen.get_feature_names_out()
    best = sorted(range(len(words)), key=lambda i: (-held[i], words[i]))[:n_words]
    vocabulary = tuple(str(words[i]) for i in best)
    counter, total = CountVectorizer(vocabulary=vocabulary), seen.build_analyzer()
    found = {}
    for part, mine in texts.items():
        counts = torch.from_numpy(counter.transform(mine).toarray()).float()
        lengths = torch.tensor([max(len(total(text)), 1) for text in mine])
        found[part] = counts / lengths[:, None]
    return vocabulary, found
