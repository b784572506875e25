"""What a run will take, from a short probe of its real parts."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from saelab import api, dictionaries
from saelab.harvest.forward import HarvestConfig
from saelab.harvest.gradient import pass_tokens
from saelab.members import Member
from saelab.passes import check_memory, check_space
from saelab.pipeline import Run
from saelab.progress import Bar
from saelab.protocols import Dictionary, LanguageModel, Solved, Store
from saelab.report import human_bytes
from saelab.run_config import RunConfig
from saelab.stages import Step
from saelab.timing import (
    MemberTime,
    PursuitTime,
    SpliceTime,
    planted_rows,
    seconds,
    time_member,
    time_pursuit,
    time_reading,
    time_splices,
)
from saelab.train.config import TrainConfig

_DRAWS_PER_SECOND = 3e7
"""Normal numbers that planting draws per second; it needs one per row and feature."""
_OWN_ARMS = 4
"""Spliced passes of the core evaluator for each dictionary: itself, re-encoded, random errors."""
_SHARED_ARMS = 2
"""Spliced passes for all dictionaries of a site: the ablations."""
_ROW_SECONDS = 2e-5
"""Seconds per row and site to fit PCA and token means."""
_SCORE_SECONDS = 2.0
"""Seconds per dictionary for bootstrap and files."""

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What a stage takes, for one member or several alike."""

    stage: str
    what: str
    seconds: float
    disk: float
    memory: float
    n: int = 1
    """How many members it stands for."""


def plan(config: RunConfig) -> Group:
    """Return a table of what each stage takes. Raises ResourceError if a stage cannot fit.

    Stages whose artifact exists already cost nothing. Probes run the real model and the real
    trainer for a few steps each; members that differ in seed or learning rate share one.
    """
    run = Run(config, dry=True)
    missing = [step for step in run.execute("index") if step.status == "missing"]
    with ExitStack() as stack:
        costs = _Planner(run, missing, stack).costs()
    for cost in costs:
        check_memory(cost.memory, cost.stage, run.device)
    check_space(run.config.out, sum(int(cost.n * cost.disk) for cost in costs), "the run")
    return _table(_merged(costs))


