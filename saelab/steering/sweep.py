"""Dose and response: how far an edit moves the model, and strengths that move it equally far.

The dose of an edit is the mean KL(clean ‖ steered) of the next-token distributions at the first 32
positions of the clean model's own continuations, which both models read (teacher forcing). Equal
strengths of two directions are nothing alike; equal doses are. The KL at the last prompt position
(Shafran, Geiger, Geva 2025, arXiv 2506.10920) is a second column, for edits that can move it: those
after the prompt leave it at 0.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.config import digest
from saelab.edits import Handle, LatentEdit, steer
from saelab.edits.placement import Steerable, encode_prompts
from saelab.errors import ConfigError
from saelab.protocols import LanguageModel

POSITIONS = 32
"""Positions of each continuation that a dose is taken over, at most."""
MIN_PROMPTS = 8
_STEPS = 16
_START = 4
"""Halvings of the largest strength at which the search for a dose begins."""
_TEXTS = 8
"""Texts whose logits are held at once."""
_WIGGLE = 0.02
"""Share by which a curve may fall and still count as rising."""


# --------------------------------------------------------------------------------------------- dose


@dataclass(frozen=True)
class CleanText:
    """The clean model's continuations of some prompts, with its log-probabilities there."""

    tokens: Int[Tensor, "prompts pos"]
    """Prompt and continuation, right-padded."""
    prompt_lengths: Int[Tensor, " prompts"]
    lengths: Int[Tensor, " prompts"]
    log_probs: list[Float[Tensor, "_ d_vocab"]]
    """Per prompt: after its last token, then after each token of its continuation."""


def seeds_of(prompts: Sequence[str], seed: int) -> list[int]:
    """Return the seed by which each prompt's continuation is drawn.

    It depends on the prompt and on how often it came before, not on its place: whatever else is
    written, and under whatever edits, a prompt is continued with the same noise.
    """
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(int(digest([seed, seen[prompt], prompt])[:16], 16))
        seen[prompt] += 1
    return seeds


def clean_text(
    model: Steerable,
    prompts: Sequence[str],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    positions: int = POSITIONS,
) -> CleanText:
    """Let the unsteered model continue prompts, by up to 32 tokens each.

    Raises ConfigError for fewer than 8 prompts, on which a mean dose is not worth much.
    """
    if len(prompts) < MIN_PROMPTS:
        raise ConfigError(f"a dose needs {MIN_PROMPTS} prompts or more, but {len(prompts)} came")
    tokens, starts = encode_prompts(model, prompts)
    whole = model.generate(
        tokens, max_new_tokens=positions, temperature=temperature, seed=seeds_of(prompts, seed),
        lengths=starts,
    )  # fmt: skip
    whole = whole.cpu()
    ends = [_end(model, row, start) for row, start in zip(whole, starts.tolist(), strict=True)]
    ends = [min(end, start + positions) for end, start in zip(ends, starts.tolist(), strict=True)]
    lengths = torch.tensor(ends)
    return CleanText(whole, starts, lengths, _log_probs(model, whole, starts, lengths))


def _end(model: Steerable, row: Int[Tensor, " pos"], start: int) -> int:
    """Return where a continuation ends: at its first EOS, which is left out, or with the row."""
    ended = (row[start:] == (-1 if model.eos_id is None else model.eos_id)).nonzero()
    return start + int(ended[0]) if len(ended) else len(row)


