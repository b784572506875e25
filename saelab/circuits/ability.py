"""How well a model does a task, and whether there is a circuit to look for."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.circuits.tasks import Metric, TaskData, Version
from saelab.errors import TaskError
from saelab.protocols import LanguageModel


@dataclass(frozen=True)
class TaskScore:
    """How well a model does a task; errors are standard errors over prompts."""

    task: str
    metric: Metric
    n: int
    accuracy: float
    accuracy_error: float
    chance: float
    clean: float
    """Mean metric of clean prompts."""
    clean_error: float
    corrupted: float
    gap: float
    """Mean of clean − corrupted, pair by pair: what effects are shares of."""
    gap_error: float

    @property
    def can_do(self) -> bool:
        """Whether accuracy is above chance by two standard errors, and the gap above noise by
        three."""
        able = self.accuracy - 2 * self.accuracy_error > self.chance
        return able and self.gap > 3 * self.gap_error

    def __str__(self) -> str:
        """Say it in a line."""
        return (
            f"{self.task}: {self.accuracy:.0%} right of {self.n} (chance {self.chance:.0%}), "
            f"{self.metric.replace('_', ' ')} {self.clean:.3g} ± {self.clean_error:.2g}, "
            f"corrupted {self.corrupted:.3g}, gap {self.gap:.3g} ± {self.gap_error:.2g}"
        )


def last_logits(
    model: LanguageModel, data: TaskData, version: Version = "clean", *, batch: int = 16
) -> Float[Tensor, "n d_vocab"]:
    """Return the logits at the last position of every prompt of a version."""
    tokens: Tensor = getattr(data, version)
    parts = []
    for index in torch.arange(len(data)).split(batch):
        part = data.rows(index)
        width = int(part.lengths.max())
        logits = model.logits(tokens[index, :width], lengths=part.lengths)
        parts.append(part.at_end(logits))
    return torch.cat(parts)


def score(model: LanguageModel, data: TaskData, *, batch: int = 16) -> TaskScore:
    """Return how well a model does a task, on these prompts."""
    logits = last_logits(model, data, batch=batch)
    right = data.is_right(logits).double()
    clean = data.measure(logits).double()
    corrupted = data.measure(last_logits(model, data, "corrupted", batch=batch)).double()
    return TaskScore(
        data.name, data.metric, len(data),
        float(right.mean()), mean_error(right), data.chance,
        float(clean.mean()), mean_error(clean), float(corrupted.mean()),
        float((clean - corrupted).mean()), mean_error(clean - corrupted),
    )  # fmt: skip


def mean_error(values: Float[Tensor, " n"]) -> float:
    """Return the standard error of a mean; infinite for a single value."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")


def require_able(found: TaskScore, *, force: bool = False) -> None:
    """Raise TaskError with the score if a model cannot do a task, unless forced."""
    if not found.can_do and not force:
        raise TaskError(
            f"the model cannot do the task, so there is no circuit to find. {found}. "
            "Take another task or model, or more prompts; `force: true` goes on anyway."
        )
