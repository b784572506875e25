"""What dictionaries made of activations share: codes by pursuit, and where each atom came from."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import PositiveInt
from torch import Tensor, nn

from saelab.dictionaries.base import BaseDictionary, DictionaryConfig, held
from saelab.ops.pursuit import PursuitTrace, pursue, sum_repeats
from saelab.ops.refit import Refit, gradient_coefficients, least_squares
from saelab.ops.unroll import unroll
from saelab.types import SparseLatents


class AtomsConfig(DictionaryConfig):
    """A dictionary whose unit-norm atoms code by signed pursuit."""

    has_lr: ClassVar[bool] = False

    d_sae: PositiveInt
    """Number of atoms."""
    k: PositiveInt
    """Steps of pursuit, so most latents per row."""
    center: bool = True
    """Subtract the store's mean first; false, as in the paper of ITDA, leaves b_dec 0."""
    refit: Refit = "mp"
    """Matching pursuit (mp), orthogonal matching pursuit (omp), or gradient pursuit (gp)."""

    @classmethod
    def example(cls) -> "AtomsConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls.parse({"d_in": 8, "d_sae": 24, "k": 3})


class Atoms(BaseDictionary):
    """Unit-norm atoms, and codes by signed pursuit of x − b_dec."""

    config: Any

    def __init__(self, config: AtomsConfig) -> None:
        """Allocate room for all atoms."""
        super().__init__(config)
        self.l0_bound = config.k
        self._refit: Refit = config.refit

    def trace(self, x: Float[Tensor, "n d_in"], *, k: int | None = None) -> PursuitTrace:
        """Return the whole pursuit of x − b_dec: order, coefficients, residual; no gradient."""
        rows = self._rows(x).detach() - self.b_dec.detach()
        atoms, steps = self.W_dec.detach(), k or self.config.k
        return pursue(rows, atoms, steps, sign="abs", refit=self._refit)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""
        return self.encode_sparse(self._rows(x)).dense().reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseLatents:
        """Return the same codes in ragged form; differentiable with the chosen atoms held fixed."""
        trace, values = self.trace(x), None
        if torch.is_grad_enabled():
            away = self._rows(x) - self.b_dec
            if self._refit == "mp":
                chosen = trace.order, trace.coefficients, trace.residual
                values, _ = unroll(away, self.W_dec, *chosen)
            elif self._refit == "gp":
                values = gradient_coefficients(away, self.W_dec, trace.order)
            else:
                smooth, _ = least_squares(away, self.W_dec, trace.order)
                values = trace.coefficients + (smooth - smooth.detach())
        return sum_repeats(
            trace.order, trace.coefficients if values is None else values, self.d_sae
        )

    def _center_(self, mean: Float[Tensor, " d_in"]) -> None:
        """Set b_dec to the mean, or to 0."""
        if self.config.center:
            self.b_dec.copy_(mean)
        else:
            self.b_dec.zero_()


class KeptRows(Atoms):
    """Atoms that are rows of a store, each with its place there; as many as were kept so far."""

    rows: Tensor = held()
    """Row number in the store of each atom."""
    documents: Tensor = held()
    positions: Tensor = held()
    """Place of each atom in its window; −1 where the store does not say."""
    tokens: Tensor = held()
    """Token at each atom's position; −1 where there is none."""

    def __init__(self, config: AtomsConfig) -> None:
        """Allocate room for all atoms, of unknown origin."""
        super().__init__(config)
        for name in _PROVENANCE:
            self.register_buffer(name, torch.full((self.d_sae,), -1, dtype=torch.int64))

    @property
    def is_full(self) -> bool:
        """Whether there are `d_sae` atoms, the most that the configuration allows."""
        return self.d_sae == self.config.d_sae

    def _hold_(self, atoms: Float[Tensor, "n d_in"], new: dict[str, Tensor]) -> None:
        """Hold these atoms; the last have `new` provenance, and −1 where it is not known."""
        kept = len(next(iter(new.values()))) if new else 0
        for name in _PROVENANCE:
            old = getattr(self, name)
            tail = new.get(name, torch.full((kept,), -1)).to(old)
            setattr(self, name, torch.cat([old[: len(atoms) - kept], tail]))
        self.W_dec = nn.Parameter(atoms)
        self.d_sae = len(atoms)

    def unplaced(self) -> Int[Tensor, " m"]:
        """Return the row numbers of the atoms whose position is not known."""
        return self.rows[self.positions < 0]

    def place_(self, position: Int[Tensor, " m"], token: Int[Tensor, " m"]) -> None:
        """Take in the position and the token of each of `unplaced`."""
        where = self.positions < 0
        self.positions[where], self.tokens[where] = position.to(self.rows), token.to(self.rows)

    def load_tensors_(self, tensors: dict[str, Tensor], origin: str) -> None:
        """Take over stored atoms, however many. Raises ArtifactError if they do not fit."""
        n = min(len(tensors["W_dec"]) if "W_dec" in tensors else 0, self.config.d_sae)
        self._hold_(self.W_dec.new_zeros(n, self.d_in), {"rows": torch.full((n,), -1)})
        super().load_tensors_(tensors, origin)


_PROVENANCE = ("rows", "documents", "positions", "tokens")
