"""What a dictionary sees of a task, beside what labels see: the principled evaluations.

At a cross-section (`vectors.py`), for every dictionary and for the supervised one of
`attributes.py`, whose codes are labels:

*Approximation.* Sufficiency: the metric with x̂ in place of x, over the clean metric. Necessity:
the metric that is lost with x̄ + (x − x̂) in place of x, over what is lost with x̄. Of some latents
alone x̂ is the sum of what they say and the bias, and what is lost is measured with that sum taken
out of x: without any latent it is nothing.

Both are left out where the metric that they are a share of is within three standard errors of 0.

*Sparse control.* An edit by k latents should do what the true counterfactual does: share of
prompts on which the model's next token is that of the patch x_s → x_t. `none` is the share
without an edit; the score (agree − none) / (supervised − none) is left out where its denominator
is small. The supervised edit is x̂_t − x̂_s: one feature out, one in.

*Interpretability.* The best F1 of latents about attributes, the same while a longer attribute is
shrunk (`occlusion.py`), and sufficiency and necessity of the latents with an F1 above a bar alone.
Sparse control once more, by what latents say: those with the highest F1 about the old value are
taken out, those about the new one put in.

Makelov, Lange, Nanda 2025, arXiv 2405.08366.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor

from saelab.circuits.ability import mean_error
from saelab.circuits.attributes import (
    Coding,
    Features,
    attributes_of,
    counterfactual,
    fit_features,
)
from saelab.circuits.bases import Directions, in_forward_order
from saelab.circuits.coders import ByDictionary, ByLabels, Coder, Labelled
from saelab.circuits.interpretability import Interpretability
from saelab.circuits.label_rows import NONE, SUPERVISED, is_clear, mean, ratio, row
from saelab.circuits.sparse_edits import SparseEdit, greedy_edit, guided_edit, magnitude, whole_edit
from saelab.circuits.strata import portion
from saelab.circuits.tasks import TaskData
from saelab.circuits.vectors import Outcome, Swap, choose_slots, in_every_layer, outcome, vectors
from saelab.config import Config
from saelab.errors import ConfigError
from saelab.protocols import LanguageModel
from saelab.stats import ResultRow

log = logging.getLogger(__name__)

_WHOLE = "k=2"
"""The labels' edit touches two features: one out, one in."""


class SupervisedConfig(Config):
    """How dictionaries are held against labels."""

    features: Features = "least_squares"
    """How labels become features."""
    budgets: list[PositiveInt] = [1, 2, 4, 8, 16, 32]
    """Latents that an edit of a dictionary may change, per slot."""
    guided: list[PositiveInt] = [1, 2, 4]
    """Latents that an edit guided by F1 takes out, per slot, and as many it puts in."""
    moved: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the metric that the chosen slots have to carry."""
    slots: list[str] = []
    """Slots to choose among; by default all."""
    pairs: PositiveInt = 128
    """Fit prompts, with their corrupted versions, on which slots are chosen."""
    least_gap: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Agreement that the supervised edit has to add before scores are shares of it."""
    bar: Annotated[float, Field(gt=0, le=1)] = 0.6
    """F1 from which on a latent is kept among the interpretable ones."""
    shrink: list[Annotated[float, Field(ge=0, le=1)]] = [1.0, 0.75, 0.5, 0.25, 0.0]
    """Factors on an attribute's features, under which shorter ones are looked for again."""
    batch: PositiveInt = 16
    """Prompts that go through the model together."""


@dataclass(frozen=True)
class Changed:
    """Counterfactual prompts, and the answers when their vectors are patched in."""

    prompts: Labelled
    answer: Tensor


Agreements = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""By attribute and kind of edit: whether each prompt agrees, and the size of its edit."""
Claims = Sequence[Bool[Tensor, "n claims"]]
"""Where the claims of a coder's latents hold among the fit prompts, in each slot."""


