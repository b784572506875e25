"""Runs' folders for the app's tests, made by hand on a toy model."""

import json
import random
from pathlib import Path

import torch

from saelab import artifacts
from saelab.artifacts import Parent
from saelab.dictionaries.base import BaseDictionary
from saelab.dictionaries.itda import ITDA, ITDAConfig
from saelab.dictionaries.semi_nmf import SemiNMF, SemiNMFConfig
from saelab.dictionaries.topk import TopK, TopKConfig
from saelab.features.build import IndexConfig, build
from saelab.models.toy import ToyModel
from saelab.ops.linalg import unit_rows
from saelab.ops.nnls import nnls
from saelab.protocols import LabelledStore, SiteStats, Store
from saelab.types import Batch, Document, Window

SITE = "blocks.1.hook_resid_post"
_SUBJECTS = ("The minister", "A man of two years", "Some people", "<script>alert('x')</script>")
_REST = (" said that it was not so.", " went home & slept.\n", " made a good state, they say.")


class TextStore(Store):
    """Sentences, read by the toy model; every fifth is held out."""

    path = None
    content_hash = "text-store"
    model_name = "toy"
    model_fingerprint = "toy"
    sites = (SITE,)

    def __init__(self, model: ToyModel, n_windows: int = 60) -> None:
        draw = random.Random(0)
        texts = [
            "".join(
                draw.choice(part) for part in (_SUBJECTS, _REST, (" ", " But"), _SUBJECTS, _REST)
            )
            for _ in range(n_windows)
        ]
        runs = model.tokenize(texts)
        self.n_windows = n_windows
        self.first = torch.tensor([0, *(len(r) for r in runs)]).cumsum(0)
        self.n_rows = int(self.first[-1])
        self.windows_ = []
        parts = []
        for number, (text, run) in enumerate(zip(texts, runs, strict=True)):
            kept = torch.ones(len(run), dtype=torch.bool)
            kept[0] = False
            strings = tuple(
                text[a:b] for a, b in zip(run.start.tolist(), run.end.tolist(), strict=True)
            )
            self.windows_.append(
                Window(number, int(self.first[number]), run.ids, torch.full((len(run),), number),
                       strings, number % 5 == 4, kept)
            )  # fmt: skip
            parts.append(model.capture(run.ids[None], [SITE])[SITE][0])
        self.x = torch.cat(parts)
        self.kept = torch.cat([w.kept for w in self.windows_])
        self.documents = torch.cat([w.document for w in self.windows_])

    def width(self, site):
        return self.x.shape[1]

    def n_kept(self, site, split):
        held = self.documents % 5 == 4
        wanted = {"all": held | ~held, "heldout": held, "train": ~held}[split]
        return int((self.kept & wanted).sum())

    def stats(self, site):
        x = self.x[self.kept].double()
        norm = x.norm(dim=1)
        return SiteStats(len(x), x.mean(0), float(norm.mean()), float((norm**2).mean()), 1.0)

    def scan(self, site, *, batch, split="all", masked=False, target=None):
        for rows in self.kept.nonzero().squeeze(1).split(batch):
            yield Batch(self.x[rows], self.x[rows], rows, self.documents[rows])

    def windows(self, site, *, split="all", limit=None):
        yield from self.windows_


class TopicStore(TextStore, LabelledStore):
    """The same, of documents of three topics."""

    n_documents = 60

    def document(self, number):
        return Document(
            number, str(number), number % 5 == 4, "", ("home", "<sea>", "sky")[number % 3]
        )


def make_related_run(out: Path) -> Path:
    """Fill a folder with a hierarchy and with a dictionary of the store's own rows; return it."""
    model = ToyModel(0, torch.device("cpu"))
    store = TopicStore(model, 24)
    for number, dictionary in enumerate((_hierarchy(store), _atoms(store))):
        name = f"toy-{dictionary.config.type}"
        parent = _dictionary(out, dictionary, name, str(number) * 64)
        _index(out, parent, dictionary, store, model)
    return out


def _hierarchy(store: TextStore) -> SemiNMF:
    d, g = store.width(SITE), torch.Generator().manual_seed(0)
    config = {"d_in": d, "d_sae": 12, "keep": 0.2, "levels": [12, 5, 2]}
    made = SemiNMF(SemiNMFConfig.parse({"type": "semi_nmf", **config}))
    sparse = torch.randn(12, d, generator=g) * (torch.rand(12, d, generator=g) < 0.2)
    levels = [unit_rows(sparse), *(unit_rows(torch.randn(n, d, generator=g)) for n in (5, 2))]
    with torch.no_grad():
        made.W_dec.copy_(levels[0])
        for level in (1, 2):
            made.features(level).copy_(levels[level])
            made.tree(level).copy_(nnls(levels[level - 1], levels[level]))
    return made


