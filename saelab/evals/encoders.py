"""Encoders: ways to turn activations into codes of a given dictionary."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.ops.pursuit import PursuitTrace, Refit, Sign, gram_of, pursue
from saelab.protocols import Dictionary
from saelab.types import Batch, SparseLatents


@final
class OwnEncoder:
    """The dictionary's own codes."""

    name = "own"

    def __init__(self, dictionary: Dictionary) -> None:
        """Encode with this dictionary."""
        self.dictionary = dictionary

    def __call__(self, batch: Batch) -> SparseLatents:
        """Return `encode_sparse(x)`."""
        return self.dictionary.encode_sparse(batch.x.to(self.dictionary.W_dec.device))


@final
class PursuitEncoder:
    """Greedy pursuit of the target with the dictionary's decoder directions.

    The target minus the dictionary's offset is pursued with unit-norm directions; coefficients
    are divided by the directions' norms, so that codes decode with W_dec as it is. Codes are
    signed unless `sign` is "nonneg". With refit "mp" an atom may be chosen again: L0 is at most
    k.
    """

    def __init__(
        self, dictionary: Dictionary, k: int, *, sign: Sign = "abs", refit: Refit = "mp"
    ) -> None:
        """Take up to `k` steps; the directions' Gram matrix is made once, if it fits."""
        self.dictionary = dictionary
        self.k = k
        self.sign: Sign = sign
        self.refit: Refit = refit
        plain = "pursuit" if refit == "mp" else refit
        self.name = f"{plain}(k={k})" if sign == "abs" else f"{plain}(k={k}, {sign})"
        with torch.no_grad():
            directions = dictionary.W_dec.detach().float()
            norms = directions.norm(dim=1)
            self._norms = torch.where(norms > 0, norms, 1)
            self._atoms = directions / self._norms[:, None]
            self._gram = gram_of(self._atoms) if refit == "mp" else None

    @torch.no_grad()
    def trace(self, batch: Batch) -> PursuitTrace:
        """Return the whole pursuit, in units of the unit-norm directions."""
        device = self._atoms.device
        target = batch.y.to(device, torch.float32) - self.dictionary.offset(batch.x.to(device))
        return pursue(
            target.float(),
            self._atoms,
            self.k,
            sign=self.sign,
            refit=self.refit,
            gram=self._gram,
        )

    def __call__(self, batch: Batch) -> SparseLatents:
        """Return the codes of the batch's rows."""
        z = self.trace(batch).codes
        values = z.values / self._norms[z.indices]
        return SparseLatents(z.row_offsets, z.indices, values, z.d_sae)


@torch.no_grad()
def decode(
    dictionary: Dictionary, z: SparseLatents, x: Float[Tensor, "n d_in"]
) -> Float[Tensor, "n d_out"]:
    """Return the reconstruction from given codes: `decode(z) + offset(x) − b_dec`."""
    x = x.to(dictionary.W_dec.device)
    return dictionary.decode(z) + (dictionary.offset(x) - dictionary.b_dec)
