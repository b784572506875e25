"""Small linear algebra that several types share: unit rows, projections, the geometric median."""

from jaxtyping import Float
from torch import Tensor


def unit_rows(W: Float[Tensor, "n d"], eps: float = 1e-8) -> Float[Tensor, "n d"]:
    """Return W with each row divided by its norm (rows shorter than `eps` by `eps`)."""
    return W / W.norm(dim=-1, keepdim=True).clamp(min=eps)


def unit_rows_(W: Float[Tensor, "n d"], eps: float = 1e-8) -> None:
    """Divide each row by its norm (rows shorter than `eps` by `eps`), in place."""
    W.div_(W.norm(dim=-1, keepdim=True).clamp(min=eps))


def remove_parallel_(g: Float[Tensor, "n d"], W: Float[Tensor, "n d"]) -> None:
    """Take from each row of g its component along the same, unit-norm row of W, in place."""
    g.addcmul_(W, (g * W).sum(-1, keepdim=True), value=-1)


def geometric_median(
    x: Float[Tensor, "n d"], *, max_iterations: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d"]:
    """Return the point with the smallest sum of distances to the rows of x.

    Weiszfeld's iteration with the step of Vardi and Zhang (2000), which neither divides by a zero
    distance nor sticks to a row. Stops when it moves by less than `tolerance` of the rows' mean
    distance from the mean.
    """
    median = x.mean(0)
    spread = (x - median).norm(dim=-1).mean()
    near = 1e-9 * spread
    for _ in range(max_iterations):
        difference = x - median
        distance = difference.norm(dim=-1)
        here = distance <= near
        weight = distance.clamp(min=near).reciprocal().masked_fill(here, 0)
        if not weight.any():
            return median
        pull = weight @ difference
        move = pull / weight.sum()
        if here.any():
            move = move * (1 - here.sum() / pull.norm().clamp(min=1e-30)).clamp(min=0)
        median = median + move
        if move.norm() < tolerance * spread:
            return median
    return median
