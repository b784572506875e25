"""Indirect-object prompts in the toy model's words, and finished dictionaries of the toy."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from saelab import artifacts
from saelab.artifacts import Parent
from saelab.circuits import examples, tasks
from saelab.circuits.tasks import TaskData
from saelab.dictionaries.topk import TopK, TopKConfig
from saelab.models.toy import ToyModel

WORDS = ("people", "man", "men", "state", "world", "life", "work", "day", "year")
FRAMES = ("when {first} and {second} are in {place}, {s2} have {object} to",)
WORDING = {
    "_NAMES": WORDS, "_PLACES": ("time",), "_OBJECTS": ("way", "years"), "_IOI_FRAMES": FRAMES,
}  # fmt: skip


def draw(name: str, model: ToyModel, n: int, *, seed: int) -> TaskData:
    """Draw as `tasks.draw` does; right is what the toy itself says of each clean prompt, and wrong
    what it says of corrupted ones."""
    with mock.patch.multiple(examples, **WORDING):
        data = tasks.draw(name, model, n, seed=seed)
    clean, corrupted = (data.at_end(model.logits(t)) for t in (data.clean, data.corrupted))
    difference = clean - corrupted.mean(0)
    return replace(
        data, right=difference.argmax(1, keepdim=True), wrong=difference.argmin(1, keepdim=True)
    )


def save_dictionary(
    out: Path,
    toy: ToyModel,
    site: str,
    /,
    *,
    seed: int = 0,
    parents: Sequence[Parent] = (),
    **facts,
) -> Path:
    """Write an untrained TopK dictionary of a site as a finished artifact; return its folder."""
    dictionary = TopK(TopKConfig(d_in=32, d_sae=24, k=4))
    generator = torch.Generator().manual_seed(seed)
    x = toy.capture(torch.randint(2, toy.d_vocab, (16, 8), generator=generator), [site])[site]
    dictionary.init_(x.flatten(0, 1), generator)
    name = f"toy-{site.split('.')[1]}-{seed}"
    with artifacts.open_draft(out, "dictionary", name, f"{seed}{site[-20:]}" * 8) as draft:
        dictionary.save(draft.folder)
        known = {
            "site": site, "type": "topk", "d_in": 32, "d_sae": 24, "k": 4, "tokens": 0,
            "config": {}, "model": {"source": "toy", "dtype": "float32", "name": "toy"},
        }  # fmt: skip
        draft.finish(
            stage="dictionary", name=name, inputs={}, parents=list(parents), facts=known | facts
        )
    return draft.target
