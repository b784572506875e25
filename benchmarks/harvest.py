"""Harvest against the bare forward pass that it cannot go below, and its memory.

    python benchmarks/harvest.py                       tokens/s of both, interleaved in one run
    python benchmarks/harvest.py --memory              peak memory for two numbers of tokens
    python benchmarks/harvest.py --memory --model toy  the same on the toy, in a minute

The bare pass is `model.capture` on full windows, with nothing done to what comes out. Harvest is
the whole stage: counting, tokenizing, tails, masks, statistics, writing, flushing and hashing. The
two alternate forward pass by forward pass, since a machine's speed drifts within seconds; half of
the background writing then falls on the bare passes, so a second ratio puts that half on harvest.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saelab import artifacts
from saelab.harvest.corpus import CorpusConfig, CorpusReport, windows
from saelab.harvest.harvest import HarvestConfig, harvest, store_dtype
from saelab.models import load_model
from saelab.protocols import LanguageModel
from saelab.store import StoreWriter
from saelab.types import Shard


def corpus_of(arguments: argparse.Namespace, tokens: int) -> CorpusConfig:
    return CorpusConfig(source=arguments.corpus, tokens=tokens, context=arguments.context)


def config_of(arguments: argparse.Namespace, model: LanguageModel) -> HarvestConfig:
    site = arguments.site or next(s.name for s in model.sites() if "resid_post" in s.name)
    return HarvestConfig(sites=(site,), batch_tokens=arguments.batch_tokens)


def whole_harvest(
    model: Any,
    corpus: CorpusConfig,
    config: HarvestConfig,
    out: Path,
    writer_class: type[StoreWriter] = StoreWriter,
) -> None:
    """Make a finished store under `out`."""
    dtype = store_dtype(config, model.dtype)
    widths = {site: model.site(site).width for site in config.sites}
    with artifacts.open_draft(out, "store", "bench", "0" * 64) as draft:
        with writer_class(draft, widths, dtype, rows_per_shard=config.rows_per_shard) as writer:
            facts = harvest(model, corpus, config, writer)
        draft.finish(stage="store", name="bench", inputs={}, parents=[], facts=facts)


def full_windows(
    model: LanguageModel, corpus: CorpusConfig, batch_tokens: int
) -> list[torch.Tensor]:
    """Return the corpus's tokens in batches of full windows."""
    ids = torch.cat([window.ids for window in windows(corpus, model, CorpusReport())])
    whole = ids[: len(ids) // corpus.context * corpus.context].view(-1, corpus.context)
    return list(whole.to(model.device).split(max(1, batch_tokens // corpus.context)))


class Interleaved:
    """A model whose every forward pass is preceded by a bare one: both see the same machine.

    The background writer overlaps both kinds of passes.
    """

    def __init__(self, model: LanguageModel, batches: list[torch.Tensor]) -> None:
        self._model = model
        self._batches = itertools.cycle(batches)
        self.tokens = 0
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def capture(self, tokens: torch.Tensor, sites: Sequence[str], lengths: Any = None) -> Any:
        started = time.perf_counter()
        batch = next(self._batches)
        self._model.capture(batch, sites)
        self.seconds += time.perf_counter() - started
        self.tokens += batch.numel()
        return self._model.capture(tokens, sites, lengths)


class TimedWriter(StoreWriter):
    """A writer that knows how long its background thread was busy."""

    busy = 0.0

    def _write(self, number: int, shard: Shard, given: dict[str, Any]) -> None:
        started = time.perf_counter()
        super()._write(number, shard, given)
        TimedWriter.busy += time.perf_counter() - started


def speed(arguments: argparse.Namespace) -> None:
    """Print tokens/s of both and their ratio, forward pass by forward pass."""
    model = load_model(arguments.model, dtype=arguments.dtype)
    corpus, config = corpus_of(arguments, arguments.tokens), config_of(arguments, model)
    batches = full_windows(model, corpus, config.batch_tokens)[:-1]
    for _ in range(3):
        model.capture(batches[0], config.sites)
    ratios, careful = [], []
    for number in range(arguments.rounds):
        both = Interleaved(model, batches)
        TimedWriter.busy = 0.0
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            whole_harvest(both, corpus, config, Path(folder), TimedWriter)
            ours = time.perf_counter() - started - both.seconds
        bare = both.tokens / both.seconds
        ratios.append(corpus.tokens / ours / bare)
        careful.append(corpus.tokens / (ours + TimedWriter.busy / 2) / bare)
        line = {"round": number, "bare": bare, "harvest": corpus.tokens / ours}
        print(json.dumps(line | {"ratio": ratios[-1], "careful": careful[-1]}), flush=True)
    print(
        json.dumps(
            {
                "what": "harvest as a share of the bare truncated forward pass",
                "ratio": statistics.median(ratios),
                "ratio_with_all_writing_on_harvest": statistics.median(careful),
                "model": model.name,
                "dtype": str(model.dtype),
                "site": config.sites[0],
                "tokens": corpus.tokens,
                "threads": torch.get_num_threads(),
            }
        )
    )


def _peak(
    arguments: argparse.Namespace, tokens: int, queue: "multiprocessing.Queue[float]"
) -> None:
    model = load_model(arguments.model, dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        whole_harvest(
            model, corpus_of(arguments, tokens), config_of(arguments, model), Path(folder)
        )
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory(arguments: argparse.Namespace) -> None:
    """Print the peak resident memory of harvests of two lengths, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for tokens in arguments.memory_tokens:
        queue = context.Queue()
        process = context.Process(target=_peak, args=(arguments, tokens, queue))
        process.start()
        peak = queue.get()
        process.join()
        print(json.dumps({"what": "peak memory, MiB", "tokens": tokens, "value": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--corpus", default="news-articles")
    parser.add_argument("--site", help="default: the first residual stream after a block")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=32_768, help="per round")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-tokens", type=int, nargs="+", default=[100_000, 1_000_000])
    arguments = parser.parse_args()
    (memory if arguments.memory else speed)(arguments)


if __name__ == "__main__":
    main()
