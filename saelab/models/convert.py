"""GGUF files turned once into Hugging Face folders (safetensors, config, tokenizer) in the cache.

Quantised weights are expanded to float32 exactly as the format defines; nothing else is changed.
The same file gives the same bytes on every conversion with the same library versions.
"""

import logging
import mmap
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from saelab.artifacts import hash_file, rename, sync_file, write_json
from saelab.assets import cache_dir, work_folder
from saelab.errors import AssetError

log = logging.getLogger(__name__)

CONVERSION = 1
"""Bumped when conversions give other weights or tokens; part of a converted model's fingerprint."""

_DONE = "conversion.json"
_DIGITS_APART = {"smollm"}
"""GGUF pre-tokenizers that split numbers into digits first, which transformers leaves out."""


def converted_folder(gguf: Path, name: str, sha256: str) -> Path:
    """Return the folder that a GGUF file was converted into, converting it at first use.

    Raises AssetError if the file is no GGUF or of a kind that cannot be read; nothing is kept then.
    """
    target = cache_dir() / "models" / f"{name}-{sha256[:8]}-{CONVERSION}"
    if (target / _DONE).exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if (target / _DONE).exists():
            return target
        shutil.rmtree(target, ignore_errors=True)
        with work_folder(target.with_name(f".{target.name}.converting")) as work:
            folder = work / "model"
            log.info("converting %s to safetensors (once)", gguf.name)
            _convert(gguf, folder)
            files = sorted(p for p in folder.iterdir() if p.is_file())
            for path in files:
                sync_file(path)
            hashes = {p.name: hash_file(p) for p in files}
            write_json(folder / _DONE, {"source": gguf.name, "sha256": sha256, "files": hashes})
            rename(folder, target)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise AssetError(f"{gguf} is no GGUF file: it does not begin with the letters GGUF")
    place: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(**place)
            network = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise AssetError(
                f"{gguf} holds a model that transformers cannot read: {error}. "
                "Give a folder with safetensors instead."
            ) from None
        _forget_quantisation(network)
        _split_digits(tokenizer, gguf)
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _forget_quantisation(network: Any) -> None:
    """Drop the marks of a quantised model: transformers refuses to save weights with them."""
    for owner, names in (
        (network.config, ("quantization_config", "_is_quantized")),
        (network, ("hf_quantizer", "quantization_method", "is_quantized")),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)


def _split_digits(tokenizer: Any, gguf: Path) -> None:
    from tokenizers import pre_tokenizers

    if _string_field(gguf, b"tokenizer.ggml.pre") in _DIGITS_APART:
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def _string_field(gguf: Path, key: bytes) -> str | None:
    """Read one text of the header (key, type 8, length, bytes) without parsing the others."""
    with gguf.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(struct.pack("<Q", len(key)) + key)
        if at < 0:
            return None
        kind, length = struct.unpack_from("<IQ", data, at + 8 + len(key))
        first = at + 8 + len(key) + 12
        return data[first : first + length].decode() if kind == 8 else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and hints off the terminal."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
