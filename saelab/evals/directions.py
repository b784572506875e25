"""Random directions that a direction with a meaning has to beat: isotropic, of the activations'
covariance, and differences of means under shuffled labels. All at unit norm, by seed.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.probes import mean_difference


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def isotropic(width: int, n: int, *, seed: int) -> Float[Tensor, "n d"]:
    """Return unit directions, uniform over the sphere."""
    return F.normalize(torch.randn(n, width, generator=_generator(seed)), dim=1)


def from_covariance(x: Float[Tensor, "rows d"], n: int, *, seed: int) -> Float[Tensor, "n d"]:
    """Return unit directions drawn from a Gaussian with the covariance of these activations.

    A draw is a random weighting of the centred rows, which has their covariance exactly. Raises
    ConfigError with fewer than two rows.
    """
    if len(x) < 2:
        raise ConfigError(f"a covariance needs two activations or more, but {len(x)} came")
    centred = (x.double() - x.double().mean(0)).cpu()
    weights = torch.randn(n, len(x), generator=_generator(seed), dtype=torch.float64)
    return F.normalize(weights @ centred, dim=1).float()


def shuffled_labels(
    x: Float[Tensor, "documents d"], positive: Bool[Tensor, " documents"], n: int, *, seed: int
) -> Float[Tensor, "n d"]:
    """Return unit differences of means under `n` random permutations of the labels."""
    generator = _generator(seed)
    shuffled = [positive[torch.randperm(len(positive), generator=generator)] for _ in range(n)]
    return F.normalize(mean_difference(x, torch.stack(shuffled, 1)), dim=1).float()
