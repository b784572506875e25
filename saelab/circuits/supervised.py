"""What a dictionary sees of a task, beside what labels see: the principled evaluations.

At a cross-section (`vectors.py`), for every dictionary and for the supervised one of
`attributes.py`, whose codes are labels:

*Approximation.* Sufficiency: the metric with x̂ in place of x, over the clean metric. Necessity:
the metric that is lost with x̄ + (x − x̂) in place of x, over what is lost with x̄.

*Sparse control.* An edit by k latents should do what the true counterfactual does: share of
prompts on which the model's next token is that of the patch x_s → x_t. `none` is the share
without an edit; the score (agree − none) / (supervised − none) is left out where its denominator
is small. The supervised edit takes one feature out and puts one in.

*Interpretability.* The best F1 of latents about attributes, the same while a longer attribute is
shrunk (`occlusion.py`), and sufficiency and necessity of the latents with an F1 above a bar alone.

Makelov, Lange, Nanda 2025, arXiv 2405.08366.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, final

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor

from saelab.circuits.attributes import (
    Coding,
    Features,
    Supervised,
    attributes_of,
    counterfactual,
    fit_features,
)
from saelab.circuits.bases import Directions, in_forward_order
from saelab.circuits.occlusion import lengths, occlusion
from saelab.circuits.predicates import (
    best_claims,
    best_unions,
    claims,
    f1,
    latent_of,
    predicates,
    splitting,
)
from saelab.circuits.sparse_edits import SparseEdit, greedy_edit, magnitude
from saelab.circuits.tasks import TaskData
from saelab.circuits.vectors import Outcome, choose_slots, outcome, vectors
from saelab.config import Config
from saelab.errors import ConfigError
from saelab.protocols import LanguageModel
from saelab.stats import ResultRow, over_documents, standard_error

VERSION = 1
SUPERVISED, NONE = "supervised", "none"
"""Arms: the labels' own dictionary, and no edit at all."""
_EDIT = 2
"""Features that a supervised edit touches: one out, one in."""


class SupervisedConfig(Config):
    """How dictionaries are held against labels."""

    features: Features = "least_squares"
    """How labels become features."""
    budgets: list[PositiveInt] = [1, 2, 4, 8, 16, 32]
    """Latents that an edit of a dictionary may change, per slot."""
    moved: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the metric that the chosen slots have to carry."""
    slots: list[str] = []
    """Slots to choose among; by default all."""
    least_gap: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Agreement that the supervised edit has to add before scores are shares of it."""
    bar: Annotated[float, Field(gt=0, le=1)] = 0.6
    """F1 from which on a latent is kept among the interpretable ones."""
    shrink: list[Annotated[float, Field(ge=0, le=1)]] = [1.0, 0.75, 0.5, 0.25, 0.0]
    """Factors on an attribute's features, under which shorter ones are looked for again."""
    batch: PositiveInt = 16
    """Prompts that go through the model together."""


@final
@dataclass(frozen=True)
class ByDictionary:
    """A dictionary's own codes."""

    dictionary: Directions
    signed: bool

    @torch.no_grad()
    def code(self, x: Float[Tensor, "n d"], table: Bool[Tensor, "n columns"], slot: int) -> Coding:
        """Return the codes; labels are not looked at."""
        del table, slot
        d = self.dictionary
        return Coding(d.encode(x), d.W_dec.detach(), d.b_dec.detach())


@final
@dataclass(frozen=True)
class ByLabels:
    """The codes that labels give, with features per slot."""

    slots: tuple[Supervised, ...]
    signed: bool = False

    def code(self, x: Float[Tensor, "n d"], table: Bool[Tensor, "n columns"], slot: int) -> Coding:
        """Return the codes; x is not looked at."""
        del x
        return self.slots[slot].code(table)


Coder = ByDictionary | ByLabels
"""A way to write the vectors of one slot as sums."""


@dataclass(frozen=True)
class Labelled:
    """Prompts, the vectors of their slots, and their labels."""

    data: TaskData
    x: Float[Tensor, "n slots d"]
    table: Bool[Tensor, "n columns"]


@dataclass(frozen=True)
class Changed:
    """Counterfactual prompts, and the answers when their vectors are patched in."""

    prompts: Labelled
    answer: Tensor


