"""Result rows and their errors: the bootstrap over documents."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ResultRow:
    """One number with everything needed to trust it."""

    name: str
    """Metric, for example `fvu`."""
    value: float
    unit: str
    n: int
    """Number of rows, positions or latents it was computed over."""
    standard_error: float | None
    """None where an error bar has no meaning (said in the metric's documentation)."""
    metric_version: int
    arm: str
    """`dictionary`, or the name of a control such as `pca(k=32)`."""
    encoder: str = "own"
    evaluator: str = "core"

    def plain(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)
