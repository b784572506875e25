"""From windows of tokens to shards of activations, by the model's forward passes.

A shard is forwarded in batches of windows of about equal length, so that what a batch holds
depends on the shard alone, and its rows are put back in document order. Masks say, per site and
reason, what readers should leave out; no position is dropped.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from pydantic import Field
from torch import Tensor

from saelab.config import Config
from saelab.errors import ConfigError
from saelab.harvest.corpus import TextWindow
from saelab.harvest.gradient import Asked, pass_tokens
from saelab.ops.loss_gradient import LossGradient
from saelab.protocols import LanguageModel
from saelab.types import Document, Mask, Shard, TokenTable

PREPASS_ROWS = 4096
"""The median norm is that of at most this many unmasked positions at the start of the corpus."""
_CALL_TOKENS = 256
"""What a forward pass costs beside its tokens, in tokens: measured on a 135M model on two cores."""


class HarvestConfig(Config):
    """Which activations to keep, in what form, and what to mask."""

    sites: tuple[str, ...] = Field(min_length=1)
    """For example `blocks.10.hook_resid_post`; `saelab sites MODEL` lists them."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Of the stored rows; `auto`: bfloat16 if the model computes in it, else float16."""
    batch_tokens: int = Field(4096, gt=0)
    """Tokens per forward pass."""
    rows_per_shard: int = Field(32_768, gt=0)
    """Rows per file: the unit of writing and of resuming."""
    mask_first: bool = True
    """Mask the first position of each window, which is often an attention sink."""
    mask_special: bool = True
    """Mask the tokenizer's special tokens."""
    norm_outlier: float | None = Field(10.0, gt=1)
    """Mask rows whose norm exceeds this multiple of the site's median norm; None: never."""
    gradient: Asked = "none"
    """Keep the gradient of the loss at every row too: of the text's next tokens (`data`), or of
    tokens that the model itself predicts (`sampled`). Takes four to five times as long."""
    gradient_seed: int = Field(0, ge=0)
    """Of the sampled labels."""

    def key_fields(self) -> dict[str, Any]:
        """Return the fields that change a store's content."""
        fields = self.plain()
        if self.gradient == "none":
            del fields["gradient"]
        if self.gradient != "sampled":
            del fields["gradient_seed"]
        return fields

    @property
    def grad_sites(self) -> tuple[str, ...]:
        """The sites whose rows get a gradient: all or none."""
        return () if self.gradient == "none" else self.sites


@dataclass(frozen=True)
class Group:
    """The consecutive windows that become one shard."""

    windows: tuple[TextWindow, ...]
    first_row: int
    first_window: int

    @property
    def n_rows(self) -> int:
        """Number of positions."""
        return sum(map(len, self.windows))

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents that begin in these windows."""
        return tuple(document for window in self.windows for document in window.begins)


_Sites = dict[str, Float[Tensor, "n d"]]


def groups(windows: Iterable[TextWindow], rows_per_shard: int) -> Iterator[Group]:
    """Cut a stream of windows into groups of at most `rows_per_shard` rows.

    Raises ConfigError if a window is longer than that.
    """
    waiting: list[TextWindow] = []
    rows = first_row = first_window = 0
    for window in windows:
        if len(window) > rows_per_shard:
            raise ConfigError(
                f"harvest.rows_per_shard is {rows_per_shard}, but a window has {len(window)} "
                "positions; a shard has to hold whole windows"
            )
        if rows + len(window) > rows_per_shard:
            yield Group(tuple(waiting), first_row, first_window)
            first_row, first_window = first_row + rows, first_window + len(waiting)
            waiting, rows = [], 0
        waiting.append(window)
        rows += len(window)
    if waiting:
        yield Group(tuple(waiting), first_row, first_window)


class Harvester:
    """Forwards groups of windows; the norm-outlier threshold is fixed by the first one."""

    def __init__(self, model: LanguageModel, config: HarvestConfig) -> None:
        """Check the sites. Raises SiteError, listing the nearest, if the model lacks one."""
        if len(set(config.sites)) != len(config.sites):
            raise ConfigError(f"harvest.sites names a site twice: {', '.join(config.sites)}")
        self.widths = {name: model.site(name).width for name in config.sites}
        self.median_norm: dict[str, float] = {}
        """Per site, once the first group was forwarded (or set from a recorded pre-pass)."""
        self._model = model
        self._config = config
        self._special = torch.tensor(sorted(model.special_ids), dtype=torch.int64)
        self._pass_tokens = config.batch_tokens
        self._gradient: LossGradient | None = None
        if config.gradient != "none":
            self._pass_tokens = pass_tokens(config.batch_tokens, model.d_vocab)
            self._gradient = LossGradient(
                model, config.sites, config.gradient, config.gradient_seed
            )

    def shard(self, group: Group) -> Shard:
        """Return a group's activations, in the model's dtype, with masks and provenance."""
        table = _table(group)
        x, grad, label = self._forward(group)
        base = self._token_mask(table)
        if not self.median_norm:
            self.median_norm = {site: _median_norm(rows, base) for site, rows in x.items()}
        mask = {site: self._site_mask(site, rows, base) for site, rows in x.items()}
        heldout = torch.tensor([window.heldout for window in group.windows])
        lengths = torch.tensor([len(window) for window in group.windows])
        heldout = heldout.repeat_interleave(lengths)
        return Shard(x, mask, table, heldout, group.documents, grad, label)

    def _forward(self, group: Group) -> tuple[_Sites, _Sites, Tensor | None]:
        """Return the rows and, where they are wanted, gradients of each site, and the labels."""
        lengths = [len(window) for window in group.windows]
        x = {site: _Rows(lengths) for site in self._config.sites}
        grad = {site: _Rows(lengths) for site in self._config.grad_sites}
        label, gradient = _Rows(lengths), self._gradient
        for members in batches_of(lengths, self._pass_tokens):
            windows = [group.windows[i] for i in members]
            tokens, sizes = self._padded(windows)
            if gradient is None:
                found = self._model.capture(tokens, self._config.sites, sizes)
            else:
                numbers = [group.first_window + i for i in members]
                found, gradients, batch_label = gradient(tokens, windows, numbers)
                label.put(members, batch_label)
                for site, rows in gradients.items():
                    grad[site].put(members, rows)
            for site, rows in found.items():
                x[site].put(members, rows)
        labels = None if gradient is None else label.all
        return {s: r.all for s, r in x.items()}, {s: r.all for s, r in grad.items()}, labels

    def _padded(self, windows: list[TextWindow]) -> tuple[Tensor, Tensor]:
        """Right-pad windows to one tensor on the model's device; return the true lengths too."""
        sizes = torch.tensor([len(window) for window in windows])
        tokens = torch.full((len(windows), int(sizes.max())), self._model.pad_id or 0)
        for place, window in enumerate(windows):
            tokens[place, : len(window)] = window.ids
        device = self._model.device
        return tokens.to(device), sizes.to(device)

    def _token_mask(self, table: TokenTable) -> Shaped[Tensor, " n"]:
        mask = torch.zeros(len(table), dtype=torch.uint8)
        if self._config.mask_special and len(self._special):
            mask[torch.isin(table.token_id.long(), self._special)] |= int(Mask.SPECIAL)
        if self._config.mask_first:
            mask[table.position == 0] |= int(Mask.FIRST)
        return mask

    def _site_mask(
        self, site: str, x: Float[Tensor, "n d"], base: Shaped[Tensor, " n"]
    ) -> Shaped[Tensor, " n"]:
        """Add the norm outliers; what is not finite is left to the writer to judge."""
        mask = base.clone()
        factor, median = self._config.norm_outlier, self.median_norm[site]
        if factor is not None and median > 0:
            norm = _norm(x)
            mask[norm.isfinite() & (norm > factor * median)] |= int(Mask.NORM_OUTLIER)
        return mask


