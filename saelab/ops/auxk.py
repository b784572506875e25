"""AuxK: dead latents learn to explain what the living ones leave (Gao et al. 2024)."""

import torch
from jaxtyping import Float
from torch import Tensor


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
    n_dead = len(W_dec)
    if n_dead == 0 or len(error) == 0:
        return error.new_zeros(())
    target = error.detach()
    size = pre.abs() if signed else pre
    where = size.topk(min(aux_k, n_dead), dim=-1, sorted=False).indices
    kept = pre.gather(-1, where)
    z = torch.zeros_like(pre).scatter(-1, where, kept if signed else kept.relu())
    left = (target - z @ W_dec).square().sum()
    variance = (target - target.mean(0)).square().sum()
    share = left / variance * min(n_dead / aux_k, 1.0)
    usable = bool(torch.isfinite(share.detach())) and bool(variance > 0)
    return share if usable else error.new_zeros(())
