"""A corpus read by a language model whose tokens are single characters."""

import json

import torch

from saelab.harvest import corpus as corpora
from saelab.harvest.corpus import CorpusConfig, CorpusReport
from saelab.protocols import LanguageModel
from saelab.types import TokenRun


class Letters(LanguageModel):
    """A language model whose tokens are single characters; id = code point."""

    name = "letters"
    context = 64
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    adds_bos = False

    def __init__(self, **ids):
        vars(self).update(ids)

    def tokenize(self, texts):
        return [
            TokenRun(
                torch.tensor([ord(c) for c in text], dtype=torch.int64),
                torch.arange(len(text)),
                torch.arange(1, len(text) + 1),
            )
            for text in texts
        ]


def texts(n, length=40, seed=0):
    return [(f"{i:04d}" + "abcdefghij" * length)[: 20 + 7 * ((i + seed) % 12)] for i in range(n)]


def as_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in rows), encoding="utf-8")
    return str(path)


def as_lines(path, rows):
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def read(model=None, **fields):
    """All windows and the report; fields override a small default."""
    options = {"tokens": 1000, "context": 16, "min_tail": 5, "sample_by": "line", "holdout": 0.3}
    report = CorpusReport()
    config = CorpusConfig.parse(options | fields)
    return list(corpora.windows(config, model or Letters(), report)), report
