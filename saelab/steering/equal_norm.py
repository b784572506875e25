"""The evaluator of equal norms: how far do latents push the model in contexts not their own?

Live latents drawn at random, and as many random directions, are added at every position of
held-out windows, all with one length in mean norms of the site's activations. A latent counts in
the windows in which it does not fire. Measured are the mean KL(clean ‖ steered), the norm of the
change of the centred logits, and the change of the joint log-probability of the 20 tokens that the
direction's own logit effect favours most. Rows: docs/steering.md.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Annotated, final

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from saelab.config import Config
from saelab.edits import Directions, Handle, add, steer
from saelab.edits.placement import Steerable
from saelab.errors import ConfigError
from saelab.evals.labelled import checked_site
from saelab.evals.sample import sample_rows
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.stats import ResultRow, bootstrap, standard_error
from saelab.steering import baselines
from saelab.steering.neutral import Neutral, heldout_windows

OWN = "dictionary"
N_TOKENS = 20
"""Tokens that a direction is held to aim at."""
MEASURES = {"kl": "nats", "logits": "norm", "target_shift": "nats"}


class EqualNormConfig(Config):
    """Which latents and contexts, and how far they are pushed."""

    norms: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.25, 0.5, 1.0)
    """Lengths of the change, in mean norms of the site's activations."""
    latents: Annotated[int, Field(ge=2)] = 64
    """Live latents that are pushed, drawn at random; as many random directions."""
    windows: PositiveInt = 8
    """Held-out windows that are read."""
    length: Annotated[int, Field(ge=2)] = 32
    """Positions of each window."""
    rows: Annotated[int, Field(ge=2)] = 4096
    """Activations behind densities, norms and covariances."""
    resamples: PositiveInt = 1000
    """Bootstrap resamples of latents behind each interval."""
    seed: int = 0
    """Of what is drawn."""


@dataclass(frozen=True)
class Contexts:
    """Windows, with what the model says in them unsteered."""

    windows: Neutral
    log_probs: Float[Tensor, "windows pos d_vocab"]
    real: Bool[Tensor, "windows pos"]


@torch.no_grad()
def contexts_of(model: Steerable, windows: Neutral, length: int) -> Contexts:
    """Read the first positions of windows with the unsteered model."""
    lengths = windows.lengths.clamp(max=length)
    longest = int(lengths.max())
    cut = Neutral(windows.name, windows.tokens[:, :longest], lengths, windows.scored[:, :longest])
    real = torch.arange(cut.tokens.shape[1]) < lengths[:, None]
    return Contexts(cut, model.logits(cut.tokens, lengths=lengths).log_softmax(-1).cpu(), real)


@torch.no_grad()
def pushed(
    model: Steerable,
    contexts: Contexts,
    site: str,
    change: Float[Tensor, " d"],
    targets: Int[Tensor, " n"],
) -> Float[Tensor, "windows 3"]:
    """Return what adding a vector at every position does in each window: the mean over positions of
    KL, of the norm of the change of centred logits, and of the targets' log-probability's change.

    Raises NonFiniteError if it makes activations infinite.
    """
    handle = Handle(Directions(change[None]), site)
    with steer(model, add(handle, 0, 1.0)):
        logits = model.logits(contexts.windows.tokens, lengths=contexts.windows.lengths)
    clean, steered = contexts.log_probs, logits.log_softmax(-1).cpu()
    moved = steered - clean
    measures = [
        -(clean.exp() * moved).sum(-1),
        (moved - moved.mean(-1, keepdim=True)).norm(dim=-1),
        steered[..., targets].logsumexp(-1) - clean[..., targets].logsumexp(-1),
    ]
    real = contexts.real.float()
    means = [torch.where(contexts.real, one, 0.0).sum(1) / real.sum(1) for one in measures]
    return torch.stack(means, 1)


