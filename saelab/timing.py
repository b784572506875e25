"""Times the real parts of a run for a moment each, for the plan: a step of a member, its codes, a
pursuit, a spliced forward pass."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab import api, artifacts
from saelab.clock import now
from saelab.dictionaries.penalty import PenalisedDictionary
from saelab.evals.core import CoreConfig
from saelab.evals.downstream import ablate_to, measure_splices
from saelab.evals.encoders import PursuitEncoder
from saelab.protocols import Dictionary, LanguageModel, Solved, Store
from saelab.store.flat import FlatConfig, FlatWorld
from saelab.store.reader import BUFFER_BYTES
from saelab.train.fit import CALIBRATION_ROWS, SAMPLE_ROWS, Member, Sweep, TrainConfig
from saelab.train.solve import Solver
from saelab.types import Window

_WARM_STEPS = 2
_STEPS = 16
_SECONDS = 2.0
"""A probe ends after this many steps, or seconds if that is sooner; four steps at least."""
_ROWS = 1024
"""Rows that are coded or pursued in a probe."""


@dataclass(frozen=True)
class MemberTime:
    """What one member takes, in seconds."""

    step: float
    """One step, reading left out."""
    checkpoint: float
    once: float
    """Initialising, calibrating and saving."""
    code: float
    """Coding one row, and decoding it."""
    rows: int = 0
    """Rows that a step read in the probe, of a member that is solved."""

    def training(self, train: TrainConfig) -> float:
        """Return what the member adds to a whole run."""
        n_checkpoints = -(-train.steps // train.checkpoint_steps)
        return train.steps * self.step + n_checkpoints * self.checkpoint + self.once

    def solving(self, dictionary: Solved, n_rows: int, train: TrainConfig) -> float:
        """Return what solving takes at most on n rows; minibatches are coded, row by row."""
        reads = dictionary.rows_read(n_rows)
        each = self.step * reads / self.rows if reads == n_rows else self.code * reads
        return (
            dictionary.most_iterations * each
            + self.checkpoint / train.checkpoint_every
            + (self.once)
        )


@dataclass(frozen=True)
class PursuitTime:
    """What re-encoding by pursuit takes, in seconds."""

    prepare: float
    """The directions' Gram matrix."""
    row: float


@dataclass(frozen=True)
class SpliceTime:
    """What scoring a window in the live model takes, in seconds."""

    clean: float
    """The forward pass without a splice, and its losses."""
    arm: float
    """Another one, spliced."""


def time_member(
    dictionary: Dictionary, store: Store, train: TrainConfig, lr: float | None
) -> MemberTime:
    """Train a member for a few steps and finish it.

    As at the start of its run; types whose codes become sparse only then, for a while as later.
    """
    if getattr(dictionary.config, "needs_labels", False):
        return _time_labelled(dictionary, store)
    with (
        tempfile.TemporaryDirectory() as folder,
        artifacts.open_draft(Path(folder), "dictionary", "probe", "0" * 64) as draft,
    ):
        member = Member("probe", dictionary, store.sites[0], lr=lr, draft=draft)
        if isinstance(dictionary, Solved):
            return _time_solved(member, store, train)
        started = now()
        probed = {"log_every": 1, "wandb": None, "tokens": max(train.tokens, 64 * train.batch)}
        sweep = Sweep([member], store, train.model_copy(update=probed))
        once = now() - started
        step = _time_steps(sweep)
        share = _make_sparse_(sweep, store)
        if share is not None:
            step = (1 - share) * step + share * _time_steps(sweep)
        checkpoint = seconds(sweep.checkpoint, repeats=1)
        started = now()
        [(_, fitted)] = sweep.finish()
        once += now() - started
    trained = fitted.dictionary
    if trained.d_sae < dictionary.d_sae:  # it grows: time it at its full width
        trained = dictionary
    code = _time_coding(trained, store)
    if trained is dictionary:
        step = max(step, train.batch * code)
    return MemberTime(step, checkpoint, once, code)


def _time_steps(sweep: Sweep) -> float:
    """Return the seconds of one step, reading left out."""
    taken: list[float] = []
    while len(taken) < _WARM_STEPS + 2 or (len(taken) < _STEPS and sum(taken) < _SECONDS):
        before = sweep.clock.seconds["stepping"]
        sweep.step()
        taken.append(sweep.clock.seconds["stepping"] - before)
    return statistics.median(taken[_WARM_STEPS:])


@torch.no_grad()
def _make_sparse_(sweep: Sweep, store: Store) -> float | None:
    """Lower a penalised member's biases until its mean L0 is the target.

    Return the share of a run in which it is: what is left when the penalty has risen. None for
    other types, whose codes are as sparse at the start.
    """
    [trainer] = sweep.active.values()
    dictionary = getattr(trainer, "dictionary", None)
    if not isinstance(dictionary, PenalisedDictionary) or dictionary.target_l0 is None:
        return None
    x = next(store.scan(store.sites[0], batch=_ROWS)).x.to(dictionary.W_dec) * trainer.scale
    z = dictionary.encode(x).flatten()
    kept = min(round(dictionary.target_l0 * len(x)), len(z))
    dictionary.b_enc.sub_(z.topk(kept).values[-1])
    return 1 - dictionary.sparsity_warmup


