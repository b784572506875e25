"""What a person is told while a run trains."""

from typing import Any


def describe(info: dict[str, Any]) -> str:
    """Return steps, time left, speed, where the time goes, and the loss of the worst member."""
    losses = {name: line["loss"] for name, line in info["members"].items()}
    worst = max(losses, key=losses.__getitem__, default="")
    shown = f" · {'loss' if len(losses) == 1 else worst} {losses[worst]:.4f}" if losses else ""
    shares = " ".join(
        f"{what} {info[f'share_{what}']:.0%}" for what in ("reading", "stepping", "logging")
    )
    return (
        f"{info['step']}/{info['steps']}, {info['eta_seconds']:.0f} s left, "
        f"{info['tokens_per_second']:,.0f} tokens/s · {shares}{shown}"
    )
