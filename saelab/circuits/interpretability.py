"""What latents say of a task's attributes: best F1s, over-splitting, and which are interpretable.

Everything is read off the fit prompts; the model is not run. Makelov, Lange, Nanda 2025, arXiv
2405.08366, section 5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    n: int

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
        """Yield the best F1s, chosen on one half of the prompts and scored on the other."""
        for i, fires in enumerate(said):
            yield from self._f1(name, i, fires)
            if isinstance(coder, ByDictionary):
                yield from self._occlusion(name, coder, i)

    def interpretable(
        self, coder: Coder, said: Sequence[Bool[Tensor, "n claims"]]
    ) -> list[Bool[Tensor, " d_sae"]]:
        """Return, slot by slot, the latents whose best F1 about a value, a value in an order, or a
        union of an attribute's values reaches the bar, on the half that chooses."""
        table = self.prompts.table[::2]
        within = next((a for a, v in self.attributes.values.items() if len(v) == 2), None)
        _, truth = predicates(self.attributes.columns, table, within=within)
        kept = []
        for fires in said:
            best = f1(fires[::2], truth).max(1).values
            for name in self.attributes.values:
                united = best_unions(fires[::2], table[:, self.attributes.of(name)])
                best = torch.maximum(best, united)
            d_sae = fires.shape[1] // (2 if coder.signed else 1)
            mask = torch.zeros(d_sae, dtype=torch.bool)
            mask[latent_of((best >= self.bar).nonzero()[:, 0], d_sae)] = True
            kept.append(mask)
        return kept

    def _f1(self, name: str, slot: int, fires: Bool[Tensor, "n claims"]) -> Iterator[ResultRow]:
        table, where = self.prompts.table, self.slots[slot]
        best = best_claims(fires[::2], table[::2], fires[1::2], table[1::2])
        for attribute in self.attributes.values:
            own = self.attributes.of(attribute)
            score = float(best.score[own].mean())
            yield row(f"f1[{attribute}]@{where}", score, None, name, n=self.n)
            split = splitting(fires[1::2], table[1::2][:, own], best.score[own])
            for what, value, unit in (
                ("found", split.found, "share"),
                ("parts", split.parts, "claims per value"),
                ("parts_recall", split.recall, "share"),
            ):
                yield row(f"{what}[{attribute}]@{where}", value, None, name, n=self.n, unit=unit)
        if name == SUPERVISED:
            for attribute, size in lengths(self.labels.slots[slot], self.attributes).items():
                yield row(f"norm[{attribute}]@{where}", size, None, name, n=self.n, unit="norm")

    def _occlusion(self, name: str, coder: ByDictionary, slot: int) -> Iterator[ResultRow]:
        """Yield the F1 of each attribute while the features of a longer one are shrunk."""
        labelled, where = self.prompts, self.slots[slot]
        for found in occlusion(
            lambda x: coder.code(x, labelled.table, slot).z,
            labelled.x[:, slot], labelled.table, self.labels.slots[slot], self.attributes,
            self.shrink, signed=coder.signed,
        ):  # fmt: skip
            what = f"f1[{found.shorter}]@{where} | α({found.longer})={found.factor:g}"
            yield row(what, found.f1, None, name, n=self.n)
