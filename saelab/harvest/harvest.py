"""Fills a store: runs a corpus through a model, up to the last site, and writes every row.

While the model runs a shard, the writer stores the one before it in the background. A crash loses
at most the shards that were being made; the same call goes on from the last complete one, to the
same bytes.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

from saelab.errors import ArtifactError, CorpusError
from saelab.harvest.corpus import (
    CorpusConfig,
    CorpusReport,
    check_split,
    report_facts,
    surely_enough,
    survey,
    windows,
)
from saelab.harvest.forward import PREPASS_ROWS, Group, HarvestConfig, Harvester, cursor, groups
from saelab.ops.loss_gradient import REDUCTION
from saelab.protocols import LanguageModel
from saelab.types import Shard

__all__ = ["HarvestConfig", "Progress", "ShardWriter", "harvest", "store_dtype"]

Progress = Callable[[int, int, float], None]
"""Called with tokens done, tokens in all, and tokens per second since the start."""


@runtime_checkable
class ShardWriter(Protocol):
    """What harvest needs of a store's writer."""

    n_shards: int
    rows_per_shard: int

    def cursor(self) -> dict[str, Any] | None:
        """Return what was given with the last complete shard, None if there is none."""
        ...

    def append(self, shard: Shard, cursor: dict[str, Any] | None = None) -> None:
        """Store a shard, and with it the state from which harvest can go on."""
        ...

    def finish(
        self, *, median_norm: dict[str, float], facts: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Complete the store and return its facts."""
        ...

    def discard(self) -> None:
        """Remove everything that was stored."""
        ...


def store_dtype(config: HarvestConfig, model_dtype: torch.dtype) -> str:
    """Return the dtype of the stored rows, `auto` resolved: it is part of the stage key."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if model_dtype == torch.bfloat16 else "float16"


def harvest(
    model: LanguageModel,
    corpus: CorpusConfig,
    config: HarvestConfig,
    writer: ShardWriter,
    *,
    report: Progress | None = None,
) -> dict[str, Any]:
    """Fill a store through its writer; return the manifest's facts.

    Raises CorpusError if there is less text than asked for or one split is empty: before the model
    runs, or, for a streamed corpus, at its end, with nothing kept. Raises SiteError, ConfigError
    and NonFiniteError.
    """
    source = Harvester(model, config)
    if not corpus.streaming and not surely_enough(corpus):
        survey(corpus, model)
    state = writer.cursor() or {}
    source.median_norm = state.get("median_norm", {})
    counts = CorpusReport()
    try:
        _write(source, windows(corpus, model, counts), writer, _Clock(report, corpus.tokens))
        check_split(corpus, counts.documents, counts.heldout_documents)
    except CorpusError:
        writer.discard()
        raise
    facts = {
        "model": {"name": model.name},
        "model_fingerprint": model.fingerprint,
        "corpus": report_facts(counts),
        "prepass_rows": PREPASS_ROWS,
    }
    if config.gradient != "none":
        facts["gradient"] = _recipe(config)
    return writer.finish(median_norm=source.median_norm, facts=facts)


def _recipe(config: HarvestConfig) -> dict[str, Any]:
    """Return what the stored gradients are gradients of, for the manifest."""
    recipe: dict[str, Any] = {"labels": config.gradient, "reduction": REDUCTION}
    return recipe | ({"seed": config.gradient_seed} if config.gradient == "sampled" else {})


def _write(source: Harvester, stream: Any, writer: ShardWriter, clock: "_Clock") -> None:
    """Forward and store the groups that are not stored yet."""
    state, stored = writer.cursor(), writer.n_shards
    for number, group in enumerate(groups(stream, writer.rows_per_shard)):
        if number >= stored:
            shard = source.shard(group)
            writer.append(shard, cursor(source, group))
            clock.done(group.n_rows, group.first_row)
        elif number == stored - 1 and state is not None:
            _check_same(state, group)


def _check_same(state: dict[str, Any], group: Group) -> None:
    """Raise ArtifactError if the last stored shard was made from other texts than there are now."""
    last = group.documents[-1] if group.documents else None
    found = None if last is None else {"number": last.number, "hash": last.hash}
    if state["last_document"] != found:
        raise ArtifactError(
            "an unfinished store was begun with other texts than the corpus holds now; "
            "remove its hidden .partial folder and run the same command again"
        )


class _Clock:
    """Reports progress, with the speed of this process."""

    def __init__(self, report: Progress | None, total: int) -> None:
        self._report = report
        self._total = total
        self._started = time.monotonic()
        self._rows = 0

    def done(self, rows: int, first_row: int) -> None:
        self._rows += rows
        if self._report is not None:
            rate = self._rows / max(time.monotonic() - self._started, 1e-9)
            self._report(first_row + rows, self._total, rate)