def _atoms(store: TextStore) -> ITDA:
    config = {"type": "itda", "d_in": store.width(SITE), "d_sae": 16, "k": 3, "threshold": 0.1}
    made = ITDA(ITDAConfig.parse(config))
    batch = next(store.scan(SITE, batch=200))
    made.begin_(batch.x.mean(0), batch.x, len(batch))
    made.partial_fit(batch)
    rows = made.unplaced()
    windows = torch.searchsorted(store.first, rows, right=True) - 1
    tokens = torch.cat([window.ids for window in store.windows_])
    made.place_(rows - store.first[windows], tokens[rows].long())
    return made


def make_run(out: Path) -> Path:
    """Fill a folder with artifacts as a run leaves them; return it."""
    model = ToyModel(0, torch.device("cpu"))
    store = TextStore(model)
    for number, d_sae in enumerate((96, 48)):
        dictionary = TopK(TopKConfig(d_in=store.x.shape[1], d_sae=d_sae, k=6))
        dictionary.init_(store.x, torch.Generator().manual_seed(number))
        parent = _dictionary(out, dictionary, f"toy-topk-{d_sae}", str(number) * 64)
        _results(out, parent, f"toy-topk-{d_sae}", 0.21 + 0.1 * number)
        if number == 0:
            _index(out, parent, dictionary, store, model)
    _draft(out)
    return out


def _facts(dictionary: BaseDictionary) -> dict:
    return {
        "type": dictionary.config.type, "d_in": dictionary.d_in, "d_sae": dictionary.d_sae,
        "k": 6, "site": SITE,
        "tokens": 1000, "config": {}, "model": {"source": "toy", "dtype": "float32", "name": "toy"},
    }  # fmt: skip


def _dictionary(out: Path, dictionary: BaseDictionary, name: str, key: str) -> Parent:
    with artifacts.open_draft(out, "dictionary", name, key) as draft:
        dictionary.save(draft.folder)
        draft.write("metrics.jsonl", _log(60))
        draft.finish(
            stage="dictionary", name=name, inputs={"lr": 2e-3}, parents=[], facts=_facts(dictionary)
        )
    return artifacts.parent_of(draft.target)


def _log(lines: int) -> bytes:
    rows = (
        {"step": s, "tokens": 512 * s, "loss": 1 / (1 + s / 9), "l0": 6.0, "dead": 0.2 / (1 + s),
         "grad_norm": 0.3, "lr": 1e-3}
        for s in range(1, lines + 1)
    )  # fmt: skip
    return b"".join(map(artifacts.canonical_line, rows))


def _results(out: Path, parent: Parent, name: str, fvu: float) -> None:
    rows = [
        _row("fvu", fvu, 0.004, "dictionary"), _row("l0", 6.0, 0.01, "dictionary"),
        _row("fvu", 0.31, 0.006, "pca(k=6)"), _row("l0", 6.0, 0.0, "pca(k=6)"),
        _row("fvu", 0.27, 0.005, "random activations"), _row("l0", 5.8, 0.02, "random activations"),
        _row("fvu", 0.35, 0.005, "token mean"), _row("dead_share", 0.02, None, "dictionary"),
        _row("ce_recovered_zero", 0.93, 0.003, "dictionary"), _row("kl", 0.11, 0.004, "dictionary"),
    ]  # fmt: skip
    with artifacts.open_draft(out, "results", name, parent.content_hash) as draft:
        draft.write("results.jsonl", [(json.dumps(row) + "\n").encode() for row in rows])
        draft.finish(
            stage="results", name=name, inputs={}, parents=[parent],
            facts={"n_results": len(rows), "evals": ["core"]},
        )  # fmt: skip


def _row(name: str, value: float, error: float | None, arm: str) -> dict:
    return {
        "name": name, "value": value, "unit": "share", "n": 1234, "standard_error": error,
        "metric_version": 1, "arm": arm, "encoder": "own", "evaluator": "core",
    }  # fmt: skip


def _index(
    out: Path, parent: Parent, dictionary: BaseDictionary, store: TextStore, model: ToyModel
) -> None:
    with artifacts.open_draft(out, "features", parent.name, parent.content_hash) as draft:
        facts = build(
            draft, dictionary, store, model, IndexConfig(batch=128), site=SITE,
            meta={"model": {"source": "toy", "dtype": "float32", "name": "toy"}},
        )  # fmt: skip
        draft.finish(stage="features", name=parent.name, inputs={}, parents=[parent], facts=facts)


def _draft(out: Path) -> None:
    """Leave a dictionary in the middle of its training, with a torn last line."""
    with artifacts.open_draft(out, "dictionary", "toy-topk-192", "9" * 64) as draft:
        artifacts.append_file(draft.folder / "metrics.jsonl", _log(20) + b'{"step": 21, "tok')
