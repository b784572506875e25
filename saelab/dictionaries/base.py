"""What all types share: storage, shapes, the linear decoder, the change of scale."""

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from saelab import artifacts
from saelab.config import Config
from saelab.errors import ArtifactError, ShapeError
from saelab.ops import sparse
from saelab.types import SparseLatents

SCHEMA = 1
CONFIG = "config.json"
WEIGHTS = "weights.safetensors"


class DictionaryConfig(Config):
    """What every type's configuration holds; a type adds its own fields."""

    needs_grad: ClassVar[bool] = False
    """Whether the type is trained on `Batch.grad`: the store must hold gradients of its site."""
    needs_neurons: ClassVar[bool] = False
    """Whether coordinates must be neurons: of a model's sites only the input of an MLP's W_out."""
    needs_labels: ClassVar[bool] = False
    """Whether the documents must have labels."""
    has_lr: ClassVar[bool] = True
    """Whether the type is trained with a learning rate; if not, a member may not give one."""

    type: Any
    """Name in the registry: a type narrows it to one literal."""
    d_in: PositiveInt
    """Width of the input site."""
    d_sae: PositiveInt
    """Number of latents."""

    @classmethod
    def example(cls) -> "DictionaryConfig":
        """Return a small configuration on which the contract laws are tested."""
        return cls.parse({"d_in": 8, "d_sae": 24})


class _Held:
    """Stands on the class for what instances hold.

    A module answers for them only when asked by name, and since Python 3.12 `isinstance` does not
    ask: without an attribute of the class, no dictionary would pass for a `protocols.Dictionary`.
    """

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Raise AttributeError, so that the module itself is asked."""
        raise AttributeError("held by instances only")


def held() -> Any:
    """Return what declares a parameter or buffer in a class, so that protocols see it."""
    return _Held()


class BaseDictionary(nn.Module, ABC):
    """A dictionary with a linear decoder and row-wise codes.

    A type gives `encode` and, where biases or thresholds carry the unit of x, `scale_`. Everything
    that a loaded dictionary needs is a parameter or a buffer. All methods are pure but those that
    end in `_`.
    """

    config_class: ClassVar[type[DictionaryConfig]]
    W_dec: nn.Parameter = held()
    b_dec: nn.Parameter = held()

    def __init__(self, config: DictionaryConfig, *, d_out: int | None = None) -> None:
        """Allocate the decoder: unit axes and no bias, until `init_` or a file fills it."""
        super().__init__()
        self.config = config
        self.d_in = config.d_in
        self.d_out = d_out or config.d_in
        self.d_sae = config.d_sae
        self.l0_bound: int | None = None
        self.W_dec = nn.Parameter(torch.eye(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    # --------------------------------------------------------------------------------- codes

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseLatents:
        """Return the same codes in ragged form."""
        return SparseLatents.from_dense(self.encode(x))

    def decode(
        self, z: Float[Tensor, "*batch d_sae"] | SparseLatents
    ) -> Float[Tensor, "*batch d_out"]:
        """Return `z @ W_dec + b_dec`; ragged codes cost only their non-zeros."""
        width = z.d_sae if isinstance(z, SparseLatents) else z.shape[-1]
        if width != self.d_sae:
            raise ShapeError(
                f"codes have {width} latents, but this {self.config.type} dictionary has "
                f"{self.d_sae}; decode them with the dictionary that made them"
            )
        if isinstance(z, SparseLatents):
            return sparse.decode_ragged(z, self.W_dec) + self.b_dec
        return z.to(self.W_dec) @ self.W_dec + self.b_dec

    def offset(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return what is added to `z @ W_dec`: `b_dec` for every row."""
        return self.b_dec.expand(*x.shape[:-1], self.d_out)

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return `decode(encode(x)) + offset(x) − b_dec`, by way of ragged codes."""
        rows = self._rows(x)
        x_hat = sparse.decode_ragged(self.encode_sparse(rows), self.W_dec) + self.offset(rows)
        return x_hat.reshape(*x.shape[:-1], self.d_out)

    def _rows(self, x: Tensor) -> Tensor:
        """Return x as (n, d_in) in the weights' dtype and on their device. Raises ShapeError."""
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ShapeError(
                f"activations have shape {tuple(x.shape)}, but this {self.config.type} "
                f"dictionary takes width {self.d_in}. Is this the site that it was trained on?"
            )
        return x.to(self.W_dec).reshape(-1, self.d_in)

    # --------------------------------------------------------------------------------- scale

    def folded(self, scale: float) -> "BaseDictionary":
        """Return a copy that takes x where this one takes `scale · x`, and codes it in x's unit."""
        new = copy.deepcopy(self)
        with torch.no_grad():
            new.scale_(1 / scale)
        return new

    def scale_(self, factor: float) -> None:
        """Change the unit of x: multiply biases and thresholds by `factor`; weights stay."""
        self.b_dec.mul_(factor)

    # --------------------------------------------------------------------------------- storage

    def save(self, path: Path) -> None:
        """Write `weights.safetensors`, then `config.json` with its hash, into the folder `path`."""
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        sha = artifacts.write_file(path / WEIGHTS, safetensors.torch.save(tensors))
        head = {"schema": SCHEMA, "config": self.config.plain(), "weights_sha256": sha}
        artifacts.write_json(path / CONFIG, head)

    def load_tensors_(self, tensors: dict[str, Tensor], origin: str) -> None:
        """Take over stored weights with their dtype. Raises ArtifactError if they do not fit."""
        own = {name: tuple(t.shape) for name, t in self.state_dict().items()}
        came = {name: tuple(t.shape) for name, t in tensors.items()}
        if own != came:
            odd = sorted(name for name in own | came if own.get(name) != came.get(name))
            raise ArtifactError(
                f"{origin} should hold tensors {own}, but holds {came} (different: "
                f"{', '.join(odd)}): it was altered, or made by another version of this type"
            )
        self.load_state_dict(tensors, assign=True)


def read_saved(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a saved dictionary's configuration and weights. Raises ArtifactError."""
    head = artifacts.read_json(path / CONFIG)
    if not isinstance(head, dict) or head.get("schema") != SCHEMA or "config" not in head:
        raise ArtifactError(f"{path / CONFIG} does not describe a dictionary of schema {SCHEMA}")
    weights = path / WEIGHTS
    if not weights.exists():
        raise ArtifactError(f"{weights} is missing: copy or make the dictionary again")
    if artifacts.hash_file(weights) != head.get("weights_sha256"):
        raise ArtifactError(
            f"{weights} does not have the sha256 that {CONFIG} records: it was truncated or "
            "altered; copy or make the dictionary again"
        )
    return head["config"], safetensors.torch.load_file(weights)
