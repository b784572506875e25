import multiprocessing
from pathlib import Path

import pytest

from saelab import artifacts
from saelab.errors import ArtifactError, LockedError

KEY = "ab" * 32


def make(out: Path, name: str = "thing", key: str = KEY, content: bytes = b"data", parents=()):
    with artifacts.open_draft(out, "store", name, key) as draft:
        draft.write("a.bin", content)
        draft.finish(stage="store", name=name, inputs={"n": 1}, parents=list(parents))
        return draft.target


def test_a_finished_artifact_is_found_by_its_key_and_verifies(tmp_path):
    path = make(tmp_path)
    assert artifacts.find(tmp_path, "store", "thing", KEY) == path
    assert artifacts.find(tmp_path, "store", "thing", "cd" * 32) is None
    artifacts.verify(path)


def test_equal_content_under_another_key_has_the_same_content_hash(tmp_path):
    first, second = make(tmp_path), make(tmp_path, key="cd" * 32)
    hashes = {artifacts.read_manifest(p).content_hash for p in (first, second)}
    assert len(hashes) == 1


def test_an_altered_or_truncated_file_is_named(tmp_path):
    path = make(tmp_path)
    (path / "a.bin").write_bytes(b"DATA")
    with pytest.raises(ArtifactError, match=r"a\.bin does not have its recorded sha256"):
        artifacts.verify(path)
    (path / "a.bin").write_bytes(b"da")
    with pytest.raises(ArtifactError, match=r"a\.bin should have 4 bytes but has 2"):
        artifacts.verify(path)
    (path / "a.bin").unlink()
    with pytest.raises(ArtifactError, match=r"a\.bin is missing"):
        artifacts.verify(path)


def test_an_unfinished_draft_is_not_found_and_keeps_its_files(tmp_path):
    with artifacts.open_draft(tmp_path, "store", "x", KEY) as draft:
        draft.write("a.bin", b"1")
    assert artifacts.find(tmp_path, "store", "x", KEY) is None
    assert artifacts.find_all(tmp_path) == []
    with artifacts.open_draft(tmp_path, "store", "x", KEY) as draft:
        assert (draft.folder / "a.bin").read_bytes() == b"1"


def test_another_schema_is_refused(tmp_path):
    path = make(tmp_path)
    data = artifacts.read_json(path / "manifest.json") | {"schema": 99}
    artifacts.write_json(path / "manifest.json", data)
    with pytest.raises(ArtifactError, match="schema 99"):
        artifacts.read_manifest(path)


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path):
    with artifacts.open_draft(tmp_path, "store", "x", KEY):
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            message = pool.apply(_try_to_open, (str(tmp_path),))
    assert "is being written by process" in message


def _try_to_open(out: str) -> str:
    try:
        with artifacts.open_draft(Path(out), "store", "x", KEY):
            return "opened"
    except LockedError as error:
        return str(error)


def test_scratch_files_do_not_survive_and_do_not_count(tmp_path):
    with artifacts.open_draft(tmp_path, "store", "x", KEY) as draft:
        draft.scratch.mkdir()
        (draft.scratch / "checkpoint").write_bytes(b"1")
        draft.write("a.bin", b"data")
        manifest = draft.finish(stage="store", name="x", inputs={}, parents=[])
    assert list(manifest.files) == ["a.bin"]
    assert not (draft.target / "scratch").exists()


def test_the_registry_finds_what_another_out_made_and_adopts_it(tmp_path):
    registry = artifacts.Registry(tmp_path / "registry")
    path = make(tmp_path / "one")
    registry.record(artifacts.read_manifest(path), path)
    assert registry.find(KEY) == path
    target = artifacts.artifact_path(tmp_path / "two", "store", "thing", KEY)
    artifacts.adopt(path, target)
    artifacts.verify(target)
    (path / "manifest.json").unlink()
    assert registry.find(KEY) is None


def test_lineage_walks_back_to_the_oldest_ancestor(tmp_path):
    old = make(tmp_path, "old")
    new = make(tmp_path, "new", "cd" * 32, b"more", [artifacts.parent_of(old)])
    assert [(depth, m.name) for depth, _, m in artifacts.lineage(new)] == [(0, "new"), (1, "old")]


def test_the_key_depends_on_inputs_version_and_parents_but_not_on_their_paths():
    parent = artifacts.Parent("store", "s", "hash", "/here")
    moved = artifacts.Parent("store", "t", "hash", "/there")
    base = artifacts.stage_key("dictionary", 1, {"k": 32}, [parent])
    assert base == artifacts.stage_key("dictionary", 1, {"k": 32}, [moved])
    assert base != artifacts.stage_key("dictionary", 2, {"k": 32}, [parent])
    assert base != artifacts.stage_key("dictionary", 1, {"k": 64}, [parent])
