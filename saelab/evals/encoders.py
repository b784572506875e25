"""Encoders: ways to turn activations into codes of a given dictionary."""

from collections.abc import Iterable
from typing import Literal, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ArtifactError, ConfigError
from saelab.ops.pursuit import PursuitTrace, gram_of, pursue
from saelab.ops.refit import Refit, Sign, residual_energies
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
        return pursue(
            self._target(batch),
            self._atoms,
            self.k,
            sign=self.sign,
            refit=self.refit,
            gram=self._gram,
        )

    def _target(self, batch: Batch) -> Float[Tensor, "n d_out"]:
        device = self._atoms.device
        offset = self.dictionary.offset(batch.x.to(device))
        return (batch.y.to(device, torch.float32) - offset).float()

    @torch.no_grad()
    def curve(
        self, batches: Iterable[Batch], mean: Float[Tensor, " d_out"]
    ) -> Float[Tensor, " steps"]:
        """Return the FVU after 0, 1, …, k steps, from one pursuit of each row.

        `mean` is that of the site: FVU is the error over the energy about it, both summed over
        rows, in float64. With refit "mp" the first j steps of a pursuit of k are the pursuit of j;
        "omp" and "gp" find the coefficients of each length anew, along the same order.
        """
        left = torch.zeros(self.k + 1, dtype=torch.float64)
        total = 0.0
        for batch in batches:
            trace = self.trace(batch)
            target = self._target(batch)
            energies = residual_energies(
                target, self._atoms, trace.order, trace.coefficients, self.refit, self.sign
            )
            left += energies.double().sum(0).cpu()
            total += float((batch.y.double() - mean.double()).square().sum())
        return left / total

    def __call__(self, batch: Batch) -> SparseLatents:
        """Return the codes of the batch's rows."""
        z = self.trace(batch).codes
        values = z.values / self._norms[z.indices]
        return SparseLatents(z.row_offsets, z.indices, values, z.d_sae)


@runtime_checkable
class GradientAware(Dictionary, Protocol):
    """A dictionary that can select latents with the gradient of the model's loss."""

    def encode_with_gradient(
        self, x: Float[Tensor, "n d_in"], grad: Float[Tensor, "n d_in"]
    ) -> SparseLatents:
        """Return codes whose latents are selected with the gradient at x."""
        ...


@final
class GradientEncoder:
    """Codes selected with the gradients that the batch holds, for a type that was trained so.

    The gradient knows the label it was taken for. With the text's own next token it tells of what
    the model is about to see (`labels="data"`), and codes made with it are no fair replacement of
    x; with a token that the model sampled it tells of the model only (`labels="sampled"`). The
    name says which.
    """

    def __init__(self, dictionary: Dictionary, labels: Literal["data", "sampled"]) -> None:
        """Encode with gradients for these labels. Raises ConfigError for other types."""
        if not isinstance(dictionary, GradientAware):
            raise ConfigError(
                f"a {dictionary.config.type} dictionary does not select by gradients; only types "
                "with `encode_with_gradient`, such as gradient_topk, do: use its own codes"
            )
        self.dictionary = dictionary
        self.name = f"gradient({labels})"

    def __call__(self, batch: Batch) -> SparseLatents:
        """Return the codes of the batch's rows. Raises ArtifactError if it holds no gradients."""
        if batch.grad is None:
            raise ArtifactError(
                f"the encoder {self.name} needs the loss's gradient at each row, but these rows "
                "came without: read them from a store that was harvested with gradients"
            )
        device = self.dictionary.W_dec.device
        return self.dictionary.encode_with_gradient(batch.x.to(device), batch.grad.to(device))


@torch.no_grad()
def decode(
    dictionary: Dictionary, z: SparseLatents, x: Float[Tensor, "n d_in"]
) -> Float[Tensor, "n d_out"]:
    """Return the reconstruction from given codes: `decode(z) + offset(x) − b_dec`."""
    x = x.to(dictionary.W_dec.device)
    return dictionary.decode(z) + (dictionary.offset(x) - dictionary.b_dec)