class _Planner:
    """Measures what the missing steps of a run take; what is alike is measured once."""

    def __init__(self, run: Run, missing: Sequence[Step], stack: ExitStack) -> None:
        self.run, self.config, self.missing = run, run.config, missing
        self.widths = _widths(run)
        self._stack = stack
        self._kept: dict[Any, Any] = {}

    def costs(self) -> list[Cost]:
        """Return the cost of every missing step, members after the store."""
        found = [_store_cost(self.run) for step in self.missing if step.member is None]
        members = {
            stage: [s.member for s in self.missing if s.stage == stage and s.member is not None]
            for stage in ("dictionary", "results", "features")
        }
        found += self._training(members["dictionary"])
        found += self._evaluation(members["results"])
        return found + [self._index(self.run.members[i]) for i in members["features"]]

    # ------------------------------------------------------------------------------- stages

    def _training(self, members: Sequence[int]) -> list[Cost]:
        train = self.config.train
        if not members or train is None:
            return []
        passes = self.run.passes(members, self.widths)
        found = []
        with Bar("plan", len(members), "members") as bar:
            for done, i in enumerate(members, 1):
                found.append(self._one_training(self.run.members[i], train))
                bar.update(done, self.run.members[i].name)
        memory = max(each.bytes for each in passes)
        sites = Counter((n, self._site(self.run.members[i])) for n, p in enumerate(passes)
                        for i in p.members if not self._is_solved(i))  # fmt: skip
        reading = sum(self._reading(site) for _, site in sites)
        what = f"{len(passes)} pass{'es' if len(passes) > 1 else ''}"
        return [*found, Cost("train: reading", what, reading, 0, memory)]

    def _one_training(self, member: Member, whole: TrainConfig) -> Cost:
        train = whole.shortened(member.tokens, member.where)
        times, dictionary = self._times(member), self._create(member)
        disk = 20 * sum(p.numel() for p in dictionary.parameters())
        if isinstance(dictionary, Solved):
            spent = times.solving(dictionary, self._n_rows(), train)
            what = f"at most {dictionary.most_iterations:,} iterations"
            return Cost(f"train {_label(member)}", what, spent, disk, 0)
        what = f"{train.steps:,} steps of {train.batch:,} at {1000 * times.step:,.0f} ms"
        return Cost(f"train {_label(member)}", what, times.training(train), disk, 0)

    def _evaluation(self, members: Sequence[int]) -> list[Cost]:
        if not members or self.config.evaluate is None:
            return []
        core, held = self.config.evaluate.core, _heldout_rows(self.run)
        rows, pursued = min(core.rows, held), min(core.pursuit_rows, held)
        windows = core.windows if self.run.config.model is not None else 0
        found, shared = [], {}
        for i in members:
            member = self.run.members[i]
            site, dictionary, times = self._site(member), self._create(member), self._times(member)
            spent = rows * times.code + _SCORE_SECONDS
            what = f"{rows:,} rows"
            if windows:
                spliced = self._splices(site)
                spent += windows * (spliced.clean + _OWN_ARMS * spliced.arm)
                shared[site, "ablations"] = windows * _SHARED_ARMS * spliced.arm
                what += f", {windows} windows × {_OWN_ARMS + 1} forward passes"
            if pursued:
                k = core.k or dictionary.l0_bound or round(member.fields.get("target_l0") or 32)
                pursuit = self._pursuit(dictionary, k)
                alone = pursuit.prepare + pursued * pursuit.row
                spent += alone
                shared[site, "random atoms", dictionary.d_sae, k] = alone
            shared[site, "fit"] = _ROW_SECONDS * (core.fit_rows + self._n_rows())
            memory = 4 * (core.batch * dictionary.d_sae * 3 + dictionary.d_sae**2)
            found.append(Cost(f"evaluate {_label(member)}", what, spent, 1e5, memory))
        sites = f"{len({key[0] for key in shared})} sites"
        return [*found, Cost("evaluate: controls", sites, sum(shared.values()), 0, 0)]

    def _index(self, member: Member) -> Cost:
        dictionary, rows = self._create(member), self._n_rows()
        l0 = dictionary.l0_bound or member.fields.get("target_l0") or 64
        firings = rows * l0
        spent = 1.3 * rows * self._times(member).code + firings * 1.5e-6 + 3
        disk = 12 * firings + 20_000 * dictionary.d_sae
        return Cost(f"index {_label(member)}", f"{rows:,} rows", spent, disk, 5e8)

    # ------------------------------------------------------------------------------- probes

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _store(self, width: int) -> Store:
        """Return planted rows of this width to probe on."""
        return self._once(("store", width), lambda: self._stack.enter_context(planted_rows(width)))

    def _create(self, member: Member) -> Any:
        width = self.widths[self._site(member)]
        dictionary = dictionaries.create({**member.fields, "d_in": width})
        return dictionary.to(self.run.device)

    def _times(self, member: Member) -> MemberTime:
        train, width = self.config.train, self.widths[self._site(member)]
        assert train is not None
        return self._once(
            ("member", width, repr(sorted(member.fields.items()))),
            lambda: time_member(self._create(member), self._store(width), train, member.lr),
        )

    def _reading(self, site: str) -> float:
        train, width = self.config.train, self.widths[site]
        assert train is not None
        store = self._store(width)
        return self._once(("reading", width), lambda: time_reading(store, store.sites[0], train))

    def _pursuit(self, dictionary: Dictionary, k: int) -> PursuitTime:
        assert self.config.evaluate is not None
        core = self.config.evaluate.core
        return self._once(
            ("pursuit", dictionary.d_in, dictionary.d_sae, k),
            lambda: time_pursuit(dictionary, self._store(dictionary.d_in), k, core),
        )

    def _splices(self, site: str) -> SpliceTime:
        assert self.config.evaluate is not None
        core = self.config.evaluate.core
        context = self.config.corpus.context if self.config.corpus else 128
        return self._once(
            ("splices", site), lambda: time_splices(self.run.model, site, core, context)
        )

    # -------------------------------------------------------------------------------- sizes

    def _is_solved(self, member: int) -> bool:
        return isinstance(self._create(self.run.members[member]), Solved)

    def _site(self, member: Member) -> str:
        return member.site or next(iter(self.widths))

    def _n_rows(self) -> int:
        config = self.config
        if config.store is not None:
            return api.open_store(config.store).n_rows
        if config.synthetic is not None:
            return config.synthetic.n_rows
        return config.corpus.tokens if config.corpus else 0


