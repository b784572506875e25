"""Edits that stand in a model: checked against it and each other, one change per site."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.edits.config import TokenPattern, Where
from saelab.edits.latents import LatentEdit
from saelab.edits.placement import Placement, Steerable, where_in_text
from saelab.errors import ConfigError, NonFiniteError, ShapeError
from saelab.protocols import LanguageModel


@final
class Steering:
    """Edits that fit a model and each other, as one change per site."""

    def __init__(self, model: LanguageModel, edits: Sequence[LatentEdit]) -> None:
        """Check the edits.

        Raises SiteError for an unknown site, ShapeError for a dictionary of another width, and
        ConfigError for a latent out of range, an unknown scale, or edits that contradict.
        """
        for edit in edits:
            _check_fit(model, edit)
        _check_contradictions(edits)
        self._sites: dict[str, list[LatentEdit]] = {}
        for edit in edits:
            self._sites.setdefault(edit.handle.site, []).append(edit)
        places = [edit.config.where for edit in edits]
        patterns = {place.tokens for place in places if isinstance(place, TokenPattern)}
        self._tables = {pattern: where_in_text(model, pattern) for pattern in patterns}

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are changed."""
        return tuple(self._sites)

    def __str__(self) -> str:
        """Return the edits in words."""
        edits = [e for edits in self._sites.values() for e in edits]
        return "; ".join(f"{edit.config} at {edit.handle.site}" for edit in edits)

    def apply(
        self, site: str, x: Float[Tensor, "batch pos d"], at: Placement
    ) -> Float[Tensor, "batch pos d"]:
        """Return a site's activations, edited. Raises NonFiniteError where they overflow."""
        change = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        touched = torch.zeros_like(at.real)
        for edit in self._sites[site]:
            mask = self._mask(edit.config.where, at)
            if bool(mask.any()):
                delta = edit.change(x[mask]).to(change)
                change = change.index_put((mask,), delta, accumulate=True)
                touched = touched | mask
        y = torch.where(touched[..., None], (x + change).to(x.dtype), x)
        if not bool(y[touched].isfinite().all()) and bool(x[touched].isfinite().all()):
            raise NonFiniteError(
                f"activations are not finite after {self}: they overflow {x.dtype} at {site!r}; "
                "take a smaller strength"
            )
        return y

    def _mask(self, where: Where, at: Placement) -> Bool[Tensor, "batch pos"]:
        if isinstance(where, TokenPattern):
            return at.real & self._tables[where.tokens].to(at.tokens.device)[at.tokens]
        if where == "all":
            return at.real
        return at.real & (at.prompt if where == "prompt" else ~at.prompt)


@contextmanager
def steer(
    model: LanguageModel,
    *edits: LatentEdit,
    prompt_lengths: Int[Tensor, " batch"] | None = None,
) -> Iterator[Steering]:
    """Let edits stand in every pass of a model, for this thread, until the block ends.

    In `generate` the prompt is what is given; in other passes it is the first `prompt_lengths`
    tokens of each row, by default all. Raises what `Steering` raises, and in a pass NonFiniteError.
    """
    if not isinstance(model, Steerable):
        raise ConfigError(
            f"{type(model).__name__} cannot keep edits standing: it lacks `steered` "
            "(see saelab.edits.placement.Steerable); pass edits to its `logits` instead"
        )
    steering = Steering(model, edits)
    with model.steered(steering, prompt_lengths):
        yield steering


def _check_fit(model: LanguageModel, edit: LatentEdit) -> None:
    dictionary, site = edit.handle.dictionary, model.site(edit.handle.site)
    if not dictionary.d_in == dictionary.d_out == site.width:
        raise ShapeError(
            f"{edit.handle.name!r} takes width {dictionary.d_in} and gives {dictionary.d_out}, but "
            f"{site.name!r} of {model.name} has width {site.width}. Was it trained at this site?"
        )
    if max(edit.config.latents) >= dictionary.d_sae:
        raise ConfigError(
            f"{edit.config}: {edit.handle.name!r} has {dictionary.d_sae} latents, numbered 0 to "
            f"{dictionary.d_sae - 1}"
        )
    if not all(map(math.isfinite, edit.strengths().tolist())):
        raise NonFiniteError(f"{edit.config}: its strength in the latent's own unit is not finite")


def _check_contradictions(edits: Sequence[LatentEdit]) -> None:
    """Refuse two edits of one latent at positions that both may edit, unless both add."""
    for place, first in enumerate(edits):
        for second in edits[place + 1 :]:
            a, b = first.config, second.config
            same = first.handle.dictionary is second.handle.dictionary
            same &= first.handle.site == second.handle.site
            shared = sorted({*a.latents} & {*b.latents}) if same else []
            apart = (a.where, b.where) in (("prompt", "after"), ("after", "prompt"))
            if shared and not apart and not a.operation == b.operation == "add":
                raise ConfigError(
                    f"two edits contradict on latents {shared}: {a}, and {b}; keep one, or give "
                    "one `where: prompt` and the other `where: after`"
                )
