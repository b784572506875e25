"""What the parts of saelab know of each other.

Consumers (train, evals, features, app) are written against the structural protocols here;
producers of dictionaries inherit exactly one of the three abstract capabilities at the end.
Nothing in this module computes anything.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.types import Batch, Document, SiteInfo, SparseLatents, TokenRun, Window

Split = Literal["train", "heldout", "all"]
"""Which documents to read: the training ones, the held-out ones, or both."""

Edit = Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch pos d"]]
"""A pure function from a site's activations to the ones that replace them."""


@runtime_checkable
class Dictionary(Protocol):
    """Directions, and a way to write an activation as a sparse sum of them."""

    d_in: int
    d_out: int
    d_sae: int

    @property
    def config(self) -> Any:
        """The frozen configuration; `plain()` gives JSON-ready data."""
        ...

    @property
    def l0_bound(self) -> int | None:
        """Largest number of non-zero latents per row, where the method guarantees one."""
        ...

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        """Row i is the decoder direction of latent i, always."""
        ...

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        """What `decode` adds."""
        ...

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes."""
        ...

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseLatents:
        """Return the same codes in ragged form."""
        ...

    def decode(
        self, z: Float[Tensor, "*batch d_sae"] | SparseLatents
    ) -> Float[Tensor, "*batch d_out"]:
        """Return `z @ W_dec + b_dec`."""
        ...

    def offset(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return what is added to `z @ W_dec`: `b_dec` unless the type says otherwise."""
        ...

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return `decode(encode(x)) + offset(x) - b_dec`: what metrics and splices call."""
        ...

    def save(self, path: Path) -> None:
        """Write `config.json` and `weights.safetensors` into the folder `path`; no pickle, ever."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """A way to turn a batch into codes for one dictionary; the default is the dictionary's own."""

    name: str
    """Recorded in each result row, for example `own` or `pursuit(k=32)`."""

    def __call__(self, batch: Batch) -> SparseLatents:
        """Return the codes of the batch's rows."""
        ...


