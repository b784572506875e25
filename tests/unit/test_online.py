"""The store without a disk agrees with the one on disk wherever both can answer."""

from itertools import islice

import pytest
import torch
from conftest import SITES

from saelab.errors import ArtifactError, CorpusError, NonFiniteError, SiteError
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.forward import HarvestConfig
from saelab.harvest.online import OnlineStore


@pytest.fixture(scope="module")
def online(toy_model, toy_corpus):
    """The same corpus and settings as the fixture on disk."""
    corpus = CorpusConfig(source=str(toy_corpus), tokens=2000, context=32, holdout=0.25, min_tail=8)
    config = HarvestConfig(sites=SITES, rows_per_shard=600, batch_tokens=512)
    return OnlineStore(toy_model, corpus, config)


def test_scanning_gives_the_rows_of_the_disk_bit_for_bit(online, toy_store):
    for options in ({}, {"split": "train", "target": SITES[1]}, {"masked": True}):
        ours = list(online.scan(SITES[0], batch=64, **options))
        disk = list(toy_store.scan(SITES[0], batch=64, **options))
        for a, b in zip(ours, disk, strict=True):
            assert torch.equal(a.rows, b.rows)
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)
            assert torch.equal(a.documents, b.documents)


def test_windows_and_counts_are_those_of_the_disk(online, toy_store):
    assert (online.n_rows, online.n_windows) == (toy_store.n_rows, toy_store.n_windows)
    for split in ("train", "heldout", "all"):
        assert online.n_kept(SITES[1], split) == toy_store.n_kept(SITES[1], split)
    ours = list(online.windows(SITES[0], split="heldout", limit=9))
    disk = list(toy_store.windows(SITES[0], split="heldout", limit=9))
    for a, b in zip(ours, disk, strict=True):
        assert (a.number, a.first_row, a.strings) == (b.number, b.first_row, b.strings)
        assert torch.equal(a.kept, b.kept)
    assert online.stats(SITES[0]).median_norm == toy_store.stats(SITES[0]).median_norm


@pytest.mark.parametrize("buffer_bytes", [1, 2**20])
def test_each_pass_gives_each_kept_row_once_in_a_seeded_order(online, toy_store, buffer_bytes):
    online.buffer_bytes = buffer_bytes
    wanted = torch.cat([b.rows for b in toy_store.scan(SITES[0], batch=64, split="train")])
    options = {"batch": 50, "seed": 1, "drop_last": False}
    n = -(-len(wanted) // 50)
    first = [b.rows for b in islice(online.batches(SITES[0], **options), n)]
    assert torch.equal(torch.cat(first).sort().values, wanted)
    again = [b.rows for b in islice(online.batches(SITES[0], **options), n)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = next(online.batches(SITES[0], batch=50, seed=2))
    assert not torch.equal(other.rows, first[0])


def test_full_batches_flow_over_the_end_of_a_pass_and_start_skips(online):
    online.buffer_bytes = 1
    stream = list(islice(online.batches(SITES[0], batch=300, seed=0, target=SITES[1]), 9))
    assert {len(b) for b in stream} == {300}
    later = next(online.batches(SITES[0], batch=300, seed=0, target=SITES[1], start=7))
    assert torch.equal(later.rows, stream[7].rows)
    assert torch.equal(later.y, stream[7].y)


def test_what_only_a_disk_offers_is_refused(online):
    one = torch.tensor([1])
    for ask in (
        lambda: online.rows(SITES[0], one),
        lambda: online.window_of(one),
        lambda: online.window(SITES[0], 1),
        lambda: online.context(1, 2, 2),
    ):
        with pytest.raises(ArtifactError, match="harvest to disk"):
            ask()
    with pytest.raises(SiteError, match="not harvested"):
        online.width("blocks.9.hook_resid_post")
    with pytest.raises(CorpusError, match="keeps only"):
        next(online.batches(SITES[0], batch=5000, seed=0))


def test_nan_in_a_kept_row_is_named(toy_corpus, broken):
    corpus = CorpusConfig(source=str(toy_corpus), tokens=200, context=32, holdout=0)
    model = broken(SITES[0], 2 + ord(":"), float("nan"))
    online = OnlineStore(model, corpus, HarvestConfig(sites=SITES))
    with pytest.raises(NonFiniteError, match=r"position \d+, document \d+"):
        list(online.scan(SITES[0], batch=64))
    assert sum(len(b) for b in online.scan(SITES[0], batch=64, masked=True)) == 200
