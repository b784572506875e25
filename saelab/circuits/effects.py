"""Effects of a model's parts on a task's metric, with their errors and their reliability.

Per pair of prompts the gap is m(clean) − m(corrupted). The effect of a part is the mean change of
the metric over the mean gap, not the mean of their ratios: a pair whose gap is near 0 would decide
alone. 1: the part carries the whole difference; 0: none of it; below 0: it works against it.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ArtifactError, TaskError

Kind = Literal["heads", "mlp", "attn", "resid"]
NEGLIGIBLE = 0.005
"""Parts whose 95 % interval lies inside ± this effect are negatives."""


@dataclass(frozen=True, order=True)
class Component:
    """A part of the model: a head of a layer, or all of a layer's branch or stream."""

    layer: int
    head: int | None = None

    def __str__(self) -> str:
        """Say it as `layer.head`."""
        return f"{self.layer}" if self.head is None else f"{self.layer}.{self.head}"


@dataclass(frozen=True)
class Effects:
    """What patching did to the metric, pair by pair; see the module for the definition."""

    components: tuple[Component, ...]
    changes: Float[Tensor, "n components"]
    """Towards corrupted, in units of the metric: what the part carries of each pair's gap."""
    gaps: Float[Tensor, " n"]

    def effect(self) -> Float[Tensor, " components"]:
        """Return each part's share of the gap, float64."""
        return self.changes.double().mean(0) / self.gaps.double().mean()

    def error(self) -> Float[Tensor, " components"]:
        """Return each effect's standard error over pairs, by the delta method, float64."""
        gaps = self.gaps.double()[:, None]
        residual = self.changes.double() - self.effect() * gaps
        return residual.std(0) / (len(gaps) ** 0.5 * gaps.mean().abs())

    def rows(self, index: Int[Tensor, " m"]) -> "Effects":
        """Return the effects measured by some pairs."""
        return Effects(self.components, self.changes[index], self.gaps[index])

    def negligible(self, within: float = NEGLIGIBLE) -> Bool[Tensor, " components"]:
        """Return which parts' 95 % interval lies inside ± `within`."""
        return self.effect().abs() + 1.96 * self.error() < within

    def halves(self, *, splits: int, seed: int) -> list[tuple["Effects", "Effects"]]:
        """Return the effects of random halves of the pairs, `splits` times."""
        generator = torch.Generator().manual_seed(seed)
        half = len(self.gaps) // 2
        orders = (torch.randperm(len(self.gaps), generator=generator) for _ in range(splits))
        return [(self.rows(order[:half]), self.rows(order[half:])) for order in orders]

    def reliability(
        self,
        statistic: Callable[[Float[Tensor, " m"], Float[Tensor, " m"]], float],
        *,
        splits: int = 20,
        seed: int = 0,
    ) -> float:
        """Return a statistic of |effect| between random halves of the pairs, on average.

        No score can be expected to agree better with a truth that has half as many pairs.
        """
        found = [
            statistic(first.effect().abs(), second.effect().abs())
            for first, second in self.halves(splits=splits, seed=seed)
        ]
        return sum(found) / len(found)


def require_gap(gaps: Float[Tensor, " n"], what: str) -> None:
    """Raise TaskError if the mean gap is within three standard errors of 0."""
    mean, error = float(gaps.double().mean()), float(gaps.double().std()) / len(gaps) ** 0.5
    if not abs(mean) > 3 * error:
        raise TaskError(
            f"the metric of {what} differs by {mean:.3g} ± {error:.2g} between clean and corrupted "
            "prompts, which is within noise: no share of it can be told. Take more pairs, another "
            "metric or another task."
        )


def agreement(first: Effects, second: Effects) -> dict[str, float]:
    """Return how far one measurement of the same parts is from another: rank and size."""
    from scipy.stats import spearmanr

    assert first.components == second.components
    a, b = first.effect(), second.effect()
    return {
        "spearman": float(spearmanr(a.abs().numpy(), b.abs().numpy()).statistic),
        "mean_error": float((a - b).abs().mean()),
        "largest_error": float((a - b).abs().max()),
    }


def heads_of(layers: int, heads: int) -> tuple[Component, ...]:
    """Return all heads, layer by layer."""
    return tuple(itertools.starmap(Component, itertools.product(range(layers), range(heads))))


def layers_of(layers: Sequence[int]) -> tuple[Component, ...]:
    """Return whole layers."""
    return tuple(Component(layer) for layer in layers)


# ----------------------------------------------------------------------------------------- on disk


def to_bytes(effects: Effects) -> bytes:
    """Return effects as safetensors; a part that is no head has −1 in its place."""
    from safetensors.torch import save

    places = [(c.layer, -1 if c.head is None else c.head) for c in effects.components]
    return save(
        {
            "components": torch.tensor(places),
            "changes": effects.changes.float().contiguous(),
            "gaps": effects.gaps.float().contiguous(),
        }
    )


def read(path: Path) -> Effects:
    """Read what `to_bytes` gave. Raises ArtifactError if the file is none of that kind."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(path)
        places = held["components"].tolist()
        components = tuple(Component(layer, None if h < 0 else h) for layer, h in places)
        return Effects(components, held["changes"], held["gaps"])
    except (OSError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} holds no effects of patching: {error}") from None
