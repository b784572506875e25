"""Training by iterations over a whole store: one `Solved` member's state, metrics and checkpoints.

It sees the member's site alone, in rows scaled to mean norm √d_in, and stops where its state says
that it is done. A checkpoint between two iterations holds the state's tensors: what is resumed ends
with the bytes of what was never interrupted. Of the run's settings only how often a line and a
checkpoint are written concern it; there is no learning rate, and no batches that members share.
"""

import copy
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from saelab import kernels
from saelab.clock import now
from saelab.errors import ConfigError, Interrupted, NonFiniteError, ShapeError
from saelab.protocols import SiteStats, Store
from saelab.train import checkpoint
from saelab.train.config import Fitted, Member, TrainConfig
from saelab.train.gradient import input_scale
from saelab.train.journal import Journal, compare_machine, hand_over, machine, times
from saelab.train.trainee import Solvable, SolverState
from saelab.types import Batch

Report = Callable[[dict[str, Any]], None]


class ScaledSite:
    """One site of a store, in float32 rows scaled by a constant; all else is the store's."""

    def __init__(self, store: Store, site: str, scale: float, device: torch.device) -> None:
        """Look at `site` through `scale`."""
        self._store, self._scale, self._device = store, scale, device
        self.sites = (site,)
        for name in dir(store):  # so that it passes for every protocol that the store passes for
            if not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, getattr(store, name))

    def stats(self, site: str) -> SiteStats:
        """Return the statistics of the scaled rows."""
        own, s = self._store.stats(site), self._scale
        return SiteStats(
            own.n, own.mean * s, own.mean_norm * s, own.mean_square_norm * s**2, own.median_norm * s
        )

    def rows(self, site: str, refs: Tensor) -> Tensor:
        """Return scaled rows by number."""
        return self._scaled(self._store.rows(site, refs))

    def batches(self, site: str, **how: Any) -> Iterator[Batch]:
        """Yield shuffled batches of scaled rows."""
        return map(self._batch, self._store.batches(site, **how))

    def scan(self, site: str, **how: Any) -> Iterator[Batch]:
        """Yield scaled rows in order."""
        return map(self._batch, self._store.scan(site, **how))

    def _batch(self, batch: Batch) -> Batch:
        x = self._scaled(batch.x)
        return replace(batch, x=x, y=x, grad=None)

    def _scaled(self, x: Tensor) -> Tensor:
        return x.to(self._device, torch.float32) * self._scale


