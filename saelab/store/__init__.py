"""Activations on disk: written once, read shuffled or in order by everything else."""

from pathlib import Path

from saelab.store.arrays import ArraysConfig, from_arrays
from saelab.store.reader import DiskStore
from saelab.store.writer import StoreWriter

__all__ = ["ArraysConfig", "DiskStore", "StoreWriter", "from_arrays", "open_store"]


def open_store(path: Path | str) -> DiskStore:
    """Open a finished store. Raises ArtifactError naming what is missing, altered or truncated."""
    return DiskStore(Path(path))
