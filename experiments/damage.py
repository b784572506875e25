"""Damage to a model's weights, of known amount: noise, rounding, and training on.

    noisy      W + a ‖W‖ E / ‖E‖, E normal: a is the noise's norm as a share of the matrix's
    rounded    each row to the nearest of 2^b evenly spaced values between its least and largest
    tune_      AdamW steps on text that the comparison does not see

The first two act on every matrix, embeddings included; vectors (norms, biases) stay.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.errors import ConfigError

Change = Callable[[Float[Tensor, "n m"]], Float[Tensor, "n m"]]


def noisy(
    weight: Float[Tensor, "n m"], share: float, generator: torch.Generator
) -> Float[Tensor, "n m"]:
    """Return the matrix with Gaussian noise whose norm is `share` of its own."""
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
    return weight + noise * (share * weight.norm() / noise.norm())


def rounded(weight: Float[Tensor, "n m"], bits: int) -> Float[Tensor, "n m"]:
    """Return each row rounded to the nearest of 2^bits values from its least to its largest."""
    if bits < 1:
        raise ConfigError(f"a row rounded to {bits} bits has no values; give 1 or more")
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    level = ((weight - low) / step.where(step > 0, 1)).round()
    return low + level * step


@torch.no_grad()
def change_matrices_(network: nn.Module, change: Change) -> None:
    """Replace every matrix of a network; what is shared between modules is changed once."""
    for parameter in network.parameters():
        if parameter.ndim == 2:
            parameter.copy_(change(parameter))


def tune_(
    network: nn.Module,
    windows: Int[Tensor, "n pos"],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Take AdamW steps on random windows of tokens; return each step's loss, in nats per token.

    The rate rises over the first twentieth of the steps and falls over the last three tenths.
    `network` is a causal language model of transformers. Raises ConfigError without windows.
    """
    if len(windows) == 0:
        raise ConfigError("there are no windows to train on; give more text")
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    losses = []
    network.train()
    for _ in range(steps):
        ids = windows[torch.randint(len(windows), (batch,), generator=generator)]
        loss = network(input_ids=ids, labels=ids, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    network.eval()
    return losses


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1.0, 0.05 * steps), (steps - step) / max(1.0, 0.3 * steps))
