"""What a latent's direction has to beat: random directions of four kinds, labels, and a prompt.

Each baseline is a `Handle` on unit directions at the same site, so that the same edits, doses and
judges serve for it and for a dictionary's latents.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.edits import Directions, Handle
from saelab.errors import ConfigError
from saelab.evals.directions import from_covariance, isotropic, shuffled_labels
from saelab.probes import DIRECTIONS, Direction
from saelab.protocols import LanguageModel

N_RANDOM = 20
"""Directions of each random kind, at least (measurement rules, section 4)."""
_POOL = 3
"""Matched latents are drawn from this many times as many nearest ones."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_effects(model: LanguageModel, handle: Handle) -> Iterator[Float[Tensor, "n d_vocab"]]:
    """Yield what each latent's direction does to the logits at unit length, as it is steered by.

    In order, some latents at a time.
    """
    for rows in handle.dictionary.W_dec.detach().split(256):
        yield model.logit_effect(handle.site, F.normalize(rows, dim=1)).cpu()


def matched_latents(
    model: LanguageModel,
    handle: Handle,
    latent: int,
    density: Float[Tensor, " d_sae"],
    n: int,
    *,
    seed: int,
) -> list[int]:
    """Return `n` random live latents like one in density and in the norm of the logit effect of its
    direction at unit length.

    They are drawn from the 3 n nearest by the larger of the two log ratios; `density` is the share
    of rows on which each latent fires. Raises ConfigError if the latent is dead or too few live.
    """
    live = (density.cpu() > 0).nonzero()[:, 0]
    others = live[live != latent]
    if float(density[latent]) <= 0 or len(others) < n:
        raise ConfigError(
            f"matching latent {latent} of {handle.name!r} (density {float(density[latent]):.2g}) "
            f"needs it and {n} others to be live, but {len(others)} others are"
        )
    norms = torch.cat([effect.norm(dim=1) for effect in unit_effects(model, handle)])
    apart = [
        (values[others] / values[latent]).log().abs() for values in (density.cpu().float(), norms)
    ]
    nearest = torch.stack(apart).amax(0).argsort(stable=True)[: _POOL * n]
    drawn = torch.randperm(len(nearest), generator=_generator(seed))[:n]
    return sorted(others[nearest[drawn]].tolist())


def supervised(
    x: Float[Tensor, "documents d"], positive: Bool[Tensor, " documents"], method: Direction
) -> Float[Tensor, "1 d"]:
    """Return the unit direction of a concept from labelled documents, one row each."""
    both = torch.stack([positive, ~positive], 1)
    return F.normalize(DIRECTIONS[method](x, both)[:1], dim=1).float()


def as_handle(directions: Float[Tensor, "m d"], like: Handle, name: str) -> Handle:
    """Return directions as latents at the site of another handle, with that site's norm."""
    return Handle(Directions(directions), like.site, name, like.scales)


def random_controls(
    model: LanguageModel,
    handle: Handle,
    latent: int,
    *,
    x: Float[Tensor, "documents d"],
    positive: Bool[Tensor, " documents"],
    rows: Float[Tensor, "rows d"],
    density: Float[Tensor, " d_sae"],
    seed: int,
    n: int = N_RANDOM,
) -> dict[str, Handle]:
    """Return the four random kinds for one latent, `n` directions each, by name.

    `x` and `positive` are labelled documents' means, `rows` are activations of the site. Raises
    ConfigError for fewer than 20 directions: their spread would not be known.
    """
    if n < N_RANDOM:
        raise ConfigError(f"controls need {N_RANDOM} random directions or more, but {n} were asked")
    like = matched_latents(model, handle, latent, density, n, seed=seed)
    W = handle.dictionary.W_dec.detach()[like].cpu()
    found = {
        "isotropic": isotropic(rows.shape[1], n, seed=seed),
        "covariance": from_covariance(rows, n, seed=seed),
        "matched_latents": F.normalize(W.float(), dim=1),
        "shuffled_labels": shuffled_labels(x, positive, n, seed=seed),
    }
    return {name: as_handle(rows, handle, name) for name, rows in found.items()}


def instructed(prompts: Sequence[str], instruction: str) -> list[str]:
    """Return prompts with an instruction before each, on its own line: steering by words."""
    return [f"{instruction.strip()}\n{prompt}" for prompt in prompts]
