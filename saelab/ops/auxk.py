"""AuxK: dead latents learn to explain what the living ones leave (Gao et al. 2024).

`auxk_loss` takes its gradient along: the loss is a scalar, so all that a backward pass needs is
known as soon as the residual is, and its two products are the only ones. On a CPU with the extra
`fast` a compiled kernel keeps the largest pre-activations of a row. `auxk_loss_plain` is the same
in plain operations, for tests and for reading. Measured at 576 → 16384 with a tenth of the latents
dead and 2048 rows: see benchmarks/train_step.py --dead.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import kernels


def auxk_loss(
    error: Float[Tensor, "n d_out"],
    pre: Float[Tensor, "n n_dead"],
    W_dec: Float[Tensor, "n_dead d_out"],
    aux_k: int,
    *,
    signed: bool = False,
) -> Float[Tensor, ""]:
    """Return the share of the residual that dead latents leave, × min(n_dead / aux_k, 1).

    `pre` and `W_dec` are the dead latents' rows only; `pre` must hold no gradient path to a bias
    that living latents share. Target and normaliser are detached and no bias is added, so the
    gradient reaches nothing but the dead latents. With `signed`, pre-activations are ranked by
    absolute size and keep their sign. A residual without variance gives 0, also where
    it is not finite.
    """
    if len(W_dec) == 0 or len(error) == 0:
        return error.new_zeros(())
    return _AuxK.apply(error.detach(), pre.to(W_dec.dtype), W_dec, aux_k, signed)  # pyright: ignore[reportReturnType]


def auxk_loss_plain(
    error: Float[Tensor, "n d_out"],
    pre: Float[Tensor, "n n_dead"],
    W_dec: Float[Tensor, "n_dead d_out"],
    aux_k: int,
    *,
    signed: bool = False,
) -> Float[Tensor, ""]:
    """Return what `auxk_loss` does, by plain operations."""
    n_dead = len(W_dec)
    if n_dead == 0 or len(error) == 0:
        return error.new_zeros(())
    target = error.detach()
    z = _kept_plain(pre, min(aux_k, n_dead), signed)
    share = _share(target, target - z @ W_dec, aux_k, n_dead)
    return share if bool(torch.isfinite(share.detach())) else error.new_zeros(())


def _share(target: Tensor, left: Tensor, aux_k: int, n_dead: int) -> Tensor:
    """Return Σ left² over the target's variance, × min(n_dead / aux_k, 1)."""
    variance = (target - target.mean(0)).square().sum()
    return left.square().sum() / variance * min(n_dead / aux_k, 1.0)


class _AuxK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "torch.autograd.function.FunctionCtx",
        target: Tensor,
        pre: Tensor,
        W_dec: Tensor,
        aux_k: int,
        signed: bool,
    ) -> Tensor:
        n_dead = len(W_dec)
        z = _kept(pre, min(aux_k, n_dead), signed)
        left = target - (z @ W_dec).to(target.dtype)
        share = _share(target, left, aux_k, n_dead)
        ctx.usable = bool(torch.isfinite(share))  # pyright: ignore[reportAttributeAccessIssue]
        if not ctx.usable:  # pyright: ignore[reportAttributeAccessIssue]
            return torch.zeros_like(share)
        left.mul_(-2 * share / left.square().sum().clamp(min=torch.finfo(left.dtype).tiny))
        ctx.save_for_backward(z, left, W_dec)
        return share

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore  (torch leaves its signature open)
        if not ctx.usable:
            return None, None, None, None, None
        z, slope, W_dec = ctx.saved_tensors  # slope: of the loss in the reconstruction
        grad_pre = grad_W = None
        if ctx.needs_input_grad[1]:
            grad_pre = (slope @ W_dec.T).mul_(grad).masked_fill_(z == 0, 0)
        if ctx.needs_input_grad[2]:
            grad_W = (z.T @ slope).mul_(grad)
        return None, grad_pre, grad_W, None, None


def _kept(pre: Tensor, k: int, signed: bool) -> Tensor:
    """Return `_kept_plain(pre, k, signed)`, by a compiled kernel where there is one."""
    if not kernels.fit(pre):
        return _kept_plain(pre, k, signed)
    from saelab.kernels import topk as kernel  # numba is optional, and slow to import

    z = torch.empty_like(pre, memory_format=torch.contiguous_format)
    kernels.over_rows(kernel.keep_largest, len(pre), *kernels.arrays(pre), k, signed, z.numpy())
    return z


def _kept_plain(pre: Tensor, k: int, signed: bool) -> Tensor:
    """Return the k largest of each row where they are positive, or largest in size; else 0."""
    size = pre.abs() if signed else pre
    where = size.topk(k, dim=-1, sorted=False).indices
    kept = pre.gather(-1, where)
    return torch.zeros_like(pre).scatter(-1, where, kept if signed else kept.relu())
