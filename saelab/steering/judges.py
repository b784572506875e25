"""Judges of a concept's presence. They read text only, and each says what it is.

A judge never sees activations, edits or which arm a text is from. Its scores are comparable within
one judge and between no two: a result row names its judge. A text that a judge gives no answer for
is missing (NaN), never 0.
"""

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.edits.placement import encode_prompts
from saelab.errors import ConfigError
from saelab.protocols import LanguageModel
from saelab.stats import auc
from saelab.steering.sweep import text_logits

_SPARE = 4
"""Tokens left free for BOS, and for what text and question make where they meet."""
MIN_AUROC = 0.8
"""A judge below this on held-out text or on unsteered generations is unvalidated."""


@runtime_checkable
class Judge(Protocol):
    """Says how much of a concept there is in each text."""

    @property
    def name(self) -> str:
        """What it is, for result rows."""
        ...

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Return a score in [0, 1] for each text; NaN where there is no answer."""
        ...


# ---------------------------------------------------------------------------------- on this machine


@final
class NgramJudge:
    """A logistic regression on the TF-IDF of word and character n-grams; scores are chances.

    Train it on another corpus than the one that chose latents and directions.
    """

    def __init__(self, texts: Sequence[str], positive: Bool[Tensor, " n"], *, corpus: str) -> None:
        """Learn the concept from labelled texts of a corpus, whose name is kept.

        Raises ConfigError unless there are texts of both kinds.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline, make_union

        if len(texts) != len(positive) or len(set(positive.tolist())) < 2:
            raise ConfigError(
                f"a judge learns from texts with and without the concept, each labelled, but "
                f"{len(texts)} texts came with {len(positive)} labels, {int(positive.sum())} of "
                "them positive"
            )
        grams = make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
        )
        regression = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
        self._model: Any = make_pipeline(grams, regression)
        self._model.fit(list(texts), positive.numpy())
        self.name = f"ngrams({corpus})"

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Return the chance that each text has the concept."""
        return torch.from_numpy(self._model.predict_proba(list(texts))[:, 1]).float()


@final
class LexiconJudge:
    """Counts distinct lemmas of an external list, up to 3 per text; the score is their third."""

    at_most = 3

    def __init__(self, lemmas: Mapping[str, Sequence[str]], *, source: str) -> None:
        """Take each lemma with the forms in which it occurs, and the name of the list."""
        self._source = source
        self._lemma = {
            form.lower(): lemma for lemma, forms in lemmas.items() for form in (lemma, *forms)
        }
        self.name = f"lexicon({source})"

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Return min(distinct lemmas, 3) / 3 of each text."""
        counts = [
            len({self._lemma[word] for word in _words(text) if word in self._lemma})
            for text in texts
        ]
        return torch.tensor(counts).clamp(max=self.at_most) / self.at_most

    def without(self, tokens: Sequence[str]) -> "LexiconJudge":
        """Return the judge that ignores lemmas with a form among these tokens.

        For a second score without the latent's 20 top logit tokens: what is left is not just the
        words that the direction writes into the logits.
        """
        shown = {token.strip().lower() for token in tokens}
        gone = {self._lemma[form] for form in shown if form in self._lemma}
        kept: dict[str, list[str]] = {}
        for form, lemma in self._lemma.items():
            if lemma not in gone:
                kept.setdefault(lemma, []).append(form)
        return LexiconJudge(kept, source=f"{self._source}, without {len(gone)} shown")


@final
class ModelJudge:
    """A local language model's odds of yes against no, after a question about the text."""

    def __init__(
        self, model: LanguageModel, question: str, *, yes: str = " yes", no: str = " no"
    ) -> None:
        """Take the model and a question, in which `{text}` stands for the text."""
        if "{text}" not in question:
            raise ConfigError(f"the question should say where the text goes ({{text}}): {question}")
        self._model, self._question = model, question
        self._yes, self._no = (int(run.ids[0]) for run in model.tokenize([yes, no]))
        if self._yes == self._no:
            raise ConfigError(f"{yes!r} and {no!r} begin with one token; take other answers")
        self.name = f"model({model.name})"

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Return the chance of yes against no for each text, of which as much is read as fits."""
        asked = [self._question.replace("{text}", text) for text in self._fitting(texts)]
        tokens, lengths = encode_prompts(self._model, asked)
        last = torch.stack([row[-1] for row in text_logits(self._model, tokens, lengths)])
        return (last[:, self._yes] - last[:, self._no]).sigmoid()

    def _fitting(self, texts: Sequence[str]) -> list[str]:
        """Return the beginnings of texts that fit into the model's context with the question."""
        (question,) = self._model.tokenize([self._question.replace("{text}", "")])
        room = max(self._model.context - len(question) - _SPARE, 1)
        runs = self._model.tokenize(texts)
        return [
            text[: int(run.end[room - 1])] if len(run) > room else text
            for text, run in zip(texts, runs, strict=True)
        ]


