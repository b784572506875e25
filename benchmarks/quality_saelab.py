"""Train one TopK dictionary with our own trainer in its defaults; the counterpart of `peers.py`.

python benchmarks/quality_saelab.py --rows FOLDER --order FOLDER/order-0.npy --lr 2e-3
"""

import argparse
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab import dictionaries
from saelab.protocols import SiteStats
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch

SITE = "rows"


class ArrayStore:
    """Rows of one site in a fixed order: the part of the `Store` protocol that training reads."""

    def __init__(self, rows: np.ndarray, order: np.ndarray) -> None:
        self.rows, self.order = rows, order
        x = torch.from_numpy(rows.astype(np.float32)).double()
        norms = x.norm(dim=1)
        square = float((norms**2).mean())
        self.found = SiteStats(
            len(x), x.mean(0), float(norms.mean()), square, float(norms.median())
        )

    def width(self, _: str) -> int:
        return self.rows.shape[1]

    def n_kept(self, _: str, __: str) -> int:
        return len(self.rows)

    def stats(self, _: str) -> SiteStats:
        return self.found

    def batches(self, _: str, *, batch: int, start: int = 0, **__: Any) -> Iterator[Batch]:
        for first in range(start * batch, len(self.order) - batch + 1, batch):
            chosen = self.order[first : first + batch]
            x = torch.from_numpy(self.rows[chosen].astype(np.float32))
            numbers = torch.from_numpy(chosen.astype(np.int64))
            yield Batch(x, x, numbers, numbers)


def fvu(x: torch.Tensor, dictionary: Any) -> float:
    """Σ‖x − x̂‖² / Σ‖x − mean‖² in float64."""
    mean = x.double().mean(0)
    error = total = 0.0
    with torch.no_grad():
        for rows in x.split(4096):
            error += float(((rows - dictionary.reconstruct(rows)).double() ** 2).sum())
            total += float(((rows.double() - mean) ** 2).sum())
    return error / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--order", type=Path, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the initialisation")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    order = np.load(args.order)
    train = np.load(args.rows / "train.npy", mmap_mode="r")
    store: Any = ArrayStore(train, order)
    sizes = {"d_in": train.shape[1], "d_sae": args.d_sae, "k": args.k}
    untrained = dictionaries.create({"type": "topk", **sizes})
    member = Member("quality", untrained, SITE, lr=args.lr, seed=args.seed)
    config = TrainConfig(batch=args.batch, tokens=len(order))
    started = time.perf_counter()
    [fitted] = fit([member], store, config)
    seconds = time.perf_counter() - started
    heldout = torch.from_numpy(np.load(args.rows / "heldout.npy").astype(np.float32))
    found = {
        "fvu": fvu(heldout, fitted.dictionary),
        "dead": fitted.facts["last_dead"],
        "seconds": round(seconds, 1),
        "ms_per_step": round(1e3 * seconds / config.steps, 1),
        "version": version("saelab"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