def _log_probs(
    model: Steerable,
    tokens: Int[Tensor, "prompts pos"],
    starts: Int[Tensor, " prompts"],
    lengths: Int[Tensor, " prompts"],
) -> list[Float[Tensor, "_ d_vocab"]]:
    logits = model.logits(tokens, lengths=lengths)
    return [
        row[start - 1 : end].log_softmax(-1)
        for row, start, end in zip(logits, starts.tolist(), lengths.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Dose:
    """How far an edit moves the model's predictions, in nats."""

    kl: float
    """Mean over prompts of the mean KL at the positions of the continuation."""
    kl_last_prompt: float | None
    """Mean KL at the last prompt position; None for edits after the prompt."""
    per_prompt: Float[Tensor, " prompts"]
    """Mean KL of each prompt; NaN where the continuation is empty."""
    target_shift: float | None
    """Mean change of the target tokens' log-probability; None without targets."""


@torch.no_grad()
def dose(
    model: Steerable,
    edits: Sequence[LatentEdit],
    text: CleanText,
    *,
    targets: Sequence[int] = (),
) -> Dose:
    """Return the dose of edits on continuations of the clean model.

    `targets` are tokens of the concept: their joint log-probability is compared too. Raises
    NonFiniteError if the edits make activations infinite.
    """
    with steer(model, *edits, prompt_lengths=text.prompt_lengths):
        steered = _log_probs(model, text.tokens, text.prompt_lengths, text.lengths)
    kls, last, shifts = [], [], []
    for clean, other in zip(text.log_probs, steered, strict=True):
        kl = (clean.exp() * (clean - other)).sum(-1).clamp(min=0)
        last.append(kl[0])
        kls.append(kl[1:].mean())
        if targets:
            chosen = list(targets)
            moved = other[1:, chosen].logsumexp(-1) - clean[1:, chosen].logsumexp(-1)
            shifts.append(moved.mean())
    per_prompt = torch.stack(kls).cpu()
    after = bool(edits) and all(edit.config.where == "after" for edit in edits)
    return Dose(
        float(per_prompt.nanmean()),
        None if after else float(torch.stack(last).mean()),
        per_prompt,
        float(torch.stack(shifts).nanmean()) if shifts else None,
    )


def text_logits(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"], lengths: Int[Tensor, " batch"]
) -> Iterator[Float[Tensor, "length d_vocab"]]:
    """Yield each right-padded text's logits at its own positions, on the CPU.

    A few texts are run at a time: logits are far larger than anything else.
    """
    for first in range(0, len(tokens), _TEXTS):
        part, own = tokens[first : first + _TEXTS], lengths[first : first + _TEXTS]
        logits = model.logits(part[:, : int(own.max())], lengths=own).cpu()
        yield from (row[:n] for row, n in zip(logits, own.tolist(), strict=True))


# ----------------------------------------------------------------------------------- matched doses


@dataclass(frozen=True)
class Matched:
    """The strength at which an edit first reaches a dose, on one side of zero."""

    target: float
    strength: float | None
    """None: not reached by the largest strength tried."""
    kl: float
    """The dose at that strength, or the largest dose that was seen."""
    monotone: bool
    """Whether the dose rose all the way up to the largest strength tried."""
    kl_last_prompt: float | None = None
    """The second dose at that strength, where it was measured."""
    target_shift: float | None = None
    """How much the concept's tokens gain there in log-probability, where it was measured."""


def match_doses(
    kl: Callable[[float], float],
    targets: Sequence[float],
    *,
    largest: float,
    sign: int = 1,
    points: int = 12,
    tolerance: float = 0.01,
) -> list[Matched]:
    """Return, for each target, the first strength from zero whose dose reaches it.

    Strengths that are `largest` times a power of two, down to 2^(1 − points), bracket the first
    crossing: from a sixteenth of `largest` down to a quarter of the smallest dose asked for, and up
    to four times the largest. Where it lies is narrowed until the dose is within a share
    `tolerance` above the target. Each sign is searched by itself. Raises ConfigError for targets or
    strengths that are not positive.
    """
    if min(targets) <= 0 or largest <= 0 or sign not in (-1, 1):
        raise ConfigError(
            f"doses and the largest strength should be positive and the sign 1 or −1, but are "
            f"{list(targets)}, {largest} and {sign}"
        )

    def side(strength: float) -> float:
        return kl(sign * strength)

    start = min(_START, points - 1)
    seen: dict[float, float] = {}
    for halvings in range(start, points):
        seen[largest / 2**halvings] = dose_there = side(largest / 2**halvings)
        if dose_there <= min(targets) / 4:
            break
    for halvings in range(start - 1, -1, -1):
        if max(seen.values()) >= 4 * max(targets):
            break
        seen[largest / 2**halvings] = side(largest / 2**halvings)
    seen = dict(sorted(seen.items()))
    doses = list(seen.values())
    monotone = all(after >= (1 - _WIGGLE) * before for before, after in pairwise(doses))
    found = []
    for target in targets:
        if max(doses) < target:
            found.append(Matched(target, None, max(doses), monotone))
            continue
        strength = _first_crossing(side, seen, target, tolerance)
        found.append(Matched(target, sign * strength, seen[strength], monotone))
    return found


def _first_crossing(
    kl: Callable[[float], float], seen: dict[float, float], target: float, tolerance: float
) -> float:
    """Return the first known strength with the dose, after narrowing where it lies.

    What is tried on the way is added to `seen`. Between two strengths a dose is about a power of
    the strength, the second near zero; every other step halves the interval, for curves that are
    not.
    """
    aim = target * (1 + tolerance / 2)
    for step in range(_STEPS):
        ordered = sorted(seen.items())
        place = next(i for i, (_, value) in enumerate(ordered) if value >= target)
        high, above = ordered[place]
        if above <= target * (1 + tolerance):
            break
        low, below = ordered[place - 1] if place else (0.0, 0.0)
        if low and below > 0:
            share = math.log(aim / below) / math.log(above / below) if step % 2 == 0 else 0.5
            middle = low * (high / low) ** share
        else:
            middle = max(high * math.sqrt(aim / above), (low + high) / 2 if step % 2 else low)
        if not low < middle < high:
            break
        seen[middle] = kl(middle)
    return min(strength for strength, value in seen.items() if value >= target)


def matched_strengths(
    model: Steerable,
    edit_at: Callable[[float], Sequence[LatentEdit]],
    text: CleanText,
    targets: Sequence[float],
    *,
    largest: float,
    sign: int = 1,
    points: int = 12,
    tolerance: float = 0.01,
    tokens: Sequence[int] = (),
) -> list[Matched]:
    """Return the strengths at which edits have the given doses; see `match_doses`.

    `edit_at` makes the edits of one strength, for example `lambda s: [add(handle, 417, s)]`;
    `tokens` are the concept's, whose log-probability is compared at the strengths found.
    """
    seen: dict[float, Dose] = {}

    def kl(strength: float) -> float:
        seen[strength] = dose(model, edit_at(strength), text, targets=tokens)
        return seen[strength].kl

    found = match_doses(kl, targets, largest=largest, sign=sign, points=points, tolerance=tolerance)
    return [
        one if one.strength is None
        else replace(
            one, kl_last_prompt=seen[one.strength].kl_last_prompt,
            target_shift=seen[one.strength].target_shift,
        )
        for one in found
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- response


@dataclass(frozen=True)
class Continuations:
    """What a model wrote after some prompts."""

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    """The continuations alone, without special tokens."""


def continuations(
    model: Steerable,
    prompts: Sequence[str],
    edits: Sequence[LatentEdit] = (),
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    batch: int = 32,
) -> Continuations:
    """Return a model's continuations under edits, in batches of prompts with one cache each.

    `seed` is one number, of which each prompt gets a seed of its own (`seeds_of`), or the seeds.
    """
    seeds = seeds_of(prompts, seed) if isinstance(seed, int) else seed
    texts: list[str] = []
    for first in range(0, len(prompts), batch):
        tokens, starts = encode_prompts(model, prompts[first : first + batch])
        with steer(model, *edits):
            whole = model.generate(
                tokens, max_new_tokens=max_new_tokens, temperature=temperature,
                seed=seeds[first : first + batch], lengths=starts,
            )  # fmt: skip
        texts += written_texts(model, whole, starts, tokens.shape[1])
    return Continuations(tuple(prompts), tuple(texts))


def written_texts(
    model: Steerable, whole: Int[Tensor, "batch total"], starts: Int[Tensor, " batch"], pos: int
) -> tuple[str, ...]:
    """Return the text after each prompt in what `generate` gave for prompts of up to `pos`
    tokens."""
    n_new, texts = whole.shape[1] - pos, []
    for row, start in zip(whole.cpu(), starts.tolist(), strict=True):
        end = _end(model, row[: start + n_new], start)
        texts.append(model.to_text(row[start:end].tolist()))
    return tuple(texts)


@torch.no_grad()
def presence(model: Steerable, handle: Handle, written: Continuations) -> Float[Tensor, " d_sae"]:
    """Return the share of the continuations' positions on which each latent of a dictionary fires
    when the unsteered model reads them."""
    tokens, lengths = encode_prompts(
        model, [p + t for p, t in zip(written.prompts, written.texts, strict=True)]
    )
    _, starts = encode_prompts(model, written.prompts)
    x = model.capture(tokens, [handle.site], lengths)[handle.site]
    spans = zip(x, starts.tolist(), lengths.tolist(), strict=True)
    rows = torch.cat([row[start:end] for row, start, end in spans])
    z = handle.dictionary.encode(rows.to(handle.dictionary.W_dec))
    return (z != 0).float().mean(0).cpu()


def grid(edit: LatentEdit, multiples: Sequence[float]) -> list[tuple[float, LatentEdit]]:
    """Return an edit at multiples of its latents' typical maximum, each with its multiple.

    Raises ConfigError for operations whose strength is no size: scale, ablate, project_out.
    """
    config = edit.config
    if config.operation not in ("add", "set", "cap"):
        raise ConfigError(f"{config} cannot be scaled; a grid takes add, set or cap")
    plain = config.plain() | {"unit": "typical_max"}
    configs = [type(config).parse(plain | {"strength": multiple}) for multiple in multiples]
    return [
        (multiple, LatentEdit(edit.handle, config))
        for multiple, config in zip(multiples, configs, strict=True)
    ]
