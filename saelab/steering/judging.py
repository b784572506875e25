"""Where the evaluators' judges learn, and how they are validated.

A judge that learnt from the corpus that chose latents and directions shares that corpus's habits.
It is therefore trained on another one, without the texts that both hold. Without another corpus it
learns from one half of the held-out documents, and its name says so.
"""

import logging
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool
from pydantic import PositiveInt
from torch import Tensor

from saelab import assets
from saelab.config import Config
from saelab.edits.placement import Steerable
from saelab.errors import ConfigError, nearest
from saelab.harvest.sources import Request, records
from saelab.labels import Labelled
from saelab.protocols import LabelledStore, Store
from saelab.stats import auc
from saelab.steering.judges import LexiconJudge, NgramJudge, Validation, validate
from saelab.steering.sweep import continuations

log = logging.getLogger(__name__)

_HEAD = 12
"""Words of a held-out document that an unsteered generation continues."""
_VALIDATED = 64
"""Documents that are continued to validate a judge, at most."""
_HALF = "held-out half"
_HELD = 5
"""One in so many texts of a judge's corpus is left out of its lesson, to see what it learnt."""


class JudgeConfig(Config):
    """Another labelled corpus, on which the judges learn."""

    source: str
    """A named asset, `hub:org/name[:config][@revision]`, a file, folder or pattern."""
    label_field: str
    """Column of the labels."""
    text_field: str | None = None
    """Column of the text; by default `text`, or the only column that holds text."""
    labels: dict[str, str] = {}
    """What that corpus calls each concept; by default the same."""
    texts: PositiveInt = 20_000
    """Texts that are read, at most."""

    def __hash__(self) -> int:
        return hash((self.source, self.label_field))


