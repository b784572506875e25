"""Training: one stream of batches feeds every member.

`fit` matches on how a dictionary comes to be (`GradientTrained`, `Streamed`, `Solved`), the only
place that does. Members that share a site share each batch; each owns all other state, so a
member's weights after a sweep are bit-identical to those of its solo run.
"""

import itertools
import logging
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from saelab import kernels
from saelab.clock import now
from saelab.errors import ConfigError, DivergedError, Interrupted, NonFiniteError, SiteError
from saelab.ops.select import tally
from saelab.protocols import GradientTrained, Solved, Store, Streamed
from saelab.train.config import Fitted, Member, TrainConfig
from saelab.train.gradient import GradientTrainer, input_scale
from saelab.train.journal import times
from saelab.train.solve import Solver, solve
from saelab.train.streaming import StreamTrainer
from saelab.train.wandb_log import WandbLog
from saelab.types import Batch, holds_neurons

__all__ = ["Done", "Fitted", "Member", "Report", "Sweep", "TrainConfig", "fit"]

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
"""Called after each line of metrics with the numbers of `_Clock.info`."""

SAMPLE_ROWS = 32_768
"""Rows that weights are initialised from."""
CALIBRATION_ROWS = 50_000
"""Training rows that a type may calibrate its thresholds on."""


Trainer = GradientTrainer | StreamTrainer
"""What takes part in a sweep: one member, and all of its state."""

Done = Callable[[int, Fitted], None]
"""Called with a member's place and what became of it, as soon as it is there."""


def fit(
    members: Iterable[Member],
    store: Store,
    config: TrainConfig,
    *,
    report: Report | None = None,
    done: Done | None = None,
) -> list[Fitted]:
    """Train all members in one pass over the store; return them in order, for raw activations.

    Members that are solved come after it, one by one: each reads the store as it needs. A member
    with a draft goes on from its last checkpoint, bit for bit. SIGINT and SIGTERM let the step end,
    write a checkpoint and raise Interrupted. A member whose loss or gradient is no longer finite is
    stopped, and its draft emptied; the others go on, `done` is called with each of them, and at the
    end DivergedError says which were stopped.
    """
    sweep = Sweep(members, store, config)
    n_members = len(sweep.active) + len(sweep.solvers)
    if n_members == 0:
        return []
    reports = [report] if report else []
    if config.wandb:
        reports.append(WandbLog(config.wandb, config.plain()))
    found: dict[int, Fitted] = {}
    with _stop_on_signals() as stop:
        _loop(sweep, reports, stop)
        for place, fitted in itertools.chain(sweep.finish(), sweep.solve(reports, stop)):
            found[place] = fitted
            if done is not None:
                done(place, fitted)
    if sweep.faults:
        raise DivergedError(sweep.faults, n_members)
    return [found[place] for place in range(n_members)]


def _trainer(member: Member, store: Store, config: TrainConfig) -> Trainer | Solver:
    if getattr(member.dictionary.config, "needs_grad", False) and (
        member.site not in store.grad_sites
    ):
        raise ConfigError(
            f"{member.name} is trained on the gradients of the model's loss, but the store holds "
            f"none at {member.site}; harvest it with harvest.gradient: sampled, or data"
        )
    if getattr(member.dictionary.config, "needs_neurons", False) and (
        store.model_name is not None and not holds_neurons(member.site)
    ):
        raise SiteError(
            f"{member.name}: {member.dictionary.config.type} groups an MLP's neurons, but "
            f"{member.site!r} has none; harvest the input of a W_out, blocks.N.mlp.hook_post"
        )
    own = config.shortened(member.tokens, member.name)
    match member.dictionary:
        case GradientTrained():
            return GradientTrainer(member, store, own)
        case Streamed():
            return StreamTrainer(member, store, own)
        case Solved() if member.tokens is not None:
            raise ConfigError(
                f"{member.name}: {member.dictionary.config.type} is solved from the whole store; "
                "drop tokens, or harvest less"
            )
        case Solved():
            return Solver(member, store, config)
        case other:
            raise ConfigError(
                f"{member.name}: {type(other).__name__} cannot be trained: a trainable type "
                "inherits GradientTrained, Streamed or Solved"
            )


