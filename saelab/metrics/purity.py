"""Label purity: whether the strongest examples of a latent share a label.

The commonest label of n examples is common among them by construction: of 20 random documents in
20 classes of one size it has three. So the label is chosen on every second example, the strongest
first, and its share is taken among the others; for random examples that is the label's base rate on
average.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Purity:
    """How many of the scored examples have the label that the others chose."""

    label: str
    hits: int
    """Scored examples with the label."""
    n: int
    """Scored examples."""
    base: float
    """Share of the label among all that could have been examples."""

    @property
    def share(self) -> float:
        """Share of the scored examples that have the label; 1: all, `base`: as if at random."""
        return self.hits / self.n

    @property
    def lift(self) -> float:
        """How many times its base rate the label's share is."""
        return self.share / self.base

    @property
    def p_value(self) -> float:
        """Probability of as many hits or more if examples were drawn at random (binomial)."""
        return self._chance(self.hits)

    def chance_of(self, lift: float) -> float:
        """Return the probability that as many random examples reach this lift or more."""
        return self._chance(math.ceil(lift * self.base * self.n - 1e-9))

    def _chance(self, hits: int) -> float:
        from scipy.stats import binom

        return float(binom.sf(hits - 1, self.n, self.base))


def label_purity(labels: Sequence[str], counts: Mapping[str, int]) -> Purity | None:
    """Return the purity of examples with these labels, strongest first; None with fewer than two.

    `counts` says how often each label occurs where examples come from. The examples must be of
    different documents. Of equally common labels the one whose first example is the strongest is
    chosen.
    """
    chosen_by, scored = labels[::2], labels[1::2]
    if not scored:
        return None
    ((label, _),) = Counter(chosen_by).most_common(1)
    return Purity(label, scored.count(label), len(scored), counts[label] / sum(counts.values()))
