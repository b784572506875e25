"""Finished dictionaries as handles to steer by: with the site and the name that their run gave."""

from pathlib import Path

from saelab import dictionaries
from saelab.artifacts import read_manifest
from saelab.edits import Handle, measure_scales
from saelab.errors import ArtifactError
from saelab.protocols import Store


def handle(path: str | Path, store: Store | None = None) -> Handle:
    """Load a finished dictionary as a handle; it knows its site.

    With a store, strengths may be in units of `typical_max` and `norm`. Raises ArtifactError if
    the folder is no dictionary, SiteError if the store lacks its site.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.stage != "dictionary":
        raise ArtifactError(f"{path} is a {manifest.stage}, but a dictionary is wanted")
    dictionary, site = dictionaries.load(path), str(manifest.facts["site"])
    scales = None if store is None else measure_scales(dictionary, store, site)
    return Handle(dictionary, site, manifest.name, scales)
