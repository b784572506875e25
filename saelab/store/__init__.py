"""Activations on disk: written once, read shuffled or in order by everything else."""

from pathlib import Path

from saelab.store.reader import DiskStore
from saelab.store.writer import StoreWriter

__all__ = ["DiskStore", "StoreWriter", "open_store"]


def open_store(path: Path | str) -> DiskStore:
    """Open a finished store. Raises ArtifactError naming what is missing, altered or truncated."""
    return DiskStore(Path(path))
