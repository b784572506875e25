"""Arms beside each other: the same prompts, doses, seeds and judge for a latent and its controls.

Each arm is some directions of one kind: one latent, or twenty random directions. At every dose
each direction gets its own matched strength, the model continues the prompts, and a judge and
another model's loss read what it wrote. Of many directions each continues a part of the prompts.
Numbers are means over an arm's directions, per prompt, so that arms are compared prompt by prompt.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.edits import Handle, LatentEdit, Where, add
from saelab.edits.placement import Steerable
from saelab.errors import ConfigError
from saelab.protocols import LanguageModel
from saelab.stats import Difference, Statistic, bootstrap, crossed_bootstrap
from saelab.steering.baselines import instructed
from saelab.steering.beside import continuations_beside
from saelab.steering.fluency import Band, band, fluent, steering_score
from saelab.steering.judges import Judge
from saelab.steering.sweep import (
    CleanText,
    Continuations,
    Matched,
    clean_text,
    continuations,
    matched_strengths,
    seeds_of,
)

_DOSED = 8
"""Prompts on whose continuations doses are taken: as many as a dose needs."""
_WRITERS = 5
"""Directions of one arm that continue a prompt, where there are more."""
_TOLERANCE = 0.05
"""How finely doses are matched, as a share of them."""

EditAt = Callable[[float], Sequence[LatentEdit]]
"""Makes the edits of one strength."""


def adding(handle: Handle, latents: Sequence[int], *, where: Where = "all") -> list[EditAt]:
    """Return an arm that adds each of some latents by itself."""

    def one(latent: int) -> EditAt:
        return lambda strength: [add(handle, latent, strength, where=where)]

    return [one(latent) for latent in latents]


def _lift(totals: Float[Tensor, "b 5"]) -> Float[Tensor, " b"]:
    return (totals[:, 0] - totals[:, 1]) / totals[:, 2]


def _fluency(totals: Float[Tensor, "b 5"]) -> Float[Tensor, " b"]:
    return totals[:, 3] / totals[:, 4]


def _score(totals: Float[Tensor, "b 5"]) -> Float[Tensor, " b"]:
    pairs = zip(_lift(totals).tolist(), _fluency(totals).tolist(), strict=True)
    return torch.tensor([steering_score(*pair) for pair in pairs], dtype=torch.float64)


def shares(n_directions: int, n_prompts: int) -> list[tuple[int, ...]]:
    """Return which prompts each direction of an arm continues: all, or of many directions each
    every so many, so that each prompt is continued by at least five.

    They are dealt in pairs of which one chooses and one is reported on (`reported_half`), so that
    all directions write in both halves.
    """
    every = max(1, n_directions // _WRITERS)
    pairs = [range(i % every, n_prompts, every) for i in range(n_directions)]
    return [
        tuple(j for pair in own for j in (2 * pair, 2 * pair + 1) if j < n_prompts) for own in pairs
    ]


def _share(which: Sequence[bool]) -> float:
    return sum(which) / len(which) if which else math.nan


Measure = Literal["score", "lift", "fluency"]
_STATISTICS: dict[Measure, Statistic] = {"score": _score, "lift": _lift, "fluency": _fluency}


@dataclass(frozen=True)
class Response:
    """What an arm did at one dose."""

    arm: str
    target: float | None
    """The dose asked for; None for a prompt, whose dose is not set."""
    matched: tuple[Matched, ...]
    """Per direction the strength; those that do not reach the dose are left out of the rest."""
    kl_last_prompt: float | None
    """Mean over directions of the second dose; None after the prompt, or for a prompt."""
    judge: str
    sums: Float[Tensor, "prompts 5"]
    """Per prompt: judged score, unsteered score, whether both are known; fluent, and 1. Means over
    the directions that continued it; 0 without one."""
    written: tuple[Continuations, ...]
    """Per direction that reached the dose, what the model wrote."""
    asked: tuple[tuple[int, ...], ...] = ()
    """Which prompts each of them continued."""
    per_direction: Float[Tensor, "directions prompts 5"] | None = None
    """What each of them adds to `sums`; with it, intervals are over directions too."""

    @property
    def lift(self) -> float:
        """Mean judged score over that of unsteered text of the same prompts."""
        return float(_lift(self._totals))

    @property
    def fluency(self) -> float:
        """Share of fluent continuations."""
        return float(_fluency(self._totals))

    @property
    def score(self) -> float:
        """Harmonic mean of lift and fluency; see `fluency.steering_score`."""
        return float(_score(self._totals))

    @property
    def directions_reached(self) -> float:
        """Share of the directions that reach the dose; NaN for a prompt."""
        return _share([one.strength is not None for one in self.matched])

    @property
    def non_monotone(self) -> float:
        """Share of the directions whose dose falls somewhere as the strength grows; NaN for a
        prompt."""
        return _share([not one.monotone for one in self.matched])

    @property
    def target_shift(self) -> float | None:
        """Mean over directions of how much the concept's tokens gain in log-probability, in nats;
        None where it was not measured, or for a prompt."""
        known = [one.target_shift for one in self.matched if one.target_shift is not None]
        return sum(known) / len(known) if known else None

    @property
    def reached(self) -> bool:
        """Whether any direction reached the dose, and wrote."""
        return bool(self._totals[0, 4] > 0)

    @property
    def n_answered(self) -> int:
        """Prompts on which the judge answered, steered and unsteered."""
        return int((self.sums[:, 2] > 0).sum())

    @property
    def missing(self) -> float:
        """Share of what was written for which there is no such answer; NaN where nothing was."""
        return float(1 - self._totals[0, 2] / self._totals[0, 4])

    def where(self, prompts: Bool[Tensor, " prompts"]) -> "Response":
        """Return what was done on some of the prompts; texts and doses are those of all."""
        own = self.per_direction
        parts = None if own is None else own[:, prompts]
        return replace(self, sums=self.sums[prompts], per_direction=parts)

    @property
    def _totals(self) -> Float[Tensor, "1 5"]:
        return self.sums.sum(0, keepdim=True)

    def replicates(
        self, measure: Measure = "score", *, resamples: int = 1000, seed: int = 0
    ) -> Float[Tensor, " resamples"]:
        """Return a measure in each resample of prompts, and of an arm's directions where there are
        several; equal seeds draw the same prompts."""
        statistic, drawing = _STATISTICS[measure], {"resamples": resamples, "seed": seed}
        if self.per_direction is None:
            return bootstrap(self.sums, statistic, **drawing)
        return crossed_bootstrap(self.per_direction, statistic, **drawing)

    def interval(
        self, measure: Measure = "score", *, resamples: int = 1000, seed: int = 0
    ) -> Difference:
        """Return a measure with its 95 % interval over prompts and directions."""
        drawn = self.replicates(measure, resamples=resamples, seed=seed)
        return Difference.of(getattr(self, measure), drawn)

    def over(self, other: "Response", *, resamples: int = 1000, seed: int = 0) -> Difference:
        """Return this score minus another arm's, paired by prompt, with its 95 % interval."""
        drawn = [one.replicates(resamples=resamples, seed=seed) for one in (self, other)]
        return Difference.of(self.score - other.score, torch.sub(*drawn))


