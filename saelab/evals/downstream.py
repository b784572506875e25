"""Splicing reconstructions into the live model: CE and KL of every arm at the same positions.

Kept positions get the arm's reconstruction of the live activation; masked positions keep their
own activation in every arm, ablations included. Losses are averaged over positions whose own
activation was kept and whose target, the next token, is in the same document and not special.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.evals.controls import Pca
from saelab.evals.sample import units
from saelab.metrics.downstream import Downstream, cross_entropy, kl_divergence, log_probs
from saelab.protocols import LanguageModel
from saelab.types import Batch, Window

Reconstruct = Callable[[Batch], Float[Tensor, "n d"]]
"""From live activations (float32) to what replaces them."""

Gradients = Callable[[Tensor, Sequence[Window]], Tensor]
"""From windows (right-padded ids, and themselves) to gradients (batch, pos, d), on the CPU."""

Known = Mapping[str, dict[int, tuple[Tensor, Tensor]]]
"""CE and KL of arms that do not change between calls, by the first window of each batch."""


@dataclass(frozen=True)
class _Tokens:
    """Windows as a right-padded rectangle."""

    ids: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    keep: Bool[Tensor, "batch pos"]
    scored: Bool[Tensor, "batch pos"]
    """Positions whose losses count."""
    targets: Int[Tensor, "batch pos"]
    rows: Int[Tensor, "batch pos"]
    """Row numbers in the store."""
    units: Int[Tensor, "batch pos"]
    """Bootstrap unit of each position."""


@torch.no_grad()
def measure_splices(
    model: LanguageModel,
    site: str,
    windows: Sequence[Window],
    arms: Mapping[str, Reconstruct],
    *,
    batch: int,
    known: Known | None = None,
    gradients: Mapping[str, Gradients] | None = None,
) -> Downstream:
    """Return the summed losses of the clean model and of each arm, spliced in at `site`.

    Arms are called with the kept live activations of each batch of windows, in order; those that
    `gradients` names, with gradients too. Losses of the arms that `known` names are kept there, and
    taken from there by later calls on the same windows.
    """
    known, gradients = known or {}, gradients or {}
    total = Downstream(list(arms))
    unit = units(windows)
    for start in range(0, len(windows), batch):
        together = windows[start : start + batch]
        tokens = _rectangle(together, unit, model)
        clean, acts = _clean_pass(model, site, tokens)
        targets = tokens.targets[tokens.scored].to(clean.device)
        log_p = log_probs(clean[tokens.scored])
        del clean
        ce: dict[str, Tensor] = {}
        kl: dict[str, Tensor] = {}
        for name, arm in arms.items():
            if start in known.get(name, {}):
                ce[name], kl[name] = known[name][start]
                continue
            grad = gradients[name](tokens.ids, together) if name in gradients else None
            x_hat = _replaced(acts, tokens, arm, grad)
            keep = tokens.keep.to(acts.device)
            logits = model.splice(tokens.ids, site, x_hat, keep, tokens.lengths)
            log_q = log_probs(logits[tokens.scored])
            del logits
            ce[name], kl[name] = cross_entropy(log_q, targets), kl_divergence(log_p, log_q)
            if name in known:
                known[name][start] = (ce[name], kl[name])
        total.update(cross_entropy(log_p, targets), ce, kl, tokens.units[tokens.scored])
    return total


def _clean_pass(
    model: LanguageModel, site: str, tokens: _Tokens
) -> tuple[Float[Tensor, "batch pos d_vocab"], Float[Tensor, "batch pos d"]]:
    """Return the clean logits and the site's activations, from one forward pass."""
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x

    logits = model.logits(tokens.ids, {site: look}, tokens.lengths)
    return logits, seen[0]


def _replaced(
    acts: Float[Tensor, "batch pos d"],
    tokens: _Tokens,
    arm: Reconstruct,
    grad: Float[Tensor, "batch pos d"] | None,
) -> Float[Tensor, "batch pos d"]:
    """Return the activations with the kept ones reconstructed, in the model's dtype."""
    keep = tokens.keep
    x = acts[keep.to(acts.device)].float().cpu()
    known = None if grad is None else grad[keep].float()
    x_hat = arm(Batch(x, x, tokens.rows[keep], tokens.units[keep], known))
    replaced = acts.clone()
    replaced[keep.to(acts.device)] = x_hat.to(acts)
    return replaced


def _rectangle(windows: Sequence[Window], unit: Mapping[int, int], model: LanguageModel) -> _Tokens:
    shape = (len(windows), max(len(w) for w in windows))
    pad = next(i for i in (model.pad_id, model.eos_id, 0) if i is not None)
    ids = torch.full(shape, pad)
    keep = torch.zeros(shape, dtype=torch.bool)
    scored, targets = keep.clone(), torch.zeros(shape, dtype=torch.int64)
    rows, number = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    special = torch.tensor(sorted(model.special_ids), dtype=torch.int64)
    for i, window in enumerate(windows):
        n, token = len(window), window.ids.long()
        ids[i, :n] = token
        keep[i, :n] = window.kept
        rows[i, :n] = window.first_row + torch.arange(n)
        number[i, :n] = torch.tensor([unit[d] for d in window.document.tolist()])
        targets[i, : n - 1] = token[1:]
        same = window.document[1:] == window.document[:-1]
        scored[i, : n - 1] = window.kept[:-1] & same & ~torch.isin(token[1:], special)
    lengths = torch.tensor([len(w) for w in windows])
    return _Tokens(ids, lengths, keep, scored, targets, rows, number)


# ------------------------------------------------------------------------- what the arms replace by


def ablate_to(vector: Float[Tensor, " d"]) -> Reconstruct:
    """Return an arm that puts the same vector everywhere: zero, or the mean."""
    vector = vector.float()
    return lambda batch: vector.expand(len(batch), -1)


@final
class RandomError:
    """x plus a random error of the same norm, row by row, as another arm's error.

    Directions are isotropic, or drawn from the training covariance of the activations.
    """

    def __init__(
        self,
        other: Reconstruct,
        kind: Literal["isotropic", "covariance"],
        pca: Pca,
        seed: int,
    ) -> None:
        """Match the norms of `other`'s errors; draws are made in the order of the calls."""
        self._other = other
        self._generator = torch.Generator().manual_seed(seed)
        scale = pca.variances.clamp(min=0).sqrt()
        root = pca.basis * scale if kind == "covariance" else pca.basis
        self._root = root.float()

    def __call__(self, batch: Batch) -> Float[Tensor, "n d"]:
        """Return x + error."""
        size = (batch.x - self._other(batch)).norm(dim=1, keepdim=True)
        drawn = torch.randn(len(batch), len(self._root), generator=self._generator) @ self._root.T
        return batch.x + drawn * (size / drawn.norm(dim=1, keepdim=True).clamp(min=1e-30))
