"""Resampling: dead latents are pointed at rows that the dictionary reconstructs badly.

    row r is drawn with probability ∝ ‖y_r − y_hat_r‖², no row twice

The pool of rows is the batch of the step: it costs no reading, is the same in a sweep as alone, and
an interrupted run meets it again. No two latents get one row, since equal latents have equal
gradients and never part. What a latent becomes is the type's own rule, `revive_`. Adam's moments of
the latent are set to zero: they belong to the one that died.

Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling". They weigh a row by
the square of its loss, ‖e‖⁴, over 819,200 of them; in a single batch a few rows of great norm
could then take most of the weight.
"""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ConfigError
from saelab.protocols import GradientTrained
from saelab.train.trainee import Trainee
from saelab.types import Batch


def require_rule(name: str, dictionary: Trainee) -> None:
    """Raise ConfigError if the dictionary's type has no rule for resampling."""
    kind = type(dictionary)
    if getattr(kind, "revive_", None) in (None, GradientTrained.revive_):
        raise ConfigError(
            f"{name}: train.resample_every is set, but {kind.__name__} has no resampling rule; "
            "leave resample_every out, or give the type a `revive_`"
        )


@torch.no_grad()
def row_errors(dictionary: Trainee, batch: Batch) -> Float[Tensor, " n"]:
    """Return ‖y − y_hat‖² of each row, coded as rows would be if training ended here.

    Types that select across a batch code by thresholds that are only set at the end; a copy is
    calibrated on the batch, and the dictionary stays as it is.
    """
    finished = copy.deepcopy(dictionary)
    finished.calibrate([batch])
    return (batch.y - finished.reconstruct(batch.x)).square().sum(1)


def draw_rows(
    errors: Float[Tensor, " n"], n_wanted: int, generator: torch.Generator
) -> Int[Tensor, " m"]:
    """Return different rows, drawn in proportion to their errors; fewer if fewer have an error."""
    weights = errors.cpu().double()
    n_drawn = min(n_wanted, int(weights.count_nonzero()))
    if n_drawn == 0:
        return torch.zeros(0, dtype=torch.int64, device=errors.device)
    return weights.multinomial(n_drawn, generator=generator).to(errors.device)


@torch.no_grad()
def forget_moments_(
    optimizer: torch.optim.Optimizer, dictionary: Trainee, ids: Int[Tensor, " m"]
) -> None:
    """Set Adam's moments of these latents to zero, in every parameter with a row per latent."""
    for parameter, state in optimizer.state.items():
        per_latent = parameter.ndim > 0 and len(parameter) == dictionary.d_sae
        if per_latent and parameter is not dictionary.b_dec:  # d_out may equal d_sae
            state["exp_avg"][ids] = 0
            state["exp_avg_sq"][ids] = 0
