"""The evaluator of signs: does one latent carry a concept and its opposite?

Any direction has two sides, to first order with opposite effects. A latent carries both signs of a
concept if, steered at equal doses, each moves the judge: the statistic is
min(|effect₊|, |effect₋|), chosen and reported like the steering score, beside what difference of
means and as many random directions of the activations' covariance reach when they are steered both
ways: each at the dose that is best for it, and at each dose, the same for all. Without steering:
what a document's signed code tells of the label, and how many latents fire with both signs on texts
that the label tells apart. Rows: docs/steering.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.edits.placement import Steerable
from saelab.evals.labelled import latents_of, pool
from saelab.evals.sample import sample_rows
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.stats import ResultRow, bootstrap, bootstrap_weights, weighted_auc
from saelab.steering import baselines
from saelab.steering.evaluator import OWN, Ground, ground_of
from saelab.steering.prepared import Load, Prepared, Readers
from saelab.steering.rows import Rows, valued
from saelab.steering.scene import Scene, SteeringConfig
from saelab.steering.signed_codes import best_signed, separated, two_sided
from saelab.steering.trial import EditAt, Response, Trial, reported_half


@dataclass(frozen=True)
class Pair:
    """One direction at one dose, steered both ways."""

    up: Response
    down: Response

    @property
    def is_reached(self) -> bool:
        """Whether both sides reached the dose."""
        return bool(self.up.written) and bool(self.down.written)

    def sums(self, *, reported: bool) -> Float[Tensor, "prompts 10"]:
        """Return what both count of each prompt of one half."""
        half = reported_half(len(self.up.sums))
        kept = half if reported else ~half
        return torch.cat([self.up.sums[kept], self.down.sums[kept]], 1)


def effects(totals: Float[Tensor, "b 10"]) -> Float[Tensor, "b 2"]:
    """Return how much each side moves the judge's mean score."""
    sides = totals.reshape(-1, 2, 5)
    return (sides[..., 0] - sides[..., 1]) / sides[..., 2]


def least(totals: Float[Tensor, "b 10"]) -> Float[Tensor, " b"]:
    """Return min(|effect₊|, |effect₋|)."""
    return effects(totals).abs().amin(1)


def opposed(totals: Float[Tensor, "b 10"]) -> Float[Tensor, " b"]:
    """Return the least effect where the two go opposite ways; 0 where they do not."""
    both = effects(totals)
    return torch.where(both.prod(1) < 0, both.abs().amin(1), 0.0)


def choose(pairs: Sequence[Pair]) -> Pair | None:
    """Return the pair with the largest least effect on every other prompt; None where no direction
    reached a dose on both sides."""
    values = [float(least(one.sums(reported=False).sum(0, keepdim=True))) for one in pairs]
    best = int(torch.tensor(values).nan_to_num(-1.0).argmax())
    return pairs[best] if values[best] == values[best] else None


def pairs_of(scene: Scene, trial: Trial, directions: Sequence[EditAt]) -> list[Pair]:
    """Steer by each direction both ways at every dose."""
    arms = {f"direction {place}": [one] for place, one in enumerate(directions)}
    up, down = (
        trial.responses(arms, scene.config.doses, largest=scene.largest, sign=sign)
        for sign in (1, -1)
    )
    return [Pair(*both) for both in zip(up, down, strict=True)]


