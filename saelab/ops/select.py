"""Which latents of a row fire: selection rules on pre-activations, as (indices, values)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def topk(pre: Float[Tensor, "n d_sae"], k: int) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Return the k largest pre-activations of each row and where they are, in no promised order.

    The values keep their sign: what is done with negative ones (usually ReLU) is the caller's
    choice.
    """
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return indices, values


def scatter(
    indices: Int[Tensor, "n k"], values: Float[Tensor, "n k"], d_sae: int
) -> Float[Tensor, "n d_sae"]:
    """Return (indices, values) rows as a dense matrix; differentiable in the values."""
    dense = torch.zeros(len(values), d_sae, dtype=values.dtype, device=values.device)
    return dense.scatter(-1, indices, values)
