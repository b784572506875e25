"""The types of dictionaries: one file each, one line each in the registry."""

from pathlib import Path
from typing import Any

from saelab.config import Config
from saelab.dictionaries.abs_topk import AbsTopK
from saelab.dictionaries.base import BaseDictionary, DictionaryConfig, read_saved
from saelab.dictionaries.batch_topk import BatchTopK
from saelab.dictionaries.feature_choice import FeatureChoice
from saelab.dictionaries.gated import Gated
from saelab.dictionaries.gradient_topk import GradientTopK
from saelab.dictionaries.itda import ITDA
from saelab.dictionaries.jump_relu import JumpReLU
from saelab.dictionaries.k_means import KMeans
from saelab.dictionaries.matching_pursuit import MatchingPursuit
from saelab.dictionaries.matryoshka import Matryoshka
from saelab.dictionaries.mutual_choice import MutualChoice
from saelab.dictionaries.random_rows import RandomRows
from saelab.dictionaries.relu import ReLU
from saelab.dictionaries.semi_nmf import SemiNMF
from saelab.dictionaries.supervised import Supervised
from saelab.dictionaries.topk import TopK
from saelab.errors import ConfigError, nearest

REGISTRY: dict[str, type[BaseDictionary]] = {
    "abs_topk": AbsTopK,
    "batch_topk": BatchTopK,
    "feature_choice": FeatureChoice,
    "matching_pursuit": MatchingPursuit,
    "matryoshka": Matryoshka,
    "mutual_choice": MutualChoice,
    "gated": Gated,
    "gradient_topk": GradientTopK,
    "itda": ITDA,
    "jump_relu": JumpReLU,
    "k_means": KMeans,
    "random_rows": RandomRows,
    "relu": ReLU,
    "semi_nmf": SemiNMF,
    "supervised": Supervised,
    "topk": TopK,
}


def config_class(type_name: str) -> type[DictionaryConfig]:
    """Return the configuration class of a type. Raises ConfigError naming the nearest."""
    if type_name not in REGISTRY:
        hint = nearest(str(type_name), sorted(REGISTRY))
        raise ConfigError(f"there is no dictionary type {type_name!r}; {hint}")
    return REGISTRY[type_name].config_class


def create(config: DictionaryConfig | dict[str, Any]) -> BaseDictionary:
    """Return an untrained dictionary. Raises ConfigError listing every fault."""
    if not isinstance(config, Config):
        if "type" not in config:
            raise ConfigError(f"a dictionary needs a `type`; {nearest('', sorted(REGISTRY))}")
        config = config_class(config["type"]).parse(config)
    return REGISTRY[config.type](config)


def load(path: Path | str) -> BaseDictionary:
    """Read a saved dictionary. Raises ArtifactError if a file is missing or altered."""
    config, tensors = read_saved(Path(path))
    dictionary = create(config)
    dictionary.load_tensors_(tensors, str(path))
    return dictionary


def fold(dictionary: BaseDictionary, scale: float) -> BaseDictionary:
    """Return the dictionary that takes raw x where the given one takes `scale · x`.

    `fold(d, s).encode(x) == d.encode(s·x) / s`. Biases and thresholds scale, weights do not.
    """
    return dictionary.folded(scale)
