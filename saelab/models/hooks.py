"""Reading and writing the tensor of one site, by hooks on the module where it lies."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelab.errors import ShapeError
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
