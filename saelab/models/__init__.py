"""Language models behind one protocol: real ones (`lens`), and seeded toys for tests (`toy`)."""

import torch

from saelab.edits.placement import Steerable
from saelab.models.identity import (
    ModelIdentity,
    fingerprints,
    identify,
    resolve_device,
    resolve_dtype,
)

__all__ = [
    "ModelIdentity",
    "fingerprints",
    "identify",
    "load_model",
    "resolve_device",
    "resolve_dtype",
]


def load_model(
    source: str, *, dtype: str = "auto", device: str | torch.device = "auto"
) -> Steerable:
    """Load a model: a named asset, `hub:org/name`, a Hugging Face folder, a .gguf file, `toy`,
    `handwired:induction`, or `redrawn:SEED:` before a real one for its weights before training.

    `dtype` is float32, bfloat16, float16 (cuda only) or auto. Raises AssetError if the model cannot
    be found or read, ConfigError for an unknown dtype or device.
    """
    from saelab.models import handwired, toy

    identity = identify(source, dtype, device)
    if toy.is_toy(source):
        return toy.ToyModel(toy.seed_of(source), resolve_device("cpu"))
    if handwired.is_handwired(source):
        return handwired.named(source)
    from saelab.models.lens import LensModel

    return LensModel(identity, resolve_device(device))
