"""Dictionaries to hold the laws against: also of solved types, which need a store."""

import torch
from doubles import ArrayStore

from saelab import dictionaries, laws
from saelab.dictionaries.base import BaseDictionary
from saelab.protocols import Solved


def ready(name: str, seed: int = 0) -> BaseDictionary:
    """Return a dictionary as after training: initialised or solved, biases moved, calibrated."""
    dictionary = dictionaries.create(dictionaries.config_class(name).example())
    if not isinstance(dictionary, Solved):
        return laws.ready(name, seed)
    generator = torch.Generator().manual_seed(seed)
    store = ArrayStore({"site": laws.some_rows(dictionary.d_in, 2, 256)})
    state = dictionary.start(store, generator)
    while not state.done:
        state = dictionary.advance(store, state)
    dictionary.finish(state)
    return laws.settled_(dictionary, generator)
