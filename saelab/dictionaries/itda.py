"""ITDA: a dictionary of activations, each kept because those before it did not explain it.

    x' = x − b_dec                          b_dec = the store's mean (`center`), or 0
    z, r = matching pursuit of x' with the atoms, k steps, signed
    error(x', r) > threshold:  x' / ‖x'‖ becomes an atom (row of W_dec)

One pass over the rows, in order: no gradients, no encoder. Codes are the same pursuit. Three rules
say what the error of a row is, each with thresholds of its own:

    fvu         ‖r‖² / ‖x'‖²                            in [0, 1]
    paper       ‖r‖²                                    in [0, ‖x'‖²], the unit of x squared
    reference   mean over d of (x'/‖x'‖ − x̂/‖x̂‖)²       = 2 (1 − cos(x', x̂)) / d, in [0, 2/d]

Leask, Nanda, Al Moubayed 2025, "Inference-Time Decomposition of Activations (ITDA)",
arXiv 2505.17769; `reference` is the rule of its code, github.com/pleask/itda.
"""

import logging
from typing import Literal, final

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from saelab.dictionaries.atoms import AtomsConfig, KeptRows
from saelab.errors import ConfigError
from saelab.ops.construct import RowError, Rule, construct
from saelab.ops.threshold import threshold_for
from saelab.protocols import Intake, Streamed
from saelab.types import Batch

log = logging.getLogger(__name__)

AIM = 1.1
"""Atoms that the run is to come to by default, over `d_sae`: it should be full before the end."""


class ITDAConfig(AtomsConfig):
    """A dictionary of activations."""

    type: Literal["itda"] = "itda"
    """Name in the registry."""
    d_sae: PositiveInt
    """Most atoms; with so many, construction ends."""
    rule: Literal["fvu", "paper", "reference"] = "fvu"
    """Error of a row: its share of unexplained energy, the squared error (paper), or the mean
    squared difference of the unit vectors (the paper's code). Their thresholds differ."""
    threshold: PositiveFloat | None = None
    """A row with a larger error becomes an atom; `paper` in the unit of x squared. None: found by
    `target_size`."""
    target_size: PositiveInt | None = None
    """Atoms that the whole run is to come to, by bisection on the threshold; default a tenth more
    than d_sae, so that the dictionary is full before the end."""

    @model_validator(mode="after")
    def _one_way_to_a_size(self) -> "ITDAConfig":
        if self.threshold is not None and self.target_size is not None:
            raise ValueError("give threshold or target_size, not both: one decides the other")
        if self.rule == "fvu" and self.threshold is not None and self.threshold >= 1:
            raise ValueError(
                f"threshold={self.threshold:g} can never fire: with rule=fvu it is a share of a "
                "row's energy, and must lie between 0 and 1"
            )
        return self

    @classmethod
    def example(cls) -> "ITDAConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls.parse({"d_in": 8, "d_sae": 24, "k": 3, "threshold": 0.3})


@final
class ITDA(KeptRows, Streamed):
    """The dictionary of activations; see the module's docstring for its equations."""

    config_class = ITDAConfig
    config: ITDAConfig

    def __init__(self, config: ITDAConfig) -> None:
        """Allocate room for all atoms. Raises ConfigError for a threshold that can never fire."""
        super().__init__(config)
        top = 2 / config.d_in
        if config.rule == "reference" and config.threshold and config.threshold >= top:
            raise ConfigError(
                f"threshold={config.threshold:g} can never fire: with rule=reference and d_in="
                f"{config.d_in} errors lie below 2 / d_in = {top:.3g}; rule=fvu does not depend on "
                "the width"
            )
        self.register_buffer("threshold", torch.tensor(config.threshold or 0.0))
        self.threshold: Tensor
        """A row with a larger error becomes an atom."""

    def scale_(self, factor: float) -> None:
        """Change the unit of x: the bias scales, and the paper's threshold scales twice."""
        super().scale_(factor)
        if self.config.rule == "paper":
            self.threshold.mul_(factor**2)

    # --------------------------------------------------------------------------- construction

    @torch.no_grad()
    def begin_(
        self, mean: Float[Tensor, " d_in"], sample: Float[Tensor, "n d_in"], n_rows: int
    ) -> None:
        """Drop all atoms, set b_dec, and find the threshold where none is given."""
        self._center_(mean)
        self._hold_(self.W_dec.new_zeros(0, self.d_in), {})
        if self.config.threshold is None:
            self.threshold.fill_(self._find_threshold(self._rows(sample) - self.b_dec, n_rows))

    def _find_threshold(self, x: Tensor, n_rows: int) -> float:
        target = self.config.target_size or round(AIM * self.config.d_sae)
        if n_rows <= target:
            raise ConfigError(
                f"{target} atoms are wanted of {n_rows} rows: give more rows, or a smaller "
                f"{'target_size' if self.config.target_size else 'd_sae'}"
            )
        tops = {"fvu": 1.0, "paper": float(x.square().sum(1).amax()), "reference": 2 / self.d_in}
        top = tops[self.config.rule]
        found = threshold_for(x, lambda t: self._rule(t, target), top, n_rows)
        log.info("threshold %.4g of at most %.4g, for %d atoms", found, top, target)
        return found

    def _rule(self, threshold: float, limit: int) -> Rule:
        return Rule(self.config.k, self.config.refit, _ERRORS[self.config.rule], threshold, limit)

    @torch.no_grad()
    def partial_fit(self, batch: Batch) -> Intake:
        """Go through the rows in order. Raises ConfigError if none of the first can be an atom."""
        x, before = self._rows(batch.x) - self.b_dec, self.W_dec.detach()
        rule = self._rule(float(self.threshold), self.config.d_sae)
        made = construct(x, before, rule)
        if len(made.atoms) == 0 and len(x):
            raise ConfigError(
                f"threshold={rule.threshold:.3g} let none of the first {len(x)} rows in: with "
                f"rule={self.config.rule} their errors lie below {float(made.errors.amax()):.3g}; "
                "lower it"
            )
        if len(made.taken):
            taken = made.taken.to(batch.rows.device)
            self._hold_(
                made.atoms.clone(), {"rows": batch.rows[taken], "documents": batch.documents[taken]}
            )
        return Intake(len(made.errors), len(made.taken), float(made.errors.double().sum()))


def _fvu(x: Float[Tensor, "n d"], residual: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return residual.square().sum(1) / x.square().sum(1)


def _squared(x: Float[Tensor, "n d"], residual: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    del x
    return residual.square().sum(1)


def _unit_difference(
    x: Float[Tensor, "n d"], residual: Float[Tensor, "n d"]
) -> Float[Tensor, " n"]:
    """Return 2 (1 − cos) / d; nothing reconstructed counts as cos = 0, the least there is."""
    x_hat = x - residual
    lengths = x.norm(dim=1) * x_hat.norm(dim=1)
    cos = (x * x_hat).sum(1) / lengths.where(lengths > 0, 1)
    return 2 * (1 - cos) / x.shape[1]


_ERRORS: dict[str, RowError] = {"fvu": _fvu, "paper": _squared, "reference": _unit_difference}
