"""The coefficients of atoms that are chosen already, and what error they leave."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Sign = Literal["abs", "nonneg", "raw"]
Refit = Literal["mp", "omp", "gp"]


def least_squares(
    x: Float[Tensor, "n d"], atoms: Float[Tensor, "n_atoms d"], support: Int[Tensor, "n t"]
) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n d"]]:
    """Return each row's best coefficients on its support, and the residual they leave."""
    absent = support < 0
    chosen = atoms[support.clamp(min=0)].masked_fill(absent[..., None], 0)
    normal = chosen @ chosen.mT + torch.diag_embed(absent.to(x.dtype))
    coefficients = torch.linalg.solve(normal, (chosen @ x[..., None]))[..., 0]
    return coefficients, x - (coefficients[:, None] @ chosen)[:, 0]


def gradient_step(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "n_atoms d"],
    support: Int[Tensor, "n t"],
    coefficients: Float[Tensor, "n t"],
    residual: Float[Tensor, "n d"],
    sign: Sign,
) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n d"]]:
    """Return the coefficients after a step of gradient pursuit, and the residual they leave.

    A step that chose an atom again, and one after the row had stopped, has a coefficient of 0.
    """
    again = (support[..., None] == support[:, None]).tril(-1).any(-1)
    unused = again | (support < 0)
    chosen = atoms[support.clamp(min=0)].masked_fill(unused[..., None], 0)
    gradient = (chosen @ residual[..., None])[..., 0]
    move = (gradient[:, None] @ chosen)[:, 0]
    energy = move.square().sum(1)
    length = (move * residual).sum(1) / torch.where(energy > 0, energy, 1)
    goes = support[:, -1:] >= 0
    values = coefficients + torch.where(goes, length[:, None] * gradient, 0)
    if sign == "nonneg":
        values = values.clamp(min=0)
    return values, x - (values[:, None] @ chosen)[:, 0]


def gradient_coefficients(
    x: Float[Tensor, "n d"], atoms: Float[Tensor, "n_atoms d"], order: Int[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Return the coefficients of gradient pursuit along an order that is known, signed.

    Differentiable in x and atoms.
    """
    values, residual = x.new_zeros(len(x), 0), x
    for step in range(order.shape[1]):
        values = torch.nn.functional.pad(values, (0, 1))
        values, residual = gradient_step(x, atoms, order[:, : step + 1], values, residual, "abs")
    return values


def residual_energies(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "n_atoms d"],
    order: Int[Tensor, "n k"],
    coefficients: Float[Tensor, "n k"],
    refit: Refit,
    sign: Sign = "abs",
) -> Float[Tensor, "n steps"]:
    """Return ‖r‖² after 0, 1, …, k steps of a pursuit, given what it chose; atoms have unit norm.

    `coefficients` are what each step of matching pursuit added; the others find theirs again.
    """
    whole = x.square().sum(1, keepdim=True)
    if refit == "mp":
        spent = coefficients.square().cumsum(1)
        return torch.cat([whole, (whole - spent).clamp(min=0)], 1)
    values, residual, left = x.new_zeros(len(x), 0), x, [whole[:, 0]]
    for step in range(1, order.shape[1] + 1):
        support = order[:, :step]
        if refit == "omp":
            values, residual = least_squares(x, atoms, support)
        else:
            values = torch.nn.functional.pad(values, (0, 1))
            values, residual = gradient_step(x, atoms, support, values, residual, sign)
        left.append(residual.square().sum(1))
    return torch.stack(left, 1)