@dataclass(frozen=True)
class Selection:
    """The best of several responses, chosen on one half of the prompts, reported on the other."""

    chosen: int
    """Its place among the candidates."""
    reported: Response
    """On the other half."""
    oracle: Response
    """The best of that other half itself: what better choosing could have gained."""
    n_candidates: int


def reported_half(n_prompts: int) -> Bool[Tensor, " prompts"]:
    """Return which prompts are reported on: every other one; the first of each pair chooses."""
    return torch.arange(n_prompts) % 2 == 1


def select(candidates: Sequence[Response]) -> Selection | None:
    """Return the response with the best score on every other prompt, scored on the rest.

    None where none has a score there: none reached its dose, or the judge answered for none. Raises
    ConfigError without a response.
    """
    if not candidates:
        raise ConfigError("there is no response to choose from; give `select` one or more")
    reported = reported_half(len(candidates[0].sums))
    halves = [[one.where(half) for one in candidates] for half in (~reported, reported)]
    first, second = (
        torch.tensor([one.score for one in half]).nan_to_num(-torch.inf) for half in halves
    )
    if not bool(first.isfinite().any()):
        return None
    chosen, best = int(first.argmax()), int(second.argmax())
    return Selection(chosen, halves[1][chosen], halves[1][best], len(candidates))


