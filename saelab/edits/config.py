"""What an edit is, as plain data: which latents, what is done to them, how much, and where."""

import re
from typing import Literal

from pydantic import FiniteFloat, NonNegativeInt, field_validator, model_validator

from saelab.config import Config

Operation = Literal["add", "set", "scale", "ablate", "project_out", "cap"]
Unit = Literal["latent", "typical_max", "norm"]
"""What strength 1 is: a latent of 1; its typical maximum; a change as long as the site's mean
norm."""

_MEASURED: tuple[Operation, ...] = ("add", "set", "cap")
_PLAIN: tuple[Operation, ...] = ("ablate", "project_out")


class TokenPattern(Config):
    """The positions whose token's text matches a pattern."""

    tokens: str
    """Regular expression, searched for in each token's own text, leading space included."""

    @field_validator("tokens")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


Where = Literal["all", "prompt", "after"] | TokenPattern
"""The positions edited: all, those of the prompt, those after it, or those of some tokens."""


class EditConfig(Config):
    """One edit as YAML says it; the dictionary is named, not held."""

    operation: Operation
    dictionary: str
    """Name of the dictionary (see `Handle`)."""
    site: str | None = None
    """Where the dictionary acts; None, in YAML by hand: wherever the dictionary of that name
    does."""
    latent: NonNegativeInt | tuple[NonNegativeInt, ...]
    """The latent, or several at once."""
    strength: FiniteFloat | tuple[FiniteFloat, ...] | None = None
    """What is added, set, multiplied by or capped at; one number for all, or one per latent."""
    unit: Unit = "latent"
    """What strength 1 is. Factors (`scale`) have no unit."""
    where: Where = "all"
    """The positions edited; never padding."""

    @property
    def latents(self) -> tuple[int, ...]:
        """The latents, as a tuple also where there is one."""
        return self.latent if isinstance(self.latent, tuple) else (self.latent,)

    @property
    def strengths(self) -> tuple[float, ...]:
        """One strength per latent; empty for operations that have none."""
        if self.strength is None or isinstance(self.strength, tuple):
            return self.strength or ()
        return (self.strength,) * len(self.latents)

    @model_validator(mode="after")
    def _check(self) -> "EditConfig":
        if not self.latents or len(set(self.latents)) < len(self.latents):
            raise ValueError(f"an edit needs one latent or several different ones: {self.latent}")
        if self.operation in _PLAIN:
            if self.strength is not None:
                raise ValueError(f"{self.operation} takes no strength")
        elif len(self.strengths) != len(self.latents):
            raise ValueError(
                f"{self.operation} needs one strength, or one for each of {len(self.latents)} "
                f"latents, but has {self.strength}"
            )
        if self.operation == "cap" and min(self.strengths) < 0:
            raise ValueError("a cap bounds |z|, so it cannot be negative")
        if self.operation not in _MEASURED and self.unit != "latent":
            raise ValueError(f"{self.operation} has no unit; leave `unit` out")
        return self

    def __str__(self) -> str:
        """Return the edit in words."""
        strength = "" if self.strength is None else f" {self.strength}"
        unit = "" if self.unit == "latent" else f" × {self.unit}"
        where = self.where.tokens if isinstance(self.where, TokenPattern) else self.where
        target = f"latent {self.latent} of {self.dictionary!r}"
        return f"{self.operation}{strength}{unit} on {target} ({where})"
