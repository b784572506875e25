"""What replaced activations do to the model's predictions: CE, KL, CE recovered; float32, nats."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saelab.metrics.sums import Accumulator, Definition, DocumentSums

CE_VERSION = 1
KL_VERSION = 1
RECOVERED_VERSION = 1


def log_probs(logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, "n d_vocab"]:
    """Return log-softmax in float32: never the logarithm of a softmax, which underflows."""
    return logits.float().log_softmax(-1)


def cross_entropy(
    log_p: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Return −log p(target) of each position."""
    return -log_p.gather(1, targets[:, None])[:, 0]


def kl_divergence(
    log_p: Float[Tensor, "n d_vocab"], log_q: Float[Tensor, "n d_vocab"]
) -> Float[Tensor, " n"]:
    """Return KL(p ‖ q) = Σ p (log p − log q) of each position; exactly 0 for equal inputs."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def ce_recovered(ce: float, ce_clean: float, ce_ablated: float) -> float:
    """Return (CE_ablated − CE) / (CE_ablated − CE_clean): 1 loses nothing, 0 is the ablation."""
    return (ce_ablated - ce) / (ce_ablated - ce_clean)


@final
class Downstream(Accumulator):
    """CE and KL of several arms at the same positions, so that their ratios are paired.

    Columns: n, CE clean, then CE and KL of each arm.
    """

    def __init__(self, arms: Sequence[str]) -> None:
        """Compare these arms with the clean model."""
        self.arms = tuple(arms)
        self.sums = DocumentSums(2 + 2 * len(self.arms))

    def update(
        self,
        clean: Float[Tensor, " n"],
        ce: Mapping[str, Float[Tensor, " n"]],
        kl: Mapping[str, Float[Tensor, " n"]],
        documents: Int[Tensor, " n"],
    ) -> None:
        """Take in the losses of some positions: the clean CE, and CE and KL of every arm."""
        columns = [torch.ones_like(clean), clean]
        for arm in self.arms:
            columns += [ce[arm], kl[arm]]
        self.sums.add(documents, torch.stack([c.double() for c in columns], 1))

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """Clean CE; the arms have their own, see `of_arm`."""
        return (Definition("ce", CE_VERSION, "nats", lambda t: t[:, 1] / t[:, 0]),)

    def of_arm(self, arm: str, ablations: Mapping[str, str] | None = None) -> list[Definition]:
        """Return the metrics of one arm.

        `ablations` maps a name to the arm that ablates: {"zero": arm} adds `ce_recovered_zero`.
        """
        ce, kl = self._columns(arm)
        found = [
            Definition("ce", CE_VERSION, "nats", lambda t: t[:, ce] / t[:, 0]),
            Definition("delta_ce", CE_VERSION, "nats", lambda t: (t[:, ce] - t[:, 1]) / t[:, 0]),
            Definition("kl", KL_VERSION, "nats", lambda t: t[:, kl] / t[:, 0]),
        ]
        for name, ablation in (ablations or {}).items():
            found.append(self._recovered(ce, name, self._columns(ablation)[0]))
        return found

    def only(self, arms: Sequence[str]) -> "Downstream":
        """Return the sums of these arms alone, as if no others had been compared."""
        columns = [0, 1, *(column for arm in arms for column in self._columns(arm))]
        found = Downstream(arms)
        found.sums.documents = self.sums.documents
        found.sums.table = self.sums.table[:, columns]
        return found

    def kl_ratio(self, arm: str, other: str, name: str) -> Definition:
        """Return KL of `arm` over KL of `other` as a metric called `name`."""
        a, b = self._columns(arm)[1], self._columns(other)[1]
        return Definition(name, KL_VERSION, "ratio", lambda t: t[:, a] / t[:, b])

    def _recovered(self, ce: int, name: str, ablated: int) -> Definition:
        return Definition(
            f"ce_recovered_{name}",
            RECOVERED_VERSION,
            "share",
            lambda t: (t[:, ablated] - t[:, ce]) / (t[:, ablated] - t[:, 1]),
        )

    def _columns(self, arm: str) -> tuple[int, int]:
        place = 2 + 2 * self.arms.index(arm)
        return place, place + 1
