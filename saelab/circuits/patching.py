"""Exact effects of heads, branches and streams: put into one run what another run holds there.

*Noising* replaces a part of the clean run, *denoising* puts the clean part into the corrupted run.
The value put in is the other run's (*resample*), the mean of corrupted prompts of the same template
at the same position (*mean*), or zero. Vig et al. 2020, Meng et al. 2022, Wang et al. 2022; in the
terms of Zhang and Nanda 2024, arXiv 2309.16042.

Three things that cannot change are not computed again: the layers below the part, the positions
before the first that is changed (their keys and values are remembered), and the logits of all
positions but the last. All parts of a layer are patched in one batch. The results are those of full
passes, but for rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.circuits.effects import Component, Effects, Kind, heads_of, layers_of, require_gap
from saelab.circuits.protocols import PatchableModel
from saelab.circuits.tasks import TaskData
from saelab.config import Config
from saelab.errors import ConfigError, SiteError
from saelab.protocols import Edit

VERSION = 1
"""Bumped when the effects of the same prompts change."""
Direction = Literal["noising", "denoising"]
_SITES: dict[Kind, str] = {
    "heads": "attn.hook_z",
    "mlp": "hook_mlp_out",
    "attn": "hook_attn_out",
    "resid": "hook_resid_pre",
}
_ROWS = 16
"""Pairs taken at once."""
_TOKENS = 2048
"""Positions run at once."""


class PatchConfig(Config):
    """What is patched where, and by what."""

    kind: Kind = "heads"
    """Which parts: every head, or each layer's MLP output, attention output or entering stream."""
    ablation: Literal["resample", "mean", "zero"] = "resample"
    """What is put in: the other run's value, the mean of corrupted prompts at that slot, zero."""
    direction: Direction = "noising"
    """Into which run: the clean one, or the corrupted one."""
    position: str = "all"
    """`all` positions together, or the name of a slot, such as `end`."""


def site_of(kind: Kind, layer: int) -> str:
    """Return the site at which parts of a kind lie."""
    return f"blocks.{layer}.{_SITES[kind]}"


def components_of(model: PatchableModel, kind: Kind) -> tuple[Component, ...]:
    """Return the parts of a kind. Raises SiteError if the model has none of them."""
    known = {site.name for site in model.sites()}
    layers = [layer for layer in range(model.n_layers) if site_of(kind, layer) in known]
    if not layers:
        raise SiteError(
            f"{model.name} has no site for {kind} ({_SITES[kind]} in any block); "
            "`saelab sites MODEL` lists those that it has"
        )
    if kind == "heads":
        return tuple(c for c in heads_of(model.n_layers, model.n_heads) if c.layer in layers)
    return layers_of(layers)


def patch(
    model: PatchableModel,
    data: TaskData,
    config: PatchConfig,
    *,
    report: Callable[[int], None] | None = None,
) -> Effects:
    """Return the effect of every part; `report` is told how many pairs are done.

    Raises ConfigError for an unknown slot or for denoising with anything but the other run's value,
    SiteError if the model has no such parts, TaskError if the metric's gap is within noise.
    """
    if config.direction == "denoising" and config.ablation != "resample":
        raise ConfigError(
            f"denoising restores clean values, but ablation is {config.ablation}; "
            "take resample, or noising"
        )
    patcher = _Patcher(model, data, config)
    parts = []
    for index in _batches(data.lengths):
        parts.append((index, *patcher.run(index)))
        if report is not None:
            report(sum(len(i) for i, *_ in parts))
    order = torch.cat([index for index, *_ in parts]).argsort()
    changes, gaps = (torch.cat(column)[order] for column in list(zip(*parts, strict=True))[1:])
    require_gap(gaps, data.name)
    return Effects(patcher.components, changes, gaps)


def _batches(lengths: Int[Tensor, " n"]) -> Iterator[Int[Tensor, " m"]]:
    """Yield rows of equal length together."""
    for length in lengths.unique():
        yield from (lengths == length).nonzero()[:, 0].split(_ROWS)


@dataclass(frozen=True)
class _Scene:
    """A batch of pairs of one length: what is patched into what."""

    data: TaskData
    base: Int[Tensor, "n pos"]
    other: Int[Tensor, "n pos"]
    first: int
    """The first position that can change."""
    changed: Bool[Tensor, "n suffix"]
    """Which of the positions from there on are patched."""


