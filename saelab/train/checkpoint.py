"""A member's state between two steps, as one file that is replaced atomically."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelab import artifacts
from saelab.config import canonical_json
from saelab.errors import ArtifactError

FILE = "checkpoint.safetensors"


def write(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and JSON-ready state into `folder`, replacing the last checkpoint at once."""
    folder.mkdir(parents=True, exist_ok=True)
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = safetensors.torch.save(ready, metadata={"state": canonical_json(state)})
    artifacts.write_file(folder / FILE, data)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the last checkpoint's tensors and state, or None. Raises ArtifactError."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            # copies: a mapped tensor lies where the header ends, and products of tensors that are
            # aligned otherwise differ in their last bits
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            state = json.loads((file.metadata() or {})["state"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ArtifactError(
            f"the checkpoint {path} cannot be read ({error}): it was altered. "
            "Delete it to start this member again."
        ) from None
    return tensors, state
