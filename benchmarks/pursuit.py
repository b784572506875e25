"""Time of matching pursuit beside the plain loop and SAELens, and whether they choose alike.

    python benchmarks/pursuit.py --acts ROWS.npy --n-atoms 16384 --k 32 --rows 1024
    python benchmarks/pursuit.py --acts ROWS.npy --n-atoms 4096 --peers PYTHON  # see peers.py
    python benchmarks/pursuit.py --acts ROWS.npy --dtype float64                # for the selections

ROWS.npy holds activations (n, d): some, at unit norm, are the atoms, and others are pursued. Every
contender lives in a process of its own; they take turns, so that a noisy machine is noisy for all.

    loop          scores every atom afresh at each step, takes the largest |score|, subtracts
    gram          makes the Gram matrix, nothing else
    gram_torch    `pursue` with the Gram matrix given and compiled kernels off
    saelab        the same as it is used
    saelab_nonneg the same by the rule of SAELens: the largest positive score
    sae_lens      its encoder with exactly k iterations: no threshold, no stop at equal supports

Prints one JSON line per contender: median milliseconds per call, rows per second, how many times
faster than the loop and than SAELens (medians of the rounds' ratios), distinct atoms per row, the
residual's share of the energy; for those that take the loop's rule also the share of rows with the
same selections, the largest relative gap between the two scores where a row first differs, and the
relative difference of the residuals' energy. `break_even_rows` is the number of rows from which
making the Gram matrix pays.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], Any]
CHOICES = ("loop", "gram_torch", "saelab")
"""Contenders whose selections are compared."""


def load(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return (atoms, rows): different rows of the file, in an order fixed by the seed."""
    acts = np.load(args.acts, mmap_mode="r")
    order = np.random.default_rng(args.seed).permutation(len(acts))[: args.n_atoms + args.rows]
    if len(order) < args.n_atoms + args.rows:
        raise SystemExit(f"{args.acts} holds {len(acts)} rows; atoms and rows need {len(order)}")
    some = torch.from_numpy(acts[np.sort(order)].astype(np.float32))[np.argsort(np.argsort(order))]
    some = some.to(getattr(torch, args.dtype))
    atoms = some[: args.n_atoms]
    return atoms / atoms.norm(dim=1, keepdim=True), some[args.n_atoms :]


def saelab(args: argparse.Namespace, atoms: Tensor, x: Tensor) -> Run:
    from saelab.ops import pursuit

    if args.worker == "loop":
        return lambda: pursuit.pursue_plainly(x, atoms, args.k)
    pursuit.GRAM_BYTES = 1 << 40
    if args.worker == "gram":
        return lambda: pursuit.gram_of(atoms)
    gram = pursuit.gram_of(atoms)
    sign = "nonneg" if args.worker == "saelab_nonneg" else "abs"
    return lambda: pursuit.pursue(x, atoms, args.k, gram=gram, sign=sign)


def sae_lens(args: argparse.Namespace, atoms: Tensor, x: Tensor) -> Run:
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

    limits = {"residual_threshold": 0.0, "max_iterations": args.k}
    config = MatchingPursuitSAEConfig(
        d_in=x.shape[1], d_sae=len(atoms), dtype=args.dtype, stop_on_duplicate_support=False,
        apply_b_dec_to_input=False, **limits,
    )  # fmt: skip
    sae = MatchingPursuitSAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(atoms)
    return lambda: sae.encode(x)


def result(worker: str, found: Any, atoms: Tensor, x: Tensor, path: str) -> dict[str, Any]:
    """Keep the order in `path`, and return what there is to say about one contender's codes."""
    if worker == "gram":
        return {}
    if worker == "sae_lens":
        codes = found
    else:
        order, values = found if worker == "loop" else (found.order, found.coefficients)
        np.save(path, order.numpy())
        codes = torch.zeros(len(x), len(atoms), dtype=x.dtype)
        codes.scatter_add_(1, order.clamp(min=0), values)
    left = (x.double() - (codes @ atoms).double()).square().sum()
    distinct = float((codes != 0).sum(1).double().mean())
    return {
        "distinct": round(distinct, 2),
        "residual": float(left / x.double().square().sum()),
    }


