"""What latents say of a task's attributes: best F1s, over-splitting, and which are interpretable.

Everything is read off the fit prompts; the model is not run. Makelov, Lange, Nanda 2025, arXiv
2405.08366, section 5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.circuits.attributes import Attributes
from saelab.circuits.coders import ByDictionary, ByLabels, Coder, Labelled
from saelab.circuits.label_rows import SUPERVISED, over_prompts, row
from saelab.circuits.occlusion import lengths, occlusion
from saelab.circuits.predicates import (
    best_claims,
    best_unions,
    claims,
    f1,
    latent_of,
    mean_f1,
    predicates,
    share_found,
    splitting,
    tallies,
)
from saelab.circuits.strata import half
from saelab.stats import ResultRow, Statistic


@dataclass(frozen=True)
class Interpretability:
    """Holds codes of labelled prompts against their labels, slot by slot."""

    attributes: Attributes
    prompts: Labelled
    slots: tuple[str, ...]
    labels: ByLabels
    shrink: Sequence[float]
    """Factors on an attribute's features, under which shorter ones are looked for again."""
    bar: float
    """F1 from which on a latent is interpretable."""
    seed: int
    """Draws the half of the prompts that chooses latents."""

    @cached_property
    def first(self) -> Bool[Tensor, " n"]:
        """The prompts that choose; the others score. Both have every template."""
        return half(self.prompts.data.templates, seed=self.seed)

    @cached_property
    def predicates(self) -> dict[str, Bool[Tensor, "n p"]]:
        """What is true of the prompts, by kind of predicate."""
        return predicates(self.attributes.columns, self.prompts.table)

    def claims(self, coder: Coder) -> list[Bool[Tensor, "n claims"]]:
        """Return where the claims of a coder's latents hold, in each slot."""
        x, table = self.prompts.x, self.prompts.table
        return [
            claims(coder.code(x[:, i], table, i).z.cpu(), signed=coder.signed)
            for i in range(len(self.slots))
        ]

    def rows(
        self, name: str, coder: Coder, said: Sequence[Bool[Tensor, "n claims"]]
    ) -> Iterator[ResultRow]:
        """Yield the best F1s, latents chosen on one half of the prompts and scored on the other."""
        for i, fires in enumerate(said):
            yield from self._f1(name, i, fires)
            if isinstance(coder, ByDictionary):
                yield from self._occlusion(name, coder, i)

    def interpretable(
        self, coder: Coder, said: Sequence[Bool[Tensor, "n claims"]]
    ) -> list[Bool[Tensor, " d_sae"]]:
        """Return, slot by slot, the latents whose best F1 about any predicate or any union of an
        attribute's values reaches the bar, on the half that chooses."""
        truth = torch.cat(list(self.predicates.values()), 1)[self.first]
        kept = []
        for fires in (claimed[self.first] for claimed in said):
            best = f1(fires, truth).max(1).values
            for name in self.attributes.values:
                united = best_unions(fires, self.predicates[name][self.first])
                best = torch.maximum(best, united.score)
            d_sae = fires.shape[1] // (2 if coder.signed else 1)
            mask = torch.zeros(d_sae, dtype=torch.bool)
            mask[latent_of((best >= self.bar).nonzero()[:, 0], d_sae)] = True
            kept.append(mask)
        return kept

    def guide(
        self, attribute: str, said: Bool[Tensor, "n claims"]
    ) -> Float[Tensor, "values claims"]:
        """Return the F1 of every claim about every value of an attribute, on all prompts."""
        return f1(said, self.predicates[attribute]).T

    def about(
        self, attribute: str, guide: Float[Tensor, "values claims"],
        table: Bool[Tensor, "m columns"], z: Float[Tensor, "m d_sae"], *, signed: bool,
    ) -> Float[Tensor, "m d_sae"]:  # fmt: skip
        """Return how well each latent of other prompts says what value they have: its claim's F1
        about it in the guide, −∞ where it does not fire."""
        value = table[:, self.attributes.of(attribute)].int().argmax(1)
        score = guide[value].to(z.device).masked_fill(~claims(z, signed=signed), -torch.inf)
        return score.unflatten(1, (-1, z.shape[1])).amax(1)

    def _f1(self, name: str, slot: int, fires: Bool[Tensor, "n claims"]) -> Iterator[ResultRow]:
        where, first = self.slots[slot], self.first
        for kind, truth in self.predicates.items():
            best = best_claims(fires[first], truth[first], fires[~first], truth[~first])
            scored = tallies(fires[~first][:, best.claim], truth[~first])
            yield self._over(f"f1[{kind}]@{where}", scored, mean_f1, name)
            if kind in self.attributes.values:
                yield self._over(f"found[{kind}]@{where}", scored, share_found, name)
                yield from self._of_attribute(name, kind, where, fires)
        if name == SUPERVISED:
            for attribute, size in lengths(self.labels.slots[slot], self.attributes).items():
                n = len(self.prompts.data)
                yield row(f"norm[{attribute}]@{where}", size, None, name, n=n, unit="norm")

    def _of_attribute(
        self, name: str, attribute: str, where: str, fires: Bool[Tensor, "n claims"]
    ) -> Iterator[ResultRow]:
        """Yield how an attribute's values are split, and the best claim about a union of them."""
        first, table = self.first, self.predicates[attribute]
        split, n = splitting(fires[~first], table[~first]), int((~first).sum())
        parts, recall = f"parts[{attribute}]@{where}", f"parts_recall[{attribute}]@{where}"
        yield row(parts, split.parts, None, name, n=n, unit="claims per value")
        yield row(recall, split.recall, None, name, n=n)
        if table.shape[1] > 2:
            unions = best_unions(fires[first], table[first])
            claim = int(unions.score.argmax())
            truth = table[~first][:, unions.members[claim]].any(1, keepdim=True)
            scored = tallies(fires[~first][:, [claim]], truth)
            yield self._over(f"f1[∪ {attribute}]@{where}", scored, mean_f1, name)

    def _occlusion(self, name: str, coder: ByDictionary, slot: int) -> Iterator[ResultRow]:
        """Yield the F1 of each attribute while the features of a longer one are shrunk."""
        labelled, where = self.prompts, self.slots[slot]
        for found in occlusion(
            lambda x: coder.code(x, labelled.table, slot).z,
            labelled.x[:, slot], labelled.table, self.labels.slots[slot], self.attributes,
            self.shrink, first=self.first, signed=coder.signed,
        ):  # fmt: skip
            what = f"f1[{found.shorter}]@{where} | α({found.longer})={found.factor:g}"
            yield self._over(what, found.tallies, mean_f1, name)

    def _over(
        self, name: str, sums: Float[Tensor, "n q"], statistic: Statistic, arm: str
    ) -> ResultRow:
        return over_prompts(name, sums, statistic, arm, seed=self.seed)