@final
class SignsEvaluator:
    """Steers every concept both ways by a dictionary's latents and by what they have to beat."""

    name = "signs"
    version = 2

    def __init__(
        self,
        config: SteeringConfig | None = None,
        site: str | None = None,
        *,
        load: Load | None = None,
    ) -> None:
        """Steer at `site`; by default the store's only one. `load` is for configurations that name
        other models."""
        self.config = config or SteeringConfig()
        self._prepared = Prepared(self.name, self.config, site, self._ground, load)

    def __call__(
        self, dictionary: Dictionary, store: Store, model: LanguageModel | None = None
    ) -> Iterator[ResultRow]:
        """Yield each concept's rows. Raises what the steering evaluator raises."""
        for steerable, scene, place, prepared in self._prepared.concepts(dictionary, store, model):
            ground, shared = prepared
            candidates = scene.candidates(steerable, place)
            own = [edit_at for arm in scene.own_arms(candidates) for edit_at in arm]
            arms = {OWN: pairs_of(scene, ground.trial, own), **shared}
            yield from valued(ground.rows.judge())
            yield from valued(self._steered(ground.rows, arms))
            yield from self._unsteered(ground.rows, scene, store, place)

    def _ground(
        self, model: Steerable, _: Store, scene: Scene, readers: Readers, place: int
    ) -> tuple[Ground, dict[str, list[Pair]]]:
        ground = ground_of(model, scene, readers, place, evaluator=self.name, version=self.version)
        n = 2 * self.config.candidates
        directions = {
            "mean_difference": baselines.supervised(
                scene.means, scene.positive(place), "mean_difference"
            ),
            "covariance": baselines.from_covariance(scene.rows, n, seed=self.config.seed),
        }
        return ground, {
            name: pairs_of(scene, ground.trial, scene.arm(rows))
            for name, rows in directions.items()
        }

    def _steered(self, rows: Rows, arms: dict[str, list[Pair]]) -> Iterator[ResultRow]:
        found = {name: choose(pairs) for name, pairs in arms.items()}
        for name, pair in found.items():
            yield rows.row("signs_candidates", float(len(arms[name])), "responses", name)
            yield rows.row("signs_reached", float(pair is not None), "share", name)
            if pair is None:
                continue
            for side, response in (("up", pair.up), ("down", pair.down)):
                own = response.where(reported_half(len(response.sums)))
                yield rows.row(f"signs_{side}", own.lift, "judge", name)
                yield rows.row(
                    f"signs_fluency_{side}", own.fluency, "share", name, encoder=rows.reader
                )
            assert pair.up.target is not None
            yield rows.row("signs_dose", pair.up.target, "nats", name)
        yield from self._compared(rows, found)
        for dose in self.config.doses:
            at_dose = {
                name: [one for one in pairs if one.up.target == dose]
                for name, pairs in arms.items()
            }
            for name, pairs in at_dose.items():
                share = sum(one.is_reached for one in pairs) / len(pairs)
                yield rows.row(f"signs_reached[dose={dose:g}]", share, "share", name)
            best = {name: choose(pairs) for name, pairs in at_dose.items()}
            yield from self._compared(rows, best, f"[dose={dose:g}]")

    def _compared(
        self, rows: Rows, found: Mapping[str, Pair | None], suffix: str = ""
    ) -> Iterator[ResultRow]:
        """Yield the effects of each arm's pair, and how much larger the dictionary's is."""
        for name, pair in found.items():
            if pair is not None:
                sums = pair.sums(reported=True)[None]
                yield rows.summed(f"signs_least{suffix}", sums, least, "judge", name)
                yield rows.summed(f"signs_opposed{suffix}", sums, opposed, "judge", name)
        own = found[OWN]
        for name, other in found.items():
            if name != OWN and own is not None and other is not None:
                yield self._lead(rows, name, own, other, suffix)

    def _lead(self, rows: Rows, name: str, first: Pair, second: Pair, suffix: str) -> ResultRow:
        """Return how much larger the dictionary's least effect is, paired by prompt."""
        resampling = {"resamples": rows.resamples, "seed": rows.seed}
        sums = [one.sums(reported=True) for one in (first, second)]
        values = [float(least(one.sum(0, keepdim=True))) for one in sums]
        drawn = torch.sub(*(bootstrap(one, least, **resampling) for one in sums))
        return rows.row(
            f"signs_least_over({name}){suffix}", values[0] - values[1], "judge", OWN, drawn
        )

    # -------------------------------------------------------------------------- without steering

    @torch.no_grad()
    def _unsteered(self, rows: Rows, scene: Scene, store: Store, place: int) -> Iterator[ResultRow]:
        """Yield what signed codes tell of held-out documents, by the best latent in training."""
        part = scene.labelled.parts["test"]
        scorers = {"codes": latents_of(scene.dictionary)}
        found, seen = pool(store, scene.site, "heldout", part.documents, scorers, batch=1024)
        codes, positive = found["codes"], part.targets[seen, place]
        best, sign = best_signed(scene.codes.mean, scene.positive(place))
        scores = sign * codes.mean[:, best].double()

        def area(weights: Float[Tensor, "b n"]) -> Float[Tensor, "b 1"]:
            return weighted_auc(scores, positive, weights)[:, None]

        value = float(area(torch.ones(1, len(scores), dtype=torch.float64)))
        drawn = bootstrap_weights(len(scores), area, resamples=rows.resamples, seed=rows.seed)
        yield rows.row("signs_auc", value, "AUC", OWN, drawn[:, 0], n=len(scores))
        up, down = self._densities(scene, store)
        live, both = (up > 0) | (down > 0), two_sided(up, down)
        shares = {"two_sided": both, "two_sided_separated": separated(codes, positive, both)}
        for name, which in shares.items():
            share = float(which.sum()) / max(int(live.sum()), 1)
            yield rows.row(f"signs_{name}_share", share, "share", OWN, n=int(live.sum()))

    def _densities(
        self, scene: Scene, store: Store
    ) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """Return the share of held-out rows on which each latent is above, and below, zero."""
        n, seed, dictionary = self.config.rows, self.config.seed, scene.dictionary
        sample = sample_rows(store, scene.site, "heldout", n, batch=1024, seed=seed)
        z = torch.cat([dictionary.encode(b.x.to(dictionary.W_dec)).cpu() for b in sample])
        return (z > 0).double().mean(0), (z < 0).double().mean(0)