@final
class EqualNormEvaluator:
    """Pushes the model along latents by one length, where they do not fire."""

    name = "equal_norm"
    version = 1

    def __init__(self, config: EqualNormConfig | None = None, site: str | None = None) -> None:
        """Push at `site`; by default the store's only one."""
        self.config = config or EqualNormConfig()
        self.site = site
        self._kept: dict[Hashable, tuple[Contexts, dict[str, Tensor]]] = {}

    def __call__(
        self, dictionary: Dictionary, store: Store, model: LanguageModel | None = None
    ) -> Iterator[ResultRow]:
        """Yield what latents and random directions do at each length.

        Raises ConfigError without a model that can be steered, or with fewer live latents than are
        asked for.
        """
        if not isinstance(model, Steerable):
            raise ConfigError("evaluate.evals: equal_norm steers and needs a live `model:`")
        site, config = checked_site(dictionary, store, self.site), self.config
        sample = sample_rows(store, site, "train", config.rows, batch=1024, seed=config.seed)
        rows = torch.cat([batch.x for batch in sample]).float()
        size = float(rows.norm(dim=1).mean())
        key = (store.content_hash, site, model.fingerprint)
        if key not in self._kept:
            windows = heldout_windows(store, site, model, config.windows)
            contexts = contexts_of(model, windows, config.length)
            self._kept = {key: (contexts, self._controls(model, contexts, site, rows, size))}
        contexts, controls = self._kept[key]
        latents = self._drawn(dictionary, rows)
        directions = dictionary.W_dec.detach()[latents].float().cpu()
        fires = self._fires(model, contexts, dictionary, site, latents)
        own = self._pushes(model, contexts, site, directions, size)
        found = {OWN: torch.where(fires[..., None, None], torch.nan, own), **controls}
        yield from self._rows(found)

    def _controls(
        self,
        model: Steerable,
        contexts: Contexts,
        site: str,
        rows: Float[Tensor, "n d"],
        size: float,
    ) -> dict[str, Float[Tensor, "m windows norms 3"]]:
        n, seed = self.config.latents, self.config.seed
        directions = {
            "isotropic": baselines.isotropic(rows.shape[1], n, seed=seed),
            "covariance": baselines.from_covariance(rows, n, seed=seed),
        }
        return {
            name: self._pushes(model, contexts, site, one, size) for name, one in directions.items()
        }

    @torch.no_grad()
    def _drawn(self, dictionary: Dictionary, rows: Float[Tensor, "n d"]) -> list[int]:
        """Return live latents, drawn at random."""
        fires = torch.zeros(dictionary.d_sae, dtype=torch.bool)
        for x in rows.split(1024):
            fires |= (dictionary.encode(x.to(dictionary.W_dec)) != 0).any(0).cpu()
        live = fires.nonzero()[:, 0]
        if len(live) < self.config.latents:
            raise ConfigError(
                f"equal_norm.latents asks for {self.config.latents} live latents, but {len(live)} "
                f"fire on {len(rows)} rows; ask for fewer, or take more rows"
            )
        generator = torch.Generator().manual_seed(self.config.seed)
        order = torch.randperm(len(live), generator=generator)
        return sorted(live[order[: self.config.latents]].tolist())

    @torch.no_grad()
    def _fires(
        self,
        model: Steerable,
        contexts: Contexts,
        dictionary: Dictionary,
        site: str,
        latents: list[int],
    ) -> Bool[Tensor, "m windows"]:
        """Return which latents fire in which windows."""
        windows = contexts.windows
        x = model.capture(windows.tokens, [site], windows.lengths)[site]
        found = [
            (dictionary.encode(row[:n].to(dictionary.W_dec))[:, latents] != 0).any(0).cpu()
            for row, n in zip(x, windows.lengths.tolist(), strict=True)
        ]
        return torch.stack(found, 1)

    def _pushes(
        self,
        model: Steerable,
        contexts: Contexts,
        site: str,
        directions: Float[Tensor, "m d"],
        size: float,
    ) -> Float[Tensor, "m windows norms 3"]:
        """Return what each direction does in each window at each length."""
        unit = torch.nn.functional.normalize(directions, dim=1)
        found = []
        for direction in unit:
            effect = model.logit_effect(site, direction[None])[0].cpu()
            targets = effect.topk(min(N_TOKENS, len(effect))).indices
            per_norm = [
                pushed(model, contexts, site, norm * size * direction, targets)
                for norm in self.config.norms
            ]
            found.append(torch.stack(per_norm, 1))
        return torch.stack(found)

    # ------------------------------------------------------------------------------------ rows

    def _rows(self, found: dict[str, Float[Tensor, "m windows norms 3"]]) -> Iterator[ResultRow]:
        for place, norm in enumerate(self.config.norms):
            for column, (measure, unit) in enumerate(MEASURES.items()):
                name = f"equal_norm_{measure}[norm={norm:g}]"
                for arm, values in found.items():
                    means = values[:, :, place, column].double().nanmean(1)
                    if not bool(means.isnan().all()):  # some latents are silent in some window
                        yield self._row(name, unit, arm, means[~means.isnan()])

    def _row(self, name: str, unit: str, arm: str, means: Float[Tensor, " m"]) -> ResultRow:
        """Return the mean over latents, with its spread over other draws of them."""
        drawn = bootstrap(
            means[:, None], lambda totals: totals[:, 0] / len(means),
            resamples=self.config.resamples, seed=self.config.seed,
        )  # fmt: skip
        return ResultRow(
            name, float(means.mean()), unit, len(means), standard_error(drawn), self.version, arm,
            "none", self.name, drawn,
        )  # fmt: skip
