"""Every stage, stopped at every write, fsync and rename and by real kills, ends in the same
bytes."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
from crash import Crash, crash_at

from saelab import artifacts, pipeline

SEED = 20
STAGE = {"harvest": "store", "train": "dictionary", "evaluate": "results", "index": "features"}


def config(root: Path) -> dict:
    core = {"rows": 128, "pursuit_rows": 32, "fit_rows": 128, "windows": 2, "resamples": 10}
    return {
        "name": "toy",
        "model": {"source": "toy", "dtype": "float32"},
        "corpus": {"source": "toy", "context": 32, "tokens": 1200, "holdout": 0.3, "min_tail": 8},
        "harvest": {"sites": ["blocks.1.hook_resid_post"], "rows_per_shard": 500},
        "dictionaries": [{"type": "topk", "d_sae": 24, "k": 3}],
        "train": {"batch": 64, "tokens": 384, "log_every": 2, "checkpoint_every": 0.34},
        "evaluate": {"core": core},
        "index": {},
        "out": str(root / "out"),
    }


def run(root: Path, until: str) -> None:
    """Run up to a stage with everything, the cache included, under `root`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(root / "cache"))
        # the page cache survives a killed process: waiting for the disk would only cost time
        patch.setattr("os.fsync", lambda _: None)
        pipeline.run(config(root), until=until)


def finished(root: Path, stage: str) -> dict[str, str]:
    """Return the hash of every file of the stage's one artifact, after checking them."""
    place = root / "cache" / "artifacts" if stage == "harvest" else root / "out"
    found = artifacts.find_all(place, STAGE[stage])
    assert len(found) == 1
    artifacts.verify(found[0][0])
    return {name: entry["sha256"] for name, entry in found[0][1].files.items()}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """For each stage, a folder in which all earlier stages are done; and the bytes it should end
    in."""
    base = tmp_path_factory.mktemp("before")
    done: Path | None = None
    ready, whole = {}, {}
    for stage in pipeline.STAGES:
        ready[stage] = base / stage
        if done is not None:
            copy(done, ready[stage])
        else:
            ready[stage].mkdir()
        done = base / f"{stage}-done"
        copy(ready[stage], done)
        run(done, stage)
        whole[stage] = finished(done, stage)
    return ready, whole


def copy(source: Path, target: Path) -> None:
    """Copy a prepared folder; the registry's absolute paths and the store's link stay behind."""
    ignore = shutil.ignore_patterns("registry", ".*.lock")
    shutil.copytree(source, target, symlinks=True, ignore=ignore, dirs_exist_ok=True)
    shutil.rmtree(target / "out" / "store", ignore_errors=True)


@pytest.mark.parametrize("stage", pipeline.STAGES)
def test_a_crash_at_any_write_fsync_or_rename_changes_no_byte(before, stage, tmp_path):
    ready, whole = before
    copy(ready[stage], tmp_path / "count")
    with crash_at(None) as calls:
        run(tmp_path / "count", stage)
    assert len(calls.seen) > 5
    for number in range(len(calls.seen)):
        root = tmp_path / str(number)
        copy(ready[stage], root)
        with pytest.raises(Crash), crash_at(number):
            run(root, stage)
        run(root, stage)
        assert finished(root, stage) == whole[stage], f"crashed at {calls.seen[number]}"
        assert not [p for p in root.rglob(".*") if p.name.endswith((".partial", ".tmp"))]
        shutil.rmtree(root)


def _child(root: str, stage: str, started: "multiprocessing.synchronize.Event") -> None:
    import torch

    torch.set_num_threads(1)
    started.set()
    run(Path(root), stage)


def _kill_midway(context, root: Path, stage: str, delay: float) -> bool:
    """Start the stage in a process, kill -9 it after `delay`; say whether it was still running."""
    started = context.Event()
    process = context.Process(target=_child, args=(str(root), stage, started))
    process.start()
    assert started.wait(60)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -9


@pytest.mark.parametrize("stage", pipeline.STAGES)
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_process_changes_no_byte(before, stage, kills, tmp_path):
    ready, whole = before
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saelab.pipeline", "saelab.models.toy"])
    chance, duration, killed = random.Random(SEED), 1.0, 0
    for number in range(10 * kills):
        root = tmp_path / str(number)
        copy(ready[stage], root)
        was_running = _kill_midway(context, root, stage, duration * chance.random())
        killed += was_running
        duration *= 1 if was_running else 0.7
        run(root, stage)
        assert finished(root, stage) == whole[stage]
        if killed == kills:
            break
    assert killed == kills