@final
class Trial:
    """One model, one set of prompts, one judge and one way of writing, for all arms."""

    def __init__(
        self,
        model: Steerable,
        prompts: Sequence[str],
        judge: Judge,
        *,
        fluency_model: LanguageModel | None = None,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        seed: int = 0,
        samples: int = 4,
        tokens: Sequence[int] = (),
    ) -> None:
        """Write unsteered continuations, `samples` per prompt for the band of fluency.

        `fluency_model` should be another model; without one the steered model itself, unsteered,
        judges losses. `tokens` are the concept's, whose shift is `Response.target_shift`. Raises
        ConfigError for fewer than 8 prompts.
        """
        self._model, self.prompts, self._judge = model, tuple(prompts), judge
        self._reader = fluency_model or model
        self._tokens = tuple(tokens)
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self.text: CleanText = clean_text(
            model, self.prompts[:_DOSED], temperature=temperature, seed=seed
        )
        self.usual: Continuations = continuations(
            model, samples * self.prompts, max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed + 1,
        )  # fmt: skip
        self.band: Band = band(self._reader, self.usual)
        scores = judge(self.usual.texts).double().reshape(samples, len(self.prompts))
        self.unsteered: Float[Tensor, " prompts"] = scores.nanmean(0)
        """Mean judged score of each prompt's unsteered continuations."""

    def responses(
        self,
        arms: Mapping[str, Sequence[EditAt]],
        doses: Sequence[float],
        *,
        largest: float,
        sign: int = 1,
    ) -> Iterator[Response]:
        """Yield each arm's response at each dose; `largest` is the largest strength tried.

        Strengths are matched for each direction by itself; what all directions of all arms write at
        a dose is written together.
        """
        directions = [edit_at for arm in arms.values() for edit_at in arm]
        asked = [own for arm in arms.values() for own in shares(len(arm), len(self.prompts))]
        found = [
            matched_strengths(
                self._model, edit_at, self.text, doses,
                largest=largest, sign=sign, tolerance=_TOLERANCE, tokens=self._tokens,
            )
            for edit_at in directions
        ]  # fmt: skip
        written = [
            self._all_written(directions, asked, [per_dose[place] for per_dose in found])
            for place in range(len(doses))
        ]
        first = 0
        for name, arm in arms.items():
            own = range(first, first + len(arm))
            first += len(arm)
            for place, target in enumerate(doses):
                yield self._response(
                    name, target, tuple(found[i][place] for i in own),
                    [(asked[i], text) for i in own if (text := written[place].get(i)) is not None],
                )  # fmt: skip

    def _all_written(
        self,
        directions: Sequence[EditAt],
        asked: Sequence[tuple[int, ...]],
        matched: Sequence[Matched],
    ) -> dict[int, Continuations]:
        """Return what each direction that has a strength writes after its prompts."""
        edits = {
            place: edit_at(one.strength)
            for place, (edit_at, one) in enumerate(zip(directions, matched, strict=True))
            if one.strength is not None
        }
        prompts = [[self.prompts[i] for i in asked[place]] for place in edits]
        texts = continuations_beside(
            self._model, prompts, list(edits.values()), max_new_tokens=self._max_new_tokens,
            temperature=self._temperature, seed=self._seed + 2,
        )  # fmt: skip
        return dict(zip(edits, texts, strict=True))

    def _response(
        self,
        name: str,
        target: float | None,
        matched: tuple[Matched, ...],
        written: Sequence[tuple[tuple[int, ...], Continuations]],
    ) -> Response:
        known = [one.kl_last_prompt for one in matched if one.kl_last_prompt is not None]
        parts = self._parts(written)
        return Response(
            name, target, matched, sum(known) / len(known) if known else None, self._judge.name,
            parts.sum(0) if written else parts.new_full(parts.shape[1:], torch.nan),
            tuple(text for _, text in written), tuple(asked for asked, _ in written),
            parts if written else None,
        )  # fmt: skip

    def prompted(self, instruction: str) -> Response:
        """Return the response to an instruction before each prompt, without an edit; prompts are
        continued with the same noise as under edits."""
        found = continuations(
            self._model, instructed(self.prompts, instruction),
            max_new_tokens=self._max_new_tokens, temperature=self._temperature,
            seed=seeds_of(self.prompts, self._seed + 2),
        )  # fmt: skip
        # losses are read after the bare prompts, like everyone's
        found = Continuations(self.prompts, found.texts)
        return self._response("prompt", None, (), [(tuple(range(len(self.prompts))), found)])

    def _parts(
        self, written: Sequence[tuple[tuple[int, ...], Continuations]]
    ) -> Float[Tensor, "directions prompts 5"]:
        """Return what each direction counts of each prompt, as a share of those that continued
        it."""
        parts = torch.zeros(len(written), len(self.prompts), 5, dtype=torch.float64)
        for part, (asked, one) in zip(parts, written, strict=True):
            own = list(asked)
            scores, usual = self._judge(one.texts).double(), self.unsteered[own]
            known = ~(scores.isnan() | usual.isnan())
            fine = fluent(self._reader, one, self.band).double()
            pair = (torch.where(known, values, 0) for values in (scores, usual))
            part[own] = torch.stack([*pair, known.double(), fine, torch.ones_like(fine)], 1)
        return parts / parts[..., 4].sum(0)[:, None].clamp(min=1)