class SupervisedEvaluation:
    """Holds dictionaries of one site against a task's labels.

    `fit` prompts give the features, the means and the choice of slots and latents; on `test`
    prompts edits and reconstructions are run. Raises ConfigError for a task without attributes.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: str,
        fit: TaskData,
        test: TaskData,
        config: SupervisedConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Choose the slots, fit the features, and run the model without a change."""
        self.model, self.seed = model, seed
        self.config = config or SupervisedConfig()
        self.attributes = attributes_of(fit)
        known = self.attributes.known(test.attributes)
        if not bool(known.any()):
            raise ConfigError(
                "no test prompt has only values of the fit prompts; draw more of both"
            )
        test = test.rows(known.nonzero()[:, 0])
        self.section = choose_slots(
            model, self._choosing(fit), site, share=self.config.moved, slots=self.config.slots,
            batch=self.config.batch,
        )  # fmt: skip
        self.fit, self.test = self._labelled(fit), self._labelled(test)
        self.labels = ByLabels(
            tuple(
                fit_features(self.fit.x[:, i], self.fit.table, self.config.features)
                for i in range(len(self.section.slots))
            )
        )
        self.interpretability = Interpretability(
            self.attributes, self.fit, self.section.slots, self.labels, self.config.shrink,
            self.config.bar, seed,
        )  # fmt: skip
        self.clean = self._outcome()
        self.mean = self.fit.x.mean(0).expand_as(self.test.x)
        self.ablated = self._outcome(self.mean)
        self.edits = {name: self._counterfactual(name) for name in self.attributes.values}

    def rows(self, dictionaries: Mapping[str, Directions]) -> Iterator[ResultRow]:
        """Yield the scores of the supervised dictionary, and of these by name.

        Raises ArtifactError for a dictionary of another width.
        """
        for dictionary in dictionaries.values():
            in_forward_order(self.model, {self.section.site: dictionary})
        self._say_what_is_left_out()
        yield from self._moved()
        arms: dict[str, Coder] = {SUPERVISED: self.labels}
        for name, dictionary in dictionaries.items():
            arms[name] = ByDictionary.of(dictionary, self.fit.x)
        yield from self._baseline()
        supervised = self._agreements(self.labels, self.interpretability.claims(self.labels))
        for name, coder in arms.items():
            said = self.interpretability.claims(coder)
            yield from self._approximation(name, coder)
            found = supervised if coder is self.labels else self._agreements(coder, said)
            yield from self._control(name, found, supervised)
            yield from self._interpretability(name, coder, said)

    # ------------------------------------------------------------------------------- the model

    def _choosing(self, fit: TaskData) -> TaskData:
        """Return the fit prompts on which slots are chosen."""
        size = min(self.config.pairs, len(fit))
        return fit.rows(portion(fit.templates, size, seed=self.seed).nonzero()[:, 0])

    def _moved(self) -> Iterator[ResultRow]:
        """Yield what the chosen slots carry on test prompts, at the site and in other layers."""
        site, slots = self.section.site, self.section.slots
        swap = Swap(self.model, self.test.data, slots, batch=self.config.batch)
        moved = self._ratio("moved", swap.moved(site, slots), swap.gaps, SUPERVISED)
        if moved.value < self.config.moved:
            log.warning(
                "the slots moved %.0f %% of the metric on the prompts that chose them, but move "
                "%.0f %% on test prompts; take more of both",
                100 * self.section.moved, 100 * moved.value,
            )  # fmt: skip
        yield moved
        for other in in_every_layer(self.model, site):
            yield self._ratio(f"moved[{other}]", swap.moved(other, slots), swap.gaps, SUPERVISED)

    def _labelled(self, data: TaskData) -> Labelled:
        x = vectors(
            self.model, data, self.section.site, self.section.slots, batch=self.config.batch
        )
        return Labelled(data, x, self.attributes.table(data.attributes))

    def _outcome(self, x: Float[Tensor, "n slots d"] | None = None) -> Outcome:
        return outcome(
            self.model, self.test.data, self.section.site, self.section.slots, x,
            batch=self.config.batch,
        )  # fmt: skip

    def _counterfactual(self, attribute: str) -> Changed:
        """Return the test prompts with one attribute changed, and what the true patch does."""
        other = self._labelled(counterfactual(self.test.data, attribute, seed=self.seed))
        return Changed(other, self._outcome(other.x).answer)

    def _codings(self, coder: Coder, prompts: Labelled) -> list[Coding]:
        slots = range(prompts.x.shape[1])
        return [coder.code(prompts.x[:, i], prompts.table, i) for i in slots]

    # ---------------------------------------------------------------------------- approximation

    def _say_what_is_left_out(self) -> None:
        clean, ablated = self.clean.metric, self.ablated.metric
        for what, whole in (("sufficiency", clean), ("necessity", clean - ablated)):
            if not is_clear(whole):
                log.warning(
                    "%s is left out: the metric that it is a share of, %.3g ± %.2g, is within "
                    "noise; take more test prompts", what, whole.mean(), mean_error(whole),
                )  # fmt: skip

    def _approximation(self, name: str, coder: Coder) -> Iterator[ResultRow]:
        """Yield sufficiency and necessity of a whole dictionary."""
        x_hat = self._stacked([c.x_hat for c in self._codings(coder, self.test)])
        yield from self._replacing(name, "", x_hat, self.mean + (self.test.x - x_hat))

    def _subset(
        self, name: str, coder: Coder, kept: Sequence[Bool[Tensor, " m"]]
    ) -> Iterator[ResultRow]:
        """Yield what some latents of each slot do alone, and what is lost without them."""
        codings = [
            Coding(c.z * mask.to(c.z), c.W, c.b)
            for c, mask in zip(self._codings(coder, self.test), kept, strict=True)
        ]
        x_hat = self._stacked([c.x_hat for c in codings])
        said = self._stacked([c.said for c in codings])
        what = f"[F1 ≥ {self.config.bar:g}]"
        yield from self._replacing(name, what, x_hat, self.test.x - said)

    def _replacing(
        self,
        name: str,
        what: str,
        there: Float[Tensor, "n slots d"],
        gone: Float[Tensor, "n slots d"],
    ) -> Iterator[ResultRow]:
        """Yield sufficiency and necessity from the vectors with nothing else and with all else."""
        clean, ablated = self.clean.metric, self.ablated.metric
        if is_clear(clean):
            yield self._ratio(f"sufficiency{what}", self._outcome(there).metric, clean, name)
        if is_clear(clean - ablated):
            lost = clean - self._outcome(gone).metric
            yield self._ratio(f"necessity{what}", lost, clean - ablated, name)

    def _stacked(self, of_slots: Sequence[Float[Tensor, "n d"]]) -> Float[Tensor, "n slots d"]:
        return torch.stack(list(of_slots), 1).to(self.test.x)

    # ------------------------------------------------------------------------------ sparse control

    def _baseline(self) -> Iterator[ResultRow]:
        for attribute, changed in self.edits.items():
            agree = (self.clean.answer == changed.answer).double()
            yield self._mean(f"agreement[{attribute}]", agree, NONE)

    def _agreements(self, coder: Coder, said: Claims) -> Agreements:
        """Return, by attribute and edit, which prompts agree and how large the edits were."""
        own, found = self._codings(coder, self.test), {}
        for attribute, changed in self.edits.items():
            other = self._codings(coder, changed.prompts)
            kinds = self._edits(coder, own, other, changed)
            if self.config.guided:
                kinds |= self._guided(attribute, coder, said, own, other)
            for kind, edits in kinds.items():
                agree = self._agree(edits, changed)
                size = torch.stack([magnitude(c, e) for c, e in zip(own, edits, strict=True)])
                found[attribute, kind] = (agree, size.mean(0).double().cpu())
        return found

    def _edits(
        self, coder: Coder, own: Sequence[Coding], other: Sequence[Coding], changed: Changed
    ) -> dict[str, list[SparseEdit]]:
        """Return edits of every slot by their budget: greedy ones, or for labels the whole one."""
        if isinstance(coder, ByLabels):
            return {_WHOLE: [whole_edit(s, t) for s, t in zip(own, other, strict=True)]}
        goal, budgets = changed.prompts.x - self.test.x, self.config.budgets
        slots = [
            greedy_edit(s, t, goal[:, i].to(s.W), max(budgets))
            for i, (s, t) in enumerate(zip(own, other, strict=True))
        ]
        return {f"k={k}": [steps[k - 1] for steps in slots] for k in budgets}

    def _guided(
        self,
        attribute: str,
        coder: Coder,
        said: Claims,
        own: Sequence[Coding],
        other: Sequence[Coding],
    ) -> dict[str, list[SparseEdit]]:
        """Return edits of every slot by latents with a high F1 about the old and the new value."""
        guides = [self.interpretability.guide(attribute, fires) for fires in said]

        def about(
            codings: Sequence[Coding], table: Bool[Tensor, "n columns"]
        ) -> list[Float[Tensor, "n m"]]:
            return [
                self.interpretability.about(attribute, guide, table, c.z, signed=coder.signed)
                for guide, c in zip(guides, codings, strict=True)
            ]

        slots = list(
            zip(
                own, other, about(own, self.test.table),
                about(other, self.edits[attribute].prompts.table), strict=True,
            )
        )  # fmt: skip
        return {
            f"F1, k={k}": [guided_edit(s, t, old, new, k) for s, t, old, new in slots]
            for k in self.config.guided
        }

    def _agree(self, edits: Sequence[SparseEdit], changed: Changed) -> Float[Tensor, " n"]:
        change = self._stacked([edit.change for edit in edits])
        return (self._outcome(self.test.x + change).answer == changed.answer).double()

    def _control(self, name: str, found: Agreements, supervised: Agreements) -> Iterator[ResultRow]:
        for (attribute, kind), (agree, size) in found.items():
            what = f"[{attribute}, {kind}]"
            yield self._mean(f"agreement{what}", agree, name)
            yield self._mean(f"magnitude{what}", size, name)
            none = (self.clean.answer == self.edits[attribute].answer).double()
            best = supervised[attribute, _WHOLE][0]
            if float((best - none).mean()) >= max(self.config.least_gap, 1e-12):
                yield self._ratio(f"edit_score{what}", agree - none, best - none, name)

    # --------------------------------------------------------------------------- interpretability

    def _interpretability(self, name: str, coder: Coder, said: Claims) -> Iterator[ResultRow]:
        """Yield what latents say of attributes, and what those that say something do alone."""
        yield from self.interpretability.rows(name, coder, said)
        kept = self.interpretability.interpretable(coder, said)
        count = sum(float(mask.sum()) for mask in kept) / len(kept)
        n = int(self.interpretability.first.sum())
        yield row(f"latents[F1 ≥ {self.config.bar:g}]", count, None, name, n=n, unit="latents")
        yield from self._subset(name, coder, kept)

    # ----------------------------------------------------------------------------------------- rows

    def _mean(self, name: str, values: Float[Tensor, " n"], arm: str) -> ResultRow:
        return mean(name, values, arm, seed=self.seed)

    def _ratio(
        self, name: str, top: Float[Tensor, " n"], bottom: Float[Tensor, " n"], arm: str
    ) -> ResultRow:
        return ratio(name, top, bottom, arm, seed=self.seed)
