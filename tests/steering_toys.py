"""A labelled store of the toy model, and dictionaries with the direction of a label's words."""

import random

import torch

from saelab import artifacts, dictionaries
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.harvest import HarvestConfig, harvest
from saelab.store import StoreWriter, open_store

SITE = "blocks.1.hook_resid_post"
COMMON = ("the", "people", "of", "this", "state", "say", "that", "time", "and", "work")
OWN = {"glad": ("good", "great"), "slow": ("old", "long")}


def labelled_store(folder, toy_model, own=OWN):
    """Harvest 110 documents of some labels, by default two, each with words of its own."""
    chance = random.Random(0)
    lines = ["label,text"]
    for number in range(110):
        label = list(own)[number % len(own)]
        words = chance.choices(COMMON + 3 * own[label], k=12)
        lines.append(f"{label},d{number}: {' '.join(words)}")
    path = folder / "corpus.csv"
    path.write_text("\n".join(lines) + "\n")
    corpus = CorpusConfig(
        source=str(path), tokens=1800, context=32, holdout=0.4, min_tail=4, label_field="label"
    )
    config = HarvestConfig(sites=(SITE,), batch_tokens=512)
    with artifacts.open_draft(folder, "store", "toy", "c" * 64) as draft:
        with StoreWriter(draft, {SITE: 32}, "float32", rows_per_shard=2000) as writer:
            facts = harvest(toy_model, corpus, config, writer)
        draft.finish(stage="store", name="toy", inputs={}, parents=[], facts=facts)
    return open_store(draft.target)


def word_direction(toy_model, words):
    """The direction that writes words into the logits."""
    ids = [int(run.ids[0]) for run in toy_model.tokenize([f" {word}" for word in words])]
    unembed = toy_model._network.unembed.weight.detach()
    return unembed[ids].mean(0) - unembed.mean(0)


def dictionary_with(direction, seed: int, type: str = "topk"):
    """Random latents, and latent 0 with a direction."""
    dictionary = dictionaries.create({"type": type, "d_in": 32, "d_sae": 20, "k": 8})
    generator = torch.Generator().manual_seed(seed)
    dictionary.init_(torch.randn(100, 32, generator=generator), generator)
    with torch.no_grad():
        dictionary.W_dec[0] = direction
    return dictionary
