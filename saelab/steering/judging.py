"""How the evaluators' judges are made, where they learn, and how they are validated.

A judge is of a kind (`judge_configs`). One of n-grams that learnt from the corpus that chose
latents and directions shares that corpus's habits. It is therefore trained on another one, without
the texts that both hold. Without another corpus it learns from one half of the held-out documents,
and its name says so. Other kinds learn nothing here. Beside whichever is chosen stands a lexicon,
where there is one of the concept.
"""

import logging
import os
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab import assets
from saelab.edits.placement import Steerable
from saelab.errors import AssetError, ConfigError, nearest
from saelab.harvest.sources import Request, records
from saelab.labels import Labelled
from saelab.protocols import LabelledStore, LanguageModel, Store
from saelab.stats import auc
from saelab.steering.judge_configs import (
    RATED,
    JudgeConfig,
    LexiconConfig,
    ModelJudgeConfig,
    NgramsConfig,
    UrlJudgeConfig,
)
from saelab.steering.judges import (
    Judge,
    LexiconJudge,
    ModelJudge,
    NgramJudge,
    UrlJudge,
    Validation,
    validate,
)
from saelab.steering.sweep import continuations

log = logging.getLogger(__name__)

_HEAD = 12
"""Words of a held-out document that an unsteered generation continues."""
_VALIDATED = 64
"""Documents that are continued to validate a judge, at most."""
_HALF = "held-out half"
_ASKED = 256
"""Held-out documents that a model or a server is asked about, at most, to validate it."""
_HELD = 5
"""One in so many texts of a judge's corpus is left out of its lesson, to see what it learnt."""

Texts = tuple[list[str], Bool[Tensor, " n"]]
"""Documents, and which of them have a label."""


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


def read_corpus(config: NgramsConfig, known: Iterable[str]) -> JudgeCorpus:
    """Read a judge's corpus without the texts that are known; letters and digits decide.

    Raises ConfigError if the configuration names none, AssetError or CorpusError if it cannot be
    read.
    """
    if config.source is None:
        raise ConfigError("there is no corpus to read: give the judge source and label_field")
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


def lexicon_of(config: LexiconConfig, name: str) -> LexiconJudge:
    """Return the judge that counts words of a concept, by what it calls the concept.

    Raises ConfigError if it has no words of it, AssetError if the list cannot be had.
    """
    if name in config.words:
        words = {word: () for word in config.words[name]}
        return LexiconJudge(words, source=f"words of {name}")
    if name not in RATED:
        raise ConfigError(
            f"steering.judge: a list of rated words knows {' and '.join(RATED)}, but not {name!r}: "
            "say in steering.judge.labels which of them a concept is, or give steering.judge.words"
        )
    return rated_lexicon(positive=name == RATED[0], source=config.source, least=config.least)


def _by_url(config: UrlJudgeConfig, name: str) -> UrlJudge:
    variable = config.key_variable
    if variable is not None and variable not in os.environ:
        raise ConfigError(
            f"steering.judge.key_variable: the environment has no variable {variable!r}; set it to "
            "the server's key, or leave key_variable out"
        )
    return UrlJudge(
        config.url, config.model, config.question.replace("{label}", name),
        key=None if variable is None else os.environ[variable],
        tries=config.tries, timeout=config.timeout,
    )  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """Judges of the concepts that are not steered by, for side effects."""

    judges: Sequence[NgramJudge]
    validation: Validation
    """Of the worst of them."""


@dataclass(frozen=True)
class Lexicon:
    """A lexicon of a concept, to read with beside the chosen judge."""

    judge: LexiconJudge
    validation: Validation
    is_chosen: bool
    """Whether it is the chosen judge itself."""


