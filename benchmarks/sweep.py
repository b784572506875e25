"""Members on one stream beside their solo runs: time of a step, and memory.

    python benchmarks/sweep.py --store runs/demo/store/...     # eight TopK, 16,384 latents
    python benchmarks/sweep.py --store runs/demo/store/... --d-sae 4096

Two processes take turns, a few steps each, so that a noisy machine is noisy for both: `sweep`
trains all members on one stream, `solo` each on a stream of its own. All run the real trainer and
reader in their defaults. `ratio` is the sweep's whole step over the sum of the solo steps without
reading plus one read of the store (median of the rounds' ratios). `member_mb` is what one member
adds to the peak memory of a process, by processes with one and with two members; `memory_ratio`
is the sweep's peak over that of a process with one member plus this for each other member.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TURN = 2
"""Steps that a process takes before the other one's turn."""
WARM = 2

Advance = Callable[[], list[float]]


def sweep_of(args: argparse.Namespace, seeds: range) -> Any:
    """The real sweep over members that differ in their seed."""
    import saelab
    from saelab import dictionaries
    from saelab.train.fit import Member, Sweep, TrainConfig

    store = saelab.open_store(args.store)
    site = args.site or store.sites[0]
    tokens = args.batch * (args.steps + WARM)
    config = TrainConfig(batch=args.batch, tokens=tokens, dead_window=10**9)  # as early in a run
    sizes = {"type": "topk", "d_in": store.width(site), "d_sae": args.d_sae, "k": args.k}
    members = [Member(f"m{s}", dictionaries.create(sizes), site, seed=s) for s in seeds]
    return Sweep(members, store, config)


def together(args: argparse.Namespace) -> Advance:
    """One step of all members: [seconds]."""
    sweep = sweep_of(args, range(args.members))

    def advance() -> list[float]:
        started = time.perf_counter()
        sweep.step()
        return [time.perf_counter() - started]

    return advance


def apart(args: argparse.Namespace) -> Advance:
    """One step of each member by itself: [seconds stepping, in all; seconds of one read]."""
    solos = [sweep_of(args, range(seed, seed + 1)) for seed in range(args.members)]

    def advance() -> list[float]:
        before = [dict(solo.clock.seconds) for solo in solos]
        for solo in solos:
            solo.step()
        spent = {
            part: [
                solo.clock.seconds[part] - b[part] for solo, b in zip(solos, before, strict=True)
            ]
            for part in ("stepping", "reading")
        }
        return [sum(spent["stepping"]), statistics.median(spent["reading"])]

    return advance


def work(args: argparse.Namespace) -> None:
    """Take steps when asked through standard input, and answer with their times."""
    torch.set_num_threads(args.threads)
    advance = {"sweep": together, "solo": apart}[args.worker](args)
    for line in sys.stdin:
        times = [advance() for _ in range(int(line))]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"times": times, "peak_mb": peak}), flush=True)


class Worker:
    """A process of the same script."""

    def __init__(self, name: str, args: argparse.Namespace, members: int) -> None:
        command = [sys.executable, __file__, "--worker", name, "--members", str(members)]
        for key in ("store", "d_sae", "k", "batch", "steps", "threads"):
            command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
        command += ["--site", args.site] if args.site else []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen(command, **pipes)

    def ask(self, steps: int) -> dict[str, Any]:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def peak(args: argparse.Namespace, members: int) -> float:
    """Peak memory in MB of a process that trains this many members for a few steps."""
    worker = Worker("sweep", args, members)
    found = worker.ask(WARM + 2)["peak_mb"]
    worker.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--site")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    one, two, all_of_them = (peak(args, n) for n in (1, 2, args.members))
    workers = {name: Worker(name, args, args.members) for name in ("sweep", "solo")}
    for worker in workers.values():
        worker.ask(WARM)
    rounds = []
    for _ in range(0, args.steps, TURN):
        sweep, solo = (workers[name].ask(TURN)["times"] for name in ("sweep", "solo"))
        whole = statistics.mean(step[0] for step in sweep)
        stepping, reading = (statistics.mean(step[part] for step in solo) for part in (0, 1))
        rounds.append((whole, stepping, reading))
    for worker in workers.values():
        worker.close()
    sweep_ms, solo_ms, read_ms = (
        1e3 * statistics.median(part) for part in zip(*rounds, strict=True)
    )
    line = {
        "members": args.members,
        "sweep_ms": round(sweep_ms, 1),
        "solo_sum_ms": round(solo_ms, 1),
        "read_ms": round(read_ms, 1),
        "ratio": round(statistics.median(w / (s + r) for w, s, r in rounds), 4),
        "peak_mb": round(all_of_them),
        "member_mb": round(two - one),
        "memory_ratio": round(all_of_them / (one + (args.members - 1) * (two - one)), 3),
    }
    sizes = {key: getattr(args, key) for key in ("d_sae", "k", "batch", "steps", "threads")}
    print(json.dumps(line | sizes))


if __name__ == "__main__":
    main()
