"""Training: one stream of batches feeds every member.

`fit` matches on how a dictionary comes to be (`GradientTrained`, `Streamed`, `Solved`), the only
place that does. Members that share a site share each batch; each owns all other state, so a
member's weights after a sweep are bit-identical to those of its solo run.
"""

import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from saelab.errors import ConfigError, Interrupted
from saelab.protocols import GradientTrained, Store
from saelab.train.config import Fitted, Member, TrainConfig
from saelab.train.gradient import GradientTrainer, input_scale
from saelab.train.wandb_log import WandbLog
from saelab.types import Batch

__all__ = ["Fitted", "Member", "Report", "TrainConfig", "fit"]

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
"""Called after each line of metrics with the numbers of `_Clock.info`."""

SAMPLE_ROWS = 32_768
"""Rows that weights are initialised from."""
CALIBRATION_ROWS = 50_000
"""Training rows that a type may calibrate its thresholds on."""


def fit(
    members: Sequence[Member],
    store: Store,
    config: TrainConfig,
    *,
    report: Report | None = None,
) -> list[Fitted]:
    """Train all members in one pass over the store; return them in order, for raw activations.

    A member with a draft goes on from its last checkpoint, bit for bit. SIGINT and SIGTERM let the
    step end, write a checkpoint and raise Interrupted. Raises NonFiniteError if a member's loss is
    no longer finite.
    """
    trainers = [_trainer(member, store, config) for member in members]
    clock = _Clock(config)
    if trainers:
        for trainer in trainers:
            trainer.resume()
        _initialise(trainers, store, config)
        reports = [report] if report else []
        if config.wandb:
            reports.append(WandbLog(config.wandb, config.plain()))
        with _stop_on_signals() as stop:
            _loop(trainers, store, config, clock, reports, stop)
    fitted = []
    for trainer in trainers:
        done = trainer.finish(_calibration(trainer, store, config))
        provenance = {"resumed_at": trainer.resumed_at, **clock.summary()}
        fitted.append(replace(done, provenance=provenance))
    return fitted


def _trainer(member: Member, store: Store, config: TrainConfig) -> GradientTrainer:
    match member.dictionary:
        case GradientTrained():
            return GradientTrainer(member, store, config)
        case other:
            raise ConfigError(
                f"{member.name}: {type(other).__name__} cannot be trained: a trainable type "
                "inherits GradientTrained"
            )


def _loop(
    trainers: list[GradientTrainer],
    store: Store,
    config: TrainConfig,
    clock: "_Clock",
    reports: list[Report],
    stop: threading.Event,
) -> None:
    first = min(t.done for t in trainers)
    streams = {
        (site, device): _stream(store, site, config, device, first)
        for site, device in dict.fromkeys((t.member.site, t.device) for t in trainers)
    }
    for number in range(first, config.steps):
        logged = False
        for place, stream in streams.items():
            with clock.spent("reading"):
                batch = next(stream)
            with clock.spent("stepping"):
                for trainer in trainers:
                    if trainer.done == number and place == (trainer.member.site, trainer.device):
                        logged |= trainer.step(batch)
        clock.steps += 1
        with clock.spent("logging"):
            if logged:
                info = clock.info(number + 1, trainers)
                for report in reports:
                    report(info)
            due = (number + 1) % config.checkpoint_steps == 0 or number + 1 == config.steps
            if due or stop.is_set():
                for trainer in trainers:
                    trainer.checkpoint()
        if stop.is_set() and number + 1 < config.steps:
            raise Interrupted(
                f"stopped after step {number + 1} of {config.steps}, as asked. "
                + _how_to_go_on(trainers)
            )


def _how_to_go_on(trainers: list[GradientTrainer]) -> str:
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


def _initialise(trainers: list[GradientTrainer], store: Store, config: TrainConfig) -> None:
    waiting = [t for t in trainers if t.needs_init]
    for site in dict.fromkeys(t.member.site for t in waiting):
        rows = max(1, min(SAMPLE_ROWS, store.n_kept(site, "train")))
        batch = next(store.batches(site, batch=rows, seed=config.shuffle_seed, split="train"))
        for trainer in waiting:
            if trainer.member.site == site:
                trainer.init_(_scaled(batch, trainer.scale, trainer.device).x)


def _calibration(trainer: GradientTrainer, store: Store, config: TrainConfig) -> Iterator[Batch]:
    """Yield training batches lazily: most types never ask for one."""
    stream = _stream(store, trainer.member.site, config, trainer.device, 0)
    yield from itertools.islice(stream, -(-CALIBRATION_ROWS // config.batch))


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
        self.steps = 0

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def summary(self) -> dict[str, Any]:
        total = sum(self.seconds.values()) or 1e-9
        shares = {f"share_{what}": round(s / total, 4) for what, s in self.seconds.items()}
        return {
            "train_seconds": round(total, 3),
            "tokens_per_second": round(self.steps * self.config.batch / total, 1),
            **shares,
        }

    def info(self, step: int, trainers: list[GradientTrainer]) -> dict[str, Any]:
        per_step = sum(self.seconds.values()) / max(self.steps, 1)
        return {
            "step": step,
            "steps": self.config.steps,
            "eta_seconds": per_step * (self.config.steps - step),
            **self.summary(),
            "members": {t.member.name: t.metrics[-1] for t in trainers if t.metrics},
        }
