"""Effects of heads to first order: all of them from a few passes forward and back.

*Attribution patching* (Nanda 2023; Syed et al. 2023, arXiv 2310.10348): the change of a head's
output between the two runs, times the metric's gradient in the clean run. *Integrated gradients*
(EAP-IG, Hanna et al. 2024, arXiv 2403.17806): the same with the gradient's mean over runs whose
embeddings lie between clean and corrupted ones. Exact where the metric is linear in the output; how
far they are off elsewhere is for `effects.agreement` to say.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from saelab.circuits.effects import Effects, require_gap
from saelab.circuits.patching import components_of, site_of
from saelab.circuits.protocols import PatchableModel
from saelab.circuits.tasks import TaskData
from saelab.protocols import Edit

VERSION = 1
"""Bumped when the effects of the same prompts change."""
_EMBED = "hook_embed"
_ROWS = 8


def attribution_patching(
    model: PatchableModel, data: TaskData, *, position: str = "all", steps: int = 1
) -> Effects:
    """Return first-order effects of noising every head with the corrupted run's output.

    `steps` = 1 takes the gradient in the clean run, more the mean over that many runs, midpoints of
    equal parts of the line from clean to corrupted embeddings. `position` is `all` or a slot.
    Raises SiteError if the model has no head outputs, ConfigError for an unknown slot, TaskError if
    the gap is within noise.
    """
    sites = list(dict.fromkeys(site_of("heads", c.layer) for c in components_of(model, "heads")))
    parts = []
    for index in torch.arange(len(data)).split(_ROWS):
        part = data.rows(index)
        width = int(part.lengths.max())
        clean, corrupted = part.clean[:, :width], part.corrupted[:, :width]
        held, other = (model.capture(tokens, [*sites, _EMBED]) for tokens in (clean, corrupted))
        gradients = _mean_gradients(model, part, clean, (held[_EMBED], other[_EMBED]), sites, steps)
        there = part.marked(position)[:, :width].to(model.device)
        moved = [
            rearrange((held[s] - other[s]).float() * gradients[s], "n p (h e) -> n p h e",
                      h=model.n_heads).sum(-1)
            for s in sites
        ]  # fmt: skip
        changes = torch.cat([(x * there[..., None]).sum(1) for x in moved], 1)
        gaps = _metric(model, part, clean) - _metric(model, part, corrupted)
        parts.append((changes.cpu(), gaps.cpu()))
    changes, gaps = (torch.cat(column) for column in zip(*parts, strict=True))
    require_gap(gaps, data.name)
    return Effects(components_of(model, "heads"), changes, gaps)


def _mean_gradients(
    model: PatchableModel,
    data: TaskData,
    tokens: Tensor,
    ends: tuple[Tensor, Tensor],
    sites: list[str],
    steps: int,
) -> dict[str, Float[Tensor, "n pos d"]]:
    """Return the metric's gradient at each site, as a mean over points between two embeddings."""

    def objective(logits: Float[Tensor, "n pos d_vocab"]) -> Float[Tensor, ""]:
        return data.measure(data.at_end(logits)).sum()

    total = dict.fromkeys(sites, torch.zeros(()))
    for step in range(steps):
        share = (step + 0.5) / steps if steps > 1 else 0.0
        edits = {_EMBED: _constant(torch.lerp(*ends, share))}
        for site, (_, gradient) in model.grad_at(tokens, sites, objective, edits).items():
            total[site] = total[site] + gradient.float() / steps
    return total


def _constant(value: Float[Tensor, "n pos d"]) -> Edit:
    return lambda _: value


def _metric(model: PatchableModel, data: TaskData, tokens: Tensor) -> Float[Tensor, " n"]:
    return data.measure(data.at_end(model.logits(tokens, lengths=data.lengths)))
