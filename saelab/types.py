"""The few values that travel between packages: sparse latents, batches, token runs, mask
reasons."""

from dataclasses import dataclass, field
from enum import IntFlag

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class Mask(IntFlag):
    """Why a position of a site is left out of training and scores; 0 means it is kept."""

    SPECIAL = 1
    """A special token of the tokenizer (BOS, EOS, chat marks)."""
    PADDING = 2
    """Padding in the source."""
    FIRST = 4
    """The first position of a window: often an attention sink."""
    NORM_OUTLIER = 8
    """The activation's norm exceeds the store's recorded multiple of the median norm."""
    NONFINITE = 16
    """The activation holds NaN or infinity."""


def is_heldout(sha256: str, holdout: float) -> bool:
    """Whether the document with this checksum is among the share `holdout` that is held out."""
    return int(sha256[:8], 16) / 2**32 < holdout


def holds_neurons(site: str) -> bool:
    """Whether the coordinates of a model's site are an MLP's neurons: the input of its W_out."""
    return site.endswith("mlp.hook_post")


def grad_dtype(stored: str) -> str:
    """Return the dtype of the gradients that lie beside rows stored in a dtype; never float16.

    Their entries spread over seven decades, and half of a per cent of them lie below its normal
    range. Rounding to bfloat16 moves a row by 0.17 % of its norm.
    """
    return "float32" if stored == "float32" else "bfloat16"


@dataclass(frozen=True)
class SparseLatents:
    """A batch of sparse codes in ragged (CSR) form; no zeros are stored, indices are unique per
    row."""

    row_offsets: Int[Tensor, " n_plus_1"]
    """int64; row i is `values[row_offsets[i]:row_offsets[i + 1]]`."""
    indices: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    d_sae: int

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.row_offsets) - 1

    def l0(self) -> Int[Tensor, " n"]:
        """Return the number of non-zero latents per row."""
        return self.row_offsets.diff()

    def rows(self) -> Int[Tensor, " nnz"]:
        """Return the row number of each stored value."""
        return torch.repeat_interleave(
            torch.arange(self.n_rows, device=self.values.device), self.l0()
        )

    def dense(self) -> Float[Tensor, "n d_sae"]:
        """Return the same codes as a dense matrix."""
        z = self.values.new_zeros(self.n_rows, self.d_sae)
        z[self.rows(), self.indices.long()] = self.values
        return z

    @staticmethod
    def from_dense(z: Float[Tensor, "n d_sae"]) -> "SparseLatents":
        """Collect the non-zero entries of a dense code matrix, indices ascending in each row."""
        rows, indices = z.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=z.shape[0])
        return SparseLatents(_offsets(counts), indices, z[rows, indices], z.shape[1])

    @staticmethod
    def from_topk(
        indices: Int[Tensor, "n k"], values: Float[Tensor, "n k"], d_sae: int
    ) -> "SparseLatents":
        """Pack fixed-width (indices, values) rows, dropping entries whose value is zero."""
        keep = values != 0
        return SparseLatents(_offsets(keep.sum(-1)), indices[keep], values[keep], d_sae)


def _offsets(counts: Int[Tensor, " n"]) -> Int[Tensor, " n_plus_1"]:
    zero = counts.new_zeros(1, dtype=torch.int64)
    return torch.cat([zero, counts.cumsum(0, dtype=torch.int64)])


@dataclass(frozen=True)
class Batch:
    """Rows of one site (or of an input and a target site) with where they came from."""

    x: Float[Tensor, "n d_in"]
    y: Float[Tensor, "n d_out"]
    """The target: `x` itself for an autoencoder, the other site's rows for a transcoder."""
    rows: Int[Tensor, " n"]
    """Row numbers in the store (int64); the token table is indexed by them."""
    documents: Int[Tensor, " n"]
    """Document number of each row: the unit of the bootstrap."""
    grad: Float[Tensor, "n d_in"] | None = None
    """Gradient of the model's loss at `x`, where the store holds it."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.x.shape[0]


@dataclass(frozen=True)
class TokenRun:
    """A text as token ids with the character span of each token, without added special tokens."""

    ids: Int[Tensor, " n"]
    start: Int[Tensor, " n"]
    """First character of each token in the text."""
    end: Int[Tensor, " n"]
    """One past the last character."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.ids.shape[0]


@dataclass(frozen=True)
class Window:
    """A run of consecutive positions that the model saw together; by default of one document."""

    number: int
    first_row: int
    """Row number of its first position; its rows are consecutive."""
    ids: Int[Tensor, " pos"]
    document: Int[Tensor, " pos"]
    """Document number per position."""
    strings: tuple[str, ...]
    """The text of each token, cut out of its document by character span; for display."""
    heldout: bool
    """Whether its documents belong to the held-out split."""
    kept: Shaped[Tensor, " pos"]
    """bool: the positions that the asked site's mask keeps."""

    def __len__(self) -> int:
        """Return the number of positions."""
        return self.ids.shape[0]


@dataclass(frozen=True)
class SiteInfo:
    """A place in a model where activations can be read and written."""

    name: str
    """TransformerLens name, for example `blocks.10.hook_resid_post`."""
    width: int
    """Size of the activation vector; for head sites heads × d_head, flattened."""
    layer: int | None
    kind: str
    """One of resid, mlp_out, attn_out, mlp_neurons, heads, embed."""


@dataclass(frozen=True)
class Document:
    """A text of a corpus, or any unit of provenance of a store made from bare arrays."""

    number: int
    """Its number in the store, in order of first appearance."""
    hash: str
    """sha256 of the text, as hex; it decides the split where nothing else does."""
    heldout: bool
    text: str
    label: str | int | float | None = None
    group: int | None = None
    """Number of the first document it shares windows with; None: it shares none."""
    split_hash: str | None = None
    """sha256 of what is divided as a whole (`corpus.split_field`: a thread, a film), as hex; None:
    the text is by itself, or the store is older than this field."""

    @property
    def decisive_hash(self) -> str:
        """The hash that decides which part of a division it belongs to."""
        return self.split_hash or self.hash


@dataclass(frozen=True)
class TokenTable:
    """Where each row of a run of rows came from; all columns have the same length."""

    token_id: Int[Tensor, " n"]
    """int32; −1 where rows are no tokens."""
    window: Int[Tensor, " n"]
    """int64; number of the window in the store."""
    position: Int[Tensor, " n"]
    """int32; place in the window."""
    document: Int[Tensor, " n"]
    """int64; number of the document in the store."""
    char_start: Int[Tensor, " n"]
    """int32; first character of the token in its document's text."""
    char_end: Int[Tensor, " n"]
    """int32; one past the last character."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.token_id.shape[0]


@dataclass(frozen=True)
class Shard:
    """Consecutive whole windows with their activations: what a store's writer takes in at a
    time."""

    x: dict[str, Float[Tensor, "n d"]]
    """Per site the rows, masked ones included; the writer converts them to the stored dtype."""
    mask: dict[str, Shaped[Tensor, " n"]]
    """Per site uint8 bits of `Mask`."""
    tokens: TokenTable
    heldout: Shaped[Tensor, " n"]
    """bool; whether each row's document belongs to the held-out split."""
    documents: tuple[Document, ...]
    """The documents whose first row is in this shard, in order."""
    grad: dict[str, Float[Tensor, "n d_grad"]] = field(default_factory=dict[str, Tensor])
    """Per site the gradient of the loss at its rows; only sites that have one."""
    label: Int[Tensor, " n"] | None = None
    """Token whose loss each row's logits entered, −1 for none, where there are gradients of it."""
