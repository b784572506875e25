"""Shared by all tests."""

import random

import pytest
import torch
from hypothesis import settings

from saelab import artifacts
from saelab.models.toy import ToyModel

settings.register_profile("default", derandomize=True, deadline=None)
settings.load_profile("default")

# tests work on tiny tensors, where waiting for a second thread costs more than it saves
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_model() -> ToyModel:
    """The seeded two-layer transformer, shared by all tests: its hooks never outlive a call."""
    return ToyModel()


# ----------------------------------------------------------------------- a store from the toy model

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
SENTENCE = "the people of this great state say that time and work can make life good for us all"


def write_corpus(path, n_documents: int = 40, seed: int = 0):
    """Write a table of seeded texts that the toy's tokenizer knows, 20 to 90 words each."""
    chance = random.Random(seed)
    lines = ["label,text"]
    for number in range(n_documents):
        words = chance.choices(SENTENCE.split(), k=chance.randint(20, 90))
        lines.append(f'{"ab"[number % 2]},"d{number}: {" ".join(words)}."')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.csv")


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory, toy_model, toy_corpus):
    """A store of 2,000 rows at two sites of the toy, in four shards, a quarter held out."""
    from saelab.harvest.corpus import CorpusConfig
    from saelab.harvest.harvest import HarvestConfig, harvest
    from saelab.store import StoreWriter, open_store

    corpus = CorpusConfig(source=str(toy_corpus), tokens=2000, context=32, holdout=0.25, min_tail=8)
    config = HarvestConfig(sites=SITES, rows_per_shard=600, batch_tokens=512)
    out = tmp_path_factory.mktemp("store")
    with artifacts.open_draft(out, "store", "toy", "a" * 64) as draft:
        widths = {site: toy_model.site(site).width for site in SITES}
        with StoreWriter(draft, widths, "float16", rows_per_shard=600) as writer:
            facts = harvest(toy_model, corpus, config, writer)
        draft.finish(stage="store", name="toy", inputs={}, parents=[], facts=facts)
    return open_store(artifacts.artifact_path(out, "store", "toy", "a" * 64))


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.json")


class Broken:
    """A model whose activations at one site hold a bad value wherever a token id occurs."""

    def __init__(self, model, site, token, value):
        self._model, self._site, self._token, self._value = model, site, token, value

    def __getattr__(self, name):
        return getattr(self._model, name)

    def capture(self, tokens, sites, lengths=None):
        found = self._model.capture(tokens, sites, lengths)
        if self._site in found:
            rows = found[self._site].clone()
            rows[..., 0][tokens == self._token] = self._value
            found[self._site] = rows
        return found


@pytest.fixture
def broken(toy_model):
    """The toy, made a `LanguageModel` in name too, with a fault planted by the test."""
    from saelab.protocols import LanguageModel

    class Model(Broken, LanguageModel):
        pass

    for name in vars(LanguageModel):
        if (
            not name.startswith("_")
            and name != "capture"
            and callable(getattr(LanguageModel, name))
        ):
            setattr(Model, name, lambda self, *a, _n=name, **k: getattr(self._model, _n)(*a, **k))
    return lambda *fault: Model(toy_model, *fault)
