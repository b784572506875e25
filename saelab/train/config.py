"""What a training run is told, and what it gives back."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from saelab.artifacts import Draft
from saelab.config import Config
from saelab.errors import ConfigError
from saelab.protocols import Dictionary
from saelab.train import schedules

Share = Annotated[float, Field(ge=0, le=1)]

ADAM_EPS = 6.25e-10
"""Adam's epsilon, of Gao et al. 2024: gradients of a loss scaled by variance are small."""


class TrainConfig(Config):
    """How all members of a run are trained. Schedules are shares of the run."""

    batch: PositiveInt = 2048
    """Rows per step."""
    tokens: PositiveInt
    """Rows seen in all, repeats included; the number of steps is tokens // batch."""
    shuffle_seed: NonNegativeInt = 0
    """Order of the rows, shared by all members."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of a member's gradient."""
    warmup: Share = 0.05
    """Share of the run over which the learning rate rises."""
    decay: Share = 0.3
    """Share of the run, at its end, over which the learning rate falls to 0."""
    betas: tuple[Share, Share] = (0.8, 0.95)
    """Adam's decay rates of the two moments; short memories suit runs of hundreds of steps."""
    dead_window: PositiveInt | None = None
    """Tokens without firing after which a latent is dead; default min(10 M, a tenth of the run)."""
    resample_every: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the run between resamplings of dead latents, none of them in the last `decay` of the
    run; default never."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the run between checkpoints."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Precision of the matrix products; weights and moments are float32 always."""
    wandb: str | None = None
    """Project on Weights & Biases that also gets the metrics (extra `wandb`)."""

    @model_validator(mode="after")
    def _one_step_at_least(self) -> "TrainConfig":
        if self.tokens < self.batch:
            raise ValueError(
                f"tokens={self.tokens} is less than one batch of {self.batch}; "
                "lower batch or raise tokens"
            )
        return self

    @model_validator(mode="after")
    def _one_resampling_at_least(self) -> "TrainConfig":
        if self.resample_every is not None and not self.resamples_after(self.resample_steps):
            raise ValueError(
                f"resample_every={self.resample_every:g} comes to nothing: no latent is resampled "
                f"in the last {self.decay:g} of the run (decay); choose it below "
                f"{1 - self.decay:g}, or leave it out"
            )
        return self

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.tokens // self.batch

    @property
    def window(self) -> int:
        """Tokens without firing after which a latent is dead."""
        return self.dead_window or schedules.default_dead_window(self.tokens)

    @property
    def checkpoint_steps(self) -> int:
        """Number of steps between checkpoints."""
        return max(1, round(self.steps * self.checkpoint_every))

    @property
    def resample_steps(self) -> int:
        """Number of steps between resamplings, where there are any."""
        return max(1, round(self.steps * (self.resample_every or 1)))

    def resamples_after(self, step: int) -> bool:
        """Whether dead latents are resampled after this many steps.

        Never while the learning rate falls: a new latent needs it to find its place, and the dead
        share at the end should count what stayed silent, not what was just touched.
        """
        if self.resample_every is None or step % self.resample_steps:
            return False
        return step < self.steps * (1 - self.decay)

    def shortened(self, tokens: int | None, who: str) -> "TrainConfig":
        """Return the same for a member that sees fewer tokens; None: all of them.

        Raises ConfigError if they are less than a step, or more than the run's.
        """
        if tokens is None:
            return self
        if not self.batch <= tokens <= self.tokens:
            raise ConfigError(
                f"{who}: tokens={tokens} should lie between one batch ({self.batch}) and what the "
                f"run reads, train.tokens={self.tokens}"
            )
        return self.model_copy(update={"tokens": tokens})

    def key_fields(self) -> dict[str, Any]:
        """Return the fields that change what a trained dictionary's files hold.

        A field that came later is left out at its default: older artifacts keep their keys.
        """
        left_out = {"checkpoint_every", "wandb"}
        if self.resample_every is None:
            left_out.add("resample_every")
        return {k: v for k, v in self.plain().items() if k not in left_out}


@dataclass(frozen=True)
class Member:
    """A dictionary to train, with what belongs to it alone."""

    name: str
    dictionary: Dictionary
    """Left as it is: training works on a copy, on the same device."""
    site: str
    lr: float | None = None
    """Peak learning rate; by default `schedules.default_lr`."""
    seed: int = 0
    """Initialisation and sampling."""
    draft: Draft | None = None
    """Where metrics, checkpoints and the trained dictionary go; None keeps everything in memory."""
    initialised: bool = False
    """Whether its weights already take raw activations, and training goes on from them."""
    tokens: int | None = None
    """Rows of the stream that it sees; by default all of the run's."""


@dataclass(frozen=True)
class Fitted:
    """A trained member."""

    name: str
    dictionary: Dictionary
    """Takes raw activations."""
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    facts: dict[str, Any]
    """What a reader wants to know without opening the files; the same on every run."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it went: seconds, tokens/s, where time went, from which step it was resumed."""