def work(args: argparse.Namespace) -> None:
    """Pursue once per line of standard input and answer with the seconds; then with the result."""
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        atoms, x = load(args)
        run = (sae_lens if args.worker == "sae_lens" else saelab)(args, atoms, x)
        found: Any = None
        for line in sys.stdin:
            if line.strip() == "time":
                started = time.perf_counter()
                found = run()
                print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
            else:
                answer = result(args.worker, found, atoms, x, line.strip())
                print(json.dumps(answer), flush=True)


class Contender:
    """A worker process and the seconds of its calls."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        self.seconds: list[float] = []
        python = args.peers if name == "sae_lens" else sys.executable
        command = [python, __file__, "--worker", name]
        for key in ("acts", "n_atoms", "k", "rows", "threads", "seed", "dtype"):
            command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
        kernels = {"SAELAB_KERNELS": "torch"} if name == "gram_torch" else {}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen(command, env=os.environ | kernels, **pipes)

    def ask(self, what: str) -> dict[str, Any]:
        """Send a line and return the answer; other lines that a library prints are skipped."""
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with {self.process.wait()}")


def agreement(own: np.ndarray, loop: np.ndarray, atoms: Tensor, x: Tensor) -> dict[str, Any]:
    """Compare selections row by row; a row's first difference is scored after the same steps."""
    same = own == loop
    gaps = []
    for row in np.nonzero(~same.all(1))[0]:
        step = int(np.argmin(same[row]))
        residual = x[row].double()
        for atom in loop[row, :step]:
            direction = atoms[atom].double()
            residual = residual - (residual @ direction) * direction
        pair = [float((atoms[o[row, step]].double() @ residual).abs()) for o in (loop, own)]
        gaps.append(abs(pair[0] - pair[1]) / max(pair))
    return {
        "same_rows": round(float(same.all(1).mean()), 5),
        "largest_gap": max(gaps, default=0.0),
    }


def ratio(slow: Contender, quick: Contender) -> float:
    pairs = zip(slow.seconds, quick.seconds, strict=True)
    return round(statistics.median(a / b for a, b in pairs), 2)


def lines(args: argparse.Namespace, contenders: dict[str, Contender]) -> list[dict[str, Any]]:
    """Return one line of figures per contender."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}.npy" for name in contenders}
        answers = {name: one.ask(paths[name]) for name, one in contenders.items()}
        orders = {name: np.load(paths[name]) for name in CHOICES}
    atoms, x = load(args)
    loop, gram = contenders["loop"], contenders["gram"]
    found = []
    for name, one in contenders.items():
        seconds = statistics.median(one.seconds)
        line: dict[str, Any] = {"impl": name, "ms": round(1e3 * seconds, 1)}
        if name != "gram":
            line |= {"rows_s": round(args.rows / seconds), "times_loop": ratio(loop, one)}
        if "sae_lens" in contenders and name != "gram":
            line["times_sae_lens"] = ratio(contenders["sae_lens"], one)
        line |= answers[name]
        if name in CHOICES[1:]:
            line |= agreement(orders[name], orders["loop"], atoms, x)
            plain = answers["loop"]["residual"]
            line["energy_off"] = abs(line["residual"] / plain - 1)
            rounds = zip(gram.seconds, loop.seconds, one.seconds, strict=True)
            pays = statistics.median(g / (a - b) for g, a, b in rounds)
            line["break_even_rows"] = round(args.rows * pays)
        sizes = ("n_atoms", "k", "rows", "rounds", "threads", "dtype")
        found.append(line | {key: getattr(args, key) for key in sizes})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--acts", type=Path, required=True)
    parser.add_argument("--n-atoms", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--peers", help="python of the peers' environment")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    names = ["loop", "gram", "gram_torch", "saelab"]
    names += ["saelab_nonneg", "sae_lens"] if args.peers else []
    contenders = {name: Contender(name, args) for name in names}
    for one in contenders.values():
        one.ask("time")
    for _ in range(args.rounds):
        for one in contenders.values():
            one.seconds.append(one.ask("time")["seconds"])
    for line in lines(args, contenders):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
