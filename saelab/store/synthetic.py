"""Stores with a planted dictionary: the directions behind the activations are known.

x = a D + b + noise: D holds unit-norm directions drawn at random, a is sparse and non-negative.
Each code is on with probability l0 / n_features, independently, with magnitude |1 + 0.25 g|, g
standard normal. The truth lies beside the shards as `truth.safetensors`: `directions` (n_features,
d) and `bias` (d).
"""

import hashlib
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from saelab.artifacts import Draft
from saelab.config import Config
from saelab.ops.shuffle import generator
from saelab.store import format as fmt
from saelab.store.writer import StoreWriter
from saelab.types import Document, Shard, TokenTable, is_heldout

TRUTH = "truth.safetensors"
SITE = "synthetic"


class SyntheticConfig(Config):
    """A store made from planted directions instead of a language model."""

    n_features: int = Field(64, gt=0)
    """Number of planted directions."""
    d: int = Field(32, gt=0)
    """Width of the activations."""
    l0: float = Field(4.0, gt=0)
    """Mean number of active directions per row."""
    n_rows: int = Field(20_000, gt=0)
    noise: float = Field(0.0, ge=0)
    """Standard deviation of isotropic noise in each coordinate."""
    bias: float = Field(0.0, ge=0)
    """Norm of a constant vector that is added to every row."""
    window: int = Field(32, gt=0)
    """Rows per window; each window is a document of its own."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the documents that is held out."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    rows_per_shard: int = Field(32_768, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> "SyntheticConfig":
        if self.l0 > self.n_features:
            raise ValueError(f"l0 ({self.l0}) must not exceed n_features ({self.n_features})")
        if self.window > self.rows_per_shard:
            raise ValueError("window must not exceed rows_per_shard")
        return self


def truth(config: SyntheticConfig) -> tuple[Float[Tensor, "n_features d"], Float[Tensor, " d"]]:
    """Return the planted unit-norm directions and the constant vector."""
    seeded = generator(config.seed, 0)
    directions = torch.randn(config.n_features, config.d, generator=seeded)
    constant = torch.randn(config.d, generator=seeded)
    directions /= directions.norm(dim=1, keepdim=True)
    return directions, constant * (config.bias / constant.norm())


def codes(config: SyntheticConfig, shard: int, n: int) -> Float[Tensor, "n n_features"]:
    """Return the planted codes of the first `n` rows of a shard."""
    seeded = generator(config.seed, 1, shard)
    on = torch.rand(n, config.n_features, generator=seeded) < config.l0 / config.n_features
    return on * (1 + 0.25 * torch.randn(n, config.n_features, generator=seeded)).abs()


def fill_synthetic(draft: Draft, config: SyntheticConfig) -> dict[str, Any]:
    """Fill an artifact's draft with a planted store; return the manifest's facts."""
    directions, bias = truth(config)
    whole = config.rows_per_shard // config.window * config.window
    sites = {SITE: config.d}
    with StoreWriter(draft, sites, config.dtype, rows_per_shard=config.rows_per_shard) as writer:
        median = 0.0
        for number, first in enumerate(range(0, config.n_rows, whole)):
            n = min(whole, config.n_rows - first)
            if number and number < writer.n_shards:
                continue
            a = codes(config, number, n)
            x = a @ directions + bias
            if config.noise:
                seeded = generator(config.seed, 2, number)
                x += config.noise * torch.randn(n, config.d, generator=seeded)
            if number == 0:
                median = float(x.norm(dim=1).median())
            if number >= writer.n_shards:
                writer.append(_shard(config, first, x, a.argmax(1)))
        draft.write(TRUTH, fmt.to_bytes({"directions": directions, "bias": bias}))
        facts = {"synthetic": config.plain(), "model": None, "model_fingerprint": None}
        return writer.finish(median_norm={SITE: median}, facts=facts)


def _shard(
    config: SyntheticConfig, first: int, x: Float[Tensor, "n d"], strongest: Tensor
) -> Shard:
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


def _document(config: SyntheticConfig, number: int, text: str) -> Document:
    sha = hashlib.sha256(f"{config.seed}:{number}:{text}".encode()).hexdigest()
    return Document(number, sha, is_heldout(sha, config.holdout), text)
