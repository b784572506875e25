"""A seeded two-layer transformer, built in milliseconds, with the same sites as a real model.

Nothing was learnt: the weights are random. Its tokenizer knows a few common words and writes
everything else as bytes, so that any text has tokens with exact character spans.
"""

import re
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saelab.config import digest
from saelab.errors import ConfigError
from saelab.models.hooked import HookedModel
from saelab.models.hooks import Point
from saelab.types import SiteInfo, TokenRun

VERSION = 1
"""Bumped when the weights or the tokens of a seed change."""

D_MODEL, N_LAYERS, N_HEADS, D_MLP, CONTEXT = 32, 2, 4, 128, 256

_WORDS = re.findall(
    r"\w+",
    "the of and to a in is was for that on with he it as his by at from they be this had are "
    "have not but which or one were her all she there would their we him been has when who will "
    "more no if out so said what up its about into than them can only other new some could time "
    "these two may then do first any my now such like our over man me even most made after also "
    "did many before must through back years where much your way well down should because each "
    "just those people how too little state good very make world still own see men work long "
    "get here between both life being under never day same another know while last might us "
    "great old year off come since against go came right used take three ",
)

BOS, EOS = 0, 1
_BYTES = 2
"""Id of byte 0; byte b has id 2 + b."""
_WORD_IDS = {" " + word: _BYTES + 256 + place for place, word in enumerate(_WORDS)}
D_VOCAB = _BYTES + 256 + len(_WORDS)
_STRINGS = {BOS: "<|bos|>", EOS: "<|eos|>"} | {place: word for word, place in _WORD_IDS.items()}
_PIECES = re.compile(r" ?[A-Za-z]+|.", re.DOTALL)


def is_toy(source: str) -> bool:
    """Return whether a source names a toy model."""
    return source == "toy" or source.startswith("toy:")


def seed_of(source: str) -> int:
    """Return the seed in `toy` (0) or `toy:seed=N`. Raises ConfigError if it is malformed."""
    found = re.fullmatch(r"toy(?::seed=(\d+))?", source)
    if found is None:
        raise ConfigError(f"a toy model is written `toy` or `toy:seed=1`, but {source!r} came")
    return int(found[1] or 0)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False)
        self.o = nn.Linear(D_MODEL, D_MODEL, bias=False)

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None,
        store: list[Any],
        real: Tensor | None,
    ) -> Tensor:
        batch, pos, _ = x.shape
        heads = self.qkv(x).view(batch, pos, 3, N_HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        store.append((k, v))
        reach = torch.ones(pos, k.shape[2], dtype=torch.bool, device=x.device)
        mask = reach.tril(k.shape[2] - pos)
        if real is not None:
            # padding sees itself, since a softmax over nothing is NaN
            itself = mask & ~reach.tril(k.shape[2] - pos - 1)
            mask = (mask & real[:, None, None, :]) | itself
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(z.transpose(1, 2).reshape(batch, pos, D_MODEL))


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D_MODEL, D_MLP)
        self.out = nn.Linear(D_MLP, D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x)))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1 = nn.RMSNorm(D_MODEL)
        self.attn = _Attention()
        self.ln2 = nn.RMSNorm(D_MODEL)
        self.mlp = _Mlp()

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None,
        store: list[Any],
        real: Tensor | None,
    ) -> Tensor:
        x = x + self.attn(self.ln1(x), past, store, real)
        return x + self.mlp(self.ln2(x))


class _Network(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(D_VOCAB, D_MODEL)
        self.place = nn.Embedding(CONTEXT, D_MODEL)
        self.blocks = nn.ModuleList(_Block() for _ in range(N_LAYERS))
        self.ln_final = nn.RMSNorm(D_MODEL)
        self.unembed = nn.Linear(D_MODEL, D_VOCAB, bias=False)
        self._init(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _init(self, generator: torch.Generator) -> None:
        for name, weight in self.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "ln" in name:
                weight.copy_(1 + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)
            elif "embed.weight" in name or "place" in name:
                weight.copy_(noise if name.startswith("embed") else 0.3 * noise)
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)

    def forward(
        self, tokens: Tensor, cache: list[Any] | None, real: Tensor | None
    ) -> tuple[Tensor, list[Any]]:
        start = 0 if cache is None else cache[0][0].shape[2]
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        if real is not None:
            places = (real.cumsum(1) - 1).clamp(min=0)[:, start:]
        x = self.embed(tokens) + self.place(places)
        store: list[Any] = []
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[layer], store, real)
        return self.unembed(self.ln_final(x)), store