def _time_solved(member: Member, store: Store, train: TrainConfig) -> MemberTime:
    """Do as `time_member` for a type that is solved: a few iterations, then the end."""
    solver = Solver(member, store, train.model_copy(update={"log_every": 1}))
    once, taken = seconds(solver.begin, repeats=1), []
    while len(taken) < _WARM_STEPS + 2 or (len(taken) < _STEPS and sum(taken) < _SECONDS):
        taken.append(seconds(solver.step, repeats=1))
    checkpoint = seconds(solver.checkpoint, repeats=1)
    started = now()
    fitted = solver.finish()
    once += now() - started
    each, code = statistics.median(taken[_WARM_STEPS:]), _time_coding(fitted.dictionary, store)
    return MemberTime(each, checkpoint, once, code, solver.reads)


def _time_labelled(dictionary: Dictionary, store: Store) -> MemberTime:
    """Do as `time_member` for a type that needs labels, which the probe's rows lack.

    What it takes is nearly all in one pass over the rows.
    """
    n_batches = sum(1 for _ in store.scan(store.sites[0], batch=_ROWS))
    batches = store.scan(store.sites[0], batch=_ROWS)
    each = seconds(lambda: next(batches).x.float().double().sum(0), repeats=4)
    once, code = n_batches * each, _time_coding(dictionary, store)
    return MemberTime(0.0, 0.0, once, code, store.n_rows)


def _time_coding(dictionary: Dictionary, store: Store) -> float:
    """Return the seconds that coding a row takes, and decoding it."""
    x = next(store.scan(store.sites[0], batch=_ROWS)).x.to(dictionary.W_dec.device)
    with torch.no_grad():
        return seconds(lambda: dictionary.decode(dictionary.encode_sparse(x))) / len(x)


def time_reading(store: Store, site: str, train: TrainConfig) -> float:
    """Return the seconds that a run takes to read its batches from one site."""
    stream = store.batches(site, batch=train.batch, seed=train.shuffle_seed, split="train")
    taken = [seconds(lambda: next(stream), repeats=1) for _ in range(6)]
    fill, each = taken[0], statistics.median(taken[1:])
    rows_in_buffer = min(BUFFER_BYTES / (2 * store.width(site)), store.n_kept(site, "train"))
    return train.steps * each + fill * (1 + train.tokens / rows_in_buffer)


def time_pursuit(dictionary: Dictionary, store: Store, k: int, core: CoreConfig) -> PursuitTime:
    """Re-encode some rows by `k` steps of pursuit."""
    encoders: list[PursuitEncoder] = []

    def prepare() -> None:
        encoders[:] = [PursuitEncoder(dictionary, k, sign=core.sign, refit=core.refit)]

    prepared = seconds(prepare, repeats=1)
    batch = next(store.scan(store.sites[0], batch=_ROWS))
    return PursuitTime(prepared, seconds(lambda: encoders[0](batch)) / len(batch))


def time_splices(model: LanguageModel, site: str, core: CoreConfig, context: int) -> SpliceTime:
    """Score a few windows of random tokens with one arm and with three."""
    n = core.window_batch
    windows = [_window(model, number, context) for number in range(2 * n)]
    mean = torch.zeros(model.site(site).width)
    taken = {}
    for arms in (1, 3):
        replace = {str(i): ablate_to(mean) for i in range(arms)}
        taken[arms] = seconds(
            lambda replace=replace: measure_splices(model, site, windows, replace, batch=n),
            repeats=1,
        ) / (2 * n)
    arm = max((taken[3] - taken[1]) / 2, 0.0)
    return SpliceTime(max(taken[1] - arm, 0.0), arm)


def _window(model: LanguageModel, number: int, context: int) -> Window:
    ids = torch.randint(model.d_vocab, (context,), generator=torch.Generator().manual_seed(number))
    kept, document = torch.ones(context, dtype=torch.bool), torch.full((context,), number)
    return Window(number, number * context, ids, document, ("",) * context, True, kept)


def seconds(call: Callable[[], Any], repeats: int = 2) -> float:
    """Return the shortest of some calls' times; with more than one, after a call to warm up."""
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        started = now()
        call()
        times.append(now() - started)
    return min(times)


@contextmanager
def planted_rows(d: int) -> Iterator[Store]:
    """Open a store of planted rows with random gradients; it is gone afterwards."""
    n = max(SAMPLE_ROWS, CALIBRATION_ROWS)
    world, seeded = FlatWorld(FlatConfig.parse({"d": d, "n_rows": n})), torch.Generator()
    codes = torch.cat(list(world.codes(0, n)))
    arrays = {
        "x": codes @ world.truth.directions + world.truth.bias,
        "grad": torch.randn(n, d, generator=seeded.manual_seed(0)),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key, rows in arrays.items():
            np.save(folder / f"{key}.npy", rows.numpy())
        x, grad = ({"probe": folder / f"{key}.npy"} for key in arrays)
        yield api.open_store(api.store_from_arrays(x, folder, gradients=grad, holdout=0))
