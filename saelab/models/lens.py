"""Real language models: TransformerLens names the sites, transformers' own modules do the work.

TransformerLens' bridge knows, for each architecture, which module lies behind
`blocks.3.hook_mlp_out`. It is built once, to read these names; the forward pass is then the
unchanged one of transformers, with hooks on its modules. So activations equal transformers' own to
the bit, fast attention stays in use, and a pass costs what it costs without hooks.

This is the only module that imports transformer_lens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from saelab.errors import AssetError
from saelab.models.convert import quiet_transformers
from saelab.models.hooked import HookedModel
from saelab.models.hooks import Point, linear_map, read
from saelab.models.identity import DTYPES, ModelIdentity, redrawn_seed
from saelab.types import SiteInfo, TokenRun

_SITES = {
    "hook_resid_pre": "resid",
    "attn.hook_z": "heads",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "resid",
    "mlp.hook_post": "mlp_neurons",
    "hook_mlp_out": "mlp_out",
    "hook_resid_post": "resid",
}
"""Sites of a block in forward order, by TransformerLens name, with their kind."""


@final
class LensModel(HookedModel):
    """A causal language model of transformers behind the `LanguageModel` protocol."""

    def __init__(self, identity: ModelIdentity, device: torch.device) -> None:
        """Load the model's folder onto a device.

        Raises AssetError if transformers cannot read it, or if it has no fast tokenizer.
        """
        self.name = identity.name
        self.fingerprint = identity.fingerprint
        self.d_model, self.n_layers = identity.d_model, identity.n_layers
        self.context = identity.context
        self.device, self.dtype = device, DTYPES[identity.dtype]
        self._network, tokenizer = _load(identity, device)
        self.n_heads = self._network.config.get_text_config().num_attention_heads
        self._take_tokenizer(tokenizer)
        names = _names(self, self._network, tokenizer)
        self._norm = self._network.get_submodule(names.norm)
        self._unembed = self._network.get_submodule(names.unembed)
        self._norm_offset = names.norm_offset
        self.d_vocab = self._unembed.get_parameter("weight").shape[0]
        points, bare = self._firing(_points(self._network, names, self))
        super().__init__(points, blocks_return_tensors=bare)

    def _take_tokenizer(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer, processors

        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pad_id = tokenizer.pad_token_id
        special = (i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
        self.special_ids = frozenset({*tokenizer.all_special_ids, *special})
        with_special = tokenizer("a", add_special_tokens=True).input_ids
        self.adds_bos = self.bos_id is not None and with_special[0] == self.bos_id
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        # spans keep the space in front of a word, so that they tile the text
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        self._tokenizer = backend

    def _firing(self, points: list[Point]) -> tuple[list[Point], bool]:
        """Keep the sites that two tokens pass through, with the width that is expected of them.

        Also tell whether each block returns a bare tensor, not a tuple.
        """
        seen: dict[str, int] = {}
        bare: list[bool] = []

        def note(name: str) -> Any:
            return lambda x: seen.__setitem__(name, x.shape[-1] if x.ndim == 3 else 0)

        handles = [read(point, note(point.site.name)) for point in points]
        handles += [
            point.module.register_forward_hook(
                lambda _, __, output: bare.append(isinstance(output, Tensor))
            )
            for point in points
            if point.site.name.endswith("hook_resid_post")
        ]
        try:
            with torch.no_grad():
                self._forward(torch.zeros(1, 2, dtype=torch.int64, device=self.device))
        finally:
            for handle in handles:
                handle.remove()
        found = [point for point in points if seen.get(point.site.name) == point.site.width]
        return found, all(bare)

    def tokenize(self, texts: Sequence[str]) -> list[TokenRun]:
        """Return ids and character spans of each text, without special tokens, of any length.

        Both ends of the spans never decrease. Where a character is written as several tokens, each
        of them spans the whole character, so neighbouring spans may overlap.
        """
        runs = []
        for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False):
            spans = torch.tensor(encoding.offsets, dtype=torch.int64).reshape(-1, 2)
            if len(spans):
                spans = spans.cummax(0).values
            ids = torch.tensor(encoding.ids, dtype=torch.int64)
            runs.append(TokenRun(ids, spans[:, 0].contiguous(), spans[:, 1].contiguous()))
        return runs

    def to_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token id as text; part of a character as `�`, an unused id as its number."""
        return [self._to_string(int(i)) for i in ids]

    def _to_string(self, token_id: int) -> str:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"[{token_id}]"
        if token.startswith("▁"):
            return token.replace("▁", " ")
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def to_text(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _forward(
        self,
        tokens: Tensor,
        cache: Any = None,
        use_cache: bool = False,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        padded: dict[str, Tensor] = {}
        if real is not None:
            places = (real.cumsum(1) - 1).clamp(min=0)
            padded["attention_mask"] = real.long()
            padded["position_ids"] = places[:, -tokens.shape[1] :]
        output = self._network(
            input_ids=tokens, past_key_values=cache, use_cache=use_cache, **padded
        )
        return output.logits, output.past_key_values if use_cache else None

    def _copies(self, cache: Any, times: int) -> Any:
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(times)
        return copied

    def _read_out(self) -> tuple[Tensor, bool, Tensor]:
        centres = isinstance(self._norm, nn.LayerNorm)
        scale = self._norm.get_parameter("weight").float() + self._norm_offset
        return scale, centres, self._unembed.get_parameter("weight")


def _load(identity: ModelIdentity, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    folder = str(identity.folder)
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network: Any = _network(folder, DTYPES[identity.dtype], redrawn_seed(identity.source))
        except (OSError, ValueError, KeyError) as error:
            raise AssetError(
                f"{folder} cannot be loaded as a causal language model: {error}"
            ) from None
    if not tokenizer.is_fast:
        raise AssetError(
            f"{identity.name} has no fast tokenizer, which character spans need; "
            "convert it to tokenizer.json"
        )
    return network.eval().requires_grad_(False).to(device), tokenizer


def _network(folder: str, dtype: torch.dtype, seed: int | None) -> nn.Module:
    """Return the trained network or, with a seed, one as its makers start it before training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if seed is None:
        return AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)


@dataclass(frozen=True)
class _Names:
    """Which of transformers' modules, by path, TransformerLens means."""

    sites: dict[str, tuple[str, str]]
    """Per site the module's path, and `in` or `out`."""
    norm: str
    unembed: str
    norm_offset: float
    """1 where the final norm scales by 1 + weight (Gemma), else 0."""


def _names(model: "LensModel", network: nn.Module, tokenizer: Any) -> _Names:
    """Ask a bridge where each site and the read-out lie.

    It is built over a copy of the modules that shares every weight, and thrown away afterwards.
    """
    from transformer_lens.model_bridge import TransformerBridge

    tensors = (*network.parameters(), *network.buffers())
    copied = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    # the bridge puts itself in the modules' places: note their paths before
    paths = {id(module): path for path, module in copied.named_modules()}
    bridge: Any = TransformerBridge.boot_transformers(
        str(model.name),
        hf_model=copied,
        tokenizer=tokenizer,
        device=str(model.device),
        dtype=model.dtype,
    )
    wanted = ["hook_embed"]
    wanted += [f"blocks.{layer}.{site}" for layer in range(model.n_layers) for site in _SITES]
    sites: dict[str, tuple[str, str]] = {}
    for name in wanted:
        hook = bridge.hook_dict.get(name)
        component, _, side = ("" if hook is None else hook.name).rpartition(".")
        if side in ("hook_in", "hook_out"):
            module = bridge.get_submodule(component).original_component
            if id(module) in paths:
                sites[name] = (paths[id(module)], side.removeprefix("hook_"))
    norm, unembed = (
        paths[id(bridge.get_submodule(name).original_component)] for name in ("ln_final", "unembed")
    )
    return _Names(sites, norm, unembed, float(bridge.cfg.rmsnorm_uses_offset))


def _points(network: nn.Module, names: _Names, model: LensModel) -> list[Point]:
    """Place the sites on the real network's modules."""

    def place(name: str, layer: int | None, kind: str) -> Point | None:
        if name not in names.sites:
            return None
        path, side_name = names.sites[name]
        side: Literal["in", "out"] = "in" if side_name == "in" else "out"
        module = network.get_submodule(path)
        into = kind in ("heads", "mlp_neurons")
        width = linear_map(module).shape[0] if into else model.d_model
        return Point(SiteInfo(name, width, layer, kind), module, side)

    points = [place("hook_embed", None, "embed")]
    for layer in range(model.n_layers):
        block = {s: place(f"blocks.{layer}.{s}", layer, kind) for s, kind in _SITES.items()}
        block["hook_resid_mid"] = _middle(block)
        points += block.values()
    return [point for point in points if point is not None]


def _middle(block: dict[str, Point | None]) -> Point | None:
    """Complete the point between attention and MLP, which blocks that run both at once lack."""
    point, before, branch = (
        block[s] for s in ("hook_resid_mid", "hook_resid_pre", "hook_attn_out")
    )
    if point is None or before is None or branch is None:
        return None
    return Point(point.site, point.module, point.side, block=before.module, branch=branch)
