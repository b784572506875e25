"""Compiled fast paths for CPUs, each with one caller in `ops/` that has a torch form beside it.

A kernel is a numba function over a range of rows, compiled without the GIL and run by plain Python
threads: numba's own thread pool would compete with torch's. numba is the optional extra `fast`;
without it, or with SAELAB_KERNELS=torch, the torch forms are used. The choice holds for the whole
process and is recorded with what was trained: the two round differently.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.errors import ConfigError

VARIABLE = "SAELAB_KERNELS"
_PIECES = 4
"""Ranges per thread: with more than one, a thread that was held up does not keep all waiting."""


@functools.cache
def name() -> str:
    """Return which kernels this process uses: "numba" or "torch". Raises ConfigError."""
    asked = os.environ.get(VARIABLE, "auto")
    if asked not in {"auto", "numba", "torch"}:
        raise ConfigError(f"{VARIABLE} is {asked!r}: it should be auto, numba or torch")
    there = importlib.util.find_spec("numba") is not None
    if asked == "numba" and not there:
        raise ConfigError(f"{VARIABLE}=numba, but numba is missing: pip install 'saelab[fast]'")
    return "numba" if there and asked != "torch" else "torch"


def fit(*tensors: Tensor) -> bool:
    """Return whether compiled kernels take these tensors: float32 on a CPU, and numba is there."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and (
        name() == "numba"
    )


@functools.cache
def fast_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """Return tensors on a CPU as arrays over the same memory where they are contiguous."""
    return [t.detach().contiguous().numpy() for t in tensors]


def over_rows(kernel: Callable[..., Any], n: int, *arguments: Any) -> None:
    """Call `kernel(start, stop, *arguments)` for ranges that cover 0 … n − 1, on torch's number of
    threads. What a row becomes must not depend on its range."""
    threads = torch.get_num_threads()
    if threads == 1 or n <= 1:
        kernel(0, n, *arguments)
        return
    step = -(-n // (threads * _PIECES))

    def run(start: int) -> None:
        kernel(start, min(start + step, n), *arguments)

    list(_pool(threads).map(run, range(0, n, step)))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="saelab-kernel")