class _Rows:
    """The rows of a shard, taken in batches of windows and put in document order."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._first = [0, *accumulate(lengths)]
        self.all = torch.empty(0)

    def put(self, members: Sequence[int], rows: Shaped[Tensor, "batch pos *row"]) -> None:
        """Take in the right-padded rows of some windows; the first ones fix width and dtype."""
        found = rows.detach().to("cpu")
        if not len(self.all):
            self.all = torch.empty(self._first[-1], *found.shape[2:], dtype=found.dtype)
        for place, member in enumerate(members):
            n, first = self._lengths[member], self._first[member]
            self.all[first : first + n] = found[place, :n]


def batches_of(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Group window numbers into batches of similar length, the longest first.

    A batch has at most `batch_tokens` tokens with padding, or is a single window. Of all ways to
    cut the sorted windows, the cheapest is taken, by dynamic programming over the last batch's
    start.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    size = np.array([lengths[i] for i in order])
    most = max(1, batch_tokens // int(size[-1]))
    cost = np.zeros(len(size) + 1)
    begin = np.zeros(len(size) + 1, dtype=np.int64)
    for end in range(1, len(size) + 1):
        start = np.arange(max(0, end - most), end)
        padded = (end - start) * size[start]
        total = cost[start] + padded + _CALL_TOKENS
        total[(padded > batch_tokens) & (start < end - 1)] = np.inf
        best = int(total.argmin())
        cost[end], begin[end] = total[best], start[best]
    cuts = [len(size)]
    while cuts[-1]:
        cuts.append(int(begin[cuts[-1]]))
    return [order[a:b] for a, b in pairwise(reversed(cuts))]


def _table(group: Group) -> TokenTable:
    lengths = torch.tensor([len(window) for window in group.windows])
    number = torch.arange(group.first_window, group.first_window + len(group.windows))
    return TokenTable(
        token_id=torch.cat([window.ids for window in group.windows]).int(),
        window=number.repeat_interleave(lengths),
        position=torch.cat([torch.arange(n) for n in lengths.tolist()]).int(),
        document=torch.cat([window.document for window in group.windows]),
        char_start=torch.cat([window.char_start for window in group.windows]).int(),
        char_end=torch.cat([window.char_end for window in group.windows]).int(),
    )


def _norm(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return torch.cat([part.float().norm(dim=1) for part in x.split(4096)])


def _median_norm(x: Float[Tensor, "n d"], base: Shaped[Tensor, " n"]) -> float:
    """Median of ‖x‖ over the first unmasked rows; 0 if there is none."""
    rows = (base == 0).nonzero().squeeze(1)[:PREPASS_ROWS]
    norm = _norm(x[rows])
    norm = norm[norm.isfinite()]
    return float(norm.median()) if len(norm) else 0.0


def cursor(harvester: Harvester, group: Group) -> dict[str, Any]:
    """Return what a later process needs to go on after this group."""
    documents = group.documents
    last = {"number": documents[-1].number, "hash": documents[-1].hash} if documents else None
    return {"median_norm": harvester.median_norm, "last_document": last}
