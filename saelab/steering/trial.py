"""Arms beside each other: the same prompts, doses, seeds and judge for a latent and its controls.

Each arm is some directions of one kind: one latent, or twenty random directions. At every dose
each direction gets its own matched strength, the model continues the prompts, and a judge and
another model's loss read what it wrote. Of many directions each continues a part of the prompts.
Numbers are means over an arm's directions, per prompt, so that arms are compared prompt by prompt.
"""

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
from saelab.stats import Difference, Statistic, bootstrap, paired_difference
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
    every so many, so that each prompt is continued by at least five."""
    every = max(1, n_directions // _WRITERS)
    return [tuple(range(i % every, n_prompts, every)) for i in range(n_directions)]


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
        return replace(self, sums=self.sums[prompts])

    @property
    def _totals(self) -> Float[Tensor, "1 5"]:
        return self.sums.sum(0, keepdim=True)

    def replicates(
        self, measure: Measure = "score", *, resamples: int = 1000, seed: int = 0
    ) -> Float[Tensor, " resamples"]:
        """Return a measure in each resample of prompts; equal seeds draw the same prompts."""
        return bootstrap(self.sums, _STATISTICS[measure], resamples=resamples, seed=seed)

    def interval(
        self, measure: Measure = "score", *, resamples: int = 1000, seed: int = 0
    ) -> Difference:
        """Return a measure with its 95 % interval over prompts."""
        drawn = self.replicates(measure, resamples=resamples, seed=seed)
        return Difference.of(getattr(self, measure), drawn)

    def over(self, other: "Response", *, resamples: int = 1000, seed: int = 0) -> Difference:
        """Return this score minus another arm's, paired by prompt, with its 95 % interval."""
        return paired_difference(self.sums, other.sums, _score, resamples=resamples, seed=seed)


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
    ) -> None:
        """Write unsteered continuations, `samples` per prompt for the band of fluency.

        `fluency_model` should be another model; without one the steered model itself, unsteered,
        judges losses. Raises ConfigError for fewer than 8 prompts.
        """
        self._model, self.prompts, self._judge = model, tuple(prompts), judge
        self._reader = fluency_model or model
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
                largest=largest, sign=sign, tolerance=_TOLERANCE,
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
        return Response(
            name, target, matched, sum(known) / len(known) if known else None, self._judge.name,
            self._sums(written), tuple(text for _, text in written),
            tuple(asked for asked, _ in written),
        )  # fmt: skip

    def prompted(self, instruction: str) -> Response:
        """Return the response to an instruction before each prompt, without an edit."""
        found = continuations(
            self._model, instructed(self.prompts, instruction),
            max_new_tokens=self._max_new_tokens, temperature=self._temperature,
            seed=self._seed + 2,
        )  # fmt: skip
        # losses are read after the bare prompts, like everyone's
        found = Continuations(self.prompts, found.texts)
        return self._response("prompt", None, (), [(tuple(range(len(self.prompts))), found)])

    def _sums(
        self, written: Sequence[tuple[tuple[int, ...], Continuations]]
    ) -> Float[Tensor, "prompts 5"]:
        """Return the mean over directions of what each prompt counts; NaN without a direction."""
        total = torch.zeros(len(self.prompts), 5, dtype=torch.float64)
        n_written = torch.zeros(len(self.prompts), 1, dtype=torch.float64)
        for asked, one in written:
            own = list(asked)
            scores, usual = self._judge(one.texts).double(), self.unsteered[own]
            known = ~(scores.isnan() | usual.isnan())
            fine = fluent(self._reader, one, self.band).double()
            pair = (torch.where(known, values, 0) for values in (scores, usual))
            total[own] += torch.stack([*pair, known.double(), fine, torch.ones_like(fine)], 1)
            n_written[own] += 1
        return total / n_written.clamp(min=1) if written else total + torch.nan