class Sweep:
    """One pass over a store: each site's batch is read once, and given to all of its members."""

    def __init__(self, members: Iterable[Member], store: Store, config: TrainConfig) -> None:
        """Take up each member's checkpoint or initialise it; open one stream per site."""
        self.store = store
        self.config = config
        made = {i: _trainer(member, store, config) for i, member in enumerate(members)}
        self.active = {i: t for i, t in made.items() if not isinstance(t, Solver)}
        """The members in training, by their place; one that diverges or is finished leaves."""
        self.solvers = {i: t for i, t in made.items() if isinstance(t, Solver)}
        """The members that are solved afterwards."""
        self.faults: dict[int, str] = {}
        """By place, what is to be said of a member that diverged."""
        self.clock = _Clock(config)
        for trainer in self.active.values():
            trainer.resume()
        going = (t.done for t in self.active.values() if not t.is_full)
        self.number = min(going, default=config.steps)
        """Steps taken."""
        _initialise(list(self.active.values()), store, config)
        places = dict.fromkeys((t.member.site, t.device) for t in self.active.values())
        self._streams = {
            (site, device): _stream(store, site, config, device, self.number)
            for site, device in places
        }

    def step(self) -> bool:
        """Take the next step of every member; return whether a line of metrics was written."""
        logged = False
        for place, stream in self._streams.items():
            here = [
                (i, t)
                for i, t in self.active.items()
                if place == (t.member.site, t.device) and not t.is_full
            ]
            if not here:
                continue
            with self.clock.spent("reading"):
                batch = next(stream)
            with self.clock.spent("stepping"):
                for i, trainer in here:
                    if trainer.done == self.number:
                        logged |= self._advance(i, trainer, batch)
        self.number += 1
        self.clock.steps += 1
        return logged

    def _advance(self, place: int, trainer: Trainer, batch: Batch) -> bool:
        try:
            with self.clock.stepped(place):
                return trainer.step(batch)
        except NonFiniteError as error:
            self.stop(place, trainer, error)
            return False

    def stop(self, place: int, trainer: Trainer | Solver, error: NonFiniteError) -> None:
        """Let a member that diverged leave, with all that was written of it."""
        log.warning("%s It is stopped.", error)
        self.faults[place] = str(error)
        self.active.pop(place, None)
        trainer.discard()

    @property
    def is_full(self) -> bool:
        """Whether no member takes another step: each is full, or has left."""
        return all(trainer.is_full for trainer in self.active.values())

    def finish(self) -> Iterator[tuple[int, Fitted]]:
        """Yield each member's place and what became of it; the member leaves.

        They go site by site, so that the rows to calibrate on are read once per site.
        """
        for site in dict.fromkeys(t.member.site for t in self.active.values()):
            rows = _Calibration(self, site)
            for place in [i for i, t in self.active.items() if t.member.site == site]:
                trainer = self.active.pop(place)
                try:
                    fitted = trainer.finish(rows.batches(trainer))
                except NonFiniteError as error:
                    self.stop(place, trainer, error)
                    continue
                spent = times(
                    steps=trainer.done, resumed_at=trainer.resumed_at,
                    init_seconds=trainer.init_seconds, step_seconds=self.clock.members[place],
                )  # fmt: skip
                provenance = spent | self.clock.summary()
                del trainer  # its optimiser's memory is free before the next one finishes
                yield place, replace(fitted, provenance=provenance)

    def solve(self, reports: list[Report], stop: threading.Event) -> Iterator[tuple[int, Fitted]]:
        """Yield each solved member's place and what became of it, one after the other."""
        for place in list(self.solvers):
            solver = self.solvers.pop(place)  # its rows are free before the next one starts
            try:
                fitted = solve(solver, reports, stop)
            except NonFiniteError as error:
                self.stop(place, solver, error)
                continue
            yield place, fitted

    def checkpoint(self) -> None:
        """Write the state of every member."""
        for trainer in self.active.values():
            trainer.checkpoint()

    def info(self) -> dict[str, Any]:
        """Return what a report is told."""
        return self.clock.info(self.number, list(self.active.values()))