@dataclass(frozen=True)
class JudgeCorpus:
    """Labelled texts that have nothing to do with a store."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    n_shared: int
    """Texts that were left out, since the store holds them too."""

    def part(self, label: str, *, held: bool) -> tuple[list[str], Bool[Tensor, " n"]]:
        """Return the texts that teach, or every fifth, which does not, and which have a label."""
        own = [i for i in range(len(self.texts)) if (i % _HELD == 0) == held]
        positive = torch.tensor([self.labels[i] == label for i in own])
        return [self.texts[i] for i in own], positive


def read_corpus(config: JudgeConfig, known: Iterable[str]) -> JudgeCorpus:
    """Read a judge's corpus without the texts that are known; letters and digits decide.

    Raises AssetError or CorpusError if it cannot be read.
    """
    taken = set(map(_letters, known))
    texts: list[str] = []
    labels: list[str] = []
    n_shared = 0
    request = Request(
        config.source, "train", config.text_field, config.label_field, "line", streaming=True
    )
    for record in records(request):
        if len(texts) == config.texts:
            break
        if _letters(record.text) in taken:
            n_shared += 1
        elif record.label is not None and record.text.strip():
            texts.append(record.text)
            labels.append(str(record.label))
    return JudgeCorpus(tuple(texts), tuple(labels), n_shared)


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text.lower())


def rated_lexicon(
    *, positive: bool = True, source: str = "rated-words", least: float = 1.0
) -> LexiconJudge:
    """Return the judge that counts words that people rated above `least`, or below its opposite.

    `source` has a word and its mean rating in each line, between tabs, as VADER's lexicon has.
    Words that begin with a shorter one of four letters or more are its forms. Raises AssetError if
    it cannot be had.
    """
    text = assets.resolve(source, "text").path.read_text(encoding="utf-8", errors="replace")
    rated = (line.split("\t")[:2] for line in text.splitlines() if "\t" in line)
    side = 1 if positive else -1
    words = sorted({word for word, mean in rated if word.isalpha() and side * float(mean) > least})
    lemmas: dict[str, list[str]] = {}
    lemma = ""
    for word in words:
        if len(lemma) >= 4 and word.startswith(lemma):
            lemmas[lemma].append(word)
        else:
            lemma = word
            lemmas[lemma] = []
    name = "positive" if positive else "negative"
    return LexiconJudge(lemmas, source=f"{source}, {name}")


@dataclass(frozen=True)
class Panel:
    """Judges of the concepts that are not steered by, for side effects."""

    judges: Sequence[NgramJudge]
    validation: Validation
    """Of the worst of them."""


@final
class Judges:
    """The judges of a store's labels, each trained once."""

    def __init__(
        self, labelled: Labelled, config: JudgeConfig | None, known: Iterable[str]
    ) -> None:
        """Read the corpus on which they learn, if there is one, without the texts that the store
        holds, which are `known`. `labelled` is in halves."""
        self._labelled, self._config = labelled, config
        self._trained: dict[tuple[int, bool], NgramJudge] = {}
        self._validated: dict[Hashable, Validation] = {}
        self._corpus: JudgeCorpus | None = None
        if config is not None:
            self._corpus = read_corpus(config, known)
            log.info(
                "judges learn from %d texts of %s; %d more lie in the store and were left out",
                len(self._corpus.texts), config.source, self._corpus.n_shared,
            )  # fmt: skip

    def of(self, place: int) -> NgramJudge:
        """Return the judge of a label. Raises ConfigError if its corpus does not know the label."""
        return self._judge(place, elsewhere=self._corpus is not None)

    def of_others(
        self, places: Sequence[int], model: Steerable, *, new_tokens: int, seed: int
    ) -> Panel | None:
        """Return judges of other labels, validated; None without one.

        They learn from the held-out half: another corpus need not know these labels.
        """
        if not places:
            return None
        found = [
            self._validation(place, model, elsewhere=False, new_tokens=new_tokens, seed=seed)
            for place in places
        ]
        judges = [self._judge(place, elsewhere=False) for place in places]
        return Panel(judges, Validation.of_all(found))

    def _judge(self, place: int, *, elsewhere: bool) -> NgramJudge:
        if (place, elsewhere) not in self._trained:
            texts, positive, name = self._lesson(place, elsewhere=elsewhere)
            self._trained[place, elsewhere] = NgramJudge(texts, positive, corpus=name)
        return self._trained[place, elsewhere]

    def _lesson(
        self, place: int, *, elsewhere: bool
    ) -> tuple[Sequence[str], Bool[Tensor, " n"], str]:
        if not elsewhere:
            half = self._labelled.parts["choose"]
            return half.texts, half.targets[:, place], _HALF
        assert self._config is not None and self._corpus is not None
        label = self.called(place)
        known = set(self._corpus.labels)
        if label not in known:
            raise ConfigError(
                f"steering.judge: {self._config.source} has no text with the label {label!r}, on "
                f"which a judge of {self._labelled.classes[place]!r} could learn; "
                f"{nearest(label, sorted(known))}. Say what it calls each concept in "
                "steering.judge.labels, or choose other steering.concepts"
            )
        texts, positive = self._corpus.part(label, held=False)
        return texts, positive, self._config.source

    def called(self, place: int) -> str:
        """Return what the judge calls a label."""
        name = self._labelled.classes[place]
        return name if self._config is None else self._config.labels.get(name, name)

    def validated(self, place: int, model: Steerable, *, new_tokens: int, seed: int) -> Validation:
        """Return a judge's AUROC on held-out documents that it did not learn from, and on what the
        unsteered model writes after the first words of some, half of them with the label."""
        elsewhere = self._corpus is not None
        found = self._validation(
            place, model, elsewhere=elsewhere, new_tokens=new_tokens, seed=seed
        )
        if self._corpus is None:
            return found
        own, positive = self._corpus.part(self.called(place), held=True)
        return replace(found, own_auroc=auc(self.of(place)(own), positive))

    def _validation(
        self, place: int, model: Steerable, *, elsewhere: bool, new_tokens: int, seed: int
    ) -> Validation:
        """Return how well a judge does on text of the store, each found once."""
        key = (place, elsewhere, model.fingerprint, new_tokens, seed)
        if key not in self._validated:
            texts, truth = self._unseen(place, elsewhere=elsewhere)
            drawn = _stratified(truth, _VALIDATED, seed)
            heads = [" ".join(texts[i].split()[:_HEAD]) for i in drawn]
            written = continuations(
                model, heads, max_new_tokens=new_tokens, temperature=1.0, seed=seed
            )
            judge = self._judge(place, elsewhere=elsewhere)
            self._validated[key] = validate(judge, (texts, truth), (written.texts, truth[drawn]))
        return self._validated[key]

    def _unseen(self, place: int, *, elsewhere: bool) -> tuple[list[str], Bool[Tensor, " n"]]:
        """Return the documents to validate on: with another corpus all held-out ones, of labels
        that it tells apart where there are two."""
        parts = self._labelled.parts
        if not elsewhere:
            return list(parts["test"].texts), parts["test"].targets[:, place]
        assert self._corpus is not None
        texts = [*parts["test"].texts, *parts["choose"].texts]
        targets = torch.cat([parts["test"].targets, parts["choose"].targets])
        known = set(self._corpus.labels)
        told = torch.tensor([self.called(i) in known for i in range(targets.shape[1])])
        kept = targets[:, told].any(1) if int(told.sum()) > 1 else torch.ones(len(texts)).bool()
        some = [text for text, keep in zip(texts, kept.tolist(), strict=True) if keep]
        return some, targets[kept, place]


def _stratified(positive: Bool[Tensor, " n"], n: int, seed: int) -> list[int]:
    """Return places drawn at random, half of `n` on each side, or all where a side has fewer."""
    generator = torch.Generator().manual_seed(seed)
    sides = [side.nonzero()[:, 0] for side in (positive, ~positive)]
    drawn = [one[torch.randperm(len(one), generator=generator)[: n // 2]] for one in sides]
    return torch.cat(drawn).tolist()


def judges_of(store: Store, labelled: Labelled, config: JudgeConfig | None) -> Judges:
    """Return the judges of a store's labels; where they learn elsewhere, from no text of it."""
    assert isinstance(store, LabelledStore)  # its documents have labels
    known = (store.document(number).text for number in range(store.n_documents))
    return Judges(labelled, config, known)