@runtime_checkable
class Store(Protocol):
    """Activations of one or several aligned sites, with where each row came from.

    Rows are numbered 0 … n_rows − 1 over all positions, masked ones included; windows and
    documents are runs of consecutive rows. Readers choose a site, and leave out what that site's
    mask leaves out.
    """

    @property
    def path(self) -> Path | None:
        """The store's folder; None for one that lives in memory."""
        ...

    content_hash: str
    """Hash of the stored bytes: the lineage of everything derived from it."""
    model_name: str | None
    """Name of the model that the rows came from; None for a store from bare arrays."""
    model_fingerprint: str | None
    sites: tuple[str, ...]
    grad_sites: tuple[str, ...]
    """The sites whose batches have a `grad`: the gradient of the model's loss at `x`."""
    grad_labels: Literal["data", "sampled"] | None
    """Labels of that loss: the text's next tokens, or the model's own; None: none, or unknown."""
    n_rows: int
    n_windows: int

    def width(self, site: str) -> int:
        """Return the size of the site's vectors. Raises SiteError, naming the nearest, if
        unknown."""
        ...

    def n_kept(self, site: str, split: Split) -> int:
        """Return how many rows of the split the site's mask keeps."""
        ...

    def stats(self, site: str) -> "SiteStats":
        """Return the float64 statistics of the site's kept training rows."""
        ...

    def batches(
        self,
        site: str,
        *,
        batch: int,
        seed: int,
        split: Split = "train",
        start: int = 0,
        target: str | None = None,
        drop_last: bool = True,
    ) -> Iterator[Batch]:
        """Yield shuffled batches of kept rows, epoch after epoch, without end.

        Rows are shuffled across documents in bounded memory; the order depends only on the store,
        `batch` and `seed`. `start` skips that many batches cheaply, so that a resumed run sees the
        same rows. Raises CorpusError if fewer than `batch` rows are kept.
        """
        ...

    def scan(
        self,
        site: str,
        *,
        batch: int,
        split: Split = "all",
        masked: bool = False,
        target: str | None = None,
    ) -> Iterator[Batch]:
        """Yield every row of the split once, in order; masked rows too if asked. The last may be
        short."""
        ...

    def rows(self, site: str, refs: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the activations with these row numbers, float32, in that order."""
        ...

    def windows(
        self, site: str, *, split: Split = "all", limit: int | None = None
    ) -> Iterator[Window]:
        """Yield windows in order; the site chooses whose mask fills `kept`."""
        ...

    def window_of(self, refs: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the window number of each row number."""
        ...

    def window(self, site: str, number: int) -> Window:
        """Return one window by number."""
        ...

    def context(self, ref: int, before: int, after: int) -> tuple[list[str], int]:
        """Return the token strings around a row, inside its window, and the row's place among
        them."""
        ...


@dataclass(frozen=True)
class SiteStats:
    """Float64 statistics of a site's kept training rows."""

    n: int
    mean: Float[Tensor, " d"]
    mean_norm: float
    """Mean of ‖x‖."""
    mean_square_norm: float
    """Mean of ‖x‖²."""
    median_norm: float
    """Median of ‖x‖ in the recorded pre-pass that fixes the norm-outlier threshold."""

    @property
    def total_variance(self) -> float:
        """Mean of ‖x − mean‖²."""
        return self.mean_square_norm - float((self.mean.double() ** 2).sum())


@dataclass(frozen=True)
class Truth:
    """What was planted in a store: x = a · directions + bias, with known codes a."""

    directions: Float[Tensor, "n_features d"]
    """Row i is the unit-norm direction of feature i."""
    bias: Float[Tensor, " d"]
    parents: Int[Tensor, " n_features"]
    """Feature without which feature i is never on; −1: none."""


@runtime_checkable
class PlantedStore(Store, Protocol):
    """A store that may know the directions and codes behind its rows."""

    def truth(self) -> Truth | None:
        """Return what was planted; None for a store whose rows came from elsewhere."""
        ...

    def codes(self, refs: Int[Tensor, " n"]) -> SparseLatents:
        """Return the planted codes of these row numbers, in that order. Raises ArtifactError if
        nothing was planted."""
        ...


@runtime_checkable
class LabelledStore(Store, Protocol):
    """A store that knows its documents: their texts, and labels where the corpus has some."""

    n_documents: int

    def document(self, number: int) -> Document:
        """Return one document with its text and label."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model whose activations can be read, replaced and differentiated.

    Every call installs and removes its own hooks under a per-model lock, so two users of one model
    never see each other's edits. Tokens are right-padded; `lengths` gives the true lengths
    (default: all full). Logits are float32.
    """

    name: str
    fingerprint: str
    """Hash of the weights, of the resolved dtype and of the tokenizer."""
    d_model: int
    n_layers: int
    d_vocab: int
    context: int
    """Longest window that the model takes."""
    device: torch.device
    dtype: torch.dtype
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    special_ids: frozenset[int]
    adds_bos: bool
    """Whether its tokenizer puts BOS before a text by itself."""

    def sites(self) -> Sequence[SiteInfo]:
        """Return the sites that can be captured, in forward order."""
        ...

    def site(self, name: str) -> SiteInfo:
        """Return one site. Raises SiteError that lists the nearest names."""
        ...

    def tokenize(self, texts: Sequence[str]) -> list[TokenRun]:
        """Return ids and character spans of each text, without special tokens."""
        ...

    def to_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token id as text, for tables of vocabulary items."""
        ...

    def capture(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[str],
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> dict[str, Float[Tensor, "batch pos d"]]:
        """Return the sites' activations in the model's dtype, stopping after the last of them."""
        ...

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        edits: Mapping[str, Edit] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return float32 logits, with each site's activations passed through its edit."""
        ...

    def splice(
        self,
        tokens: Int[Tensor, "batch pos"],
        site: str,
        x_hat: Float[Tensor, "batch pos d"],
        keep: Bool[Tensor, "batch pos"],
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return logits with the site replaced by `x_hat` where `keep`, and untouched elsewhere."""
        ...

    def grad_at(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[str],
        objective: Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, ""]],
        edits: Mapping[str, Edit] | None = None,
    ) -> dict[str, tuple[Float[Tensor, "batch pos d"], Float[Tensor, "batch pos d"]]]:
        """Return (activation, gradient of the objective) at each site."""
        ...

    def vjp(
        self,
        tokens: Int[Tensor, "batch pos"],
        source: str,
        target: str,
        cotangent: Float[Tensor, "batch pos d_target"],
    ) -> Float[Tensor, "batch pos d_source"]:
        """Return the vector-Jacobian product from a later site back to an earlier one."""
        ...

    def generate(
        self,
        tokens: Int[Tensor, "batch pos"],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        edits: Mapping[str, Edit] | None = None,
    ) -> Int[Tensor, "batch total"]:
        """Continue each prompt with a key-value cache; edits act in every forward pass."""
        ...

    def logit_effect(
        self, site: str, directions: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n d_vocab"]:
        """Return each direction's direct effect on the logits; see the model for the norm's
        treatment."""
        ...

    def to_residual(
        self, site: str, directions: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n d_model"]:
        """Carry directions of a site into the residual stream (through W_out, or W_O per head)."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """Scores one dictionary on one store, with a live model where the metric needs one."""

    name: str
    version: int
    """Bumped when the numbers change; part of the stage key and of each row."""

    def __call__(
        self, dictionary: Dictionary, store: Store, model: LanguageModel | None
    ) -> Iterable[Any]:
        """Yield `stats.ResultRow`s."""
        ...


@dataclass(frozen=True)
class Loss:
    """What a gradient-trained type's loss returns."""

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    """Detached parts by name, for the log."""
    fired: Int[Tensor, " nnz"]
    """Ids of the latents that fired (repeats allowed)."""
    l0: Float[Tensor, ""]
    """Mean number of non-zero latents per row."""
    observed: dict[str, Tensor] = field(default_factory=dict)
    """What `observe_` needs after the step, such as thresholds."""


class GradientTrained(ABC):
    """A type that is learnt by gradient steps on batches. Losses live here; loops live in
    `train`."""

    @abstractmethod
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        """Initialise the weights from a sample of (scaled) activations."""

    @abstractmethod
    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the loss of a batch; pure. `progress` is the share of the run done, in [0, 1)."""

    def constrain_grad_(self) -> None:
        """Change gradients before clipping and the step, to keep a constraint. Default: nothing."""

    def constrain_(self) -> None:
        """Change weights after the step, to keep a constraint. Default: nothing."""

    def observe_(self, loss: Loss) -> None:
        """Take in what the loss observed. Default: nothing."""

    def lr_factors(self) -> Mapping[str, float]:
        """Return factors on the learning rate by parameter name, where not 1. Default: none."""
        return {}

    def revive_(self, ids: Int[Tensor, " m"], rows: Float[Tensor, "m d_in"]) -> None:
        """Re-initialise latents from rows that are reconstructed badly. Default: not supported."""
        raise NotImplementedError(f"{type(self).__name__} has no resampling rule")

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Turn batch-coupled selection into per-latent thresholds, weights frozen. Default:
        nothing."""


@dataclass(frozen=True)
class Intake:
    """What a streamed type did with a batch."""

    seen: int
    """Rows it looked at: all of the batch, unless it became full."""
    failed: int
    """Rows that it coded too badly; each left its mark."""
    error: float
    """Sum of the rows' errors, each as it was at the row's turn."""


class Streamed(ABC):
    """A type that is built in one pass over batches, each seen once. Its state between two batches
    is its `state_dict`, whose tensors may grow; `load_tensors_` takes it up again."""

    @abstractmethod
    def begin_(
        self, mean: Float[Tensor, " d_in"], sample: Float[Tensor, "n d_in"], n_rows: int
    ) -> None:
        """Start afresh, knowing the rows' mean, a sample, and how many different ones will come."""

    @abstractmethod
    def partial_fit(self, batch: Batch) -> Intake:
        """Take in one batch, row after row."""

    @property
    def is_full(self) -> bool:
        """Whether further batches change nothing. Default: never."""
        return False

    def unplaced(self) -> Int[Tensor, " m"]:
        """Return the row numbers whose place it keeps and has not been told. Default: none."""
        return torch.zeros(0, dtype=torch.int64)

    def place_(self, position: Int[Tensor, " m"], token: Int[Tensor, " m"]) -> None:
        """Take in the place in its window and the token of each of `unplaced`. Default: nothing."""


class Solved(ABC):
    """A type that is found by iterations over a whole store.

    The store that it is given has one site, and rows that are float32 and scaled to mean norm √d.
    """

    @property
    @abstractmethod
    def most_iterations(self) -> int:
        """How many iterations there may be."""

    @property
    @abstractmethod
    def working_bytes(self) -> float:
        """Most memory that a state takes, and an iteration beside it."""

    @abstractmethod
    def rows_read(self, n: int) -> int:
        """Return how many of n training rows an iteration reads: all, or a minibatch."""

    @abstractmethod
    def start(self, store: Store, generator: torch.Generator) -> Any:
        """Return the initial state; `train.trainee.SolverState` says what it offers."""

    @abstractmethod
    def advance(self, store: Store, state: Any) -> Any:
        """Return the next state."""

    @abstractmethod
    def restore(self, store: Store, tensors: Mapping[str, Tensor]) -> Any:
        """Return the state that gave these tensors."""

    @abstractmethod
    def finish(self, state: Any) -> None:
        """Take the solution out of the state."""
