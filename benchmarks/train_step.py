"""Time of one TopK training step beside the peers' and beside the product no step can avoid.

    python benchmarks/train_step.py --acts ROWS.npy --d-sae 16384 --k 32 --batch 2048 --steps 30
    python benchmarks/train_step.py --acts ROWS.npy --peers PYTHON   # an environment as in peers.py
    python benchmarks/train_step.py --acts ROWS.npy --dead 0.1       # a tenth of the latents dead

ROWS.npy holds activations (n, d). Every contender lives in a process of its own; they take turns, a
few steps each, so that a noisy machine is noisy for all. `limit` is one bare float32 encoder
product with reading. `saelab` is the real trainer in its defaults: reading, AuxK, clipping and
metrics included; with `--dead` every step has that share of its latents forced dead. Prints one
JSON line per contender: median milliseconds per step, tokens per second, the ratio to `limit`
(median of the rounds' ratios), FVU on the last 4,096 rows after all steps, peak memory.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

HELDOUT = 4096
TURN = 3
"""Steps that a contender takes before the next one's turn."""
WARM = 3
PEERS = ("sparsify", "sae_lens", "dictionary_learning")

Advance = Callable[[], None]
Score = Callable[[], float | None]


class Rows:
    """Batches of the rows, scaled to mean norm √d, in an order fixed by the seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        acts = np.load(args.acts, mmap_mode="r")
        self.pool, self.batch = acts[:-HELDOUT], args.batch
        some = self.pool[: 4 * HELDOUT].astype(np.float32)
        self.scale = acts.shape[1] ** 0.5 / float(np.linalg.norm(some, axis=1).mean())
        self.heldout = torch.from_numpy(acts[-HELDOUT:].astype(np.float32))
        self.order = np.random.default_rng(args.seed).permutation(len(self.pool))

    def numbers(self) -> Iterator[np.ndarray]:
        place = 0
        while True:
            yield np.sort(self.order[place : place + self.batch])
            place = (place + self.batch) % (len(self.order) - self.batch)

    def raw(self) -> Iterator[torch.Tensor]:
        return (torch.from_numpy(self.pool[n].astype(np.float32)) for n in self.numbers())

    def fvu(self, x_hat: torch.Tensor) -> float:
        x = self.heldout
        share = (x - x_hat.detach()).square().sum() / (x - x.mean(0)).square().sum()
        return round(float(share), 4)


def limit(args: argparse.Namespace, rows: Rows) -> tuple[Advance, Score]:
    batches = rows.raw()
    W = torch.randn(args.d_sae, rows.pool.shape[1])

    def advance() -> None:
        _ = (next(batches) * rows.scale) @ W.T

    return advance, lambda: None


def saelab(args: argparse.Namespace, rows: Rows) -> tuple[Advance, Score]:
    from quality_saelab import ArrayStore

    from saelab import dictionaries
    from saelab.train.config import Member, TrainConfig
    from saelab.train.fit import _stream
    from saelab.train.gradient import GradientTrainer

    steps = args.steps + WARM
    order = np.concatenate([n for n, _ in zip(rows.numbers(), range(steps), strict=False)])
    store: Any = ArrayStore(rows.pool, order)
    config = TrainConfig(batch=args.batch, tokens=args.batch * steps, dead_window=10**9)
    sizes = {"d_in": rows.pool.shape[1], "d_sae": args.d_sae, "k": args.k}
    untrained = dictionaries.create({"type": "topk", **sizes})
    trainer = GradientTrainer(Member("step", untrained, "rows", lr=args.lr), store, config)
    stream = _stream(store, "rows", config, torch.device("cpu"), 0)
    trainer.init_(next(rows.raw()) * trainer.scale)
    dead = torch.randperm(args.d_sae)[: round(args.dead * args.d_sae)]

    def advance() -> None:
        trainer.silent[dead] = config.window
        trainer.step(next(stream))

    def score() -> float:
        return rows.fvu(trainer.dictionary.folded(trainer.scale).reconstruct(rows.heldout))

    return advance, score


def peer(args: argparse.Namespace, rows: Rows) -> tuple[Advance, Score]:
    import peers

    steps = args.steps + WARM
    given = SimpleNamespace(**vars(args), schedule="warmup_decay")
    step, reconstruct = getattr(peers, args.worker)(given, rows.pool.shape[1], steps)
    batches, count = rows.raw(), iter(range(steps))

    def advance() -> None:
        step(next(count), next(batches) * rows.scale)

    def score() -> float:
        with torch.no_grad():
            return rows.fvu(reconstruct(rows.heldout * rows.scale) / rows.scale)

    return advance, score


def work(args: argparse.Namespace) -> None:
    """Take steps when asked through standard input, and answer with their times."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = Rows(args)
    advance, score = {"limit": limit, "saelab": saelab}.get(args.worker, peer)(args, rows)
    for line in sys.stdin:
        if line.strip() == "score":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            found = {"fvu": score(), "peak_mb": peak}
            if args.worker == "saelab":
                from saelab import kernels
                from saelab.ops.select import tally

                found |= {"kernels": kernels.name(), "exact_per_row": round(tally.per_row, 1)}
            print(json.dumps(found), flush=True)
            continue
        times = []
        for _ in range(int(line)):
            started = time.perf_counter()
            advance()
            times.append(time.perf_counter() - started)
        print(json.dumps(times), flush=True)


class Contender:
    """A worker process and the times of its steps."""

    def __init__(self, name: str, args: argparse.Namespace, python: str) -> None:
        self.name = name
        self.rounds: list[list[float]] = []
        command = [python, __file__, "--worker", name]
        for key in ("acts", "d_sae", "k", "batch", "steps", "lr", "threads", "seed", "dead"):
            command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1"}
        self.process: Any = subprocess.Popen(command, env=environment, **pipes)

    def ask(self, what: str) -> Any:
        """Send a line and return the answer; other lines that a library prints are skipped."""
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(("[", "{")):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with {self.process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--acts", type=Path, required=True)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dead", type=float, default=0.0, help="share of saelab's latents")
    parser.add_argument("--peers", help="python of the peers' environment")
    parser.add_argument("--impls", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    contenders = [Contender(name, args, sys.executable) for name in ("limit", "saelab")]
    if args.peers:
        contenders += [Contender(name, args, args.peers) for name in args.impls]
    for contender in contenders:
        contender.ask(str(WARM))
    for start in range(0, args.steps, TURN):
        for contender in contenders:
            contender.rounds.append(contender.ask(str(min(TURN, args.steps - start))))
    bare = [statistics.median(times) for times in contenders[0].rounds]
    for contender in contenders:
        own = [statistics.median(times) for times in contender.rounds]
        median = statistics.median(t for times in contender.rounds for t in times)
        line = {
            "impl": contender.name,
            "ms": round(1e3 * median, 1),
            "tok_s": round(args.batch / median),
            "ratio": round(statistics.median(a / b for a, b in zip(own, bare, strict=True)), 3),
            **contender.ask("score"),
        }
        sizes = {key: getattr(args, key) for key in ("steps", "d_sae", "k", "batch", "threads")}
        print(json.dumps(line | sizes | {"dead": args.dead}), flush=True)


if __name__ == "__main__":
    main()