@final
class Judges:
    """The judges of a store's labels, each made once."""

    def __init__(
        self,
        labelled: Labelled,
        config: JudgeConfig,
        known: Iterable[str],
        asked: LanguageModel | None = None,
    ) -> None:
        """Read the corpus on which they learn, if there is one, without the texts that the store
        holds, which are `known`. `labelled` is in halves; `asked` is the model of a `model` judge.
        """
        self._labelled, self._config, self._asked = labelled, config, asked
        self._made: dict[int, Judge] = {}
        self._halves: dict[int, NgramJudge] = {}
        self._validated: dict[Hashable, Validation] = {}
        self._corpus: JudgeCorpus | None = None
        self._words = (
            config
            if isinstance(config, LexiconConfig)
            else LexiconConfig(kind="lexicon", labels=config.labels)
        )
        if isinstance(config, NgramsConfig) and config.source is not None:
            self._corpus = read_corpus(config, known)
            log.info(
                "judges learn from %d texts of %s; %d more lie in the store and were left out",
                len(self._corpus.texts), config.source, self._corpus.n_shared,
            )  # fmt: skip

    def called(self, place: int) -> str:
        """Return what the judge calls a label."""
        return self._config.called(self._labelled.classes[place])

    # ------------------------------------------------------------------------------- making them

    def of(self, place: int) -> Judge:
        """Return the chosen judge of a label. Raises ConfigError if it does not know the label."""
        if place not in self._made:
            self._made[place] = self._make(place)
        return self._made[place]

    def _make(self, place: int) -> Judge:
        config, name = self._config, self.called(place)
        if isinstance(config, LexiconConfig):
            return lexicon_of(config, name)
        if isinstance(config, UrlJudgeConfig):
            return _by_url(config, name)
        if isinstance(config, ModelJudgeConfig):
            assert self._asked is not None  # whoever makes judges has the model
            question = config.question.replace("{label}", name)
            yes, no = config.answers
            return ModelJudge(self._asked, question, yes=yes, no=no)
        return self._of_half(place) if self._corpus is None else self._of_corpus(place)

    def _of_half(self, place: int) -> NgramJudge:
        if place not in self._halves:
            half = self._labelled.parts["choose"]
            self._halves[place] = NgramJudge(half.texts, half.targets[:, place], corpus=_HALF)
        return self._halves[place]

    def _of_corpus(self, place: int) -> NgramJudge:
        assert isinstance(self._config, NgramsConfig) and self._config.source is not None
        assert self._corpus is not None
        label, known = self.called(place), set(self._corpus.labels)
        if label not in known:
            raise ConfigError(
                f"steering.judge: {self._config.source} has no text with the label {label!r}, on "
                f"which a judge of {self._labelled.classes[place]!r} could learn; "
                f"{nearest(label, sorted(known))}. Say what it calls each concept in "
                "steering.judge.labels, or choose other steering.concepts"
            )
        texts, positive = self._corpus.part(label, held=False)
        return NgramJudge(texts, positive, corpus=self._config.source)

    # --------------------------------------------------------------------------- validating them

    def validated(self, place: int, model: Steerable, *, new_tokens: int, seed: int) -> Validation:
        """Return the chosen judge's AUROC on held-out documents that it did not learn from, and on
        what the unsteered model writes after the first words of some, half of them with the label.
        """
        judge, unseen = self.of(place), self._unseen(place)
        found = self._validation(judge, place, unseen, model, new_tokens=new_tokens, seed=seed)
        if self._corpus is None:
            return found
        own, positive = self._corpus.part(self.called(place), held=True)
        return replace(found, own_auroc=auc(judge(own), positive))

    def lexicon(
        self, place: int, model: Steerable, *, new_tokens: int, seed: int
    ) -> Lexicon | None:
        """Return the lexicon of a label, validated; None where there is none, or none to be had."""
        name = self.called(place)
        if not self._words.knows(name):
            return None
        try:
            judge = lexicon_of(self._words, name)
        except AssetError as error:
            log.warning("steering: no rows of a lexicon of %r: %s", name, error)
            return None
        known = [self._words.knows(self.called(i)) for i in range(len(self._labelled.classes))]
        unseen = self._heldout(place, known)
        found = self._validation(judge, place, unseen, model, new_tokens=new_tokens, seed=seed)
        return Lexicon(judge, found, self._words is self._config)

    def of_others(
        self, places: Sequence[int], model: Steerable, *, new_tokens: int, seed: int
    ) -> Panel | None:
        """Return judges of other labels, validated; None without one.

        They learn from the held-out half: another corpus need not know these labels.
        """
        if not places:
            return None
        judges = [self._of_half(place) for place in places]
        found = [
            self._validation(
                judge, place, self._test_half(place), model, new_tokens=new_tokens, seed=seed
            )
            for judge, place in zip(judges, places, strict=True)
        ]
        return Panel(judges, Validation.of_all(found))

    def _validation(
        self,
        judge: Judge,
        place: int,
        unseen: Texts,
        model: Steerable,
        *,
        new_tokens: int,
        seed: int,
    ) -> Validation:
        """Return how well a judge does on text of the store, each found once."""
        key = (judge.name, place, model.fingerprint, new_tokens, seed)
        if key not in self._validated:
            texts, truth = unseen
            drawn = _stratified(truth, _VALIDATED, seed)
            heads = [" ".join(texts[i].split()[:_HEAD]) for i in drawn]
            written = continuations(
                model, heads, max_new_tokens=new_tokens, temperature=1.0, seed=seed
            )
            read = range(len(texts))
            if isinstance(judge, ModelJudge | UrlJudge):
                read = _stratified(truth, _ASKED, seed)
            heldout = ([texts[i] for i in read], truth[list(read)])
            self._validated[key] = validate(judge, heldout, (written.texts, truth[drawn]))
        return self._validated[key]

    def _unseen(self, place: int) -> Texts:
        """Return the documents to validate the chosen judge on."""
        if isinstance(self._config, NgramsConfig) and self._corpus is None:
            return self._test_half(place)
        names = [self.called(i) for i in range(len(self._labelled.classes))]
        if isinstance(self._config, LexiconConfig):
            return self._heldout(place, [self._config.knows(name) for name in names])
        known = None if self._corpus is None else set(self._corpus.labels)
        return self._heldout(place, [known is None or name in known for name in names])

    def _test_half(self, place: int) -> Texts:
        """Return the held-out documents that teach no judge."""
        test = self._labelled.parts["test"]
        return list(test.texts), test.targets[:, place]

    def _heldout(self, place: int, told: Sequence[bool]) -> Texts:
        """Return all held-out documents, of labels that a judge tells apart where there are two."""
        parts = self._labelled.parts
        texts = [*parts["test"].texts, *parts["choose"].texts]
        targets = torch.cat([parts["test"].targets, parts["choose"].targets])
        kept = torch.ones(len(texts), dtype=torch.bool)
        if sum(told) > 1:
            kept = targets[:, torch.tensor(told)].any(1)
        some = [text for text, keep in zip(texts, kept.tolist(), strict=True) if keep]
        return some, targets[kept, place]


def _stratified(positive: Bool[Tensor, " n"], n: int, seed: int) -> list[int]:
    """Return places drawn at random, half of `n` on each side, or all where a side has fewer."""
    generator = torch.Generator().manual_seed(seed)
    sides = [side.nonzero()[:, 0] for side in (positive, ~positive)]
    drawn = [one[torch.randperm(len(one), generator=generator)[: n // 2]] for one in sides]
    return torch.cat(drawn).tolist()


def judges_of(
    store: Store, labelled: Labelled, config: JudgeConfig, asked: LanguageModel
) -> Judges:
    """Return the judges of a store's labels; where they learn elsewhere, from no text of it."""
    assert isinstance(store, LabelledStore)  # its documents have labels
    known = (store.document(number).text for number in range(store.n_documents))
    return Judges(labelled, config, known, asked)
