"""Reading and writing the tensor of one site, by hooks on the module where it lies."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelab.edits.placement import Placement, SiteEdits
from saelab.errors import ConfigError, NonFiniteError, ShapeError
from saelab.protocols import Edit
from saelab.types import SiteInfo


@dataclass(frozen=True)
class Point:
    """Where a site lies in the network."""

    site: SiteInfo
    module: nn.Module
    side: Literal["in", "out"]
    """Whether the site is the module's input or its output."""
    block: nn.Module | None = None
    """For `hook_resid_mid` only: the block whose input is the residual before attention."""
    branch: "Point | None" = None
    """For `hook_resid_mid` only: what attention adds. The middle of the residual stream is no
    module's output, so a change of it is added here; both MLP and skip connection then see it."""


@dataclass(frozen=True)
class Past:
    """Keys and values of the beginning of some prompts."""

    cache: Any
    rows: int
    positions: int


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_first_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})


def read(point: Point, action: Callable[[Tensor], None]) -> RemovableHandle:
    """Show the site's tensor to `action` in every forward pass."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        action(_first_input(args, kwargs))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        action(output[0] if isinstance(output, tuple) else output)

    if point.side == "in":
        return point.module.register_forward_pre_hook(before, with_kwargs=True)
    return point.module.register_forward_hook(after)


def write(point: Point, action: Callable[[Tensor], Tensor | None]) -> list[RemovableHandle]:
    """Replace the site's tensor by what `action` returns, unless that is None."""
    if point.branch is not None:
        return _write_middle(point, action)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = action(_first_input(args, kwargs))
        return None if y is None else _with_first_input(args, kwargs, y)

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        y = action(output[0] if isinstance(output, tuple) else output)
        return (y, *output[1:]) if y is not None and isinstance(output, tuple) else y

    if point.side == "in":
        return [point.module.register_forward_pre_hook(before, with_kwargs=True)]
    return [point.module.register_forward_hook(after)]


def _write_middle(point: Point, action: Callable[[Tensor], Tensor | None]) -> list[RemovableHandle]:
    """Change the residual stream between attention and MLP, by a change of what attention adds."""
    assert point.block is not None and point.branch is not None
    entering: list[Tensor] = []

    def note(x: Tensor) -> None:
        entering[:] = [x]

    def change(added: Tensor) -> Tensor | None:
        middle = entering[0] + added
        y = action(middle)
        return None if y is None else added + (y - middle)

    block = Point(point.site, point.block, "in")
    return [read(block, note), *write(point.branch, change)]


def linear_map(module: nn.Module) -> Tensor:
    """Return a linear module's matrix as (inputs, outputs), also of GPT-2's transposed layers."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, nn.Linear) else weight


@contextmanager
def handing_on(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks only hand on their input, in a pass that replaces the stream after them anyway."""

    def hand_on(*args: Any, **kwargs: Any) -> Tensor:
        return _first_input(args, kwargs)

    try:
        for block in blocks:
            block.forward = hand_on
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


@contextmanager
def last_only(unembed: nn.Module) -> Iterator[None]:
    """Let a read-out see the last position only."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (args[0][:, -1:],)

    handle = unembed.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def recorder(name: str, seen: dict[str, Tensor], edit: Edit | None = None) -> Edit:
    """Return an edit that notes the (edited) activations as a node of the graph."""

    def record(x: Tensor) -> Tensor:
        if edit is not None:
            x = edit(x)
        seen[name] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return seen[name]

    return record


def checked(name: str, edit: Edit) -> Edit:
    """Let an edit answer in another dtype, but not in another shape."""

    def checked(x: Tensor) -> Tensor:
        y = edit(x)
        if y.shape != x.shape:
            raise ShapeError(
                f"the edit of {name!r} should return {tuple(x.shape)}, but returned "
                f"{tuple(y.shape)}"
            )
        return y.to(x.dtype)

    return checked


# ------------------------------------------------------------------------------ edits that stand


@final
class Pass:
    """The forward pass that is running, for edits that depend on the position."""

    def __init__(
        self, tokens: Tensor, lengths: Tensor | None = None, *, generating: bool = False
    ) -> None:
        """Begin with whole texts; with `generating`, `move_on_` says what each pass covers."""
        self._tokens, self._lengths = tokens, lengths
        self._generating = generating
        self._real: Tensor | None = None
        self._after_prompt = False

    def move_on_(self, new: Tensor, real: Tensor | None, *, after_prompt: bool) -> None:
        """Take in the newest tokens, and which of all tokens so far are no padding."""
        self._tokens, self._after_prompt = new, after_prompt
        self._real = None if real is None else real[:, -new.shape[1] :]

    def placement(self, prompt_lengths: Tensor | None) -> Placement:
        """Return where the pass is; the prompt of whole texts is their first `prompt_lengths`."""
        if not self._generating:
            return Placement.of_texts(self._tokens, self._lengths, prompt_lengths)
        everywhere = torch.ones_like(self._tokens, dtype=torch.bool)
        real = everywhere if self._real is None else self._real
        return Placement(self._tokens, real, everywhere & (not self._after_prompt))


@final
class Standing(threading.local):
    """The edits that stand in a model, of each thread apart, outermost first."""

    edits: tuple[tuple[SiteEdits, Tensor | None], ...] = ()
    """Each with the lengths of the prompts in passes over whole texts."""

    @contextmanager
    def holding(self, edits: SiteEdits, prompt_lengths: Tensor | None) -> Iterator[None]:
        """Let edits stand until the block ends."""
        before = self.edits
        self.edits = (*before, (edits, prompt_lengths))
        try:
            yield
        finally:
            self.edits = before

    def before(self, writes: Mapping[str, Edit], now: Pass | None) -> dict[str, Edit]:
        """Return a call's own edits with those that stand put before them.

        Raises ConfigError if edits stand in a pass whose positions are unknown (`now` is None).
        """
        merged = dict(writes)
        if now is None:
            if self.edits:
                raise ConfigError(
                    f"a pass that goes on from remembered activations cannot place {self}; leave "
                    "the block of `steer`, or give the pass edits of its own"
                )
            return merged
        for edits, prompt_lengths in reversed(self.edits):
            for site in edits.sites:
                merged[site] = _then(edits, site, prompt_lengths, now, merged.get(site))
        return merged

    def finite(self, logits: Tensor) -> Tensor:
        """Return logits as float32. Raises NonFiniteError if edits that stand overflow them."""
        logits = logits.float()
        if self.edits and not bool(logits.isfinite().all()):
            raise NonFiniteError(f"logits are not finite under {self}; take a smaller strength")
        return logits

    def __str__(self) -> str:
        """Return the edits in words."""
        return "; ".join(str(edits) for edits, _ in self.edits)


def _then(
    edits: SiteEdits, site: str, prompt_lengths: Tensor | None, now: Pass, next_: Edit | None
) -> Edit:
    def edit(x: Tensor) -> Tensor:
        y = edits.apply(site, x, now.placement(prompt_lengths))
        return y if next_ is None else next_(y)

    return edit
