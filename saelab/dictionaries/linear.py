"""What types share that select latents: which k of a row, or of a batch, become codes.

A type says which pre-activations of a batch become codes in training (`_select`), and how rows are
coded afterwards (`encode`). Loss: Σ‖x − x_hat‖² / (n · variance) + aux_weight · AuxK. Weights,
AuxK and constraints are those of `affine.py`.
"""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import model_validator
from torch import Tensor

from saelab.dictionaries.affine import AffineConfig, AffineDictionary
from saelab.ops import allocate, select, sparse
from saelab.protocols import Loss
from saelab.types import Batch, SparseLatents

Code = tuple[Tensor, Tensor] | SparseLatents
"""A batch's code in training: (indices, z) of equal width in all rows, or ragged."""


class LinearConfig(AffineConfig):
    """What these types' configurations share."""

    k: Any
    """Latents per row: exactly, at most, or on average, as the type says."""
    freeze_decoder: bool = False
    """Train the encoder and biases on random decoder directions that never move: a control."""

    def plain(self) -> dict[str, Any]:
        """Return JSON-ready data.

        `freeze_decoder` came later and is left out when off: older dictionaries keep their keys.
        """
        left_out = set() if self.freeze_decoder else {"freeze_decoder"}
        return {key: value for key, value in super().plain().items() if key not in left_out}

    @model_validator(mode="after")
    def _fits(self) -> "LinearConfig":
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}; choose k ≤ d_sae")
        return self

    @classmethod
    def example(cls) -> "LinearConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls.parse({"d_in": 8, "d_sae": 24, "k": 3})


class LinearDictionary(AffineDictionary):
    """A dictionary that keeps some pre-activations as they are, without a selection rule.

    Its encoder starts at half the decoder: k unit-norm directions that are chosen for their overlap
    with x overlap with each other, so a tied encoder of full size overshoots (docs/methods/topk.md
    has the comparison).
    """

    encoder_start = 0.5

    def __init__(self, config: LinearConfig) -> None:
        """Allocate the weights; a frozen decoder takes no gradient and needs no constraint."""
        super().__init__(config)
        if config.freeze_decoder:
            self.W_dec.requires_grad_(False)
            self.unit_decoder = False

    @torch.no_grad()
    def revive_(self, ids: Int[Tensor, " m"], rows: Float[Tensor, "m d_in"]) -> None:
        """Point each of these latents at one of these rows, which are reconstructed badly.

        A frozen direction stays: there the encoder row starts again along it, whatever the rows.
        """
        if not self.config.freeze_decoder:
            super().revive_(ids, rows)
            return
        self.W_enc[ids] = self.W_dec[ids] * self._revived_norm(ids)
        self.b_enc[ids] = 0

    @abstractmethod
    def _select(self, x: Tensor, progress: float) -> Code:
        """Return the batch's code in training, differentiable on the selected entries."""

    def _keep(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return (indices, z) of the k largest latents of each row; differentiable on those."""
        indices, pre = select.linear_topk(
            self._centred(x), self.W_enc, self.b_enc, k, signed=self.signed
        )
        z = self._at(x, indices, pre)
        return indices, z if self.signed else z.relu()

    def _at(self, x: Tensor, indices: Tensor, pre: Tensor) -> Tensor:
        """Return chosen pre-activations, found without gradient, as differentiable ones."""
        return sparse.encode_at(x, self.b_dec, self.W_enc, self.b_enc, indices, pre)

    # ------------------------------------------------------------------------------- training

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the FVU-scaled error plus AuxK; pure."""
        return self._loss_of(batch, self._select(batch.x, progress), dead)

    def _loss_of(self, batch: Batch, code: Code, dead: Tensor) -> Loss:
        """Return the loss of a batch that is coded so."""
        error, fvu = self._error(batch, code)
        aux = fvu.new_zeros(())
        if self.config.aux_weight > 0:
            aux = self._aux(batch.x, error, dead)
        indices, z = (code.indices, code.values) if isinstance(code, SparseLatents) else code
        fires = z.detach() != 0
        return Loss(
            total=fvu + self.config.aux_weight * aux,
            terms={"fvu": fvu.detach(), "aux": aux.detach()},
            fired=indices[fires],
            l0=fires.sum() / max(len(batch), 1),
        )

    def _error(self, batch: Batch, code: Code) -> tuple[Tensor, Tensor]:
        """Return each row's residual, and the batch's loss of reconstruction in units of FVU."""
        error = batch.y - (self._sum(code) + self.b_dec)
        return error, self._fvu(error)

    def _sum(self, code: Code) -> Tensor:
        """Return each row's z W_dec, with gradients that cost only the code's entries."""
        if isinstance(code, SparseLatents):
            return sparse.decode_ragged_at(code, self.W_dec)
        return sparse.decode_at(*code, self.W_dec)

    # ---------------------------------------------------------------------------- thresholds

    def _encode_above(self, x: Tensor, threshold: Tensor) -> Tensor:
        """Return the dense code of each row: pre where pre > threshold ≥ 0, else 0."""
        pre = F.linear(self._rows(x) - self.b_dec, self.W_enc, self.b_enc)
        z = torch.where(pre > threshold, pre, 0)
        return z.reshape(*x.shape[:-1], self.d_sae)

    @torch.no_grad()
    def _common_threshold(self, batches: Iterable[Batch]) -> Tensor:
        """Return the threshold above which the batches' mean l0 is k; 0 if no k are positive."""
        x = torch.cat([batch.x for batch in batches])
        total = int(self.config.k * len(x))
        return allocate.common_threshold(self._centred(x), self.W_enc, self.b_enc, total)
