"""Time of a semi-NMF update beside a straightforward one, and whether their losses agree.

    python benchmarks/semi_nmf.py --acts NEURONS.npy --rank 100 --rows 4000
    python benchmarks/semi_nmf.py --rank 100                         # planted neurons, d = 1536

NEURONS.npy holds an MLP's activations (n, d). Both contenders start from the same codes, live in a
process of their own and take turns, a few updates each, so that a noisy machine is noisy for all.

    plain     each step as the paper writes it: (GᵀG + ε)⁻¹ GᵀX, winners, norms, G's update, and
              ‖X − G F‖² from the reconstruction
    saelab    `ops.factorise.update`

Prints one JSON line per contender: median milliseconds per update, how many times faster than the
plain one (median of the rounds' ratios), FVU after all updates, and its relative difference from
the plain one's. `--encode` times the non-negative least squares of the rows with the features too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TURN = 5
"""Updates that a contender takes before the other's turn."""
WARM = 5
NAMES = ("plain", "saelab")

Advance = Callable[[], float]


def load(args: argparse.Namespace) -> Tensor:
    """Return the rows: some of the file in a fixed order, or planted groups of neurons."""
    if args.acts is not None:
        acts = np.load(args.acts, mmap_mode="r")
        order = np.random.default_rng(args.seed).permutation(len(acts))[: args.rows]
        return torch.from_numpy(acts[np.sort(order)].astype(np.float32))
    seeded = torch.Generator().manual_seed(args.seed)
    groups = torch.randn(2 * args.rank, args.d, generator=seeded)
    groups *= torch.rand(groups.shape, generator=seeded) < args.keep
    z = torch.rand(args.rows, 2 * args.rank, generator=seeded)
    return (z * (z > 0.9)) @ groups + 0.1 * torch.randn(args.rows, args.d, generator=seeded)


def plain(x: Tensor, codes: Tensor, keep: int) -> Advance:
    """Return a straightforward implementation's update; each gives the loss."""
    g, eye = codes.T.contiguous(), torch.eye(len(codes))

    def advance() -> float:
        nonlocal g
        f = torch.linalg.inv(g.T @ g + 1e-6 * eye) @ (g.T @ x)
        least = f.abs().topk(keep, dim=1).values[:, -1:]
        f = f * (f.abs() >= least)
        norms = g.norm(dim=0)
        g, f = g / norms, f * norms[:, None]
        p, q = x @ f.T, f @ f.T
        up = p.clamp(min=0) + g @ (-q).clamp(min=0)
        down = (-p).clamp(min=0) + g @ q.clamp(min=0) + 1e-6
        g = g * (up / down).sqrt()
        return float((x - g @ f).square().sum())

    return advance


def saelab(x: Tensor, codes: Tensor, keep: int) -> Advance:
    from saelab.ops import factorise

    state = factorise.Whole.of(x.T.contiguous(), codes)

    def advance() -> float:
        nonlocal state
        state = state.next(keep)
        return state.factors.loss

    return advance


def work(args: argparse.Namespace) -> None:
    """Take the updates that each line of standard input asks for; answer with their seconds."""
    from saelab.ops import factorise

    torch.set_num_threads(args.threads)
    x = load(args)
    keep = -(-x.shape[1] * args.keep // 1)
    seeded = torch.Generator().manual_seed(args.seed)
    codes = factorise.start_codes(x.T.contiguous(), args.rank, args.start, seeded)
    advance = {"plain": plain, "saelab": saelab}[args.worker](x, codes, int(keep))
    spread = float((x - x.mean(0)).double().square().sum())
    for line in sys.stdin:
        started = time.perf_counter()
        loss = [advance() for _ in range(int(line))][-1]
        taken = time.perf_counter() - started
        print(json.dumps({"seconds": taken, "fvu": loss / spread}), flush=True)


class Contender:
    """A worker process, the seconds of its turns, and its last FVU."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.fvu = float("nan")
        command = [sys.executable, __file__, "--worker", name]
        for key in ("rank", "rows", "d", "keep", "start", "threads", "seed"):
            command += [f"--{key}", str(getattr(args, key))]
        command += ["--acts", str(args.acts)] if args.acts else []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen(command, **pipes)

    def take(self, updates: int, *, timed: bool = True) -> None:
        """Take some updates."""
        self.process.stdin.write(f"{updates}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with {self.process.wait()}")
        found = json.loads(answer)
        self.fvu = found["fvu"]
        if timed:
            self.seconds.append(found["seconds"] / updates)


def time_encoding(args: argparse.Namespace) -> dict[str, Any]:
    """Return what coding the rows takes, with features after some updates."""
    from saelab.ops import factorise
    from saelab.ops.nnls import nnls

    torch.set_num_threads(args.threads)
    x = load(args)
    seeded = torch.Generator().manual_seed(args.seed)
    codes = factorise.start_codes(x.T.contiguous(), args.rank, args.start, seeded)
    state = factorise.Whole.of(x.T.contiguous(), codes)
    for _ in range(args.rounds * TURN):
        state = state.next(int(-(-x.shape[1] * args.keep // 1)))
    nnls(x[:64], state.features)
    started = time.perf_counter()
    z = nnls(x, state.features)
    taken = time.perf_counter() - started
    large = (z > 0) & (z >= 0.01 * z.amax(1, keepdim=True))
    error = float((x - z @ state.features).double().square().sum()) / state.spread
    return {
        "impl": "nnls", "ms_per_1000_rows": round(1e6 * taken / len(x), 1), "fvu": error,
        "l0": round(float((z != 0).sum(1).float().mean()), 2),
        "l0_above_1_percent": round(float(large.sum(1).float().mean()), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--acts", type=Path)
    parser.add_argument("--rank", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--d", type=int, default=1536, help="width of planted neurons")
    parser.add_argument("--keep", type=float, default=0.01)
    parser.add_argument("--start", choices=("random", "kmeans", "svd"), default="random")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    contenders = {name: Contender(name, args) for name in NAMES}
    for one in contenders.values():
        one.take(WARM, timed=False)
    for _ in range(args.rounds):
        for one in contenders.values():
            one.take(TURN)
    first = contenders["plain"]
    for name, one in contenders.items():
        pairs = zip(first.seconds, one.seconds, strict=True)
        line: dict[str, Any] = {
            "impl": name, "ms": round(1e3 * statistics.median(one.seconds), 2),
            "times_plain": round(statistics.median(a / b for a, b in pairs), 2),
            "fvu": one.fvu, "fvu_off": abs(one.fvu / first.fvu - 1),
            "updates": WARM + TURN * args.rounds,
        }  # fmt: skip
        sizes = ("rank", "rows", "keep", "start", "rounds", "threads")
        print(json.dumps(line | {key: getattr(args, key) for key in sizes}), flush=True)
        one.process.stdin.close()
    if args.encode:
        print(json.dumps(time_encoding(args)), flush=True)


if __name__ == "__main__":
    main()