def _loop(sweep: Sweep, reports: list[Report], stop: threading.Event) -> None:
    steps = sweep.config.steps
    while sweep.number < steps and not sweep.is_full:
        logged = sweep.step()
        with sweep.clock.spent("logging"):
            if logged:
                info = sweep.info()
                for report in reports:
                    report(info)
            due = sweep.number % sweep.config.checkpoint_steps == 0 or sweep.number == steps
            due |= sweep.is_full
            if due or stop.is_set():
                sweep.checkpoint()
        if stop.is_set() and sweep.number < steps and not sweep.is_full:
            raise Interrupted(
                f"stopped after step {sweep.number} of {steps}, as asked. "
                + _how_to_go_on(list(sweep.active.values()))
            )


class _Calibration:
    """A site's first training batches, read when a type first asks for them: most never do."""

    def __init__(self, sweep: Sweep, site: str) -> None:
        self._sweep, self._site = sweep, site
        self._kept: list[Batch] | None = None

    def batches(self, trainer: Trainer) -> Iterator[Batch]:
        if self._kept is None:
            config = self._sweep.config
            stream = _stream(self._sweep.store, self._site, config, torch.device("cpu"), 0)
            self._kept = list(itertools.islice(stream, -(-CALIBRATION_ROWS // config.batch)))
        for batch in self._kept:
            yield _scaled(batch, 1.0, trainer.device)


def _how_to_go_on(trainers: list[Trainer]) -> str:
    if all(t.member.draft is not None for t in trainers):
        return "A checkpoint is written: run the same command to go on."
    return "Nothing was kept: this run had no folder for checkpoints."


def _stream(
    store: Store, site: str, config: TrainConfig, device: torch.device, start: int
) -> Iterator[Batch]:
    scale = input_scale(store, site)
    batches = store.batches(
        site, batch=config.batch, seed=config.shuffle_seed, split="train", start=start
    )
    return (_scaled(batch, scale, device) for batch in batches)


def _scaled(batch: Batch, scale: float, device: torch.device) -> Batch:
    """Return the batch in float32, x and y scaled to mean norm √d, gradients by the inverse."""
    x = batch.x.to(device, torch.float32) * scale
    same = batch.y is batch.x
    y = x if same else batch.y.to(device, torch.float32) * scale
    grad = None if batch.grad is None else batch.grad.to(device, torch.float32) / scale
    return replace(batch, x=x, y=y, grad=grad)


def _initialise(trainers: list[Trainer], store: Store, config: TrainConfig) -> None:
    waiting = [t for t in trainers if t.needs_init]
    for site in dict.fromkeys(t.member.site for t in waiting):
        rows = max(1, min(SAMPLE_ROWS, store.n_kept(site, "train")))
        batch = next(store.batches(site, batch=rows, seed=config.shuffle_seed, split="train"))
        for trainer in waiting:
            if trainer.member.site == site:
                trainer.init_(_scaled(batch, trainer.scale, trainer.device).x)


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Set the event on the first SIGINT or SIGTERM; a second one acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _frame: object) -> None:
        log.warning("%s: finishing the step", signal.Signals(number).name)
        stop.set()
        restore()

    for number in signals:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()


class _Clock:
    """Where the time of a run goes."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.seconds = {"reading": 0.0, "stepping": 0.0, "logging": 0.0}
        self.members: defaultdict[int, float] = defaultdict(float)
        """By member, the seconds in its own steps, of those taken since it was resumed."""
        self.steps = 0

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        started = now()
        yield
        self.seconds[what] += now() - started

    @contextmanager
    def stepped(self, place: int) -> Iterator[None]:
        started = now()
        yield
        self.members[place] += now() - started

    def summary(self) -> dict[str, Any]:
        total = sum(self.seconds.values()) or 1e-9
        shares = {f"share_{what}": round(s / total, 4) for what, s in self.seconds.items()}
        return {
            "train_seconds": round(total, 3),
            "tokens_per_second": round(self.steps * self.config.batch / total, 1),
            **shares,
            "kernels": kernels.name(),
            "exact_scores_per_row": round(tally.per_row, 1),
        }

    def info(self, step: int, trainers: list[Trainer]) -> dict[str, Any]:
        per_step = sum(self.seconds.values()) / max(self.steps, 1)
        return {
            "step": step,
            "steps": self.config.steps,
            "eta_seconds": per_step * (self.config.steps - step),
            **self.summary(),
            "members": {t.member.name: t.journal.lines[-1] for t in trainers if t.journal.lines},
        }
