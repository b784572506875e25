"""Flat superposition: unit-norm directions drawn at random, each on by itself.

x = a D + b + noise. Each code is on with probability l0 / n_features, independently, with magnitude
|1 + 0.25 g|, g standard normal. What a concept's sign means is the kind:

    flat            one-sided concepts: codes are non-negative
    bidirectional   a concept is one direction with two ends: codes have a random sign
    opposed         concepts 2i and 2i + 1 are independent and lie on one line: D_{2i+1} = −D_{2i},
                    codes are non-negative. Where both are on, x holds only their difference
"""

from collections.abc import Iterator
from typing import Literal, final

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from saelab.ops.shuffle import generator
from saelab.protocols import Truth
from saelab.store.planted import RowsConfig


class FlatConfig(RowsConfig):
    """A store made from directions in flat superposition."""

    kind: Literal["flat", "bidirectional", "opposed"] = "flat"
    """What a concept's sign means."""
    n_features: int = Field(64, gt=0)
    """Number of planted concepts."""
    d: int = Field(32, gt=0)
    """Width of the activations."""
    l0: float = Field(4.0, gt=0)
    """Mean number of active concepts per row."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of isotropic noise in each coordinate."""
    bias: float = Field(0.0, ge=0)
    """Norm of a constant vector that is added to every row."""

    @model_validator(mode="after")
    def _possible(self) -> "FlatConfig":
        if self.l0 > self.n_features:
            raise ValueError(f"l0 ({self.l0}) must not exceed n_features ({self.n_features})")
        if self.kind == "opposed" and self.n_features % 2:
            raise ValueError("opposed concepts come in pairs: n_features must be even")
        return self


@final
class FlatWorld:
    """Directions in flat superposition, and the law of their codes."""

    def __init__(self, config: FlatConfig) -> None:
        """Draw the directions."""
        self._config = config
        seeded = generator(config.seed, 0)
        directions = torch.randn(config.n_features, config.d, generator=seeded)
        constant = torch.randn(config.d, generator=seeded)
        directions /= directions.norm(dim=1, keepdim=True)
        if config.kind == "opposed":
            directions[1::2] = -directions[::2]
        bias = constant * (config.bias / constant.norm())
        self.truth = Truth(directions, bias, torch.full((config.n_features,), -1))

    def codes(self, shard: int, n: int) -> Iterator[Float[Tensor, "rows n_features"]]:
        """Yield the codes of the first `n` rows of a shard, in one piece."""
        config, shape = self._config, (n, self._config.n_features)
        seeded = generator(config.seed, 1, shard)
        on = torch.rand(shape, generator=seeded) < config.l0 / config.n_features
        a = on * (1 + 0.25 * torch.randn(shape, generator=seeded)).abs()
        if config.kind == "bidirectional":
            a *= torch.randint(2, shape, generator=seeded) * 2 - 1
        yield a
