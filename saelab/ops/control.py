"""How the weight of a sparsity penalty moves during a run."""

import torch
from jaxtyping import Float
from torch import Tensor

GAIN = 20.0
"""Change of the log weight per run and unit of error, where the error lasts."""
LARGEST = 1.0
"""Largest error that counts: a run that starts far off must not overshoot."""


def ramp(progress: float, *, until: float) -> float:
    """Return a factor that rises linearly to 1 at `until`, for the weight of a sparsity penalty."""
    return min(1.0, progress / until) if until > 0 else 1.0


def l0_error(l0: Float[Tensor, ""], target_l0: float) -> Float[Tensor, ""]:
    """Return log(l0 / target_l0) within ± LARGEST; rows without any latent give −LARGEST."""
    return torch.log(l0 / target_l0).clamp(-LARGEST, LARGEST)


def integrate(
    log_weight: Float[Tensor, ""], error: Float[Tensor, ""], share: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return the log weight after a `share` of the run with this error of the L0.

    The integral part of a controller: `log_weight + GAIN · share · error`. The weight in use is
    exp(log_weight + error): the proportional part damps what the slow answer of L0 would excite.
    """
    return log_weight + GAIN * share * error
