"""Result rows of a steered concept: each with its resamples over prompts, or over windows."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.stats import ResultRow, Statistic, crossed_bootstrap, known, standard_error
from saelab.steering.candidates import Candidate
from saelab.steering.judges import Validation
from saelab.steering.trial import Measure, Response

UNITS: dict[Measure, str] = {"score": "score", "lift": "judge", "fluency": "share"}


def valued(rows: Iterable[ResultRow]) -> Iterator[ResultRow]:
    """Yield the rows that have a value: what a judge gave no answer for is no row."""
    return (row for row in rows if math.isfinite(row.value))


@dataclass(frozen=True)
class Rows:
    """What the rows of a concept have in common."""

    label: str
    validation: Validation
    n: int
    """Prompts that are reported."""
    evaluator: str
    version: int
    resamples: int
    seed: int
    reader: str
    """Which model's loss says what is fluent, as rows of fluency name it."""

    def row(
        self,
        name: str,
        value: float,
        unit: str,
        arm: str,
        replicates: Float[Tensor, " resamples"] | None = None,
        *,
        n: int | None = None,
        encoder: str | None = None,
    ) -> ResultRow:
        """Return a row; `n` is the number of prompts and `encoder` the judge where nothing is said.

        Its error is over the resamples that have a value.
        """
        judge = self.validation.judge + ("" if self.validation.validated else ", unvalidated")
        error = None if replicates is None else standard_error(known(replicates))
        return ResultRow(
            f"{name}({self.label})", value, unit, self.n if n is None else n,
            error, self.version, arm, encoder or judge, self.evaluator, replicates,
        )  # fmt: skip

    def read_by(self, validation: Validation) -> "Rows":
        """Return the rows of the same concept by another judge."""
        return replace(self, validation=validation)

    def summed(
        self,
        name: str,
        sums: Float[Tensor, "directions n q"],
        statistic: Statistic,
        unit: str,
        arm: str,
    ) -> ResultRow:
        """Return a row of a statistic of each direction's sums per prompt or window."""
        value = float(statistic(sums.sum((0, 1))[None]))
        drawn = crossed_bootstrap(sums, statistic, resamples=self.resamples, seed=self.seed)
        return self.row(name, value, unit, arm, drawn, n=sums.shape[1])

    def judge(self, name: str = "judge") -> Iterator[ResultRow]:
        """Yield how well the judge tells texts apart that no edit has touched."""
        for side in ("heldout_auroc", "generated_auroc", "own_auroc"):
            value = getattr(self.validation, side)
            if value is not None:
                yield self.row(f"steering_{name}_{side}", value, "AUC", "judge")

    def response(self, arm: str, response: Response, suffix: str = "") -> Iterator[ResultRow]:
        """Yield score and lift, of the prompts that the judge answered for, and fluency, of all."""
        for measure, unit in UNITS.items():
            drawn = response.replicates(measure, resamples=self.resamples, seed=self.seed)
            value = getattr(response, measure)
            judged = measure != "fluency"
            yield self.row(
                f"steering_{measure}{suffix}", value, unit, arm, drawn,
                n=response.n_answered if judged else None,
                encoder=None if judged else self.reader,
            )  # fmt: skip

    def chosen(self, arm: str, response: Response, n_candidates: int) -> Iterator[ResultRow]:
        """Yield what the chosen response did, at which dose, among how many, and how much of it the
        judge gave no answer for."""
        yield from self.response(arm, response)
        yield self.row("steering_missing", response.missing, "share", arm)
        numbers = {
            "dose": (response.target, "nats"),
            "candidates": (float(n_candidates), "responses"),
        }
        for name, (value, unit) in numbers.items():
            if value is not None:
                yield self.row(f"steering_{name}", value, unit, arm)
        if response.target is not None:
            yield from self.directions(arm, [response])
            yield from self.predictions(arm, response)

    def candidate(self, arm: str, candidate: Candidate, suffix: str = "") -> Iterator[ResultRow]:
        """Yield which latent an arm steers by, and with which sign."""
        yield self.row(f"steering_latent{suffix}", float(candidate.latent), "id", arm)
        yield self.row(f"steering_sign{suffix}", float(candidate.sign), "sign", arm)

    def predictions(self, arm: str, response: Response, suffix: str = "") -> Iterator[ResultRow]:
        """Yield the KL at the last prompt position and the shift of the concept's tokens, where
        they were measured."""
        for name in ("kl_last_prompt", "target_shift"):
            value = getattr(response, name)
            if value is not None:
                yield self.row(f"steering_{name}{suffix}", value, "nats", arm)

    def directions(
        self, arm: str, responses: Sequence[Response], suffix: str = ""
    ) -> Iterator[ResultRow]:
        """Yield the share of directions that reach a dose, and of those whose dose falls somewhere
        as the strength grows, over responses at one dose."""
        n = sum(len(one.matched) for one in responses)
        shares = {
            "directions_reached": sum(one.directions_reached for one in responses) / len(responses),
            "non_monotone": sum(one.non_monotone for one in responses) / len(responses),
        }
        for name, share in shares.items():
            yield self.row(f"steering_{name}{suffix}", share, "share", arm, n=n)

    def by_dose(self, arm: str, responses: Sequence[Response]) -> Iterator[ResultRow]:
        """Yield how many directions reach each dose, and what is predicted and written at those
        that some reach, none of them chosen.

        `responses` are of one candidate, or of several where none was chosen.
        """
        by_dose: dict[float, list[Response]] = {}
        for response in responses:
            if response.target is not None:
                by_dose.setdefault(response.target, []).append(response)
        for dose, own in by_dose.items():
            suffix = f"[dose={dose:g}]"
            yield from self.directions(arm, own, suffix)
            if len(own) == 1 and own[0].written:
                yield from self.response(arm, own[0], suffix)
                yield from self.predictions(arm, own[0], suffix)

    def lead(self, other: str, arm: str, first: Response, second: Response) -> ResultRow:
        """Return how much more one arm scores than another, paired by prompt."""
        drawn = [
            one.replicates(resamples=self.resamples, seed=self.seed) for one in (first, second)
        ]
        value, both = first.score - second.score, (first.sums[:, 2] > 0) & (second.sums[:, 2] > 0)
        return self.row(
            f"steering_score_over({other})", value, "score", arm, torch.sub(*drawn),
            n=int(both.sum()),
        )  # fmt: skip
