"""Supervised directions: what labels alone give, the yardstick for what is found without them.

Every label of the training documents has one direction, in the order of the labels as text. With
x̄ the mean of a document's kept rows, m the mean of x̄ over documents and m_c over those of label c,

    mean_difference   m_c − mean of x̄ over the other documents
    mean_features     m_c − m
    least_squares     the u that minimise Σ ‖x̄ − m − Σ_v u_v‖² over a document's labels v
    linear_probe      the weights of a logistic regression on x̄, both sides weighing the same

scaled to unit norm. Codes are projections, of either sign, and not sparse:

    z = (x − b_dec) W_decᵀ        b_dec = m        x_hat = z W_dec + b_dec

Mean and least-squares features: Makelov, Lange, Nanda (2025), Towards Principled Evaluations of
Sparse Autoencoders for Interpretability and Control, arXiv 2405.08366.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from saelab.dictionaries.base import BaseDictionary, DictionaryConfig
from saelab.errors import ConfigError
from saelab.labels import labelled_documents, seen_only
from saelab.metrics.pooling import Pooling
from saelab.ops import linalg
from saelab.probes import DIRECTIONS, Direction
from saelab.protocols import Solved, Store

_BATCH = 4096
_DOCUMENTS = 10_000


class SupervisedConfig(DictionaryConfig):
    """Directions of the labels of a corpus; `d_sae` is the number of labels."""

    has_lr: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    type: Literal["supervised"] = "supervised"
    """Name in the registry."""
    method: Direction = "mean_difference"
    """How labels become directions."""
    per_label: Annotated[int, Field(ge=2)] = 10
    """Labels with fewer training documents have no direction, and do not count in `d_sae`."""

    @classmethod
    def example(cls) -> "SupervisedConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls.parse({"d_in": 8, "d_sae": 3, "per_label": 2})


@dataclass(frozen=True)
class Lesson:
    """What the directions are fitted on, and the directions once they are."""

    x: Float[Tensor, "n d_in"]
    """Mean activation of each labelled training document."""
    targets: Bool[Tensor, "n d_sae"]
    directions: Float[Tensor, "d_sae d_in"] | None = None

    @property
    def loss(self) -> float:
        """Share of the documents' variance that their labels leave: Σ‖x̄ − m_c‖² / Σ‖x̄ − m‖²."""
        x, truth = self.x.double(), self.targets.double()
        means = (truth.T @ x) / truth.sum(0)[:, None]
        return float((x - truth @ means).square().sum() / (x - x.mean(0)).square().sum())

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.directions is not None

    def metrics(self) -> dict[str, float]:
        """Return numbers for the log: every direction fires on every row."""
        return {"l0": float(self.targets.shape[1]), "dead": 0.0}

    def tensors(self) -> dict[str, Tensor]:
        """Return what `Supervised.restore` needs."""
        found = {"x": self.x, "targets": self.targets}
        return found if self.directions is None else found | {"directions": self.directions}


@final
class Supervised(BaseDictionary, Solved):
    """A direction for each label of a store's documents."""

    config_class = SupervisedConfig
    config: SupervisedConfig

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return projections on the directions, from `b_dec`."""
        return F.linear(self._rows(x) - self.b_dec, self.W_dec).reshape(*x.shape[:-1], self.d_sae)

    @property
    def most_iterations(self) -> int:
        """One: the directions have closed forms, or are a regression solved to the end."""
        return 1

    @property
    def working_bytes(self) -> float:
        """Memory of the pooled sums of ten thousand documents."""
        return 16.0 * _DOCUMENTS * self.d_in

    def rows_read(self, n: int) -> int:
        """Return n: every training row is read, once."""
        return n

    def start(self, store: Store, generator: torch.Generator) -> Lesson:  # noqa: ARG002
        """Pool the labelled training documents of the store's only site; nothing is random.

        Raises ConfigError if there are not `d_sae` labels, or if the store has several sites, and
        CorpusError if no document of a label keeps a row.
        """
        site, *others = store.sites
        if others:
            raise ConfigError(
                f"the store has the sites {', '.join(store.sites)}: give a store of one site"
            )
        found = labelled_documents(store, "train", at_most=None, per_class=self.config.per_label)
        if len(found.classes) != self.d_sae:
            raise ConfigError(
                f"the store has {len(found.classes)} labels with {self.config.per_label} training "
                f"documents ({', '.join(found.classes)}), but d_sae is {self.d_sae}: set d_sae to "
                f"{len(found.classes)}"
            )
        part = found.parts["train"]
        pooling = Pooling(part.documents, self.d_in)
        for rows in store.scan(site, batch=_BATCH, split="train"):
            mine = torch.isin(rows.documents, part.documents)
            pooling.update(rows.x[mine], rows.documents[mine])
        kept = seen_only(part, pooling.seen, found, site)
        return Lesson(pooling.compute().mean, kept.targets)

    def advance(self, store: Store, state: Lesson) -> Lesson:  # noqa: ARG002
        """Fit the directions, in one step; a finished lesson stays as it is."""
        if state.done:
            return state
        fitted = DIRECTIONS[self.config.method](state.x, state.targets)
        return replace(state, directions=linalg.unit_rows(fitted))

    def restore(self, store: Store, tensors: Mapping[str, Tensor]) -> Lesson:  # noqa: ARG002
        """Return the lesson that gave these tensors."""
        return Lesson(tensors["x"], tensors["targets"].bool(), tensors.get("directions"))

    @torch.no_grad()
    def finish(self, state: Lesson) -> None:
        """Take over the directions and the mean."""
        assert state.directions is not None
        self.W_dec.copy_(state.directions)
        self.b_dec.copy_(state.x.double().mean(0))
