"""What this machine has: versions, extras, device, disk, cached assets."""

import importlib.metadata
import shutil

import psutil
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from saelab import assets
from saelab.report import human_bytes

_EXTRAS = {
    "lm": ("transformer-lens", "transformers", "datasets", "gguf"),
    "app": ("streamlit", "plotly", "pandas"),
    "wandb": ("wandb",),
    "fast": ("numba",),
    "plots": ("matplotlib",),
}


def doctor() -> Group:
    """Return this machine as a table."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    memory = psutil.virtual_memory()
    cache = assets.cache_dir()
    existing = next(p for p in [cache, *cache.parents] if p.exists())
    table.add_row("saelab", importlib.metadata.version("saelab"))
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("device", _device())
    table.add_row("memory", f"{human_bytes(memory.available)} free of {human_bytes(memory.total)}")
    table.add_row("cache", f"{cache} ({human_bytes(shutil.disk_usage(existing).free)} free)")
    for extra, packages in _EXTRAS.items():
        table.add_row(f"extra {extra}", ", ".join(map(_version, packages)))
    cached = [name for name in assets.CATALOGUE if assets.cached(name)]
    table.add_row("assets", ", ".join(cached) or "none fetched yet")
    return Group(table)


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} missing"
