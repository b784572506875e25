"""The gradient through all steps of a matching pursuit, in memory that does not grow with steps.

    v_t = ⟨r_t, d_{j_t}⟩        r_{t+1} = r_t − v_t d_{j_t}        t = 0 … T − 1

The choice of j_t is piecewise constant, so with it held fixed the steps are smooth in x = r_0 and
in the atoms. With g_t the gradient that reaches v_t from outside and ρ_T the one that reaches r_T,
going backwards

    w_t = g_t − ⟨ρ_{t+1}, d_{j_t}⟩      ρ_t = ρ_{t+1} + w_t d_{j_t}
    ∂/∂d_{j_t} gets  w_t r_t − v_t ρ_{t+1}                       ∂/∂x = ρ_0

and r_t = r_{t+1} + v_t d_{j_t} is made again on the way. What is kept is (j_t, v_t) and r_T:
O(k + d) numbers per row, none of them per atom. The sums are done in a fixed order, so on a CPU
equal inputs give equal bits.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab import kernels
from saelab.ops.pursuit import compiled, pursue
from saelab.ops.refit import Sign


def unroll(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "n_atoms d"],
    order: Int[Tensor, "n k"],
    coefficients: Float[Tensor, "n k"],
    residual: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n d"]]:
    """Return (coefficients, residual) of a finished matching pursuit, differentiable in x and
    atoms.

    They are trusted and returned as they are; `order` is −1 where a row has stopped.
    """
    return _Unroll.apply(x, atoms, order, coefficients, residual)  # pyright: ignore[reportReturnType]


def pursuit_auxk(
    error: Float[Tensor, "n d"], atoms: Float[Tensor, "n_dead d"], aux_k: int, sign: Sign = "nonneg"
) -> Float[Tensor, ""]:
    """Return the share of the residual that pursuit with dead atoms leaves, × min(n_dead/aux_k, 1).

    Pursuit's AuxK: `aux_k` steps with the dead atoms only. Target and normaliser are detached, so
    the gradient reaches nothing but `atoms`. The normaliser is the residual's variance, as in
    `ops.auxk`. A residual without variance, or one that is not finite, gives 0.
    """
    n_dead = len(atoms)
    if n_dead == 0 or len(error) == 0:
        return error.new_zeros(())
    target = error.detach()
    trace = pursue(target, atoms.detach(), aux_k, sign=sign)
    _, left = unroll(target, atoms, trace.order, trace.coefficients, trace.residual)
    variance = (target - target.mean(0)).square().sum()
    share = left.square().sum() / variance * min(n_dead / aux_k, 1.0)
    usable = bool(torch.isfinite(share.detach())) and bool(variance > 0)
    return share if usable else error.new_zeros(())


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "torch.autograd.function.FunctionCtx",
        x: Tensor,  # noqa: ARG004  (receives a gradient)
        atoms: Tensor,
        order: Tensor,
        coefficients: Tensor,
        residual: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(atoms, order, coefficients, residual)
        return coefficients.clone(), residual.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values: Tensor, grad_residual: Tensor):  # pyright: ignore  (its signature is open)
        atoms, order, values, residual = ctx.saved_tensors
        back = _back_compiled if compiled(atoms, values, residual) else _back
        grad_x, grad_atoms = back(
            atoms, order, values, residual, grad_values, grad_residual, ctx.needs_input_grad[1]
        )
        return grad_x, grad_atoms, None, None, None


def _back(
    atoms: Tensor,
    order: Tensor,
    values: Tensor,
    residual: Tensor,
    grad_values: Tensor,
    rho: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and, if wanted, of the atoms."""
    out = torch.zeros_like(atoms)
    for step in range(order.shape[1] - 1, -1, -1):
        atom = order[:, step].clamp(min=0)
        went, chosen, value = order[:, step] >= 0, atoms[atom], values[:, step]
        weight = torch.where(went, grad_values[:, step] - (rho * chosen).sum(1), 0)
        residual = residual + value[:, None] * chosen
        if wanted:
            out.index_add_(0, atom, weight[:, None] * residual - value[:, None] * rho)
        rho = rho + weight[:, None] * chosen
    return rho, out if wanted else None


def _back_compiled(
    atoms: Tensor,
    order: Tensor,
    values: Tensor,
    residual: Tensor,
    grad_values: Tensor,
    rho: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Do as `_back`: first along the rows, then along the columns, which threads can share."""
    from saelab.kernels.pursuit import back_columns, back_rows

    table, steps = atoms.detach().contiguous().numpy(), order.numpy()
    weights, grad_x = grad_values.clone().numpy(), rho.clone(memory_format=torch.contiguous_format)
    kernels.over_rows(back_rows, len(order), table, steps, weights, grad_x.numpy())
    if not wanted:
        return grad_x, None
    out = torch.zeros_like(atoms, memory_format=torch.contiguous_format)
    after = (residual.contiguous().numpy(), rho.contiguous().numpy(), out.numpy())
    kernels.over_rows(back_columns, atoms.shape[1], table, steps, values.numpy(), weights, *after)
    return grad_x, out
