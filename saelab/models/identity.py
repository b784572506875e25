"""Which model a source means, without loading it: the pipeline asks this on every command."""

import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from saelab import assets
from saelab.artifacts import read_json, write_json
from saelab.config import digest
from saelab.errors import AssetError, ConfigError, nearest
from saelab.models import handwired, toy

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelIdentity:
    """A model's name, sizes and fingerprint."""

    name: str
    source: str
    fingerprint: str
    """Hash of the weights' and tokenizer's checksum and of the resolved dtype."""
    dtype: str
    """Resolved: never `auto`."""
    context: int
    d_model: int
    n_layers: int
    d_vocab: int
    folder: Path | None
    """The Hugging Face folder; None for a toy."""


_REDRAWN = re.compile(r"redrawn:(\d+):(.+)")


def redrawn_seed(source: str) -> int | None:
    """Return the seed of `redrawn:SEED:MODEL`, whose weights are drawn anew; None of any other."""
    found = _REDRAWN.fullmatch(source)
    return None if found is None else int(found[1])


def identify(
    source: str, dtype: str = "auto", device: str | torch.device = "auto"
) -> ModelIdentity:
    """Return which model a source means; fetches and converts it at first use, but loads nothing.

    Raises AssetError if it cannot be found or is incomplete, ConfigError for an unknown dtype.
    """
    if toy.is_toy(source):
        return _identify_toy(source, dtype)
    if handwired.is_handwired(source):
        return _identify_handwired(source, dtype)
    resolved_dtype = resolve_dtype(dtype, resolve_device(device))
    folder, name, content = _folder_of(source)
    sizes = _sizes(folder)
    fingerprint = _fingerprint(content, resolved_dtype)
    return ModelIdentity(name, source, fingerprint, resolved_dtype, **sizes, folder=folder)


def fingerprints(source: str) -> set[str]:
    """Return the fingerprints of a source's weights, one for every dtype that they may be read in.

    Two fingerprints are of the same weights where this set holds both. Raises AssetError if the
    source cannot be found or is incomplete.
    """
    if toy.is_toy(source) or handwired.is_handwired(source):
        return {identify(source).fingerprint}
    _, _, content = _folder_of(source)
    return {_fingerprint(content, dtype) for dtype in DTYPES}


def _fingerprint(content: str, dtype: str) -> str:
    return digest({"content": content, "dtype": dtype})


def _identify_toy(source: str, dtype: str) -> ModelIdentity:
    if dtype not in ("auto", "float32"):
        raise ConfigError(f"the toy model computes in float32; dtype {dtype!r} came")
    fingerprint = digest({"toy": toy.seed_of(source), "version": toy.VERSION})
    sizes = {
        "context": toy.CONTEXT,
        "d_model": toy.D_MODEL,
        "n_layers": toy.N_LAYERS,
        "d_vocab": toy.D_VOCAB,
    }
    return ModelIdentity("toy", source, fingerprint, "float32", **sizes, folder=None)


def _identify_handwired(source: str, dtype: str) -> ModelIdentity:
    if dtype not in ("auto", "float32"):
        raise ConfigError(f"hand-wired models compute in float32; dtype {dtype!r} came")
    made = handwired.named(source)
    return ModelIdentity(
        made.name, source, made.fingerprint, "float32", context=made.context, d_model=made.d_model,
        n_layers=made.n_layers, d_vocab=made.d_vocab, folder=None,
    )  # fmt: skip


