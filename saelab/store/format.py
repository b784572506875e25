"""The store's files: their names, dtypes and columns, and safetensors read through memory maps.

shard-00000.safetensors    per site `{site}` (n, d) and `mask:{site}` (n,) uint8; 0 = kept; where
                           they were asked for, `grad:{site}` (n, d) and `label` (n,) int32
tokens-00000.safetensors   the columns of `types.TokenTable` for the same rows
documents-00000.jsonl      the documents whose first row is in this shard
index.safetensors          first row of each shard and window; split, group, place of documents
stats.safetensors          the float64 mean over kept training rows of `{site}` and `grad:{site}`
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from saelab.errors import ArtifactError

LABEL = "label"
INDEX = "index.safetensors"
STATS = "stats.safetensors"
STAGE = "store"

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

COLUMNS = {
    "token_id": torch.int32,
    "window": torch.int64,
    "position": torch.int32,
    "document": torch.int64,
    "char_start": torch.int32,
    "char_end": torch.int32,
}

_SERIAL = 32_767
"""Most elements that torch's element-wise operations handle without starting threads."""

# bfloat16 is unknown to NumPy: two-byte floats are mapped as integers and seen as floats by torch.
_NUMPY = {
    "F16": np.dtype("<i2"),
    "BF16": np.dtype("<i2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


def shard_name(number: int) -> str:
    """Return the file name of a shard's activations and masks."""
    return f"shard-{number:05d}.safetensors"


def tokens_name(number: int) -> str:
    """Return the file name of a shard's token table."""
    return f"tokens-{number:05d}.safetensors"


def documents_name(number: int) -> str:
    """Return the file name of the documents that begin in a shard."""
    return f"documents-{number:05d}.jsonl"


def mask_name(site: str) -> str:
    """Return the tensor name of a site's mask bits."""
    return f"mask:{site}"


def grad_name(site: str) -> str:
    """Return the tensor name of the gradients at a site's rows."""
    return f"grad:{site}"


def to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Return tensors as the bytes of a safetensors file without metadata: equal every time."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Map the tensors of a safetensors file, read-only; two-byte floats appear as int16.

    Raises ArtifactError naming the file if it is missing, truncated or malformed.
    """
    header, start = _header(path)
    payload = path.stat().st_size - start
    tensors: dict[str, np.ndarray] = {}
    whole = np.asarray(np.memmap(path, mode="r", offset=start, shape=(payload,)))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        dtype = _NUMPY.get(entry["dtype"])
        shape = tuple(entry["shape"])
        if dtype is None or last > payload or last - first != math.prod(shape) * dtype.itemsize:
            raise _altered(path, f"its tensor {name!r} does not fit in the file")
        tensors[name] = whole[first:last].view(dtype).reshape(shape)
    return tensors


def to_float32(stored: np.ndarray, dtype: torch.dtype) -> Float[Tensor, "n d"]:
    """Return rows as they are mapped, of a store's dtype, as float32.

    Torch converts in pieces too small for its thread pool: one thread is fast enough here, and
    waiting for a second one makes it ten times slower on a busy machine.
    """
    values = torch.from_numpy(stored).view(dtype)
    if dtype == torch.float32:
        return values
    found = torch.empty(values.shape)
    step = max(1, _SERIAL // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        found[start : start + step].copy_(values[start : start + step])
    return found


def _header(path: Path) -> tuple[dict, int]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size - 8:
                raise _altered(path, "its header is longer than the file")
            return json.loads(file.read(size)), 8 + size
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing from the store; make the store again") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise _altered(path, "its header is not valid") from None


def _altered(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path} was truncated or altered ({why}); delete the store and run the same command again"
    )
