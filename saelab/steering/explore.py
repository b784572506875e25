"""A first look: one latent's dose and response beside its controls, in one call.

The evaluator chooses latents and reports them on other prompts; here the latent is given, nothing
is chosen, and every prompt counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.edits import Directions, Handle, add
from saelab.edits.placement import Steerable
from saelab.errors import ConfigError
from saelab.evals.sample import sample_rows
from saelab.protocols import LanguageModel, Store
from saelab.steering import baselines
from saelab.steering.curves import curves_of, dose_figure
from saelab.steering.judges import Judge
from saelab.steering.scene import LARGEST, PROMPTS
from saelab.steering.sweep import Continuations, dose, grid, presence
from saelab.steering.trial import Response, Trial, adding

DOSES = (0.05, 0.1, 0.2, 0.4, 0.8)
_ROWS = 4096
"""Activations behind the covariance and the densities of controls."""


@final
@dataclass(frozen=True)
class DoseResponse:
    """What a latent and its controls did at each dose."""

    trial: Trial
    responses: tuple[Response, ...]
    model: Steerable
    handle: Handle
    multiples: tuple[tuple[float, float], ...] = ()
    """Multiples of the latent's typical maximum that were asked for, each with its dose in nats."""

    def presence(self, arm: str, dose: float) -> Float[Tensor, " d_sae"]:
        """Return the share of positions on which each latent fires when the unsteered model reads
        what an arm wrote at a dose. Raises ConfigError if there is nothing."""
        written = self.at(arm, dose).written
        if not written:
            raise ConfigError(f"{arm} does not reach {dose} nats, so nothing was written there")
        prompts = tuple(p for one in written for p in one.prompts)
        texts = tuple(t for one in written for t in one.texts)
        return presence(self.model, self.handle, Continuations(prompts, texts))

    def at(self, arm: str, dose: float) -> Response:
        """Return one response. Raises ConfigError if there is none."""
        for one in self.responses:
            if (one.arm, one.target) == (arm, dose):
                return one
        known = sorted({f"{one.arm} at {one.target}" for one in self.responses})
        raise ConfigError(f"nothing was steered by {arm} at {dose}; there is {', '.join(known)}")

    def figure(self, title: str = "") -> Any:
        """Return the Plotly figure: lift, fluency and score by dose, controls in grey."""
        return dose_figure(curves_of(self.responses), title=title)


def dose_response(
    model: Steerable,
    handle: Handle,
    latent: int,
    judge: Judge,
    *,
    store: Store | None = None,
    sign: int = 1,
    instruction: str | None = None,
    prompts: Sequence[str] = PROMPTS,
    doses: Sequence[float] = DOSES,
    multiples: Sequence[float] = (),
    tokens: Sequence[int] = (),
    n_random: int = baselines.N_RANDOM,
    max_new_tokens: int = 32,
    fluency_model: LanguageModel | None = None,
    seed: int = 0,
) -> DoseResponse:
    """Steer by a latent and by its controls at equal doses, and let a judge read what is written.

    `judge` says how much of the concept there is in a text; `sign` −1 steers the other way. Without
    a store the only control is isotropic directions; with one, directions of the activations'
    covariance and live latents that are like this one come beside it. An `instruction` before each
    prompt is one more arm. With `multiples` of the latent's typical maximum the doses are those
    that it has there, and controls are steered at these; `tokens` are the concept's, for
    `Response.target_shift`. Raises ConfigError for fewer than 8 prompts, a latent that is out of
    range, too few live latents for the controls, or multiples without the handle's scales.
    """
    if not 0 <= latent < handle.dictionary.d_sae:
        raise ConfigError(
            f"{handle.name!r} has {handle.dictionary.d_sae} latents, numbered from 0; there is no "
            f"latent {latent}"
        )
    trial = Trial(
        model, prompts, judge, fluency_model=fluency_model, max_new_tokens=max_new_tokens,
        seed=seed, tokens=tokens,
    )  # fmt: skip
    placed = _doses_of(trial, handle, latent, [sign * one for one in multiples], model)
    if multiples:
        doses = sorted(placed.values())
    unit = torch.nn.functional.normalize
    width = handle.dictionary.d_out
    directions = {
        f"latent {latent}": sign * unit(handle.dictionary.W_dec.detach()[[latent]].float(), dim=1),
        "isotropic": baselines.isotropic(width, n_random, seed=seed),
    }
    if store is None:
        size = width**0.5 if handle.scales is None else handle.scales.mean_norm
    else:
        rows = _rows(store, handle.site, seed)
        size = float(rows.norm(dim=1).mean())
        directions |= _controls(model, handle, latent, rows, n_random, seed)
    arms = {
        name: adding(Handle(Directions(own.cpu()), handle.site), range(len(own)))
        for name, own in directions.items()
    }
    responses = list(trial.responses(arms, doses, largest=LARGEST * size))
    responses += [] if instruction is None else [trial.prompted(instruction)]
    return DoseResponse(trial, tuple(responses), model, handle, tuple(placed.items()))


def _doses_of(
    trial: Trial, handle: Handle, latent: int, multiples: Sequence[float], model: Steerable
) -> dict[float, float]:
    """Return the dose, to three digits, at each multiple of a latent's typical maximum."""
    edits = grid(add(handle, latent, 1.0), multiples)
    return {at: float(f"{dose(model, [edit], trial.text).kl:.3g}") for at, edit in edits}


def _rows(store: Store, site: str, seed: int) -> Float[Tensor, "n d"]:
    sample = sample_rows(store, site, "train", _ROWS, batch=1024, seed=seed)
    return torch.cat([batch.x for batch in sample]).float()


@torch.no_grad()
def _controls(
    model: LanguageModel,
    handle: Handle,
    latent: int,
    rows: Float[Tensor, "rows d"],
    n: int,
    seed: int,
) -> dict[str, Float[Tensor, "m d"]]:
    """Return the random directions that know the site, and those that know the dictionary."""
    dictionary = handle.dictionary
    fires = [dictionary.encode(x.to(dictionary.W_dec)) != 0 for x in rows.split(1024)]
    density = torch.cat(fires).float().mean(0).cpu()
    like = baselines.matched_latents(model, handle, latent, density, n, seed=seed)
    W = torch.nn.functional.normalize(dictionary.W_dec.detach()[like].float(), dim=1)
    return {"covariance": baselines.from_covariance(rows, n, seed=seed), "matched_latents": W}
