"""Matryoshka: prefixes of one BatchTopK code each reconstruct x by themselves.

    prefixes m_1 < … < m_G = d_sae      x_hat_g = b_dec + Σ_{i ≤ m_g} z_i W_dec[i]

Loss: Σ_g w_g ‖x − x_hat_g‖² / (n · variance) + aux_weight · AuxK, summed over rows, with AuxK on
the full residual. All prefixes share one code, the BatchTopK code over all latents; early latents
must serve alone, so they stay general. Coding after training: as in BatchTopK.

Bussmann, Nabeshima, Karvonen, Nanda 2025, "Learning Multi-Level Features with Matryoshka Sparse
Autoencoders", arXiv 2503.17547.
"""

from typing import Literal, final

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from saelab.dictionaries.coupled import CoupledConfig, CoupledDictionary
from saelab.dictionaries.linear import Code
from saelab.ops import allocate
from saelab.types import Batch, SparseLatents


class MatryoshkaConfig(CoupledConfig):
    """A Matryoshka dictionary."""

    type: Literal["matryoshka"] = "matryoshka"
    """Name in the registry."""
    prefixes: tuple[PositiveInt, ...] | None = None
    """Ascending numbers of latents, the last d_sae; default d_sae/16, /8, /4, /2 and d_sae."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """Weight of each prefix's error; default 1 / number of prefixes."""

    @model_validator(mode="after")
    def _prefixes_nest(self) -> "MatryoshkaConfig":
        ends = self.resolved_prefixes
        if list(ends) != sorted(set(ends)) or not ends or ends[-1] != self.d_sae:
            raise ValueError(f"prefixes={list(ends)} should ascend and end with {self.d_sae}")
        if len(self.resolved_weights) != len(ends):
            raise ValueError(
                f"weights should be {len(ends)}, one for each of prefixes={list(ends)}"
            )
        return self

    @property
    def resolved_prefixes(self) -> tuple[int, ...]:
        """The numbers of latents in each prefix."""
        if self.prefixes is not None:
            return self.prefixes
        return tuple(sorted({max(1, self.d_sae // part) for part in (16, 8, 4, 2, 1)}))

    @property
    def resolved_weights(self) -> tuple[float, ...]:
        """The weight of each prefix's error."""
        number = len(self.resolved_prefixes)
        return (1 / number,) * number if self.weights is None else self.weights


@final
class Matryoshka(CoupledDictionary):
    """The Matryoshka dictionary; see the module's docstring for its equations."""

    config_class = MatryoshkaConfig
    config: MatryoshkaConfig

    def _error(self, batch: Batch, code: Code) -> tuple[Tensor, Tensor]:
        """Return the full residual, and the weighted FVU of all prefixes."""
        assert isinstance(code, SparseLatents)
        x_hat, fvu = torch.zeros_like(batch.y), batch.y.new_zeros(())
        error, start = batch.y, 0
        for end, weight in zip(
            self.config.resolved_prefixes, self.config.resolved_weights, strict=True
        ):
            x_hat = x_hat + self._sum(allocate.between(code, start, end))
            error = batch.y - (x_hat + self.b_dec)
            fvu = fvu + weight * self._fvu(error)
            start = end
        return error, fvu