# ------------------------------------------------------------------------------------------ by URL


Post = Callable[[urllib.request.Request, float], bytes]
"""Sends a request with a timeout in seconds and returns the answer's body."""


def _post(request: urllib.request.Request, timeout: float) -> bytes:
    with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310 (scheme checked)
        return answer.read()


@final
class UrlJudge:
    """Any server with OpenAI's chat completions: it is asked for a number from 0 to 2.

    A request that fails, or whose answer holds no such number, is repeated; after the last try the
    text is missing.
    """

    top = 2

    def __init__(
        self,
        url: str,
        model: str,
        question: str,
        *,
        key: str | None = None,
        tries: int = 3,
        timeout: float = 60.0,
        pause: Callable[[float], None] = time.sleep,
        post: Post = _post,
    ) -> None:
        """Take the server's base URL, a model's name, and a question with `{text}` in it.

        `key` goes into the requests' authorisation and nowhere else. Raises ConfigError for a URL
        that is not http(s), or a question without a place for the text.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"a judge's URL should begin with http:// or https://, but is {url}")
        if "{text}" not in question:
            raise ConfigError(f"the question should say where the text goes ({{text}}): {question}")
        self._url = url.rstrip("/") + "/chat/completions"
        self._model, self._question, self._key = model, question, key
        self._tries, self._timeout, self._pause, self._post = tries, timeout, pause, post
        self.name = f"url({model})"

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Return each text's answer over 2; NaN where there is none after all tries."""
        return torch.tensor([self._ask(text) for text in texts])

    def _ask(self, text: str) -> float:
        message = {"role": "user", "content": self._question.replace("{text}", text)}
        body = {"model": self._model, "messages": [message], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        for attempt in range(self._tries):
            if attempt:
                self._pause(2.0 ** (attempt - 1))
            request = urllib.request.Request(  # noqa: S310 (scheme checked)
                self._url, json.dumps(body).encode(), headers
            )
            try:
                said = json.loads(self._post(request, self._timeout))
                content = said["choices"][0]["message"]["content"]
            except (
                OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError
            ):  # fmt: skip
                continue  # an answer that did not come whole is asked for again
            number = re.search(r"(?<![\d.])[0-2](?:\.\d+)?(?!\d)", str(content))
            if number and float(number[0]) <= self.top:
                return float(number[0]) / self.top
        return math.nan


# -------------------------------------------------------------------------------------- validation


@dataclass(frozen=True)
class Validation:
    """How well a judge tells labelled texts apart that no edit has touched."""

    judge: str
    heldout_auroc: float
    generated_auroc: float
    """On unsteered generations that continue texts with and without the concept. Either is NaN
    where the judge answers for no text of one side."""
    own_auroc: float | None = None
    """On texts of the corpus that it learnt from, left out of the lesson; None where that is the
    corpus of the held-out texts."""

    @property
    def validated(self) -> bool:
        """Whether both are known and at least .8; rows of other judges are marked."""
        return all(area >= MIN_AUROC for area in (self.heldout_auroc, self.generated_auroc))

    @classmethod
    def of_all(cls, several: Sequence["Validation"]) -> "Validation":
        """Return what holds of several judges of one name: the least area of each kind, NaN where
        one is."""
        areas = torch.tensor(
            [[one.heldout_auroc, one.generated_auroc] for one in several], dtype=torch.float64
        )
        return cls(several[0].judge, *areas.amin(0).tolist())


def validate(
    judge: Judge,
    heldout: tuple[Sequence[str], Bool[Tensor, " n"]],
    generated: tuple[Sequence[str], Bool[Tensor, " m"]],
) -> Validation:
    """Return a judge's AUROC on held-out texts and on unsteered generations, with their labels."""
    first, second = (_auroc(judge, *texts) for texts in (heldout, generated))
    return Validation(judge.name, first, second)


def _auroc(judge: Judge, texts: Sequence[str], positive: Bool[Tensor, " n"]) -> float:
    scores = judge(texts)
    known = ~scores.isnan()
    return auc(scores[known], positive[known])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())
