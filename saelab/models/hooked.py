"""What every model shares: captures, edits, gradients and generation by hooks on plain modules.

A model names the modules at which its sites lie (`Point`); everything else is done here. Hooks live
for one call, under the model's lock, and go also when it fails. A hook acts only in the call that
installed it: an edit may itself call the model, and that inner forward pass is clean.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelab.edits.placement import SiteEdits, encode_prompts, pad_of
from saelab.errors import NonFiniteError, ShapeError, SiteError, nearest
from saelab.models import generation
from saelab.models.hooks import Pass, Point, Standing, handing_on, read, write
from saelab.protocols import Edit
from saelab.types import SiteInfo, TokenRun


class _Stop(Exception):
    """Everything asked for was seen: leave the forward pass."""


class HookedModel(ABC):
    """A language model made of plain modules; see `protocols.LanguageModel` for the methods.

    Tokens are right-padded. Attention is causal, so no position sees the padding after it, and no
    attention mask is passed: real positions come out as if alone, and padded ones are meaningless.
    """

    name: str
    fingerprint: str
    d_model: int
    n_layers: int
    d_vocab: int
    context: int
    device: torch.device
    dtype: torch.dtype
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    special_ids: frozenset[int]
    adds_bos: bool

    def __init__(self, points: Sequence[Point], *, blocks_return_tensors: bool) -> None:
        """Take the sites' places, in forward order, and whether blocks return bare tensors."""
        self._points = {point.site.name: point for point in points}
        self._order = {name: place for place, name in enumerate(self._points)}
        self._lock = threading.RLock()
        self._call: object | None = None
        self._standing = Standing()
        self._blocks_return_tensors = blocks_return_tensors
        self._spliced: tuple[str, Tensor, Tensor] | None = None
        """The site, tokens and clean activations of the last splice."""

    # ---------------------------------------------------------------- what a model has to provide

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> list[TokenRun]:
        """Return ids and character spans of each text, without special tokens."""

    @abstractmethod
    def to_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token id as text."""

    @abstractmethod
    def to_text(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special tokens."""

    @abstractmethod
    def _forward(
        self,
        tokens: Tensor,
        cache: Any = None,
        use_cache: bool = False,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the logits, and the key-value cache after these tokens if one is used.

        `real` says which of the cached and the new tokens are no (left) padding; None: all.
        """

    @abstractmethod
    def _read_out(self) -> tuple[Tensor, bool, Tensor]:
        """Return the final norm's scale, whether it centres, and W_U as (d_vocab, d_model)."""

    # ---------------------------------------------------------------------------------------- sites

    def sites(self) -> Sequence[SiteInfo]:
        """Return the sites that can be captured, in forward order."""
        return [point.site for point in self._points.values()]

    def site(self, name: str) -> SiteInfo:
        """Return one site. Raises SiteError that lists the nearest names."""
        return self._point(name).site

    def _point(self, name: str) -> Point:
        point = self._points.get(name)
        if point is None:
            raise SiteError(
                f"{self.name} has no site {name!r}; {nearest(name, list(self._points))}"
            )
        return point

    # ---------------------------------------------------------------------------------------- hooks

    @contextmanager
    def _hooks(
        self,
        reads: Mapping[str, Callable[[Tensor], None]],
        writes: Mapping[str, Edit],
        now: Pass,
    ) -> Iterator[None]:
        """Install hooks for one call; a site's writes come before its reads, and the edits that
        stand before both."""
        call = object()
        handles: list[RemovableHandle] = []
        writes = self._standing.before(writes, now)
        names = sorted(map(self._known, {*reads, *writes}), key=lambda name: self._order[name])
        with self._lock:
            outer, self._call = self._call, call
            try:
                for name in names:
                    point = self._points[name]
                    if name in writes:
                        handles += write(point, self._guard(call, _checked(name, writes[name])))
                    if name in reads:
                        handles.append(read(point, self._guard(call, reads[name])))
                yield
            finally:
                self._call = outer
                for handle in handles:
                    handle.remove()

    @contextmanager
    def steered(
        self, edits: SiteEdits, prompt_lengths: Int[Tensor, " batch"] | None = None
    ) -> Iterator[None]:
        """Let edits stand in every pass of this thread until the block ends; they nest.

        Raises NonFiniteError from a pass whose logits they make infinite.
        """
        for name in edits.sites:
            self._known(name)
        with self._standing.holding(edits, prompt_lengths):
            yield

    def _finite(self, logits: Tensor) -> Tensor:
        """Return logits as float32. Raises NonFiniteError if edits that stand overflow them."""
        logits = logits.float()
        if self._standing.edits and not bool(logits.isfinite().all()):
            edits = "; ".join(str(edits) for edits, _ in self._standing.edits)
            raise NonFiniteError(f"logits are not finite under {edits}; take a smaller strength")
        return logits

    def _known(self, name: str) -> str:
        return self._point(name).site.name

    def _guard(self, call: object, action: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """Let a hook act only in the call that installed it, not in one made inside an edit."""
        return lambda x: action(x) if self._call is call else None

    def _placed(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Check the tokens' shape and move them to the model's device."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ShapeError(f"tokens should be (batch, pos), but are {tuple(tokens.shape)}")
        if tokens.shape[1] > self.context:
            raise ShapeError(
                f"tokens have {tokens.shape[1]} positions, but {self.name} takes {self.context}; "
                "cut them into shorter windows"
            )
        if lengths is not None and (
            lengths.shape != tokens.shape[:1] or not bool((lengths <= tokens.shape[1]).all())
        ):
            raise ShapeError(
                f"lengths should hold one length of at most {tokens.shape[1]} for each of "
                f"{tokens.shape[0]} rows, but are {lengths.tolist()}"
            )
        return tokens.to(self.device)

    # --------------------------------------------------------------------------------------- passes

    def capture(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[str],
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> dict[str, Float[Tensor, "batch pos d"]]:
        """Return the sites' activations in the model's dtype, stopping after the last of them."""
        tokens = self._placed(tokens, lengths)
        kept: dict[str, Tensor] = {}
        wanted = len(set(sites))

        def keep(name: str, x: Tensor) -> None:
            kept[name] = x
            if len(kept) == wanted:
                raise _Stop

        reads = {name: _partial(keep, name) for name in sites}
        with torch.inference_mode(), self._hooks(reads, {}, Pass(tokens, lengths)), suppress(_Stop):
            self._forward(tokens)
        # copied, since tensors of inference mode could not be used where gradients are taken
        return {name: kept[name].clone() for name in sites}

    @torch.no_grad()
    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        edits: Mapping[str, Edit] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return float32 logits, with each site's activations passed through its edit."""
        tokens = self._placed(tokens, lengths)
        with self._hooks({}, edits or {}, Pass(tokens, lengths)):
            return self._finite(self._forward(tokens)[0])

    def splice(
        self,
        tokens: Int[Tensor, "batch pos"],
        site: str,
        x_hat: Float[Tensor, "batch pos d"],
        keep: Bool[Tensor, "batch pos"],
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return logits with the site replaced by `x_hat` where `keep`, and untouched elsewhere.

        Splices that follow each other over the same tokens, at one site of the residual stream,
        share one pass through the blocks before it; the logits are the same to the bit.
        """
        tokens = self._placed(tokens, lengths)
        mask = keep.to(self.device)[..., None]
        put = x_hat.to(self.device, self.dtype)
        with self._lock:
            name, seen, clean = self._spliced or ("", tokens, None)
            # edits that stand may have changed what was seen, or may change it now
            alone = not self._standing.edits
            known = alone and name == site and torch.equal(seen, tokens)

            def edit(x: Tensor) -> Tensor:
                x = clean if known and clean is not None else x
                if alone:
                    self._spliced = (site, tokens.clone(), x)
                return torch.where(mask, put, x)

            with handing_on(self._blocks_before(site) if known else ()):
                return self.logits(tokens, {site: edit})

    def _blocks_before(self, site: str) -> list[nn.Module]:
        """Return the blocks that need not run where the site's clean activations are known."""
        layer, name = self.site(site).layer, site.rpartition(".")[2]
        if not self._blocks_return_tensors or layer is None or "hook_resid" not in name:
            return []
        layers = {"hook_resid_pre": layer, "hook_resid_post": layer + 1}.get(name, 0)
        return [self._point(f"blocks.{i}.hook_resid_post").module for i in range(layers)]

    def grad_at(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[str],
        objective: Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, ""]],
        edits: Mapping[str, Edit] | None = None,
    ) -> dict[str, tuple[Float[Tensor, "batch pos d"], Float[Tensor, "batch pos d"]]]:
        """Return (activation, gradient of the objective) at each site, after the site's own edit.

        The gradient at an earlier site includes the paths through later ones.
        """
        tokens = self._placed(tokens)
        seen: dict[str, Tensor] = {}
        edits = dict(edits or {})
        edits |= {name: _recorder(name, seen, edits.get(name)) for name in sites}
        with torch.enable_grad(), self._hooks({}, edits, Pass(tokens)):
            value = objective(self._forward(tokens)[0].float())
            grads = torch.autograd.grad(value, [seen[name] for name in sites])
        return {name: (seen[name].detach(), g) for name, g in zip(sites, grads, strict=True)}

    def vjp(
        self,
        tokens: Int[Tensor, "batch pos"],
        source: str,
        target: str,
        cotangent: Float[Tensor, "batch pos d_target"],
    ) -> Float[Tensor, "batch pos d_source"]:
        """Return the vector-Jacobian product from a later site back to an earlier one.

        Raises SiteError if `target` does not come after `source`.
        """
        if self._order[self._known(target)] <= self._order[self._known(source)]:
            raise SiteError(f"{target!r} should come after {source!r} in the forward pass")
        tokens = self._placed(tokens)
        seen: dict[str, Tensor] = {}

        def end(x: Tensor) -> None:
            seen[target] = x
            raise _Stop

        edits = {source: _recorder(source, seen)}
        with torch.enable_grad(), self._hooks({target: end}, edits, Pass(tokens)):
            with suppress(_Stop):
                self._forward(tokens)
            back = cotangent.to(self.device, self.dtype)
            return torch.autograd.grad(seen[target], seen[source], back)[0]

    @overload
    def generate(
        self, tokens: Int[Tensor, "batch pos"], *, max_new_tokens: int, temperature: float = 0.0,
        seed: int = 0, edits: Mapping[str, Edit] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Int[Tensor, "batch total"]: ...  # fmt: skip

    @overload
    def generate(
        self, tokens: str, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
        edits: Mapping[str, Edit] | None = None, lengths: None = None,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, tokens: list[str], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
        edits: Mapping[str, Edit] | None = None, lengths: None = None,
    ) -> list[str]: ...  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "batch pos"] | str | list[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        edits: Mapping[str, Edit] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Int[Tensor, "batch total"] | str | list[str]:
        """Continue each prompt with a key-value cache; edits act in every forward pass.

        Prompts are texts, which come back with their continuations, or tokens; of different
        lengths, tokens are right-padded, and so is the result. The first pass shows an edit all
        prompts, padded on the left; each later one only the new position. Temperature 0 takes the
        likeliest token. After EOS a row is filled with EOS; the call ends when all rows have, so
        `total` is at most pos + max_new_tokens.
        """
        if not isinstance(tokens, Tensor):
            texts = [tokens] if isinstance(tokens, str) else tokens
            ids, lengths = encode_prompts(self, texts)
            whole = self.generate(
                ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                edits=edits, lengths=lengths,
            )  # fmt: skip
            ends = (lengths + whole.shape[1] - ids.shape[1]).tolist()
            rows = [self.to_text(row[:end]) for row, end in zip(whole.tolist(), ends, strict=True)]
            return rows[0] if isinstance(tokens, str) else rows
        tokens = self._placed(tokens, lengths)
        if tokens.shape[1] + max_new_tokens > self.context:
            raise ShapeError(
                f"{tokens.shape[1]} + {max_new_tokens} positions are more than the {self.context} "
                f"that {self.name} takes; shorten the prompt or ask for fewer tokens"
            )
        if lengths is not None:
            generation.check_prompts(lengths)
        now = Pass(tokens, generating=True)

        def step(new: Tensor, cache: Any, real: Tensor | None) -> tuple[Tensor, Any]:
            now.move_on_(new, real, after_prompt=cache is not None)
            logits, cache = self._forward(new, cache, use_cache=True, real=real)
            return self._finite(logits[:, -1]), cache

        with self._hooks({}, edits or {}, now):
            return generation.continued(
                step, tokens, lengths, generation.chooser(temperature, seed),
                max_new_tokens=max_new_tokens, eos=self.eos_id, pad=pad_of(self),
            )  # fmt: skip

    # ------------------------------------------------------------------------- directions to logits

    @torch.no_grad()
    def logit_effect(
        self, site: str, directions: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n d_vocab"]:
        """Return each direction's direct effect on the logits, float32, centred over the tokens.

        effect = r · diag(γ) W_Uᵀ minus its mean over the vocabulary, where r is the direction
        carried into the residual stream (`to_residual`) and γ the final norm's scale; a LayerNorm's
        centring is applied to r. The norm's division by the activation's size differs between
        positions and is left out: effects can be compared between directions, but are no logit
        differences. Later layers' reactions and a soft cap on the logits are left out too.
        """
        scale, centres, unembed = self._read_out()
        r = self.to_residual(site, directions)
        if centres:
            r = r - r.mean(-1, keepdim=True)
        effect = (r * scale.float()) @ unembed.float().T
        return effect - effect.mean(-1, keepdim=True)

    @torch.no_grad()
    def to_residual(
        self, site: str, directions: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n d_model"]:
        """Carry directions of a site into the residual stream, float32.

        Through W_out for neurons and W_O for (flattened) heads; unchanged for sites that lie in
        the residual stream or are added to it. A norm that follows W_O or W_out is left out.
        """
        point = self._point(site)
        if directions.shape[-1] != point.site.width:
            raise ShapeError(
                f"directions have width {directions.shape[-1]}, but site {site!r} has width "
                f"{point.site.width}"
            )
        directions = directions.to(self.device, torch.float32)
        if point.site.kind in ("mlp_neurons", "heads"):
            return directions @ linear_map(point.module).float()
        return directions


def linear_map(module: nn.Module) -> Tensor:
    """Return a linear module's matrix as (inputs, outputs), also of GPT-2's transposed layers."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, nn.Linear) else weight


def _partial(action: Callable[[str, Tensor], None], name: str) -> Callable[[Tensor], None]:
    return lambda x: action(name, x)


def _recorder(name: str, seen: dict[str, Tensor], edit: Edit | None = None) -> Edit:
    """Return an edit that notes the (edited) activations as a node of the graph."""

    def record(x: Tensor) -> Tensor:
        if edit is not None:
            x = edit(x)
        seen[name] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return seen[name]

    return record


def _checked(name: str, edit: Edit) -> Edit:
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
