"""A linear transformer-like model, and linear dictionaries with errors, to check circuits by hand.

    x0 = E[token]        x1 = x0 + mix(x0)        x2 = x1 + mlp(x1)        logits = x2 U

`mix` averages over earlier positions, `mlp` acts on each; both are matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saelab.circuits.contrast import Contrast, logit_difference, positions_from_the_end
from saelab.models.hooked import HookedModel
from saelab.models.hooks import Point
from saelab.types import SiteInfo

D, VOCAB = 6, 11
FIRST, BRANCH, LAST = (
    "blocks.0.hook_resid_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_resid_post",
)


class _Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return x + self.map(x).cumsum(1) / count


class _Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class BareModel(HookedModel):
    """A model without a tokenizer: `network` maps tokens to logits."""

    def __init__(
        self, name: str, network: nn.Module, points: Sequence[Point], width: int, vocab: int
    ) -> None:
        """Give all weights of the network values of chance, and freeze them."""
        generator = torch.Generator().manual_seed(0)
        for weight in network.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)
            weight.requires_grad_(False)
        self.name = self.fingerprint = name
        self.d_model, self.d_vocab, self.context, self.n_heads = width, vocab, 16, 1
        self.n_layers = len({point.site.layer for point in points})
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.bos_id = self.eos_id = self.pad_id = None
        self.special_ids, self.adds_bos = frozenset(), False
        self.network = network
        super().__init__(points, blocks_return_tensors=True)

    def to_strings(self, ids: Any) -> Any:
        return [f" t{i}" for i in ids]

    def _forward(self, tokens: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        return self.network(tokens), None

    def _nothing(self, *_: Any) -> Any:
        raise NotImplementedError

    tokenize = to_text = _copies = _read_out = _nothing


def linear_model() -> BareModel:
    """Return the model of the module's docstring."""
    mix, add = _Mix(), _Add()
    network = nn.Sequential(nn.Embedding(VOCAB, D), mix, add, nn.Linear(D, VOCAB, bias=False))
    points = [
        Point(SiteInfo(FIRST, D, 0, "resid"), mix, "out"),
        Point(SiteInfo(BRANCH, D, 1, "mlp_out"), add.mlp, "out"),
        Point(SiteInfo(LAST, D, 1, "resid"), add, "out"),
    ]
    return BareModel("linear", network, points, D, VOCAB)


@dataclass(frozen=True)
class LinearCodes:
    """Codes (x − b_dec) W_encᵀ with any decoder: linear, and wrong by an error."""

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return len(self.W_dec)

    def encode(self, x: Tensor) -> Tensor:
        return (x - self.b_dec) @ self.W_enc.T


def linear_codes(seed: int, d_sae: int = 4, d: int = D) -> LinearCodes:
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(d_sae, d, generator=generator) for _ in range(2)]
    return LinearCodes(*tables, torch.randn(d, generator=generator))


def random_contrast(n: int = 5, length: int = 4, vocab: int = VOCAB, seed: int = 3) -> Contrast:
    """Return random pairs; the first position and the last token are the same in both."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(vocab, (2, n, length), generator=generator).unbind(0)
    corrupted[:, 0] = clean[:, 0]
    right, wrong = torch.randint(vocab, (2, n), generator=generator).unbind(0)
    wrong = torch.where(wrong == right, (right + 1) % vocab, wrong)
    slots, names = positions_from_the_end(clean)
    return Contrast(clean, corrupted, slots, names, logit_difference(right, wrong))