def _label(member: Member) -> str:
    """Return what members that differ in seed, rate or k have in common."""
    return f"{member.fields['type']} {member.fields['d_sae']}"


def _merged(costs: Sequence[Cost]) -> Iterator[Cost]:
    """Yield one line per stage and label, with the mean of what each takes."""
    for stage in dict.fromkeys(cost.stage for cost in costs):
        alike = [cost for cost in costs if cost.stage == stage]
        n, what = len(alike), list(dict.fromkeys(cost.what for cost in alike))
        text = what[0] if len(what) == 1 else f"{what[0]} … {what[-1]}"
        yield Cost(
            stage, text, sum(cost.seconds for cost in alike) / n,
            sum(cost.disk for cost in alike) / n, max(cost.memory for cost in alike), n,
        )  # fmt: skip


def _store_cost(run: Run) -> Cost:
    config = run.config
    if config.synthetic is not None:
        size = config.synthetic.n_rows * (4 * config.synthetic.d + 40)
        drawn = config.synthetic.n_rows * config.synthetic.n_features
        taken = max(size / 2e7, drawn / _DRAWS_PER_SECOND)
        what = f"{config.synthetic.n_rows:,} planted rows"
        return Cost("store", what, taken, size, size / 4)
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
        return probe.numel() / seconds(lambda: model.capture(probe, sites)), 0
    n = pass_tokens(harvest.batch_tokens, model.d_vocab)
    probe = _tokens(model, max(1, n // context), context)
    taken = seconds(lambda: model.grad_at(probe, sites, lambda z: z.logsumexp(-1).sum()))
    return probe.numel() / taken, 16 * probe.numel() * model.d_vocab


def _widths(run: Run) -> dict[str, int]:
    config = run.config
    if config.store is not None:
        opened = api.open_store(config.store)
        return {site: opened.width(site) for site in opened.sites}
    if config.synthetic is not None:
        return {"synthetic": config.synthetic.d}
    sites = config.harvest.sites if config.harvest else ()
    return {site: run.model.site(site).width for site in sites}


def _heldout_rows(run: Run) -> int:
    config = run.config
    if config.store is not None:
        opened = api.open_store(config.store)
        return opened.n_kept(opened.sites[0], "heldout")
    if config.synthetic is not None:
        return round(config.synthetic.holdout * config.synthetic.n_rows)
    return round(config.corpus.holdout * config.corpus.tokens) if config.corpus else 0


def _tokens(model: LanguageModel, windows: int, context: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.d_vocab, (windows, context), generator=generator)


def _model_bytes(model: LanguageModel) -> float:
    parameters = getattr(model, "n_parameters", 12 * model.n_layers * model.d_model**2)
    return parameters * (2 if model.dtype in (torch.bfloat16, torch.float16) else 4)


def _table(costs: Iterator[Cost]) -> Group:
    found = list(costs)
    if not found:
        return Group(Text("Everything is made already."))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in ("stage", "what", "time", "disk", "memory"):
        table.add_column(column, justify="left" if column in ("stage", "what") else "right")
    for cost in found:
        stage = f"{cost.n} × {cost.stage}" if cost.n > 1 else cost.stage
        table.add_row(
            stage, cost.what, _duration(cost.n * cost.seconds),
            human_bytes(cost.n * cost.disk), human_bytes(cost.memory) if cost.memory else "",
        )  # fmt: skip
    total = sum(cost.n * cost.seconds for cost in found)
    disk = sum(cost.n * cost.disk for cost in found)
    table.add_row("all", "", _duration(total), human_bytes(disk), "", style="bold")
    return Group(table, Text("Times are from a short probe just now.", style="dim"))


def _duration(taken: float) -> str:
    minutes, rest = divmod(round(taken), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
