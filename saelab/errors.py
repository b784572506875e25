"""Every error a user can cause. A message says what was wanted, what came and what to do."""

from collections.abc import Mapping


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


class TaskError(SaelabError):
    """A model cannot do a task, its tokenizer has too few words for it, or its prompts do not
    fit."""


class NonFiniteError(SaelabError):
    """Activations or a loss are NaN or infinite."""


class DivergedError(NonFiniteError):
    """Members of a sweep stopped being finite; the others were trained to the end."""

    def __init__(self, faults: Mapping[int, str], n_members: int) -> None:
        """Take what is to be said of each that diverged, by its place in the sweep."""
        self.faults = dict(faults)
        lines = list(faults.values())
        if n_members > 1:
            kept = f"the other {n_members - len(faults)} are trained"
            lines.insert(0, f"{len(faults)} of {n_members} dictionaries diverged; {kept}.")
        super().__init__("\n".join(lines))


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
