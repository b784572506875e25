"""What latents say of a task's attributes: best F1s, over-splitting, and which are interpretable.

Everything is read off the fit prompts; the model is not run. Makelov, Lange, Nanda 2025, arXiv
2405.08366, section 5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.circuits.attributes import Attributes
from saelab.circuits.coders import ByDictionary, ByLabels, Coder, Labelled
from saelab.circuits.label_rows import SUPERVISED, row
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
from saelab.circuits.strata import half
from saelab.stats import ResultRow


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
        """Return, slot by slot, the latents whose best F1 about a value, a value in an order, or a
        union of an attribute's values reaches the bar, on the half that chooses."""
        table = self.prompts.table[self.first]
        within = next((a for a, v in self.attributes.values.items() if len(v) == 2), None)
        _, truth = predicates(self.attributes.columns, table, within=within)
        kept = []
        for fires in (claimed[self.first] for claimed in said):
            best = f1(fires, truth).max(1).values
            for name in self.attributes.values:
                united = best_unions(fires, table[:, self.attributes.of(name)])
                best = torch.maximum(best, united)
            d_sae = fires.shape[1] // (2 if coder.signed else 1)
            mask = torch.zeros(d_sae, dtype=torch.bool)
            mask[latent_of((best >= self.bar).nonzero()[:, 0], d_sae)] = True
            kept.append(mask)
        return kept

    def _f1(self, name: str, slot: int, fires: Bool[Tensor, "n claims"]) -> Iterator[ResultRow]:
        n = len(self.prompts.data)
        table, where, first = self.prompts.table, self.slots[slot], self.first
        best = best_claims(fires[first], table[first], fires[~first], table[~first])
        for attribute in self.attributes.values:
            own = self.attributes.of(attribute)
            score = float(best.score[own].mean())
            yield row(f"f1[{attribute}]@{where}", score, None, name, n=n)
            split = splitting(fires[~first], table[~first][:, own], best.score[own])
            for what, value, unit in (
                ("found", split.found, "share"),
                ("parts", split.parts, "claims per value"),
                ("parts_recall", split.recall, "share"),
            ):
                yield row(f"{what}[{attribute}]@{where}", value, None, name, n=n, unit=unit)
        if name == SUPERVISED:
            for attribute, size in lengths(self.labels.slots[slot], self.attributes).items():
                yield row(f"norm[{attribute}]@{where}", size, None, name, n=n, unit="norm")

    def _occlusion(self, name: str, coder: ByDictionary, slot: int) -> Iterator[ResultRow]:
        """Yield the F1 of each attribute while the features of a longer one are shrunk."""
        labelled, where, n = self.prompts, self.slots[slot], len(self.prompts.data)
        for found in occlusion(
            lambda x: coder.code(x, labelled.table, slot).z,
            labelled.x[:, slot], labelled.table, self.labels.slots[slot], self.attributes,
            self.shrink, first=self.first, signed=coder.signed,
        ):  # fmt: skip
            what = f"f1[{found.shorter}]@{where} | α({found.longer})={found.factor:g}"
            yield row(what, found.f1, None, name, n=n)
