"""What training needs of a dictionary, beside its capability."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from saelab.protocols import Dictionary, Loss, Store
from saelab.types import Batch


@runtime_checkable
class Trainee(Dictionary, Protocol):
    """What training needs of a dictionary: `GradientTrained`, a module, and `folded`."""

    def init_(self, sample: Tensor, generator: torch.Generator) -> None: ...  # noqa: D102
    def loss(self, batch: Batch, progress: float, dead: Tensor) -> Loss: ...  # noqa: D102
    def constrain_grad_(self) -> None: ...  # noqa: D102
    def constrain_(self) -> None: ...  # noqa: D102
    def observe_(self, loss: Loss) -> None: ...  # noqa: D102
    def lr_factors(self) -> Mapping[str, float]: ...  # noqa: D102
    def revive_(self, ids: Tensor, rows: Tensor) -> None: ...  # noqa: D102
    def calibrate(self, batches: Iterable[Batch]) -> None: ...  # noqa: D102
    def folded(self, scale: float) -> "Trainee": ...  # noqa: D102
    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Tensor]: ...  # noqa: D102
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> Any: ...  # noqa: D102


@runtime_checkable
class SolverState(Protocol):
    """Where the solution of a `Solved` type stands between two iterations."""

    @property
    def loss(self) -> float:
        """What is being made small, as a share of the rows' variance; not finite: it diverged."""
        ...

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return numbers for the log, `l0` and `dead` among them."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on with, bit for bit."""
        ...


@runtime_checkable
class Solvable(Dictionary, Protocol):
    """What solving needs of a dictionary: `Solved`, and `folded`."""

    @property
    def most_iterations(self) -> int: ...  # noqa: D102
    def rows_read(self, n: int) -> int: ...  # noqa: D102
    def start(self, store: Store, generator: torch.Generator) -> SolverState: ...  # noqa: D102
    def advance(self, store: Store, state: Any) -> SolverState: ...  # noqa: D102
    def restore(self, store: Store, tensors: Mapping[str, Tensor]) -> SolverState: ...  # noqa: D102
    def finish(self, state: Any) -> None: ...  # noqa: D102
    def folded(self, scale: float) -> "Solvable": ...  # noqa: D102
