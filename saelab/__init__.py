"""saelab: every dictionary, the same activations, the same scorecard, one place to look at it."""

import importlib
from typing import Any

__version__ = "0.1.0"

_API = (
    "evaluate", "fit", "index", "load", "load_model", "open_features", "open_online", "open_store",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the public functions on first use, so that `import saelab` costs nothing."""
    if name in _API:
        return getattr(importlib.import_module("saelab.api"), name)
    if name == "run":
        return importlib.import_module("saelab.pipeline").run
    raise AttributeError(f"module 'saelab' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public functions."""
    return sorted([*globals(), *_API, "run"])
