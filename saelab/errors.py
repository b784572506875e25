"""Every error a user can cause. A message says what was wanted, what came and what to do."""


class SaelabError(Exception):
    """Base class: the command line prints its message without a traceback and exits with 2."""


class ConfigError(SaelabError):
    """A configuration has an unknown key, a wrong type or a value out of range."""


class ShapeError(SaelabError):
    """A tensor has another width or length than the object it was given to."""


class ArtifactError(SaelabError):
    """An artifact is missing, altered, of an unknown schema, or does not fit its use."""


class LockedError(ArtifactError):
    """Another run is writing the same artifact."""


class AssetError(SaelabError):
    """A model or a text cannot be found, fetched or verified."""


class CorpusError(SaelabError):
    """A corpus cannot be read, or holds less than was asked for."""


class SiteError(SaelabError):
    """A model has no such site, or a site does not fit its use."""


class NonFiniteError(SaelabError):
    """Activations or a loss are NaN or infinite."""


class ResourceError(SaelabError):
    """A run would not fit in the disk or memory that there is."""


class Interrupted(SaelabError):
    """The user stopped a run; it left a checkpoint, and the same command goes on from there."""


def nearest(name: str, known: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """Return a phrase naming the known names closest to `name`, or all of them if none is close."""
    import difflib

    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(map(repr, list(known)[:12])) + (", …" if len(known) > 12 else "")
    return f"known: {shown}"
