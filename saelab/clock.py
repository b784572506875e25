"""The time, once the device has done what was asked of it."""

import time

import torch


def now() -> float:
    """Return seconds of a clock that never goes back, after all work given to a GPU is done.

    Work on a GPU is only queued when a call returns; without the wait its time would fall to
    whatever waits next.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
