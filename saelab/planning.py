"""What a run will take, from a short probe of the real parts; and what this machine has."""

import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from saelab import api, assets, dictionaries
from saelab.harvest.forward import HarvestConfig
from saelab.harvest.gradient import pass_tokens
from saelab.members import Member
from saelab.ops.pursuit import pursue
from saelab.pipeline import Run, check_memory, check_space
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.report import human_bytes
from saelab.run_config import RunConfig
from saelab.store.flat import FlatConfig, FlatWorld
from saelab.train.fit import Member as TrainMember
from saelab.train.fit import fit

_PROBE_STEPS = 4
_DRAWS_PER_SECOND = 3e7
"""Normal numbers that planting draws per second; it needs one per row and feature."""
_SPLICED_ARMS = 7
"""Forward passes of the core evaluator per window: clean, dictionary, re-encoded, two ablations,
two random errors."""


@dataclass(frozen=True)
class Cost:
    """What one stage takes."""

    stage: str
    what: str
    seconds: float
    disk: float
    memory: float


def plan(config: RunConfig) -> Group:
    """Return a table of what each stage takes. Raises ResourceError if a stage cannot fit.

    Stages whose artifact exists already cost nothing. Probes run the real model and the real
    trainer for a few steps each.
    """
    run = Run(config, dry=True)
    missing = [step for step in run.execute("index") if step.status == "missing"]
    widths = _widths(run)
    costs = []
    for step in missing:
        if step.member is None:
            costs.append(_store_cost(run))
            continue
        member = run.members[step.member]
        width = widths[member.site or next(iter(widths))]
        if step.stage == "dictionary":
            assert config.train is not None
            needed = api.training_bytes({**member.fields, "d_in": width}, config.train)
            check_memory(needed, f"training {step.name}", run.device)
        dictionary = dictionaries.create({**member.fields, "d_in": width})
        cost = {"dictionary": _train_cost, "results": _evaluate_cost, "features": _index_cost}
        costs.append(cost[step.stage](run, step.name, member, dictionary))
    for cost in costs:
        check_memory(cost.memory, cost.stage, run.device)
    check_space(run.config.out, sum(int(cost.disk) for cost in costs), "the run")
    return _table(costs)


def _store_cost(run: Run) -> Cost:
    config = run.config
    if config.synthetic is not None:
        size = config.synthetic.n_rows * (4 * config.synthetic.d + 40)
        drawn = config.synthetic.n_rows * config.synthetic.n_features
        seconds = max(size / 2e7, drawn / _DRAWS_PER_SECOND)
        what = f"{config.synthetic.n_rows:,} planted rows"
        return Cost("store", what, seconds, size, size / 4)
    assert config.corpus and config.harvest
    tokens, context = config.corpus.tokens, config.corpus.context
    rate, held = _harvest_rate(run.model, config.harvest, context)
    disk = api.store_bytes(run.model, config.corpus, config.harvest)
    shard = 2 * disk / tokens * config.harvest.rows_per_shard
    what = f"{tokens:,} tokens at {rate:,.0f}/s"
    if config.harvest.gradient != "none":
        what += ", with gradients"
    return Cost("store", what, tokens / rate + 3, disk, shard + held + _model_bytes(run.model))


