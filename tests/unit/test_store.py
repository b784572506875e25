"""The store: what is written is what is read, in order and shuffled."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab import artifacts
from saelab.errors import (
    ArtifactError,
    ConfigError,
    CorpusError,
    NonFiniteError,
    ShapeError,
    SiteError,
)
from saelab.ops import shuffle
from saelab.store import StoreWriter, open_store
from saelab.types import Document, Mask, Shard, TokenTable

A, B = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
TEXT = "ab cd"


def make_shard(x, first=0, *, window=4, masks=None, heldout=None, per_document=8):
    """Rows from `first` on: windows of 4, two windows per document, masks per site."""
    n = len(next(iter(x.values())))
    rows = torch.arange(first, first + n)
    document = rows // per_document
    table = TokenTable(
        (rows % 7).int(), rows // window, (rows % window).int(), document,
        (rows % 5).int(), (rows % 5 + 1).int(),
    )  # fmt: skip
    new = sorted({int(d) for d, r in zip(document, rows, strict=True) if r % per_document == 0})
    held = heldout or (lambda number: number % 4 == 3)
    documents = tuple(Document(number, f"{number:064x}", held(number), TEXT) for number in new)
    none = {site: torch.zeros(n, dtype=torch.uint8) for site in x}
    flags = torch.tensor([held(int(number)) for number in document])
    return Shard(x, none | (masks or {}), table, flags, documents)


def write(out, shards, dtype="float32", key="b" * 64):
    widths = {site: x.shape[1] for site, x in shards[0].x.items()}
    with artifacts.open_draft(out, "store", "s", key) as draft:
        with StoreWriter(draft, widths, dtype) as writer:
            for shard in shards:
                writer.append(shard)
            facts = writer.finish(median_norm=dict.fromkeys(widths, 1.0))
        draft.finish(stage="store", name="s", inputs={}, parents=[], facts=facts)
    return artifacts.artifact_path(out, "store", "s", key)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """96 rows at two sites in three shards; every third row masked at the second site."""
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
    shards = []
    for first in (0, 32, 64):
        part = slice(first, first + 32)
        mask = torch.where(torch.arange(first, first + 32) % 3 == 0, 8, 0).to(torch.uint8)
        rows = {A: x[part], B: -2 * x[part, :3]}
        shards.append(make_shard(rows, first, masks={B: mask}))
    return x, open_store(write(tmp_path_factory.mktemp("small"), shards))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_come_back_bit_for_bit_in_their_dtype(tmp_path, dtype):
    x = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
    store = open_store(write(tmp_path, [make_shard({A: x})], dtype))
    refs = torch.tensor([31, 0, 7, 7])
    assert torch.equal(store.rows(A, refs), x.to(getattr(torch, dtype)).float()[refs])


def test_equal_stores_have_equal_bytes(tmp_path):
    x = torch.randn(32, 5)
    first, second = (write(tmp_path / n, [make_shard({A: x, B: x + 1})]) for n in "ab")
    assert artifacts.read_manifest(first) == artifacts.read_manifest(second)


def test_a_document_keeps_whose_it_is_and_is_written_as_before_where_it_is_nobodys(tmp_path):
    shard = make_shard({A: torch.randn(16, 5)})
    film, other = replace(shard.documents[0], split_hash="f" * 64), shard.documents[1]
    folder = write(tmp_path, [replace(shard, documents=(film, other))])
    store = open_store(folder)
    assert [store.document(n) for n in (0, 1)] == [replace(film, group=0), replace(other, group=1)]
    lines = (folder / "documents-00000.jsonl").read_text().splitlines()
    before = {"document", "group", "hash", "heldout", "label", "text"}
    assert [json.loads(line).keys() - before for line in lines] == [{"split_hash"}, set()]


def test_masks_are_kept_per_site(small):
    _, store = small
    assert store.n_kept(A, "all") == 96
    assert store.n_kept(A, "train") == 72
    assert store.n_kept(B, "all") == 64
    assert store.facts["masked"][B]["NORM_OUTLIER"] == 32
    assert store.window(A, 0).kept.tolist() == [True] * 4
    assert store.window(B, 0).kept.tolist() == [False, True, True, False]


def test_scan_gives_each_kept_row_of_a_split_once_in_order(small):
    x, store = small
    found = list(store.scan(B, batch=7, split="train"))
    rows = torch.cat([b.rows for b in found])
    wanted = [r for r in range(96) if r % 3 and (r // 8) % 4 != 3]
    assert rows.tolist() == wanted
    assert torch.equal(torch.cat([b.x for b in found]), -2 * x[wanted, :3])
    assert [len(b) for b in found[:-1]] == [7] * (len(found) - 1)
    assert torch.equal(torch.cat([b.documents for b in found]), rows // 8)


def test_scan_can_give_the_masked_rows_too(small):
    _, store = small
    assert torch.cat([b.rows for b in store.scan(B, batch=10, masked=True)]).tolist() == [
        *range(96)
    ]


def test_a_target_site_is_aligned_and_kept_by_both_masks(small):
    x, store = small
    for b in islice(store.batches(A, batch=8, seed=0, target=B), 20):
        assert (b.rows % 3 != 0).all()
        assert torch.equal(b.x, x[b.rows])
        assert torch.equal(b.y, -2 * x[b.rows, :3])
    b = next(store.batches(A, batch=8, seed=0))
    assert b.y is b.x


@pytest.mark.parametrize("buffer_bytes", [1, 2**20])
@pytest.mark.parametrize("batch", [5, 8])
def test_each_epoch_gives_each_kept_row_exactly_once(small, batch, buffer_bytes):
    _, store = small
    store.buffer_bytes = buffer_bytes
    wanted = torch.cat([b.rows for b in store.scan(A, batch=96, split="train")])
    stream = torch.cat([b.rows for b in islice(store.batches(A, batch=batch, seed=1), 72)])
    epochs = stream[: len(stream) // 72 * 72].view(-1, 72)
    assert all(torch.equal(epoch.sort().values, wanted) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("buffer_bytes", [1, 2**20])
def test_starting_later_equals_skipping(small, buffer_bytes, drop_last):
    _, store = small
    store.buffer_bytes = buffer_bytes
    options = {"batch": 7, "seed": 3, "drop_last": drop_last}
    whole = [b.rows for b in islice(store.batches(A, **options), 40)]
    for start in (1, 10, 11, 12, 30):
        later = next(store.batches(A, start=start, **options))
        assert torch.equal(later.rows, whole[start])


def test_epochs_can_end_with_a_short_batch(small):
    _, store = small
    sizes = [len(b) for b in islice(store.batches(A, batch=10, seed=0, drop_last=False), 16)]
    assert sizes == ([10] * 7 + [2]) * 2


def test_two_readers_with_one_seed_agree_and_other_seeds_differ(small):
    _, store = small

    def first(seed):
        return next(open_store(store.path).batches(A, batch=16, seed=seed))

    assert torch.equal(first(5).rows, first(5).rows)
    assert torch.equal(first(5).x, first(5).x)
    assert not torch.equal(first(5).rows, first(6).rows)


def test_a_batch_larger_than_the_split_is_refused(small):
    _, store = small
    with pytest.raises(CorpusError, match=r"keeps only 24 heldout rows"):
        store.batches(A, batch=25, seed=0, split="heldout")


def test_statistics_are_those_of_the_kept_training_rows(small):
    x, store = small
    kept = x[[r for r in range(96) if (r // 8) % 4 != 3]].double()
    stats = store.stats(A)
    torch.testing.assert_close(stats.mean, kept.mean(0), rtol=0, atol=1e-12)
    assert stats.n == 72
    assert stats.mean_norm == pytest.approx(float(kept.norm(dim=1).mean()), rel=1e-12)
    assert stats.total_variance == pytest.approx(float(kept.var(0, correction=0).sum()), rel=1e-9)


def test_statistics_do_not_depend_on_where_shards_are_cut(tmp_path):
    x = torch.randn(64, 4)
    whole = open_store(write(tmp_path / "a", [make_shard({A: x})]))
    parts = [make_shard({A: x[:16]}), make_shard({A: x[16:]}, 16)]
    cut = open_store(write(tmp_path / "b", parts))
    assert whole.stats(A).total_variance == pytest.approx(cut.stats(A).total_variance, rel=1e-12)


def test_windows_and_context_show_the_text_of_the_document(small):
    _, store = small
    window = store.window(A, 1)
    assert (window.first_row, window.strings) == (4, ("d", "a", "b", " "))
    assert store.window_of(torch.tensor([0, 3, 4, 95])).tolist() == [0, 0, 1, 23]
    assert store.context(5, 3, 1) == (["d", "a", "b"], 1)
    assert store.context(5, 0, 9) == (["a", "b", " "], 0)
    assert [w.number for w in store.windows(A, split="heldout", limit=3)] == [6, 7, 14]
    assert store.document(3) == Document(3, f"{3:064x}", True, TEXT, None, 3)


def test_unknown_sites_rows_and_windows_are_named(small):
    _, store = small
    with pytest.raises(SiteError, match="did you mean 'blocks"):
        store.width("blocks.0.hook_resid_pos")
    with pytest.raises(ShapeError, match=r"0 … 95"):
        store.rows(A, torch.tensor([96]))
    with pytest.raises(ShapeError, match=r"0 … 23"):
        store.window(A, 24)
    with pytest.raises(ShapeError, match=r"0 … 95"):
        store.context(96, 1, 1)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "documents-00000.jsonl"])
def test_a_truncated_file_is_named_on_opening(tmp_path, name):
    path = write(tmp_path, [make_shard({A: torch.randn(32, 4)})])
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=name):
        open_store(path)
    (path / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing"):
        open_store(path)


def test_a_header_that_does_not_fit_is_named(tmp_path):
    path = write(tmp_path, [make_shard({A: torch.randn(32, 4)})])
    shard = path / "shard-00000.safetensors"
    data = shard.read_bytes()
    for broken in (b"\xff" * 8 + data[8:], data[:8] + b"{" * 8 + data[16:]):
        shard.write_bytes(broken)
        with pytest.raises(
            ArtifactError, match=r"shard-00000\.safetensors was truncated or altered"
        ):
            open_store(path).rows(A, torch.tensor([0]))


def test_an_altered_byte_is_found_by_the_hash(tmp_path):
    path = write(tmp_path, [make_shard({A: torch.randn(32, 4)})])
    shard = path / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match="shard-00000"):
        artifacts.verify(path)


def test_nan_in_a_kept_row_names_site_document_and_position(tmp_path):
    x = torch.randn(32, 4)
    x[13, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"{A}.*position 1 of window 3, document 1"):
        write(tmp_path, [make_shard({A: x})])
    assert artifacts.find_all(tmp_path) == []


def test_nan_in_masked_rows_is_a_warning_and_marked(tmp_path, caplog):
    x = torch.randn(32, 4)
    x[13] = float("inf")
    mask = torch.zeros(32, dtype=torch.uint8)
    mask[13] = int(Mask.FIRST)
    store = open_store(write(tmp_path, [make_shard({A: x}, masks={A: mask})]))
    assert "1 masked rows" in caplog.text
    assert store.facts["masked"][A]["NONFINITE"] == 1
    assert store.n_kept(A, "all") == 31
    assert mask[13] == int(Mask.FIRST)


def test_a_value_beyond_float16_says_which_dtype_to_use(tmp_path):
    x = torch.randn(32, 4)
    x[3, 0] = 7e4
    with pytest.raises(NonFiniteError, match=r"7e\+04.*bfloat16 or float32"):
        write(tmp_path / "a", [make_shard({A: x})], "float16")
    assert open_store(write(tmp_path / "b", [make_shard({A: x})], "bfloat16")).n_rows == 32


def test_shards_of_other_sites_or_lengths_are_refused(tmp_path):
    shard = make_shard({A: torch.randn(32, 4)})
    with pytest.raises(ShapeError, match="a shard has"):
        write(tmp_path, [shard, make_shard({A: torch.randn(32, 5)}, 32)])
    with pytest.raises(ConfigError, match="float16"):
        write(tmp_path, [shard], "float61", key="c" * 64)


def test_a_store_without_rows_is_refused(tmp_path):
    with (
        artifacts.open_draft(tmp_path, "store", "s", "d" * 64) as draft,
        StoreWriter(draft, {A: 2}, "float32") as writer,
        pytest.raises(ArtifactError, match="at least one row"),
    ):
        writer.finish(median_norm={A: 1.0})


def test_another_artifact_is_no_store(tmp_path):
    with artifacts.open_draft(tmp_path, "results", "r", "e" * 64) as draft:
        draft.write("results.jsonl", json.dumps({}).encode())
        draft.finish(stage="results", name="r", inputs={}, parents=[])
    with pytest.raises(ArtifactError, match="is a results, not a store"):
        open_store(artifacts.artifact_path(tmp_path, "results", "r", "e" * 64))


@given(
    counts=st.lists(st.integers(0, 16), min_size=1, max_size=60),
    capacity=st.integers(1, 200),
    seed=st.integers(0, 9),
)
def test_buffers_of_a_block_order_hold_each_block_once_and_not_too_many_rows(
    counts, capacity, seed
):
    import numpy as np

    sizes = np.array(counts)
    order = shuffle.block_order(sizes, capacity, seed, 0)
    buffers = [order.buffer(j) for j in range(len(order.ends))]
    assert sorted(np.concatenate(buffers).tolist()) == np.flatnonzero(sizes).tolist()
    assert all(sizes[buffer].sum() < capacity + 16 for buffer in buffers)
    assert order.row_ends[-1] == sizes.sum()


def test_a_seed_for_one_place_is_not_that_of_another():
    drawn = {tuple(shuffle.permutation(20, 0, a, b).tolist()) for a in range(3) for b in range(3)}
    assert len(drawn) == 9


def test_batches_mix_documents_as_a_full_permutation_does(tmp_path):
    x = torch.zeros(16_384, 1)
    shard = make_shard({A: x}, per_document=128, heldout=lambda _: False)
    store = open_store(write(tmp_path, [shard]))
    store.buffer_bytes = 4 * 8192
    ours = [len(b.documents.unique()) for b in islice(store.batches(A, batch=256, seed=0), 64)]
    order = shuffle.permutation(16_384, 0).view(-1, 256) // 128
    full = [len(row.unique()) for row in order]
    assert sum(ours) >= 0.9 * sum(full)