class _Patcher:
    """Patches batches of pairs; see `patch`."""

    def __init__(self, model: PatchableModel, data: TaskData, config: PatchConfig) -> None:
        self.model, self.data, self.config = model, data, config
        self.components = components_of(model, config.kind)
        self._means = dict[int, dict[str, Tensor]]()

    def run(
        self, index: Int[Tensor, " m"]
    ) -> tuple[Float[Tensor, "m components"], Float[Tensor, " m"]]:
        """Return the changes towards corrupted and the gaps of some pairs of one length."""
        scene = self._scene(index)
        m_base, m_other = (self._plain(scene, tokens) for tokens in (scene.base, scene.other))
        layers = list(dict.fromkeys(c.layer for c in self.components))
        streams = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
        held = self.model.capture(scene.base, streams)
        values = self._values(scene, [site_of(self.config.kind, layer) for layer in layers])
        past = self.model.remember(scene.base[:, : scene.first]) if scene.first else None
        found = []
        for layer, stream in zip(layers, streams, strict=True):
            entering = held[stream][:, scene.first :]
            for parts in self._split(layer, entering[..., 0].numel()):
                found.append(self._patched(scene, layer, parts, entering, values, past))
        changes = m_base[:, None] - torch.cat(found, 1)
        if self.config.direction == "denoising":
            return -changes, m_other - m_base
        return changes, m_base - m_other

    def _scene(self, index: Int[Tensor, " m"]) -> _Scene:
        data = self.data.rows(index)
        length = int(data.lengths[0])
        pair = data.clean[:, :length], data.corrupted[:, :length]
        base, other = pair if self.config.direction == "noising" else pair[::-1]
        changed = data.marked(self.config.position)[:, :length]
        touched = changed
        if self.config.ablation == "resample":
            touched = changed & ((base != other).cumsum(1) > 0)
        first = length - 1
        if bool(touched.any()):
            first = int(touched.any(0).nonzero()[0])
        return _Scene(data, base, other, first, changed[:, first:])

    def _plain(self, scene: _Scene, tokens: Int[Tensor, "n pos"]) -> Float[Tensor, " n"]:
        """Return the metric of whole runs."""
        stream = self.model.capture(tokens, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
        return scene.data.measure(self.model.resume(stream, 0)).cpu()

    def _values(self, scene: _Scene, sites: Sequence[str]) -> dict[str, Tensor]:
        """Return what is put in at each site, from the first position that can change on."""
        if self.config.ablation == "zero":
            return {}
        if self.config.ablation == "resample":
            held = self.model.capture(scene.other, sites)
            return {site: x[:, scene.first :] for site, x in held.items()}
        rows = [self._mean(int(template), sites) for template in scene.data.templates]
        return {site: torch.stack([row[site][scene.first :] for row in rows]) for site in sites}

    def _mean(self, template: int, sites: Sequence[str]) -> dict[str, Float[Tensor, "pos d"]]:
        """Return the mean of a template's corrupted prompts at each position, computed once."""
        if template not in self._means:
            mine = self.data.rows((self.data.templates == template).nonzero()[:, 0])
            tokens = mine.corrupted[:, : int(mine.lengths[0])]
            sums: dict[str, Any] = dict.fromkeys(sites, 0.0)
            for part in tokens.split(_ROWS):
                for site, x in self.model.capture(part, sites).items():
                    sums[site] = sums[site] + x.float().sum(0)
            self._means[template] = {site: x / len(mine) for site, x in sums.items()}
        return self._means[template]

    def _split(self, layer: int, positions: int) -> Iterator[Sequence[Component]]:
        """Yield a layer's parts, as many together as a pass may have positions."""
        mine = [c for c in self.components if c.layer == layer]
        step = max(1, _TOKENS // positions)
        for start in range(0, len(mine), step):
            yield mine[start : start + step]

    def _patched(
        self,
        scene: _Scene,
        layer: int,
        parts: Sequence[Component],
        entering: Float[Tensor, "n suffix d"],
        values: dict[str, Tensor],
        past: Any,
    ) -> Float[Tensor, "n parts"]:
        """Return the metric of each pair with each part patched."""
        site = site_of(self.config.kind, layer)
        width = self.model.site(site).width
        columns = torch.stack([self._columns(part, width) for part in parts])
        mask = rearrange(scene.changed, "n s -> n 1 s 1") & rearrange(columns, "c w -> c 1 w")
        edit = _replacing(mask.to(self.model.device), values.get(site))
        stream = repeat(entering, "n s d -> (n c) s d", c=len(parts))
        logits = self.model.resume(stream, layer, {site: edit}, past)
        repeated = scene.data.rows(torch.arange(len(scene.data)).repeat_interleave(len(parts)))
        return rearrange(repeated.measure(logits).cpu(), "(n c) -> n c", c=len(parts))

    def _columns(self, part: Component, width: int) -> Bool[Tensor, " width"]:
        if part.head is None:
            return torch.ones(width, dtype=torch.bool)
        return torch.arange(width) // (width // self.model.n_heads) == part.head


def _replacing(mask: Bool[Tensor, "n c s w"], value: Float[Tensor, "n s w"] | None) -> Edit:
    """Return an edit that puts a value, or zero, where the mask is true."""

    def edit(x: Float[Tensor, "rows s w"]) -> Float[Tensor, "rows s w"]:
        split = rearrange(x, "(n c) s w -> n c s w", c=mask.shape[1])
        put = 0.0 if value is None else value[:, None].to(x.dtype)
        return torch.where(mask, put, split).flatten(0, 1)

    return edit
