"""The sites of one model, and hooks on them that live for one call.

Hooks go also when the call fails. A hook acts only in the call that installed it: an edit may
itself call the model, and that inner forward pass is clean. The lock keeps calls of threads apart.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelab.errors import SiteError, nearest
from saelab.models.hooks import Pass, Point, Standing, checked, read, write
from saelab.protocols import Edit
from saelab.types import SiteInfo


@final
class Sites:
    """Where a model's sites lie, the edits that stand in them, and the lock of its passes."""

    def __init__(
        self, model_name: str, points: Sequence[Point], *, blocks_return_tensors: bool
    ) -> None:
        """Take the places in forward order, and whether blocks return bare tensors."""
        self._model_name = model_name
        self._points = {point.site.name: point for point in points}
        self._order = {name: place for place, name in enumerate(self._points)}
        self._blocks_return_tensors = blocks_return_tensors
        self._call: object | None = None
        self.lock = threading.RLock()
        self.standing = Standing()

    @property
    def infos(self) -> list[SiteInfo]:
        """The sites in forward order."""
        return [point.site for point in self._points.values()]

    def __getitem__(self, name: str) -> Point:
        """Return where a site lies. Raises SiteError that lists the nearest names."""
        point = self._points.get(name)
        if point is None:
            raise SiteError(
                f"{self._model_name} has no site {name!r}; {nearest(name, list(self._points))}"
            )
        return point

    def order(self, name: str) -> int:
        """Return a site's place in the forward pass. Raises SiteError for an unknown one."""
        return self._order[self[name].site.name]

    def blocks_before(self, name: str) -> list[nn.Module]:
        """Return the blocks that need not run where the site's activations are known."""
        layer, place = self[name].site.layer, name.rpartition(".")[2]
        if not self._blocks_return_tensors or layer is None or "hook_resid" not in place:
            return []
        layers = {"hook_resid_pre": layer, "hook_resid_post": layer + 1}.get(place, 0)
        return [self[f"blocks.{i}.hook_resid_post"].module for i in range(layers)]

    @contextmanager
    def hooked(
        self,
        reads: Mapping[str, Callable[[Tensor], None]],
        writes: Mapping[str, Edit],
        now: Pass | None,
    ) -> Iterator[None]:
        """Install hooks for one call; a site's writes come before its reads, and the edits that
        stand before both. Where `now` is None, no edits may stand."""
        call = object()
        handles: list[RemovableHandle] = []
        writes = self.standing.before(writes, now)
        names = sorted({*reads, *writes}, key=self.order)
        with self.lock:
            outer, self._call = self._call, call
            try:
                for name in names:
                    point = self[name]
                    if name in writes:
                        handles += write(point, self._guard(call, checked(name, writes[name])))
                    if name in reads:
                        handles.append(read(point, self._guard(call, reads[name])))
                yield
            finally:
                self._call = outer
                for handle in handles:
                    handle.remove()

    def _guard(self, call: object, action: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """Let a hook act only in the call that installed it, not in one made inside an edit."""
        return lambda x: action(x) if self._call is call else None
