"""Tokens per second of generation under an edit, prompts in one batch beside one by one.

    python benchmarks/steering.py                      # the toy, for a look
    python benchmarks/steering.py --model smollm2-135m

Thirty-two prompts, 32 new tokens each, under a vector added at every position of the middle layer.
Both ways take turns, and in a turn one by one writes a few of the prompts, so that a noisy machine
is noisy for both. `ratio` is the batch's tokens per second over those of prompts one by one (median
of the rounds' ratios); `unedited` is the batch's without the edit. A JSON line.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext

import torch

import saelab
from saelab.edits import Directions, Handle, add, steer
from saelab.edits.placement import Steerable, encode_prompts
from saelab.steering.scene import PROMPTS

ALONE = 4
"""Prompts that are written one by one in a round."""


def tokens_per_second(model: Steerable, texts: list[str], n_new: int, edits: list) -> float:
    """Tokens per second of one call of `generate`; a row that ends early counts as it stands."""
    tokens, lengths = encode_prompts(model, texts)
    with steer(model, *edits) if edits else nullcontext():
        started = time.perf_counter()
        whole = model.generate(
            tokens, max_new_tokens=n_new, temperature=1.0, seed=0, lengths=lengths
        )
        seconds = time.perf_counter() - started
    return len(texts) * (whole.shape[1] - tokens.shape[1]) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = saelab.load_model(args.model, dtype=args.dtype)
    site = f"blocks.{model.n_layers // 2}.hook_resid_post"
    direction = torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(0))
    edits = [add(Handle(Directions(direction), site), 0, 0.1)]
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(args.batch)]
    tokens_per_second(model, texts, 2, edits)
    rounds = []
    for _ in range(args.rounds):
        together = tokens_per_second(model, texts, args.tokens, edits)
        alone = [tokens_per_second(model, [one], args.tokens, edits) for one in texts[:ALONE]]
        unedited = tokens_per_second(model, texts, args.tokens, [])
        rounds.append((together, statistics.harmonic_mean(alone), unedited))
    together, alone, unedited = (statistics.median(part) for part in zip(*rounds, strict=True))
    line = {
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_tokens_per_s": round(together, 1),
        "alone_tokens_per_s": round(alone, 1),
        "ratio": round(statistics.median(t / a for t, a, _ in rounds), 2),
        "unedited_tokens_per_s": round(unedited, 1),
    }
    sizes = {key: getattr(args, key) for key in ("batch", "tokens", "rounds", "threads")}
    print(json.dumps(line | sizes))


if __name__ == "__main__":
    main()
