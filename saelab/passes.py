"""Which members are trained together: as many as fit in memory; the rest take another pass."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from saelab.errors import ResourceError


@dataclass(frozen=True)
class Load:
    """What training one member takes of memory, in bytes."""

    member: int
    """Its position among the run's members."""
    site: str
    kept: float
    """All the time: weights, gradients, Adam's moments."""
    passing: float
    """Beside it while its own step or checkpoint lasts; members take turns."""
    reading: float
    """The stream of its site, which members of the site share."""


@dataclass(frozen=True)
class Pass:
    """Members that are trained in one pass over the store."""

    members: list[int]
    bytes: float
    """Memory that it takes."""


def needed(loads: Sequence[Load]) -> float:
    """Return what members take that are trained in one pass, in bytes."""
    streams = {load.site: load.reading for load in loads}
    passing = max((load.passing for load in loads), default=0)
    return sum(load.kept for load in loads) + passing + sum(streams.values())


def split(loads: Sequence[Load], budget: float) -> list[Pass]:
    """Split members into passes that take at most `budget` bytes, those of one site together.

    A member that takes more by itself has a pass for itself.
    """
    sites = list(dict.fromkeys(load.site for load in loads))
    passes: list[list[Load]] = []
    for load in sorted(loads, key=lambda load: sites.index(load.site)):
        if passes and needed([*passes[-1], load]) <= budget:
            passes[-1].append(load)
        else:
            passes.append([load])
    return [Pass([load.member for load in group], needed(group)) for group in passes]


def free_memory(device: torch.device) -> float:
    """Return how many bytes a pass may take: nine tenths of the memory that is free now."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    return 0.9 * psutil.virtual_memory().available


def check_memory(
    needed: float, what: str, device: torch.device, limit_gb: float | None = None
) -> None:
    """Raise ResourceError if `needed` bytes exceed the limit, or the device's whole memory."""
    total = psutil.virtual_memory().total
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    if limit_gb is not None and needed > 1e9 * limit_gb:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.2g} GB of memory, but memory_gb allows {limit_gb:g}; "
            "raise it, or lower d_sae or train.batch"
        )
    if needed > 0.9 * total:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.1f} GB of memory, but {device.type} has "
            f"{total / 1e9:.1f} GB; lower d_sae or train.batch"
        )


def check_space(folder: Path, needed: int, what: str = "the store") -> None:
    """Raise ResourceError if the disk that holds `folder` lacks `needed` bytes and a tenth more."""
    existing = next(p for p in [folder, *folder.resolve().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.1 * needed:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free. "
            "Ask for fewer tokens or sites, or a narrower dtype, or set SAELAB_CACHE to a "
            "larger disk."
        )
