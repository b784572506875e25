"""Attention-only transformers whose weights were written by hand, so that their circuits are known.

The stream is a row of blocks, each as wide as it needs to be: the token, the token before, the
position, what is said, and a dump that nothing reads. A head attends by a bilinear form of two
blocks and copies one block into another. There are no norms, so that what a head says reaches the
logits linearly.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.config import digest
from saelab.errors import ConfigError
from saelab.models.hooked import HookedModel
from saelab.models.hooks import Point
from saelab.types import SiteInfo, TokenRun

WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "world", "life", "hand", "part",
    "child", "eye", "place", "work", "week", "case", "point", "company", "number",
)  # fmt: skip
"""What a model that is named by its source knows."""
Block = Literal["token", "before", "position", "said", "dump"]
CONTEXT = 32
SHARP = 1e3
"""Logit of attention at which a head attends to one place exactly."""
_CHARACTER = re.compile(".", re.DOTALL)
_SOURCE = re.compile(r"handwired:induction(?::sharpness=(\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class Head:
    """What a head attends to, and what it copies from there to where."""

    query: Block
    key: Block
    attends: Float[Tensor, "query key"]
    """Score of each pair of a query's and a key's coordinate; the softmax is over their sum."""
    source: Block
    target: Block
    gain: float = 1.0
    """What the copied block is multiplied with."""


@final
class HandwiredModel(HookedModel):
    """Layers of hand-written heads behind the `LanguageModel` protocol."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    def __init__(self, name: str, words: Sequence[str], layers: Sequence[Sequence[Head]]) -> None:
        """Build a model that knows some words, each of which is a token after a space."""
        self.name = name
        self.words = tuple(words)
        self._ids = {f" {word}": i for i, word in enumerate(self.words)}
        self._network = _Network(len(words) + 1, layers).eval().requires_grad_(False)
        weights = [parameter.tolist() for parameter in self._network.parameters()]
        self.fingerprint = digest({"words": self.words, "weights": weights})
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.d_model = self._network.d_model
        self.n_layers, self.n_heads = len(layers), len(layers[0])
        self.d_vocab, self.context = len(words) + 1, CONTEXT
        self.bos_id = self.eos_id = self.pad_id = None
        self.special_ids = frozenset()
        self.adds_bos = False
        self._unembed = self._network.unembed
        super().__init__(_points(self._network), blocks_return_tensors=True)

    def tokenize(self, texts: Sequence[str]) -> list[TokenRun]:
        """Return ids and spans: known words with their leading space, else character by character,
        all of them the last id."""
        return [self._run(text) for text in texts]

    def _run(self, text: str) -> TokenRun:
        found = [
            (self._ids.get(piece[0], len(self.words)), piece.start(), piece.end())
            for word in re.finditer(r" [^ ]+|.", text, re.DOTALL)
            for piece in (
                [word] if word[0] in self._ids else _CHARACTER.finditer(text, *word.span())
            )
        ]
        return TokenRun(*torch.tensor(found, dtype=torch.int64).reshape(-1, 3).unbind(1))

    def to_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token id as text, the last one as `�`."""
        return [f" {self.words[i]}" if i < len(self.words) else "�" for i in map(int, ids)]

    def to_text(self, ids: Sequence[int]) -> str:
        """Return tokens as text; there are no special ones."""
        return "".join(self.to_strings(ids))

    def _forward(
        self,
        tokens: Tensor,
        cache: Any = None,
        use_cache: bool = False,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        logits, seen = self._network(tokens, cache, real)
        return logits, seen if use_cache else None

    def _copies(self, cache: Any, times: int) -> Any:
        return [x.repeat_interleave(times, 0) for x in cache]

    def _read_out(self) -> tuple[Tensor, bool, Tensor]:
        return torch.ones(self.d_model), False, self._network.unembed.weight


# ------------------------------------------------------------------------------------- two circuits


def is_handwired(source: str) -> bool:
    """Return whether a source names a hand-wired model."""
    return source.startswith("handwired:")


def named(source: str) -> HandwiredModel:
    """Return the model that `handwired:induction` names, with soft attention if its sharpness is
    given, as in `handwired:induction:sharpness=5`. Raises ConfigError for another name."""
    found = _SOURCE.fullmatch(source)
    if found is None:
        raise ConfigError(
            "a hand-wired model is `handwired:induction` or `handwired:induction:sharpness=5`, but "
            f"{source!r} came; others are built in Python (`models.handwired`)"
        )
    return induction_model(WORDS, sharpness=float(found[1] or SHARP))


def induction_model(words: Sequence[str], *, sharpness: float = SHARP) -> HandwiredModel:
    """Return a model that repeats runs of words, by heads (0, 0) and (1, 0).

    Head (0, 0) writes the token before into each position; head (1, 0) looks for a position whose
    token before is the present token, and says its token. Heads (0, 1) and (1, 1) write where
    nothing is read. `sharpness` is the logit of attention: at 1000 each head attends to one place
    exactly, and no gradient passes through what it attends to.
    """
    n = len(words) + 1
    equal = sharpness * torch.eye(n)
    back = sharpness * torch.eye(CONTEXT).roll(-1, 1).tril(-1)
    idle = Head("token", "token", torch.zeros(n, n), "token", "dump")
    return HandwiredModel(
        "handwired-induction",
        words,
        [
            [Head("position", "position", back, "token", "before"), idle],
            [Head("token", "before", equal, "token", "said", gain=10.0), idle],
        ],
    )


def inhibition_model(words: Sequence[str], *, at: int) -> HandwiredModel:
    """Return a model that says every word so far but the one at position `at`; all is linear.

    Head (0, 1) says the mean of all tokens, head (1, 0) takes back the token at `at`. Heads (0, 0)
    and (1, 1) write where nothing is read. Attention depends on positions alone. Of the last of
    the three words A B B, `at` = 2, is A − B = ⅓ − ⅔ + 1 = ⅔, and of A B A it is −⅔: the first head
    has −½ of the difference between the two, the second one 1½.
    """
    n = len(words) + 1
    anywhere = torch.zeros(CONTEXT, CONTEXT)
    there = anywhere.clone()
    there[:, at] = 1e3
    idle = Head("token", "token", torch.eye(n), "token", "dump")
    says = Head("position", "position", anywhere, "token", "said")
    takes_back = Head("position", "position", there, "token", "said", gain=-1.0)
    return HandwiredModel("handwired-inhibition", words, [[idle, says], [takes_back, idle]])


# -------------------------------------------------------------------------------------- the network


class _Attention(nn.Module):
    """Heads as full bilinear forms; a head's z is the block that it copies."""

    def __init__(self, heads: Sequence[Head], blocks: dict[str, slice], d: int, n: int) -> None:
        super().__init__()
        attends, values, outs = (torch.zeros(len(heads), *s) for s in ((d, d), (d, n), (n, d)))
        for i, head in enumerate(heads):
            attends[i, blocks[head.query], blocks[head.key]] = head.attends
            values[i, blocks[head.source]] = torch.eye(n)
            outs[i, :, blocks[head.target]] = head.gain * torch.eye(n)
        self.attends, self.values = nn.Parameter(attends), nn.Parameter(values)
        self.o = nn.Linear(len(heads) * n, d, bias=False)
        self.o.weight = nn.Parameter(outs.reshape(-1, d).T.contiguous())

    def forward(self, x: Tensor, seen: Tensor, real: Tensor | None) -> Tensor:
        q, k = x.shape[1], seen.shape[1]
        scores = torch.einsum("bqd,hde,bke->bhqk", x, self.attends, seen)
        mask = torch.ones(q, k, dtype=torch.bool, device=x.device).tril(k - q)
        if real is not None:
            # padding sees itself, since a softmax over nothing is NaN
            itself = mask & ~mask.tril(k - q - 1)
            mask = ((mask & real[:, None, :]) | itself)[:, None]
        pattern = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        z = torch.einsum("bhqk,bke,hen->bqhn", pattern, seen, self.values)
        return self.o(z.flatten(2))