Agreements = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""By attribute and budget: whether each prompt agrees, and the size of its edit."""


class SupervisedEvaluation:
    """Holds dictionaries of one site against a task's labels.

    `fit` prompts give the features, the means and the choice of latents; on `test` prompts edits
    and reconstructions are run. Raises ConfigError for a task without attributes.
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
            model, test, site, share=self.config.moved, slots=self.config.slots,
            batch=self.config.batch,
        )  # fmt: skip
        self.fit, self.test = self._labelled(fit), self._labelled(test)
        self.labels = ByLabels(
            tuple(
                fit_features(self.fit.x[:, i], self.fit.table, self.config.features)
                for i in range(len(self.section.slots))
            )
        )
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
        yield self._row("moved", self.section.moved, None, SUPERVISED)
        arms: dict[str, Coder] = {SUPERVISED: self.labels}
        for name, dictionary in dictionaries.items():
            arms[name] = ByDictionary(dictionary, _is_signed(dictionary, self.fit.x))
        yield from self._baseline()
        supervised = self._agreements(self.labels, [_EDIT])
        for name, coder in arms.items():
            yield from self._approximation(name, coder)
            own = supervised if coder is self.labels else None
            budgets = [_EDIT] if own else self.config.budgets
            found = own or self._agreements(coder, budgets)
            yield from self._control(name, found, supervised)
            yield from self._interpretability(name, coder)

    # ------------------------------------------------------------------------------- the model

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

    def _approximation(
        self, name: str, coder: Coder, kept: Sequence[Bool[Tensor, " m"]] | None = None
    ) -> Iterator[ResultRow]:
        """Yield sufficiency and necessity, of all latents or of some in each slot."""
        codings = self._codings(coder, self.test)
        if kept is not None:
            codings = [
                Coding(c.z * mask.to(c.z), c.W, c.b) for c, mask in zip(codings, kept, strict=True)
            ]
        x, x_hat = self.test.x, torch.stack([c.x_hat for c in codings], 1).to(self.test.x)
        what = "" if kept is None else f"[F1 ≥ {self.config.bar:g}]"
        there = self._outcome(x_hat).metric
        gone = self._outcome(self.mean + (x - x_hat)).metric
        clean, ablated = self.clean.metric, self.ablated.metric
        yield self._ratio(f"sufficiency{what}", there, clean, name)
        yield self._ratio(f"necessity{what}", clean - gone, clean - ablated, name)

    # ------------------------------------------------------------------------------ sparse control

    def _baseline(self) -> Iterator[ResultRow]:
        for attribute, changed in self.edits.items():
            agree = (self.clean.answer == changed.answer).double()
            yield self._mean(f"agreement[{attribute}]", agree, NONE)

    def _agreements(self, coder: Coder, budgets: Sequence[int]) -> Agreements:
        """Return, by attribute and budget, which prompts agree and how large the edits were."""
        own, found = self._codings(coder, self.test), {}
        for attribute, changed in self.edits.items():
            other = self._codings(coder, changed.prompts)
            goal = changed.prompts.x - self.test.x
            slots = [
                greedy_edit(own[i], other[i], goal[:, i].to(own[i].W), max(budgets))
                for i in range(len(own))
            ]
            for k in budgets:
                edits = [steps[k - 1] for steps in slots]
                agree = self._agree(edits, changed)
                size = torch.stack([magnitude(c, e) for c, e in zip(own, edits, strict=True)])
                found[attribute, k] = (agree, size.mean(0).double().cpu())
        return found

    def _agree(self, edits: Sequence[SparseEdit], changed: Changed) -> Float[Tensor, " n"]:
        change = torch.stack([edit.change for edit in edits], 1).to(self.test.x)
        return (self._outcome(self.test.x + change).answer == changed.answer).double()

    def _control(self, name: str, found: Agreements, supervised: Agreements) -> Iterator[ResultRow]:
        for (attribute, k), (agree, size) in found.items():
            what = f"[{attribute}, k={k}]"
            yield self._mean(f"agreement{what}", agree, name)
            yield self._mean(f"magnitude{what}", size, name)
            none = (self.clean.answer == self.edits[attribute].answer).double()
            best = supervised[attribute, _EDIT][0]
            if float((best - none).mean()) >= max(self.config.least_gap, 1e-12):
                yield self._ratio(f"edit_score{what}", agree - none, best - none, name)

    # --------------------------------------------------------------------------- interpretability

    def _interpretability(self, name: str, coder: Coder) -> Iterator[ResultRow]:
        """Yield the best F1s, chosen on one half of the fit prompts and scored on the other."""
        first, second = (self.fit.table[half::2] for half in (0, 1))
        kept = []
        for i, slot in enumerate(self.section.slots):
            z = coder.code(self.fit.x[:, i], self.fit.table, i).z.cpu()
            said = claims(z, signed=coder.signed)
            fires = (said[::2], said[1::2])
            yield from self._f1(name, slot, fires, (first, second))
            if isinstance(coder, ByDictionary):
                yield from self._occlusion(name, coder, i)
            kept.append(self._interpretable(fires[0], first, z.shape[1]))
        yield self._row(
            f"latents[F1 ≥ {self.config.bar:g}]",
            sum(float(mask.sum()) for mask in kept) / len(kept), None, name, "latents",
        )  # fmt: skip
        yield from self._approximation(name, coder, kept)

    def _f1(
        self,
        name: str,
        slot: str,
        fires: tuple[Bool[Tensor, "n m"], Bool[Tensor, "n2 m"]],
        tables: tuple[Bool[Tensor, "n columns"], Bool[Tensor, "n2 columns"]],
    ) -> Iterator[ResultRow]:
        best = best_claims(fires[0], tables[0], fires[1], tables[1])
        for attribute in self.attributes.values:
            own = self.attributes.of(attribute)
            yield self._row(f"f1[{attribute}]@{slot}", float(best.score[own].mean()), None, name)
            split = splitting(fires[1], tables[1][:, own], best.score[own])
            for what, value, unit in (
                ("found", split.found, "share"),
                ("parts", split.parts, "claims per value"),
                ("parts_recall", split.recall, "share"),
            ):
                yield self._row(f"{what}[{attribute}]@{slot}", value, None, name, unit)
        if name == SUPERVISED:
            features = self.labels.slots[self.section.slots.index(slot)]
            for attribute, size in lengths(features, self.attributes).items():
                yield self._row(f"norm[{attribute}]@{slot}", size, None, name, "norm")

    def _occlusion(self, name: str, coder: ByDictionary, slot: int) -> Iterator[ResultRow]:
        """Yield the F1 of each attribute while the features of a longer one are shrunk."""
        labelled, where = self.fit, self.section.slots[slot]
        for found in occlusion(
            lambda x: coder.code(x, labelled.table, slot).z,
            labelled.x[:, slot], labelled.table, self.labels.slots[slot], self.attributes,
            self.config.shrink, signed=coder.signed,
        ):  # fmt: skip
            what = f"f1[{found.shorter}]@{where} | α({found.longer})={found.factor:g}"
            yield self._row(what, found.f1, None, name)

    def _interpretable(
        self, fires: Bool[Tensor, "n m"], table: Bool[Tensor, "n columns"], d_sae: int
    ) -> Bool[Tensor, " d_sae"]:
        """Return the latents whose best F1 about a value, a value in an order, or a union of an
        attribute's values reaches the bar."""
        within = next((a for a, v in self.attributes.values.items() if len(v) == 2), None)
        _, truth = predicates(self.attributes.columns, table, within=within)
        best = f1(fires, truth).max(1).values
        for attribute in self.attributes.values:
            best = torch.maximum(best, best_unions(fires, table[:, self.attributes.of(attribute)]))
        mask = torch.zeros(d_sae, dtype=torch.bool)
        mask[latent_of((best >= self.config.bar).nonzero()[:, 0], d_sae)] = True
        return mask

    # ----------------------------------------------------------------------------------------- rows

    def _row(
        self, name: str, value: float, error: float | None, arm: str, unit: str = "share"
    ) -> ResultRow:
        return ResultRow(
            name, value, unit, len(self.test.data), error, VERSION, arm, evaluator="supervised"
        )

    def _mean(self, name: str, values: Float[Tensor, " n"], arm: str) -> ResultRow:
        return self._ratio(name, values, torch.ones_like(values), arm)

    def _ratio(
        self, name: str, top: Float[Tensor, " n"], bottom: Float[Tensor, " n"], arm: str
    ) -> ResultRow:
        """Return Σ top / Σ bottom over prompts, with its bootstrap error."""
        sums = torch.stack([top, bottom], 1).double()
        value = float(top.sum() / bottom.sum())
        drawn = over_documents(sums, lambda s: s[:, 0] / s[:, 1], seed=self.seed)
        return self._row(name, value, standard_error(drawn), arm)


@torch.no_grad()
def _is_signed(dictionary: Directions, x: Float[Tensor, "n slots d"]) -> bool:
    """Return whether any code of these vectors is negative."""
    return bool((dictionary.encode(x.flatten(0, 1)) < 0).any())
