"""Schedules as functions of the share of the run that is done, in [0, 1]."""


def lr_factor(progress: float, *, warmup: float, decay: float) -> float:
    """Return the learning rate's factor: a linear rise, a plateau, a linear fall to 0."""
    rise = progress / warmup if warmup > 0 else 1.0
    fall = (1 - progress) / decay if decay > 0 else 1.0
    return max(0.0, min(1.0, rise, fall))


def default_lr(d_sae: int) -> float:
    """Return 2e-3 · √(4608 / d_sae), the peak learning rate where a member gives none."""
    return 2e-3 * (4608 / d_sae) ** 0.5


def default_dead_window(tokens: int) -> int:
    """Return after how many silent tokens a latent is dead: 10 M, or a tenth of a shorter run."""
    return max(1, min(10_000_000, tokens // 10))
