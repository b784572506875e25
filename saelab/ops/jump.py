"""A step at a threshold, with the pseudo-derivatives of Rajamanoharan et al. 2024.

A step has no useful derivative, so that of the expected loss is estimated: only values within half
a bandwidth of the threshold count, K(t) = 1 for |t| < ½. With H(t) = 1 for t > 0,

    jump(u) = u · H(u − θ)     ∂/∂u = H(u − θ)     ∂/∂θ = −(θ / ε) K((u − θ) / ε)
    step(u) = H(u − θ)         ∂/∂u = 0            ∂/∂θ = −(1 / ε) K((u − θ) / ε)

The kernel sees u, not the jump's result: values just below the threshold count too. u is a table
with a threshold per column, or a list of entries with a threshold each.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def jump(
    u: Float[Tensor, "*n m"],
    threshold: Float[Tensor, " m"],
    bandwidth: Float[Tensor, " m"],
) -> Float[Tensor, "*n m"]:
    """Return u where it is above the threshold, else 0."""
    return _Jump.apply(u, threshold, bandwidth)  # pyright: ignore[reportReturnType]


def step(
    u: Float[Tensor, "*n m"],
    threshold: Float[Tensor, " m"],
    bandwidth: Float[Tensor, " m"],
) -> Float[Tensor, "*n m"]:
    """Return 1 where u is above the threshold, else 0; no gradient reaches u."""
    return _Step.apply(u, threshold, bandwidth)  # pyright: ignore[reportReturnType]


def kernel(
    u: Float[Tensor, "*n m"],
    threshold: Float[Tensor, " m"],
    bandwidth: Float[Tensor, " m"],
) -> Float[Tensor, "*n m"]:
    """Return 1 where u is less than half a bandwidth from the threshold, else 0."""
    return ((u - threshold).abs() < bandwidth / 2).to(u.dtype)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "torch.autograd.function.FunctionCtx", u: Tensor, threshold: Tensor, bandwidth: Tensor
    ) -> Tensor:
        ctx.save_for_backward(u, threshold, bandwidth)
        return u * (u > threshold)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore  (torch leaves its signature open)
        u, threshold, bandwidth = ctx.saved_tensors
        near = (grad * kernel(u, threshold, bandwidth)).sum_to_size(threshold.shape)
        return grad * (u > threshold), -near * threshold / bandwidth, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "torch.autograd.function.FunctionCtx", u: Tensor, threshold: Tensor, bandwidth: Tensor
    ) -> Tensor:
        ctx.save_for_backward(u, threshold, bandwidth)
        return (u > threshold).to(u.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore  (torch leaves its signature open)
        u, threshold, bandwidth = ctx.saved_tensors
        near = (grad * kernel(u, threshold, bandwidth)).sum_to_size(threshold.shape)
        return None, -near / bandwidth, None