class _Block(nn.Module):
    def __init__(self, attention: _Attention) -> None:
        super().__init__()
        self.attn = attention

    def forward(
        self, x: Tensor, past: Tensor | None, seen: list[Tensor], real: Tensor | None
    ) -> Tensor:
        seen.append(x if past is None else torch.cat([past, x], 1))
        return x + self.attn(x, seen[-1], real)


class _Network(nn.Module):
    def __init__(self, n: int, layers: Sequence[Sequence[Head]]) -> None:
        super().__init__()
        widths = {"token": n, "before": n, "position": CONTEXT, "said": n, "dump": n}
        blocks, self.d_model = dict[str, slice](), 0
        for name, width in widths.items():
            blocks[name] = slice(self.d_model, self.d_model + width)
            self.d_model += width
        self.embed = nn.Embedding(n, self.d_model)
        self.place = nn.Embedding(CONTEXT, self.d_model)
        self.blocks = nn.ModuleList(
            _Block(_Attention(heads, blocks, self.d_model, n)) for heads in layers
        )
        self.unembed = nn.Linear(self.d_model, n, bias=False)
        with torch.no_grad():
            for module, block, size in (
                (self.embed, "token", n),
                (self.place, "position", CONTEXT),
                (self.unembed, "said", n),
            ):
                module.weight.zero_()
                module.weight[:, blocks[block]] = torch.eye(size)

    def forward(
        self, tokens: Tensor, cache: list[Tensor] | None, real: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        start = 0 if cache is None else cache[0].shape[1]
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        if real is not None:
            places = (real.cumsum(1) - 1).clamp(min=0)[:, start:]
        x = self.embed(tokens) + self.place(places)
        seen: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[layer], seen, real)
        return self.unembed(x), seen


def _points(network: _Network) -> list[Point]:
    d = network.d_model
    points = [Point(SiteInfo("hook_embed", d, None, "embed"), network.embed, "out")]
    for layer, block in enumerate(network.blocks):
        assert isinstance(block, _Block)
        at = f"blocks.{layer}."
        heads = SiteInfo(at + "attn.hook_z", block.attn.o.in_features, layer, "heads")
        points += [
            Point(SiteInfo(at + "hook_resid_pre", d, layer, "resid"), block, "in"),
            Point(heads, block.attn.o, "in"),
            Point(SiteInfo(at + "hook_attn_out", d, layer, "attn_out"), block.attn, "out"),
            Point(SiteInfo(at + "hook_resid_post", d, layer, "resid"), block, "out"),
        ]
    return points
