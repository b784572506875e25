"""saelab: every dictionary, the same activations, the same scorecard, one place to look at it."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# torch's CPU backend reads these once, at its first use. Large tensors then lie in large pages:
# fresh gradients of 40 MB cost 5 ms instead of 28. And oneDNN keeps the code of the last 64 shapes
# instead of 1024, which for windows of all lengths is 100 MB more per million tokens.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

_API = (
    "evaluate", "fit", "index", "load", "load_model", "open_features", "open_online", "open_store",
)  # fmt: skip


_ELSEWHERE = {
    "dose_response": "saelab.steering.explore", "handle": "saelab.handles",
    "run": "saelab.pipeline", "steer": "saelab.edits",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the public functions on first use, so that `import saelab` costs nothing."""
    if name in _API:
        return getattr(importlib.import_module("saelab.api"), name)
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module 'saelab' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public functions."""
    return sorted([*globals(), *_API, *_ELSEWHERE])
