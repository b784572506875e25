"""Speed and mixing of shuffled reading, from a warm cache.

python benchmarks/reader.py                    a synthetic store of 400k × 576 fp16, 530 documents
python benchmarks/reader.py --store PATH       a finished store
"""

import argparse
import hashlib
import json
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from saelab import artifacts
from saelab.store import DiskStore, StoreWriter, open_store
from saelab.types import Document, Shard, TokenTable

SITE = "site"
KEY = "0" * 64


def make_store(out: Path, n_rows: int, width: int, n_documents: int) -> Path:
    """Write random rows in documents of equal length, one window per 128 rows."""
    length = -(-n_rows // n_documents)
    step = 32_768
    with artifacts.open_draft(out, "store", "bench", KEY) as draft:
        with StoreWriter(draft, {SITE: width}, "float16", rows_per_shard=step) as writer:
            given = 0
            for first in range(0, n_rows, step):
                rows = torch.arange(first, min(first + step, n_rows))
                seeded = torch.Generator().manual_seed(first)
                x = torch.randn(len(rows), width, generator=seeded)
                document = rows // length
                window = rows // 128
                zeros = torch.zeros(len(rows), dtype=torch.int32)
                table = TokenTable(zeros, window, (rows % 128).int(), document, zeros, zeros)
                mask = (rows % 128 == 0).to(torch.uint8)
                new = range(given, int(document[-1]) + 1)
                given = int(document[-1]) + 1
                heldout = torch.zeros(len(rows), dtype=torch.bool)
                documents = tuple(Document(n, f"{n:064x}", False, "") for n in new)
                writer.append(Shard({SITE: x}, {SITE: mask}, table, heldout, documents))
            facts = writer.finish(median_norm={SITE: width**0.5})
        draft.finish(stage="store", name="bench", inputs={}, parents=[], facts=facts)
    return artifacts.artifact_path(out, "store", "bench", KEY)


def speed(store: DiskStore, site: str, batch: int, n_batches: int) -> float:
    """Rows per second over `n_batches`, the filling of the buffer included."""
    started = time.perf_counter()
    for _ in islice(store.batches(site, batch=batch, seed=1), n_batches):
        pass
    return n_batches * batch / (time.perf_counter() - started)


def distinct_share(store: DiskStore, site: str, batch: int, n_batches: int) -> float:
    """Distinct documents per batch, as a share of what a full permutation has."""
    documents = torch.cat([b.documents for b in store.scan(site, batch=65_536, split="train")])
    seeded = torch.Generator().manual_seed(0)
    full = [
        len(documents[torch.randperm(len(documents), generator=seeded)[:batch]].unique())
        for _ in range(n_batches)
    ]
    ours = [
        len(b.documents.unique())
        for b in islice(store.batches(site, batch=batch, seed=2), n_batches)
    ]
    return sum(ours) / sum(full)


def fingerprint(store: DiskStore, site: str, batch: int, n_batches: int) -> str:
    """Hash of the rows and values of the first batches."""
    sha = hashlib.sha256()
    for b in islice(store.batches(site, batch=batch, seed=3), n_batches):
        sha.update(b.rows.numpy().tobytes())
        sha.update(b.x.numpy().tobytes())
    return sha.hexdigest()


def report(path: Path, arguments: argparse.Namespace) -> None:
    store = open_store(path)
    if arguments.buffer_mb:
        store.buffer_bytes = arguments.buffer_mb * 2**20
    site = arguments.site or store.sites[0]
    batch = arguments.batch
    per_epoch = store.n_kept(site, "train") // batch
    speed(store, site, batch, per_epoch)
    rates = [speed(store, site, batch, 2 * per_epoch) for _ in range(arguments.repeats)]
    share = distinct_share(store, site, batch, min(per_epoch, 100))
    first, second = (fingerprint(open_store(path), site, batch, 20) for _ in range(2))
    for line in (
        {"what": "rows per second", "median": sorted(rates)[len(rates) // 2], "all": rates},
        {"what": "distinct documents per batch, share of a full permutation", "value": share},
        {"what": "two readers with one seed give identical batches", "value": first == second},
        {"what": "store", "rows": store.n_rows, "width": store.width(site), "batch": batch,
         "buffer_bytes": store.buffer_bytes, "threads": torch.get_num_threads()},
    ):  # fmt: skip
        print(json.dumps(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--site")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--documents", type=int, default=530)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--buffer-mb", type=int, default=0, help="0: the reader's default")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.store:
        report(arguments.store, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = make_store(Path(folder), arguments.rows, arguments.width, arguments.documents)
        report(path, arguments)


if __name__ == "__main__":
    main()
