"""What every model shares: captures, edits, gradients and generation by hooks on plain modules.

A model names the modules at which its sites lie (`Point`); everything else is done here, by hooks
that live for one call (`sites`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelab.edits.placement import SiteEdits, encode_prompts, pad_of
from saelab.errors import ShapeError, SiteError
from saelab.models import generation
from saelab.models.hooks import Pass, Past, Point, handing_on, last_only, linear_map, recorder
from saelab.models.sites import Sites
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
    n_heads: int
    d_vocab: int
    context: int
    device: torch.device
    dtype: torch.dtype
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    special_ids: frozenset[int]
    adds_bos: bool
    _unembed: nn.Module
    """Makes logits of the final norm's output."""

    def __init__(self, points: Sequence[Point], *, blocks_return_tensors: bool) -> None:
        """Take the sites' places, in forward order, and whether blocks return bare tensors."""
        self._sites = Sites(self.name, points, blocks_return_tensors=blocks_return_tensors)
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
    def _copies(self, cache: Any, times: int) -> Any:
        """Return a copy of a key-value cache, with every row `times` times in a row."""

    @abstractmethod
    def _read_out(self) -> tuple[Tensor, bool, Tensor]:
        """Return the final norm's scale, whether it centres, and W_U as (d_vocab, d_model)."""

    # ---------------------------------------------------------------------------------------- sites

    def sites(self) -> Sequence[SiteInfo]:
        """Return the sites that can be captured, in forward order."""
        return self._sites.infos

    def site(self, name: str) -> SiteInfo:
        """Return one site. Raises SiteError that lists the nearest names."""
        return self._sites[name].site

    def steered(
        self, edits: SiteEdits, prompt_lengths: Int[Tensor, " batch"] | None = None
    ) -> AbstractContextManager[None]:
        """Let edits stand in every pass of this thread until the block ends; they nest.

        Raises SiteError for an unknown site, and NonFiniteError from a pass whose logits they make
        infinite.
        """
        for name in edits.sites:
            self.site(name)
        return self._sites.standing.holding(edits, prompt_lengths)

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

        reads = {name: partial(keep, name) for name in sites}
        now = Pass(tokens, lengths)
        with torch.inference_mode(), self._sites.hooked(reads, {}, now), suppress(_Stop):
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
        with self._sites.hooked({}, edits or {}, Pass(tokens, lengths)):
            return self._sites.standing.finite(self._forward(tokens)[0])

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
        with self._sites.lock:
            name, seen, clean = self._spliced or ("", tokens, None)
            # edits that stand may have changed what was seen, or may change it now
            alone = not self._sites.standing.edits
            known = alone and name == site and torch.equal(seen, tokens)

            def edit(x: Tensor) -> Tensor:
                x = clean if known and clean is not None else x
                if alone:
                    self._spliced = (site, tokens.clone(), x)
                return torch.where(mask, put, x)

            with handing_on(self._sites.blocks_before(site) if known else ()):
                return self.logits(tokens, {site: edit})

    @torch.no_grad()
    def remember(self, tokens: Int[Tensor, "batch pos"]) -> Past:
        """Return the keys and values of a prompt's beginning, for `resume`; it is not changed.

        Raises ConfigError while edits stand, as `resume` does.
        """
        tokens = self._placed(tokens)
        with self._sites.hooked({}, {}, None):
            return Past(self._forward(tokens, use_cache=True)[1], *tokens.shape)

    @torch.no_grad()
    def resume(
        self,
        resid: Float[Tensor, "rows pos d_model"],
        layer: int,
        edits: Mapping[str, Edit] | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "rows d_vocab"]:
        """Return the float32 logits at the last position, from the stream that enters a block.

        Only blocks from `layer` on are run, and of the positions only those of `resid`; they attend
        to those of `past` before them. Each of its rows stands for equally many rows of `resid`.
        Raises ConfigError while edits stand: there are no tokens by which to place them.
        """
        site = f"blocks.{layer}.hook_resid_pre"
        edits = dict(edits or {})
        edit = edits.pop(site, None)
        start = resid.to(self.device, self.dtype)
        edits[site] = lambda _: start if edit is None else edit(start)
        tokens = torch.zeros(resid.shape[:2], dtype=torch.int64, device=self.device)
        cache = None if past is None else self._copies(past.cache, len(resid) // past.rows)
        shortened = (handing_on(self._sites.blocks_before(site)), last_only(self._unembed))
        with self._sites.lock, shortened[0], shortened[1], self._sites.hooked({}, edits, None):
            return self._forward(tokens, cache, use_cache=cache is not None)[0][:, -1].float()

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
        edits |= {name: recorder(name, seen, edits.get(name)) for name in sites}
        with torch.enable_grad(), self._sites.hooked({}, edits, Pass(tokens)):
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
        if self._sites.order(target) <= self._sites.order(source):
            raise SiteError(f"{target!r} should come after {source!r} in the forward pass")
        tokens = self._placed(tokens)
        seen: dict[str, Tensor] = {}

        def end(x: Tensor) -> None:
            seen[target] = x
            raise _Stop

        edits = {source: recorder(source, seen)}
        with torch.enable_grad(), self._sites.hooked({target: end}, edits, Pass(tokens)):
            with suppress(_Stop):
                self._forward(tokens)
            back = cotangent.to(self.device, self.dtype)
            return torch.autograd.grad(seen[target], seen[source], back)[0]

    @overload
    def generate(
        self, tokens: Int[Tensor, "batch pos"], *, max_new_tokens: int, temperature: float = 0.0,
        seed: int | Sequence[int] = 0, edits: Mapping[str, Edit] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Int[Tensor, "batch total"]: ...  # fmt: skip

    @overload
    def generate(
        self, tokens: str, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
        edits: Mapping[str, Edit] | None = None, lengths: None = None,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, tokens: list[str], *, max_new_tokens: int, temperature: float = 0.0,
        seed: int | Sequence[int] = 0, edits: Mapping[str, Edit] | None = None,
        lengths: None = None,
    ) -> list[str]: ...  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "batch pos"] | str | list[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        edits: Mapping[str, Edit] | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Int[Tensor, "batch total"] | str | list[str]:
        """Continue each prompt with a key-value cache; edits act in every forward pass.

        Prompts are texts, which come back with their continuations, or tokens; of different
        lengths, tokens are right-padded, and so is the result. The first pass shows an edit all
        prompts, padded on the left; each later one only the new position. Temperature 0 takes the
        likeliest token; else a row draws by its own seed, or by `seed` and its place if that is one
        number, whatever else is in the batch. After EOS a row is filled with EOS; the call ends
        when all rows have, so `total` is at most pos + max_new_tokens.
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
        seeds = generation.seeds_of_rows(seed, len(tokens))
        now = Pass(tokens, generating=True)

        def step(new: Tensor, cache: Any, real: Tensor | None) -> tuple[Tensor, Any]:
            now.move_on_(new, real, after_prompt=cache is not None)
            logits, cache = self._forward(new, cache, use_cache=True, real=real)
            return self._sites.standing.finite(logits[:, -1]), cache

        with self._sites.hooked({}, edits or {}, now):
            return generation.continued(
                step, tokens, lengths, generation.chooser(temperature, seeds),
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
        point = self._sites[site]
        if directions.shape[-1] != point.site.width:
            raise ShapeError(
                f"directions have width {directions.shape[-1]}, but site {site!r} has width "
                f"{point.site.width}"
            )
        directions = directions.to(self.device, torch.float32)
        if point.site.kind in ("mlp_neurons", "heads"):
            return directions @ linear_map(point.module).float()
        return directions
