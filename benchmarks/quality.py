"""Held-out FVU of our TopK trainer beside the peers', on the same rows in the same order.

    python benchmarks/quality.py --store runs/demo/store/... --peers /path/to/peers/bin/python

Every implementation trains d_sae latents, k of them active, for the same number of steps on
identical batches: the kept training rows of one site, in a fresh permutation per epoch fixed by the
seed. Per implementation the learning rate is chosen on order 0 under the schedule that we use too,
then the schedule at that rate; the best pair runs on the other orders. Peers run in their own
environment through `peers.py`; ours is the trainer that `saelab train` runs, in its defaults,
through `quality_saelab.py`.

`--acts FOLDER` takes `train.npy` and `heldout.npy` instead of a store. One JSON line per run goes
to `--out`, keyed by the rows' sha256; a run that stands there is not repeated. The table at the end
gives mean and standard error over orders, and the paired difference to the best peer.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LRS = (8e-4, 2e-3, 4e-3)
SCHEDULES = {
    "saelab": ("default",),
    "sparsify": ("warmup_decay", "constant", "linear"),
    "dictionary_learning": ("warmup_decay", "constant"),
    "sae_lens": ("warmup_decay", "constant"),
}

Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is equal for every implementation."""

    folder: Path
    rows: str
    d_sae: int
    k: int
    batch: int
    steps: int
    threads: int

    def common(self) -> Line:
        sizes = {"d_sae": self.d_sae, "k": self.k, "batch": self.batch, "steps": self.steps}
        return {"rows": self.rows, **sizes}


def order(n: int, total: int, seed: int) -> np.ndarray:
    """Row numbers of `total` training rows: permutations of range(n), one after another."""
    generator = np.random.default_rng(seed)
    epochs = -(-total // n)
    return np.concatenate([generator.permutation(n) for _ in range(epochs)])[:total].astype("int32")


def rows_hash(folder: Path) -> str:
    """The sha256 of the training and held-out rows' bytes."""
    found = hashlib.sha256()
    for name in ("train.npy", "heldout.npy"):
        found.update(np.ascontiguousarray(np.load(folder / name)).tobytes())
    return found.hexdigest()


def export_store(store_path: Path, site: str | None, folder: Path) -> None:
    """Write the kept rows of a store's site, training and held-out apart, as float16 .npy files."""
    import saelab

    store = saelab.open_store(store_path)
    site = site or store.sites[0]
    for split, name in (("train", "train.npy"), ("heldout", "heldout.npy")):
        parts = [b.x.half().numpy() for b in store.scan(site, batch=8192, split=split)]
        np.save(folder / name, np.concatenate(parts))


def run_worker(impl: str, schedule: str, lr: float, seed: int, args: Any, setting: Setting) -> Line:
    """Train and score once, in a process of its own."""
    here = Path(__file__).parent
    command = [str(args.peers), str(here / "peers.py"), impl, "--schedule", schedule]
    if impl == "saelab":
        command = [sys.executable, str(here / "quality_saelab.py")]
    command += ["--rows", str(setting.folder), "--order", str(setting.folder / f"order-{seed}.npy")]
    for name in ("d_sae", "k", "batch", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(setting, name))]
    command += ["--lr", str(lr), "--seed", str(seed)]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    head = {"impl": impl, "schedule": schedule, "lr": lr, "seed": seed}
    return {**head, **setting.common(), **found, "wall": round(time.time() - started, 1)}


def runner(args: Any, setting: Setting) -> Callable[[str, str, float, int], float]:
    """A function that returns a run's FVU, from the log where it stands there already."""
    lines = read_lines(args.out)

    def measure(impl: str, schedule: str, lr: float, seed: int) -> float:
        key = {"impl": impl, "schedule": schedule, "lr": lr, "seed": seed, **setting.common()}
        for line in lines:
            if all(line.get(name) == value for name, value in key.items()):
                return line["fvu"]
        line = run_worker(impl, schedule, lr, seed, args, setting)
        lines.append(line)
        with args.out.open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line["fvu"]

    return measure


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def compare(impls: Iterable[str], seeds: int, measure: Callable[..., float]) -> dict[str, Line]:
    """Choose the rate under the first schedule, then the schedule, on order 0; run the others."""
    found = {}
    for impl in impls:
        schedules = SCHEDULES[impl]
        lr = min(LRS, key=lambda rate: measure(impl, schedules[0], rate, 0))
        schedule = min(schedules, key=lambda name: measure(impl, name, lr, 0))
        values = [measure(impl, schedule, lr, seed) for seed in range(seeds)]
        found[impl] = {"schedule": schedule, "lr": lr, "fvu": np.array(values)}
    return found


def table(found: dict[str, Line]) -> str:
    """Markdown: mean and standard error over orders, and the paired difference to the best peer."""
    peers = {impl: row for impl, row in found.items() if impl != "saelab"}
    best = min(peers or found, key=lambda impl: found[impl]["fvu"].mean())
    lines = [
        f"| implementation | schedule | lr | held-out FVU | s.e. | minus {best} | s.e. |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for impl, row in sorted(found.items(), key=lambda item: item[1]["fvu"].mean()):
        fvu, difference = row["fvu"], row["fvu"] - found[best]["fvu"]
        lines.append(
            f"| {impl} | {row['schedule']} | {row['lr']:g} | {fvu.mean():.4f} | {_se(fvu):.4f} "
            f"| {difference.mean():+.4f} | {_se(difference):.4f} |"
        )
    return "\n".join(lines)


def _se(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--store", type=Path)
    source.add_argument("--acts", type=Path, help="folder with train.npy and heldout.npy")
    parser.add_argument("--site")
    parser.add_argument("--peers", type=Path, help="python of the peers' environment")
    parser.add_argument("--impls", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not args.peers and set(args.impls) != {"saelab"}:
        parser.error("--peers PYTHON is needed, or --impls saelab")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.store:
            export_store(args.store, args.site, folder)
        else:
            for name in ("train.npy", "heldout.npy"):
                (folder / name).symlink_to((args.acts / name).resolve())
        n = len(np.load(folder / "train.npy", mmap_mode="r"))
        for seed in range(args.seeds):
            np.save(folder / f"order-{seed}.npy", order(n, args.steps * args.batch, seed))
        sizes = (args.d_sae, args.k, args.batch, args.steps, args.threads)
        setting = Setting(folder, rows_hash(folder), *sizes)
        found = compare(args.impls, args.seeds, runner(args, setting))
    print(f"\nrows sha256 {setting.rows}\n\n{table(found)}")


if __name__ == "__main__":
    main()
