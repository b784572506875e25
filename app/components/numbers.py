"""Numbers as people read them."""

import math

from saelab.show import value

__all__ = ["one_in", "percent", "value", "when"]


def percent(x: float | None) -> str:
    """A share as percent with two significant digits, never rounded to 0 or 100 %."""
    if x is None:
        return "–"
    shown = 100 * x
    if x in (0, 1) or shown >= 99.995:
        return f"{shown:.0f} %"
    if shown < 0.001:
        return "< 0.001 %"
    near = min(shown, 100 - shown) if shown > 50 else shown
    digits = min(4, max(0, (shown <= 50) - math.floor(math.log10(near))))
    return f"{shown:.{digits}f} %"


def one_in(x: float | None) -> str:
    """A density as `1 in 320 tokens`; empty where that says nothing."""
    return f"1 in {round(1 / x):,} tokens" if x and x < 0.2 else ""


def when(iso: str) -> str:
    """Date and minute of an ISO time."""
    return iso[:16].replace("T", " ")
