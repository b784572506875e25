"""The gradient of the model's loss at its sites: what a dictionary may select latents by.

A window's loss is the sum, in nats, of the cross-entropies of its labelled positions,

    L = − Σ_t log p(label_t | tokens up to t),        g_t = ∂L / ∂x_t at a site.

x_t enters the loss of position t and of every later one in its window. It is a sum, not a mean, so
g depends neither on the number of labels nor on what else is in the forward pass. Two kinds of
labels:

    data      the next token of the text, where it is of the same document and no special token.
              The last position has no label, and so no gradient
    sampled   a token drawn at each position from the model's own prediction: knows nothing of the
              text that follows
"""

from collections.abc import Sequence
from typing import Literal, Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ConfigError
from saelab.ops.shuffle import generator
from saelab.protocols import LanguageModel

Labels = Literal["data", "sampled"]

REDUCTION = "sum over a window's labelled positions of the cross-entropy in nats"
NO_LABEL = -1


@runtime_checkable
class Text(Protocol):
    """What labels need of a window."""

    @property
    def ids(self) -> Int[Tensor, " pos"]:
        """Its tokens."""
        ...

    @property
    def document(self) -> Int[Tensor, " pos"]:
        """Document number per position."""
        ...

    def __len__(self) -> int:
        """Return the number of positions."""
        ...


@final
class LossGradient:
    """Activations and gradients of windows that the model sees together."""

    def __init__(
        self,
        model: LanguageModel,
        sites: Sequence[str],
        labels: Labels,
        seed: int,
    ) -> None:
        """`seed` is of the sampled labels. Raises ConfigError for a float16 model."""
        if model.dtype == torch.float16:
            raise ConfigError(
                f"{model.name} computes in float16, in which gradients underflow; take model.dtype "
                "float32 or bfloat16 to take them"
            )
        self._model, self._sites, self._labels, self._seed = model, sites, labels, seed
        self._special = torch.tensor(sorted(model.special_ids), dtype=torch.int64)

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        windows: Sequence[Text],
        numbers: Sequence[int],
    ) -> tuple[
        dict[str, Float[Tensor, "batch pos d"]],
        dict[str, Float[Tensor, "batch pos d"]],
        Int[Tensor, "batch pos"],
    ]:
        """Return each site's activations and gradients, in the model's dtype, and the labels.

        `tokens` are the windows, right-padded; `numbers` are theirs in the store.
        """
        chosen: list[Tensor] = []

        def loss(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
            if self._labels == "data":
                label = next_tokens(windows, tokens.shape[1], self._special)
            else:
                label = sampled_tokens(logits.detach(), windows, numbers, self._seed)
            chosen.append(label)
            return F.cross_entropy(
                logits.flatten(0, 1), label.flatten().to(logits.device),
                ignore_index=NO_LABEL, reduction="sum",
            )  # fmt: skip

        found = self._model.grad_at(tokens, self._sites, loss)
        x = {site: pair[0] for site, pair in found.items()}
        return x, {site: pair[1] for site, pair in found.items()}, chosen[0]


def next_tokens(
    windows: Sequence[Text], width: int, special: Int[Tensor, " n_special"]
) -> Int[Tensor, "batch pos"]:
    """Return the label of each position, −1 where the next token is none of its document's text."""
    label = torch.full((len(windows), width), NO_LABEL)
    for row, window in zip(label, windows, strict=True):
        following = window.ids[1:].long()
        same = window.document[1:] == window.document[:-1]
        counts = same & ~torch.isin(following, special)
        row[: len(following)] = torch.where(counts, following, NO_LABEL)
    return label


def sampled_tokens(
    logits: Float[Tensor, "batch pos d_vocab"],
    windows: Sequence[Text],
    numbers: Sequence[int],
    seed: int,
) -> Int[Tensor, "batch pos"]:
    """Draw a label for each position from the softmax of its logits, −1 for padding.

    A window's draws depend on its number and the seed alone, not on its place in a batch.
    """
    label = torch.full(logits.shape[:2], NO_LABEL)
    for row, predicted, window, number in zip(label, logits, windows, numbers, strict=True):
        n = len(window)
        u = torch.rand(n, generator=generator(seed, number), dtype=torch.float64)
        row[:n] = inverse_draw(predicted[:n], u)
    return label


def inverse_draw(
    logits: Float[Tensor, "pos d_vocab"], u: Float[Tensor, " pos"]
) -> Int[Tensor, " pos"]:
    """Return per row the token at whose place the cumulated softmax passes u ∈ [0, 1)."""
    wide = logits.cpu() if logits.device.type == "mps" else logits
    cumulated = wide.double().softmax(-1).cumsum(-1)
    reached = u[:, None].to(cumulated.device) * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, reached, right=True)[:, 0]
    return place.clamp(max=logits.shape[-1] - 1).cpu()
