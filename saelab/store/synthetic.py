"""Stores with a planted dictionary: the directions behind the activations, and every row's codes,
are known.

Each kind of world is a file: `flat` (with `bidirectional` and `opposed`), `hierarchy`, `benchmark`.
The truth lies beside the shards; see `planted`.
"""

import hashlib
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Discriminator, Tag
from torch import Tensor

from saelab.artifacts import Draft
from saelab.ops.shuffle import generator
from saelab.store.benchmark import BenchmarkConfig, BenchmarkWorld
from saelab.store.flat import FlatConfig, FlatWorld
from saelab.store.hierarchy import HierarchyConfig, HierarchyWorld
from saelab.store.planted import RowsConfig, World, write_codes, write_truth
from saelab.store.writer import StoreWriter
from saelab.types import Document, Shard, SparseLatents, TokenTable, is_heldout

SITE = "synthetic"


def _kind(data: Any) -> str:
    kind = data.get("kind") if isinstance(data, dict) else getattr(data, "kind", None)
    return kind if kind in ("hierarchy", "benchmark") else "flat"


SyntheticConfig = Annotated[
    Annotated[FlatConfig, Tag("flat")]
    | Annotated[HierarchyConfig, Tag("hierarchy")]
    | Annotated[BenchmarkConfig, Tag("benchmark")],
    Discriminator(_kind),
]
"""A store made from planted directions instead of a language model; `kind` says which."""


def make_world(config: SyntheticConfig) -> World:
    """Return the planted world that a configuration describes."""
    if isinstance(config, HierarchyConfig):
        return HierarchyWorld(config)
    if isinstance(config, BenchmarkConfig):
        return BenchmarkWorld(config)
    return FlatWorld(config)


def fill_synthetic(draft: Draft, config: SyntheticConfig) -> dict[str, Any]:
    """Fill an artifact's draft with a planted store; return the manifest's facts."""
    world = make_world(config)
    whole = config.rows_per_shard // config.window * config.window
    sites = {SITE: config.d}
    with StoreWriter(draft, sites, config.dtype, rows_per_shard=config.rows_per_shard) as writer:
        median = 0.0
        for number, first in enumerate(range(0, config.n_rows, whole)):
            if number and number < writer.n_shards:
                continue
            x, strongest, codes = _rows(world, config, number, min(whole, config.n_rows - first))
            if number == 0:
                median = float(x.norm(dim=1).median())
            if number >= writer.n_shards:
                write_codes(draft, number, codes)
                writer.append(_shard(config, first, x, strongest))
        write_truth(draft, world.truth)
        facts = {"synthetic": config.plain(), "model": None, "model_fingerprint": None}
        return writer.finish(median_norm={SITE: median}, facts=facts)


def _rows(
    world: World, config: SyntheticConfig, shard: int, n: int
) -> tuple[Float[Tensor, "n d"], Tensor, list[SparseLatents]]:
    """Return a shard's rows, the strongest feature of each, and their codes."""
    truth = world.truth
    parts, strongest, codes = [], [], []
    for a in world.codes(shard, n):
        parts.append(a @ truth.directions + truth.bias)
        strongest.append(a.abs().argmax(1))
        codes.append(SparseLatents.from_dense(a))
    x = torch.cat(parts)
    if isinstance(config, FlatConfig) and config.noise:
        x += config.noise * torch.randn(n, config.d, generator=generator(config.seed, 2, shard))
    return x, torch.cat(strongest), codes


def _shard(config: RowsConfig, first: int, x: Float[Tensor, "n d"], strongest: Tensor) -> Shard:
    """Lay rows out in windows; each token is called after its strongest direction."""
    n = len(x)
    rows = torch.arange(first, first + n)
    names = [f"f{i} " for i in strongest.tolist()]
    lengths = torch.tensor([len(name) for name in names])
    begin = (rows % config.window == 0) | (rows == first)
    ends = lengths.cumsum(0)
    window = rows // config.window
    before = (ends - lengths)[begin][window - window[0]]
    documents = []
    for number in range(int(window[0]), int(window[-1]) + 1):
        start = number * config.window - first
        text = "".join(names[start : start + config.window])
        documents.append(_document(config, number, text))
    heldout = torch.tensor([document.heldout for document in documents])[window - window[0]]
    table = TokenTable(
        token_id=strongest,
        window=window,
        position=rows % config.window,
        document=window,
        char_start=ends - lengths - before,
        char_end=ends - before,
    )
    mask = {SITE: torch.zeros(n, dtype=torch.uint8)}
    return Shard({SITE: x}, mask, table, heldout, tuple(documents))


def _document(config: RowsConfig, number: int, text: str) -> Document:
    sha = hashlib.sha256(f"{config.seed}:{number}:{text}".encode()).hexdigest()
    return Document(number, sha, is_heldout(sha, config.holdout), text)