def _harvest_rate(
    model: LanguageModel, harvest: HarvestConfig, context: int
) -> tuple[float, float]:
    """Return the tokens per second of harvest's passes, and the bytes of logits that one holds."""
    sites = list(harvest.sites)
    if harvest.gradient == "none":
        probe = _tokens(model, max(1, harvest.batch_tokens // context), context)
        return probe.numel() / _seconds(lambda: model.capture(probe, sites)), 0
    n = pass_tokens(harvest.batch_tokens, model.d_vocab)
    probe = _tokens(model, max(1, n // context), context)
    seconds = _seconds(lambda: model.grad_at(probe, sites, lambda z: z.logsumexp(-1).sum()))
    return probe.numel() / seconds, 16 * probe.numel() * model.d_vocab


def _widths(run: Run) -> dict[str, int]:
    config = run.config
    if config.store is not None:
        opened = api.open_store(config.store)
        return {site: opened.width(site) for site in opened.sites}
    if config.synthetic is not None:
        return {"synthetic": config.synthetic.d}
    sites = config.harvest.sites if config.harvest else ()
    return {site: run.model.site(site).width for site in sites}


def _train_cost(run: Run, name: str, member: Member, dictionary: Any) -> Cost:
    train = run.config.train
    assert train is not None
    short = train.model_copy(update={"tokens": _PROBE_STEPS * train.batch, "wandb": None})
    with _planted_rows(dictionary.d_in, 2 * train.batch) as store:
        probe = TrainMember("probe", dictionary.to(run.device), store.sites[0], lr=member.lr)
        done = fit([probe], store, short)[0]
    per_step = done.provenance["train_seconds"] / _PROBE_STEPS
    memory = api.training_bytes(dictionary.config.plain(), train)
    disk = 20 * sum(p.numel() for p in dictionary.parameters())
    what = f"{train.steps:,} steps of {train.batch:,} at {1000 * per_step:,.0f} ms"
    return Cost(f"train {name}", what, per_step * train.steps + 3, disk, memory)


def _evaluate_cost(run: Run, name: str, _member: Member, dictionary: Dictionary) -> Cost:
    assert run.config.evaluate
    core = run.config.evaluate.core
    x = torch.randn(256, dictionary.d_in)
    atoms = torch.nn.functional.normalize(dictionary.W_dec.detach().float(), dim=1)
    k = core.k or dictionary.l0_bound or 32
    pursuit = _seconds(lambda: pursue(x, atoms, k)) / len(x)
    held = _heldout_rows(run)
    rows, pursued = min(core.rows, held), min(core.pursuit_rows, held)
    seconds = 2 * pursuit * pursued + 3 * _encode_seconds(dictionary) * rows + 3
    what = f"{rows:,} rows"
    if run.config.model is not None and core.windows:
        context = run.config.corpus.context if run.config.corpus else 128
        tokens = _tokens(run.model, core.window_batch, context)
        forward = _seconds(lambda: run.model.logits(tokens)) / core.window_batch
        seconds += forward * core.windows * _SPLICED_ARMS
        what += f", {core.windows} windows × {_SPLICED_ARMS} forward passes"
    memory = 4 * (core.batch * dictionary.d_sae * 3 + dictionary.d_sae**2)
    return Cost(f"evaluate {name}", what, seconds, 1e5, memory)


def _index_cost(run: Run, name: str, _member: Member, dictionary: Dictionary) -> Cost:
    config = run.config
    rows = config.corpus.tokens if config.corpus else 0
    if config.store is not None:
        rows = api.open_store(config.store).n_rows
    if config.synthetic is not None:
        rows = config.synthetic.n_rows
    firings = rows * (dictionary.l0_bound or 64)
    seconds = 1.3 * rows * _encode_seconds(dictionary) + firings * 1.5e-6 + 3
    disk = 12 * firings + 20_000 * dictionary.d_sae
    return Cost(f"index {name}", f"{rows:,} rows", seconds, disk, 5e8)


def _heldout_rows(run: Run) -> int:
    config = run.config
    if config.store is not None:
        opened = api.open_store(config.store)
        return opened.n_kept(opened.sites[0], "heldout")
    if config.synthetic is not None:
        return round(config.synthetic.holdout * config.synthetic.n_rows)
    return round(config.corpus.holdout * config.corpus.tokens) if config.corpus else 0


def _encode_seconds(dictionary: Dictionary) -> float:
    x = torch.randn(1024, dictionary.d_in, device=dictionary.W_dec.device)
    with torch.no_grad():
        return _seconds(lambda: dictionary.encode_sparse(x)) / len(x)


def _tokens(model: LanguageModel, windows: int, context: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.d_vocab, (windows, context), generator=generator)


def _seconds(call: Callable[[], Any]) -> float:
    """Return the shortest of two calls' times, after one to warm up."""
    call()
    times = []
    for _ in range(2):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _model_bytes(model: LanguageModel) -> float:
    parameters = getattr(model, "n_parameters", 12 * model.n_layers * model.d_model**2)
    return parameters * (2 if model.dtype in (torch.bfloat16, torch.float16) else 4)


def _table(costs: list[Cost]) -> Group:
    if not costs:
        return Group(Text("Everything is made already."))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in ("stage", "what", "time", "disk", "memory"):
        table.add_column(column, justify="left" if column in ("stage", "what") else "right")
    for cost in costs:
        table.add_row(
            cost.stage, cost.what, _duration(cost.seconds),
            human_bytes(cost.disk), human_bytes(cost.memory),
        )  # fmt: skip
    total = sum(cost.seconds for cost in costs)
    disk = sum(cost.disk for cost in costs)
    table.add_row("all", "", _duration(total), human_bytes(disk), "", style="bold")
    return Group(table, Text("Times are from a short probe just now.", style="dim"))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextmanager
def _planted_rows(d: int, n: int) -> Iterator[Store]:
    """Open a store of `n` planted rows with random gradients for the trainer to be timed on.

    It is gone afterwards.
    """
    config = FlatConfig.parse({"d": d, "n_rows": n})
    world, seeded = FlatWorld(config), torch.Generator().manual_seed(0)
    codes = torch.cat(list(world.codes(0, n)))
    arrays = {
        "x": codes @ world.truth.directions + world.truth.bias,
        "grad": torch.randn(n, d, generator=seeded),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key, rows in arrays.items():
            np.save(folder / f"{key}.npy", rows.numpy())
        x, grad = ({"probe": folder / f"{key}.npy"} for key in arrays)
        made = api.store_from_arrays(x, folder, gradients=grad, holdout=0)
        yield api.open_store(made)


# ------------------------------------------------------------------------------------- this machine


def doctor() -> Group:
    """Return what this machine has: versions, extras, device, disk, cached assets."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    memory = psutil.virtual_memory()
    cache = assets.cache_dir()
    existing = next(p for p in [cache, *cache.parents] if p.exists())
    table.add_row("saelab", importlib.metadata.version("saelab"))
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("device", _device())
    table.add_row("memory", f"{human_bytes(memory.available)} free of {human_bytes(memory.total)}")
    table.add_row("cache", f"{cache} ({human_bytes(shutil.disk_usage(existing).free)} free)")
    for extra, packages in _EXTRAS.items():
        table.add_row(f"extra {extra}", ", ".join(map(_version, packages)))
    cached = [name for name in assets.CATALOGUE if assets.cached(name)]
    table.add_row("assets", ", ".join(cached) or "none fetched yet")
    return Group(table)


_EXTRAS = {
    "lm": ("transformer-lens", "transformers", "datasets", "gguf"),
    "app": ("streamlit", "plotly", "pandas"),
    "wandb": ("wandb",),
    "fast": ("numba",),
}


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} missing"
