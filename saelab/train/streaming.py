"""Training in one pass: one member that takes in batches until it is full.

It shares the stream of its site with members that are trained by gradients, and like them owns all
of its state. There is no learning rate, and nothing is drawn: the order of the rows decides.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from saelab.clock import now
from saelab.errors import ArtifactError, ConfigError, NonFiniteError, ShapeError
from saelab.protocols import Dictionary, Intake, Store
from saelab.train import checkpoint
from saelab.train.config import Fitted, Member, TrainConfig
from saelab.train.gradient import input_scale
from saelab.train.journal import Journal, compare_machine, hand_over, machine
from saelab.types import Batch


@runtime_checkable
class Collector(Dictionary, Protocol):
    """What one pass needs of a dictionary: `Streamed`, a module, and `folded`."""

    @property
    def is_full(self) -> bool: ...  # noqa: D102
    def begin_(self, mean: Tensor, sample: Tensor, n_rows: int) -> None: ...  # noqa: D102
    def partial_fit(self, batch: Batch) -> Intake: ...  # noqa: D102
    def unplaced(self) -> Tensor: ...  # noqa: D102
    def place_(self, position: Tensor, token: Tensor) -> None: ...  # noqa: D102
    def folded(self, scale: float) -> "Collector": ...  # noqa: D102
    def state_dict(self) -> dict[str, Tensor]: ...  # noqa: D102
    def load_tensors_(self, tensors: dict[str, Tensor], origin: str) -> None: ...  # noqa: D102


class StreamTrainer:
    """One streamed member in training, on inputs scaled to mean norm √d_in."""

    def __init__(self, member: Member, store: Store, config: TrainConfig) -> None:
        """Take a copy of the member's dictionary. Raises ShapeError on a site of another width, and
        ConfigError for a learning rate."""
        given: Collector = member.dictionary  # pyright: ignore[reportAssignmentType]
        width = store.width(member.site)
        if given.d_in != width:
            raise ShapeError(
                f"{member.name}: site {member.site!r} has width {width}, but the dictionary takes "
                f"{given.d_in}. Is this the site that it is meant for?"
            )
        if member.lr is not None:
            raise ConfigError(
                f"{member.name}: {given.config.type} takes no gradient steps; drop lr"
            )
        self.config, self.store = config, store
        self.scale = input_scale(store, member.site)
        self.dictionary: Collector = given.folded(1 / self.scale)
        self.member = replace(member, dictionary=self.dictionary)
        self.device = given.W_dec.device
        self.journal = Journal(member.draft)
        self.done = 0
        """Batches taken in."""
        self.resumed_at = 0
        self.init_seconds: float | None = 0.0
        """Spent in `init_`; None where the checkpoint does not say."""
        self.seen = 0
        """Rows looked at in all."""
        self.since = Intake(0, 0, 0.0)
        """What happened since the last line of metrics."""

    @property
    def needs_init(self) -> bool:
        """Whether `init_` must be called before the first batch."""
        return self.done == 0 and not self.member.initialised

    @property
    def is_full(self) -> bool:
        """Whether it takes no more batches though the run goes on."""
        ended = self.done == self.config.steps
        return ended or (self.done > 0 and self.dictionary.is_full)

    def init_(self, sample: Tensor) -> None:
        """Begin, knowing the site's mean and a sample of scaled activations."""
        site, config = self.member.site, self.config
        mean = (self.store.stats(site).mean * self.scale).to(self.device, torch.float32)
        n_rows = min(config.steps * config.batch, self.store.n_kept(site, "train"))
        started = now()
        self.dictionary.begin_(mean, sample, n_rows)
        self.init_seconds = now() - started

    def step(self, batch: Batch) -> bool:
        """Take in a scaled batch; return whether a line of metrics was written."""
        new, old = self.dictionary.partial_fit(batch), self.since
        self.done += 1
        self.seen += new.seen
        self.since = Intake(old.seen + new.seen, old.failed + new.failed, old.error + new.error)
        if not math.isfinite(new.error):
            raise NonFiniteError(
                f"{self.member.name}: a row's error is {new.error} at step {self.done} of "
                f"{self.config.steps}: the store's rows should be finite; look at it with "
                "`saelab list`, or harvest it again"
            )
        last = self.done == self.config.steps or self.is_full
        if self.done % self.config.log_every and not last:
            return False
        self._log()
        return True

    def _log(self) -> None:
        rows = max(self.since.seen, 1)
        self.journal.add(
            {
                "step": self.done,
                "tokens": self.seen,
                "loss": self.since.error / rows,
                "atoms": self.dictionary.d_sae,
                "failed": self.since.failed / rows,
            }
        )
        self.since = Intake(0, 0, 0.0)

    # ------------------------------------------------------------------------------- checkpoints

    def checkpoint(self) -> None:
        """Write the whole state between two batches; nothing without a draft."""
        if self.member.draft is None:
            return
        since = [self.since.seen, self.since.failed, self.since.error]
        state = {"step": self.done, "seen": self.seen, "since": since, **machine()}
        state["init_seconds"] = self.init_seconds
        checkpoint.write(self.member.draft.scratch, self.dictionary.state_dict(), state)

    def discard(self) -> None:
        """Remove what was written of this member."""
        if self.member.draft is not None:
            self.member.draft.discard()

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one, and cut the metrics at its step."""
        if self.member.draft is None:
            return
        found = checkpoint.read(self.member.draft.scratch)
        if found is not None:
            tensors, state = found
            here = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            self.dictionary.load_tensors_(here, f"the checkpoint of {self.member.name}")
            self.done = self.resumed_at = state["step"]
            self.seen, self.since = state["seen"], Intake(*state["since"])
            self.init_seconds = state.get("init_seconds")
            compare_machine(self.member.name, state)
        self.journal.cut(self.done)

    # ------------------------------------------------------------------------------------ finish

    def finish(self, calibration: Iterable[Batch]) -> Fitted:
        """Look up where the atoms came from, fold the input scale in, save into the draft."""
        del calibration
        trained = self.dictionary.folded(self.scale)
        trained.place_(*_places(self.store, self.member.site, trained.unplaced().cpu()))
        last = self.journal.lines[-1]
        facts = hand_over(self.member, trained, self.scale) | {
            "tokens_seen": self.seen,
            "full": trained.is_full,
            "last_loss": last["loss"],
            "last_failed": last["failed"],
        }
        return Fitted(self.member.name, trained, self.journal.lines, facts)


def _places(store: Store, site: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's position in its window and its token; −1 where the store cannot say."""
    position, token = torch.full_like(rows, -1), torch.full_like(rows, -1)
    try:
        numbers = store.window_of(rows)
    except ArtifactError:  # an online store keeps no windows to look in
        return position, token
    for number in numbers.unique().tolist():
        window, here = store.window(site, number), numbers == number
        position[here] = rows[here] - window.first_row
        token[here] = window.ids.long()[position[here]]
    return position, token