def _folder_of(source: str) -> tuple[Path, str, str]:
    """Return the Hugging Face folder of a source, its name and a checksum of its content."""
    if again := _REDRAWN.fullmatch(source):
        seed, inner = again.groups()
        if toy.is_toy(inner) or handwired.is_handwired(inner):
            raise ConfigError(f"{inner} has no trained weights to redraw; take `toy:seed={seed}`")
        folder, name, content = _folder_of(inner)
        return folder, f"{name}-redrawn-{seed}", f"{content}:redrawn:{seed}"
    resolved = assets.resolve(source, "model")
    content = assets.identity(source, "model")
    if resolved.path.is_dir():
        return resolved.path, resolved.name, content
    if resolved.path.suffix != ".gguf":
        raise AssetError(
            f"{source!r} is the file {resolved.path.name}; a model is a folder with config.json, "
            "safetensors and a tokenizer, or a .gguf file"
        )
    from saelab.models.convert import CONVERSION, converted_folder

    folder = converted_folder(resolved.path, resolved.name, content)
    return folder, resolved.name, f"{content}:{CONVERSION}"


_SIZES = {
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "d_model": ("hidden_size", "n_embd", "d_model"),
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "d_vocab": ("vocab_size",),
}


def _sizes(folder: Path) -> dict[str, int]:
    """Read the sizes that config.json states. Raises AssetError if the folder is incomplete."""
    parts = {
        "config.json": ["config.json"],
        "weights (*.safetensors)": ["*.safetensors"],
        "a tokenizer (tokenizer.json)": ["tokenizer.json", "tokenizer.model", "vocab.json"],
    }
    for part, patterns in parts.items():
        if not any(next(folder.glob(pattern), None) for pattern in patterns):
            raise AssetError(
                f"{folder} has no {part}; a model's folder needs {', '.join(parts)}. "
                "Write it with save_pretrained, or fetch it again."
            )
    config: dict[str, Any] = read_json(folder / "config.json")
    config |= config.get("text_config", {})
    sizes = {}
    for size, keys in _SIZES.items():
        found = [config[key] for key in keys if isinstance(config.get(key), int)]
        if not found:
            raise AssetError(f"{folder / 'config.json'} states no {size} (looked for {keys})")
        sizes[size] = found[0]
    return sizes


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device to compute on; `auto` takes cuda, then mps, then cpu.

    Raises ConfigError if it is unknown or not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    text = str(device)
    if text == "auto":
        return torch.device(next(kind for kind, usable in there.items() if usable))
    kind = text.split(":")[0]
    if kind not in there:
        raise ConfigError(f"unknown device {text!r}; {nearest(text, ['auto', *there])}")
    if not there[kind]:
        raise ConfigError(f"device {text!r} was asked for, but this machine has none; use `auto`")
    return torch.device(text)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """Return the dtype's name; `auto` takes bfloat16 where a probe showed it to be faster here.

    Raises ConfigError for an unknown dtype, or float16 on a device that cannot compute in it.
    """
    if dtype == "auto":
        return _fastest(device)
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; {nearest(dtype, ['auto', *DTYPES])}")
    if dtype == "float16" and device.type != "cuda":
        raise ConfigError(f"float16 needs a cuda device, not {device.type}; use bfloat16 or auto")
    return dtype


def _fastest(device: torch.device) -> str:
    """Return the probe's verdict on this host, kept in the cache: stage keys have to stay."""
    if device.type == "mps":
        return "float32"
    record = assets.cache_dir() / "dtype.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    key = f"{socket.gethostname()}/{device.type}"
    with FileLock(record.with_suffix(".lock")):
        known = read_json(record) if record.exists() else {}
        if known.get(key) not in DTYPES:
            known[key] = _probe(device)
            write_json(record, known)
    return known[key]


def _probe(device: torch.device) -> str:
    """Time the product of a small model's MLP in both dtypes; bfloat16 has to win by a third."""
    best = {"float32": float("inf"), "bfloat16": float("inf")}
    pairs = {
        name: (
            torch.ones(1024, 576, device=device, dtype=DTYPES[name]),
            torch.ones(576, 1536, device=device, dtype=DTYPES[name]),
        )
        for name in best
    }
    for _ in range(8):
        for name, (x, w) in pairs.items():
            started = time.perf_counter()
            (x @ w).sum().item()
            best[name] = min(best[name], time.perf_counter() - started)
    return "bfloat16" if best["bfloat16"] * 4 / 3 < best["float32"] else "float32"