@final
class ToyModel(HookedModel):
    """The toy behind the `LanguageModel` protocol."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    def __init__(self, seed: int = 0, device: torch.device | None = None) -> None:
        """Build the toy of a seed."""
        self.name = "toy" if seed == 0 else f"toy-{seed}"
        self.fingerprint = digest({"toy": seed, "version": VERSION})
        self.device = device or torch.device("cpu")
        self.dtype = torch.float32
        self.d_model, self.n_layers, self.n_heads = D_MODEL, N_LAYERS, N_HEADS
        self.d_vocab, self.context = D_VOCAB, CONTEXT
        self.bos_id, self.eos_id, self.pad_id = BOS, EOS, EOS
        self.special_ids = frozenset({BOS, EOS})
        self.adds_bos = False
        self._network = _Network(seed).eval().requires_grad_(False).to(self.device)
        self._unembed = self._network.unembed
        super().__init__(_points(self._network), blocks_return_tensors=True)

    def tokenize(self, texts: Sequence[str]) -> list[TokenRun]:
        """Return ids and spans: known words with their leading space, all else as UTF-8 bytes.

        The bytes of one character all carry that character's span.
        """
        return [_tokenize(text) for text in texts]

    def to_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token id as text; a lone byte that is no character as `�`."""
        return [_STRINGS.get(i) or bytes([i - _BYTES]).decode("utf-8", "replace") for i in ids]

    def to_text(self, ids: Sequence[int]) -> str:
        """Return tokens as text, without special tokens; bytes that are no text as `�`."""
        written = (i for i in ids if i not in self.special_ids)
        pieces = (_STRINGS[i].encode() if i in _STRINGS else bytes([i - _BYTES]) for i in written)
        return b"".join(pieces).decode("utf-8", "replace")

    def _forward(
        self,
        tokens: Tensor,
        cache: Any = None,
        use_cache: bool = False,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        logits, store = self._network(tokens, cache, real)
        return logits, store if use_cache else None

    def _copies(self, cache: Any, times: int) -> Any:
        return [tuple(x.repeat_interleave(times, 0) for x in layer) for layer in cache]

    def _read_out(self) -> tuple[Tensor, bool, Tensor]:
        return self._network.ln_final.weight, False, self._network.unembed.weight


def _tokenize(text: str) -> TokenRun:
    ids: list[int] = []
    start: list[int] = []
    end: list[int] = []
    for piece in _PIECES.finditer(text):
        known = _WORD_IDS.get(piece[0])
        if known is not None:
            ids.append(known)
            start.append(piece.start())
            end.append(piece.end())
            continue
        for place, character in enumerate(piece[0], piece.start()):
            encoded = character.encode("utf-8", "surrogatepass")
            ids += [_BYTES + byte for byte in encoded]
            start += [place] * len(encoded)
            end += [place + 1] * len(encoded)
    return TokenRun(*(torch.tensor(column, dtype=torch.int64) for column in (ids, start, end)))


def _points(network: _Network) -> list[Point]:
    points = [Point(SiteInfo("hook_embed", D_MODEL, None, "embed"), network.embed, "out")]
    for layer, block in enumerate(network.blocks):
        assert isinstance(block, _Block)
        at = f"blocks.{layer}."
        attn_out = Point(
            SiteInfo(at + "hook_attn_out", D_MODEL, layer, "attn_out"), block.attn, "out"
        )
        middle = SiteInfo(at + "hook_resid_mid", D_MODEL, layer, "resid")
        points += [
            Point(SiteInfo(at + "hook_resid_pre", D_MODEL, layer, "resid"), block, "in"),
            Point(SiteInfo(at + "attn.hook_z", D_MODEL, layer, "heads"), block.attn.o, "in"),
            attn_out,
            Point(middle, block.ln2, "in", block=block, branch=attn_out),
            Point(SiteInfo(at + "mlp.hook_post", D_MLP, layer, "mlp_neurons"), block.mlp.out, "in"),
            Point(SiteInfo(at + "hook_mlp_out", D_MODEL, layer, "mlp_out"), block.mlp, "out"),
            Point(SiteInfo(at + "hook_resid_post", D_MODEL, layer, "resid"), block, "out"),
        ]
    return points
