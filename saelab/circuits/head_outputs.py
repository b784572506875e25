"""What each head writes into the residual stream at the last position of a prompt."""

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from saelab.circuits.patching import components_of, site_of
from saelab.circuits.protocols import PatchableModel
from saelab.circuits.tasks import TaskData, Version

_ROWS = 16


@torch.no_grad()
def head_outputs(
    model: PatchableModel, data: TaskData, version: Version
) -> Float[Tensor, "n heads d_model"]:
    """Return z W_O of every head, layer by layer, float32: without the output's bias.

    Raises SiteError if the model has no head outputs.
    """
    sites = list(dict.fromkeys(site_of("heads", c.layer) for c in components_of(model, "heads")))
    maps = {site: _output_maps(model, site) for site in sites}
    parts = []
    for index in torch.arange(len(data)).split(_ROWS):
        rows = data.rows(index)
        tokens = getattr(rows, version)[:, : int(rows.lengths.max())]
        held = model.capture(tokens, sites)
        found = []
        for site in sites:
            z = rearrange(rows.at_end(held[site]).float(), "n (h e) -> n h e", h=model.n_heads)
            found.append(einsum(z, maps[site], "n h e, h e d -> n h d"))
        parts.append(torch.cat(found, 1).cpu())
    return torch.cat(parts)


def _output_maps(model: PatchableModel, site: str) -> Float[Tensor, "heads e d_model"]:
    """Return each head's part of W_O."""
    whole = model.to_residual(site, torch.eye(model.site(site).width))
    return rearrange(whole, "(h e) d -> h e d", h=model.n_heads)
