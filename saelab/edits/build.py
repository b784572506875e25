"""Writing edits: one function per operation, and YAML both ways."""

from collections.abc import Sequence
from typing import Any

import yaml

from saelab.config import parse_yaml
from saelab.edits.config import EditConfig, Operation, Unit, Where
from saelab.edits.latents import Editable, Handle, LatentEdit
from saelab.errors import ConfigError, nearest


def _edit(
    operation: Operation,
    source: Handle | Editable,
    latent: int | Sequence[int],
    site: str | None,
    **fields: Any,
) -> LatentEdit:
    if not isinstance(source, Handle):
        if site is None:
            raise ConfigError(
                "a bare dictionary does not know its site: write `site=...`, or pass a Handle"
            )
        source = Handle(source, site)
    elif site is not None and site != source.site:
        raise ConfigError(f"{source.name!r} is a dictionary of {source.site!r}, not of {site!r}")
    fields |= {"operation": operation, "dictionary": source.name, "site": source.site}
    fields["latent"] = latent if isinstance(latent, int) else tuple(latent)
    if isinstance(fields.get("strength"), Sequence):
        fields["strength"] = tuple(fields["strength"])
    return LatentEdit(source, EditConfig.parse(fields))


def add(
    source: Handle | Editable,
    latent: int | Sequence[int],
    strength: float | Sequence[float],
    *,
    unit: Unit = "latent",
    where: Where = "all",
    site: str | None = None,
) -> LatentEdit:
    """Return the edit that adds strength · W_dec[latent]. Raises ConfigError."""
    return _edit("add", source, latent, site, strength=strength, unit=unit, where=where)


def set_to(
    source: Handle | Editable,
    latent: int | Sequence[int],
    strength: float | Sequence[float],
    *,
    unit: Unit = "latent",
    where: Where = "all",
    site: str | None = None,
) -> LatentEdit:
    """Return the edit that clamps latents to a value. Raises ConfigError."""
    return _edit("set", source, latent, site, strength=strength, unit=unit, where=where)


def scale(
    source: Handle | Editable,
    latent: int | Sequence[int],
    factor: float | Sequence[float],
    *,
    where: Where = "all",
    site: str | None = None,
) -> LatentEdit:
    """Return the edit that multiplies latents by a factor. Raises ConfigError."""
    return _edit("scale", source, latent, site, strength=factor, where=where)


def cap(
    source: Handle | Editable,
    latent: int | Sequence[int],
    bound: float | Sequence[float],
    *,
    unit: Unit = "latent",
    where: Where = "all",
    site: str | None = None,
) -> LatentEdit:
    """Return the edit that keeps |z| of latents at most at a bound. Raises ConfigError."""
    return _edit("cap", source, latent, site, strength=bound, unit=unit, where=where)


def ablate(
    source: Handle | Editable,
    latent: int | Sequence[int],
    *,
    where: Where = "all",
    site: str | None = None,
) -> LatentEdit:
    """Return the edit that sets latents to zero. Raises ConfigError."""
    return _edit("ablate", source, latent, site, where=where)


def project_out(
    source: Handle | Editable,
    latent: int | Sequence[int],
    *,
    where: Where = "all",
    site: str | None = None,
) -> LatentEdit:
    """Return the edit that removes x's components along latents' directions. Raises ConfigError."""
    return _edit("project_out", source, latent, site, where=where)


def to_yaml(edits: Sequence[LatentEdit]) -> str:
    """Return edits as YAML. Raises ConfigError if two dictionaries have one name."""
    handles: dict[str, Handle] = {}
    for edit in edits:
        if handles.setdefault(edit.handle.name, edit.handle) is not edit.handle:
            raise ConfigError(
                f"two dictionaries are called {edit.handle.name!r}: give each Handle its own name"
            )
    return yaml.safe_dump([edit.config.plain() for edit in edits], sort_keys=False)


def from_yaml(text: str, handles: Sequence[Handle]) -> list[LatentEdit]:
    """Return the edits that YAML says, on these dictionaries.

    Raises ConfigError for a dictionary that is not among them, or that acts at another site.
    """
    data = parse_yaml(text, "the list of edits")
    if not isinstance(data, list):
        raise ConfigError(f"edits should be a list, but are {type(data).__name__}")
    known = {handle.name: handle for handle in handles}
    edits = []
    for config in map(EditConfig.parse, data):
        if config.dictionary not in known:
            hint = nearest(config.dictionary, list(known))
            raise ConfigError(f"there is no dictionary {config.dictionary!r}; {hint}")
        handle = known[config.dictionary]
        if config.site not in (None, handle.site):
            raise ConfigError(
                f"{config} is for the dictionary at {config.site!r}, but the one of that name acts "
                f"at {handle.site!r}; give the handle of the dictionary that was meant"
            )
        edits.append(LatentEdit(handle, config.model_copy(update={"site": handle.site})))
    return edits