class Solver:
    """One member that is being solved."""

    def __init__(self, member: Member, store: Store, config: TrainConfig) -> None:
        """Take a copy of the member's dictionary.

        Raises ShapeError on a site of another width, and ConfigError for one that goes on from a
        finished dictionary.
        """
        given: Solvable = member.dictionary  # pyright: ignore[reportAssignmentType]
        width = store.width(member.site)
        if given.d_in != width:
            raise ShapeError(
                f"{member.name}: site {member.site!r} has width {width}, but the dictionary takes "
                f"{given.d_in}. Is this the site that it is meant for?"
            )
        if member.initialised:
            raise ConfigError(
                f"{member.name}: {given.config.type} is solved from the rows and cannot continue "
                "from a finished dictionary; drop `init`"
            )
        self.config = config
        self.scale = input_scale(store, member.site)
        self.dictionary = copy.deepcopy(given)
        self.member = replace(member, dictionary=self.dictionary)
        view = ScaledSite(store, member.site, self.scale, given.W_dec.device)
        self.view = cast(Store, view)
        self.reads = self.dictionary.rows_read(store.n_kept(member.site, "train"))
        """Rows that an iteration reads."""
        self.journal = Journal(member.draft)
        self.state: SolverState | None = None
        self.done = 0
        """Iterations taken."""
        self.resumed_at = 0
        self.init_seconds: float | None = 0.0
        """Spent in `start`, reading included; None where the checkpoint does not say."""
        self.seconds = 0.0
        """Spent in iterations since it was resumed."""

    @property
    def most(self) -> int:
        """How many iterations there may be."""
        return self.dictionary.most_iterations

    def begin(self) -> None:
        """Take up the last checkpoint, if there is one, or start."""
        draft = self.member.draft
        found = None if draft is None else checkpoint.read(draft.scratch)
        if found is None:
            generator = torch.Generator().manual_seed(self.member.seed)
            started = now()
            self.state = self.dictionary.start(self.view, generator)
            self.init_seconds = now() - started
        else:
            tensors, state = found
            self.state = self.dictionary.restore(self.view, tensors)
            self.done = self.resumed_at = state["step"]
            self.init_seconds = state.get("init_seconds")
            compare_machine(self.member.name, state)
        self.journal.cut(self.done)

    def step(self) -> bool:
        """Take an iteration; return whether a line of metrics was written."""
        started = now()
        state = self.state = self.dictionary.advance(self.view, self.state)
        self.done += 1
        self.seconds += now() - started
        if not math.isfinite(state.loss):
            raise NonFiniteError(
                f"{self.member.name}: the loss became {state.loss} at iteration {self.done}. "
                "Look at the store's activations with `saelab list`, or start it otherwise."
            )
        if self.done % self.config.log_every and not state.done:
            return False
        line = {"step": self.done, "tokens": self.done * self.reads, "loss": state.loss}
        self.journal.add(line | state.metrics())
        return True

    def checkpoint(self) -> None:
        """Write the state between two iterations; nothing without a draft."""
        if self.member.draft is not None and self.state is not None:
            kept = {"step": self.done, "init_seconds": self.init_seconds, **machine()}
            checkpoint.write(self.member.draft.scratch, self.state.tensors(), kept)

    def discard(self) -> None:
        """Remove what was written of this member: it diverged."""
        if self.member.draft is not None:
            self.member.draft.discard()

    def finish(self) -> Fitted:
        """Take the solution, fold the input scale in, save into the draft; return the member."""
        self.dictionary.finish(self.state)
        self.state = None  # and with it the rows
        trained = self.dictionary.folded(self.scale)
        last = self.journal.lines[-1]
        facts = hand_over(self.member, trained, self.scale) | {
            "iterations": self.done,
            **{f"last_{key}": last[key] for key in ("loss", "l0", "dead") if key in last},
        }
        spent = times(
            steps=self.done, resumed_at=self.resumed_at, init_seconds=self.init_seconds,
            step_seconds=self.seconds,
        )  # fmt: skip
        provenance = spent | {"kernels": kernels.name()}
        return Fitted(self.member.name, trained, self.journal.lines, facts, provenance)

    def info(self) -> dict[str, Any]:
        """Return what a report is told."""
        n, seconds = self.done - self.resumed_at, max(self.seconds, 1e-9)
        return {
            "step": self.done,
            "steps": self.most,
            "eta_seconds": seconds / max(n, 1) * (self.most - self.done),
            "tokens_per_second": round(n * self.reads / seconds, 1),
            "share_reading": 0.0,
            "share_stepping": 1.0,
            "share_logging": 0.0,
            "members": {self.member.name: self.journal.lines[-1]} if self.journal.lines else {},
        }


def solve(solver: Solver, reports: Sequence[Report], stop: threading.Event) -> Fitted:
    """Iterate to the end; once `stop` is set, write a checkpoint and raise Interrupted."""
    solver.begin()
    every = max(1, round(solver.most * solver.config.checkpoint_every))
    while not _state(solver).done:
        logged = not stop.is_set() and solver.step()
        if logged:
            for report in reports:
                report(solver.info())
        if stop.is_set() or solver.done % every == 0 or _state(solver).done:
            solver.checkpoint()
        if stop.is_set() and not _state(solver).done:
            kept = "A checkpoint is written: run the same command to go on."
            lost = "Nothing was kept: this run had no folder for checkpoints."
            raise Interrupted(
                f"stopped after iteration {solver.done} of at most {solver.most}, as asked. "
                + (lost if solver.member.draft is None else kept)
            )
    return solver.finish()


def _state(solver: Solver) -> SolverState:
    assert solver.state is not None
    return solver.state
