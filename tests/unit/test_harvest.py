"""Harvest: the model's activations, masked for a reason, in document order, through any crash."""

import logging

import pytest
import torch
from conftest import SITES, write_corpus
from crash import Crash, assert_survives_every_crash, crash_at

from saelab import artifacts
from saelab.errors import ArtifactError, ConfigError, CorpusError, NonFiniteError, SiteError
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.forward import HarvestConfig, batches_of
from saelab.harvest.harvest import harvest, store_dtype
from saelab.store import StoreWriter, open_store
from saelab.types import Mask

KEY = "f" * 64


def fill(out, model, source, *, tokens=700, shard=300, report=None, corpus=None, **options):
    """Harvest a corpus under `out`; return the finished store's folder."""
    fields = {"tokens": tokens, "context": 32, "holdout": 0.25, "min_tail": 8} | (corpus or {})
    config = HarvestConfig.parse(
        {"sites": SITES, "batch_tokens": 256, "dtype": "float32"} | options
    )
    with artifacts.open_draft(out, "store", "toy", KEY) as draft:
        if draft.is_finished:
            return draft.target
        widths = {site: model.site(site).width for site in config.sites}
        with StoreWriter(draft, widths, config.dtype, rows_per_shard=shard) as writer:
            asked = CorpusConfig(source=str(source), **fields)
            facts = harvest(model, asked, config, writer, report=report)
        draft.finish(stage="store", name="toy", inputs={}, parents=[], facts=facts)
    return artifacts.artifact_path(out, "store", "toy", KEY)


def test_rows_are_the_models_activations_at_their_positions(toy_store, toy_model):
    for window in toy_store.windows(SITES[0], limit=6):
        rows = torch.arange(window.first_row, window.first_row + len(window))
        alone = toy_model.capture(window.ids.long()[None], list(SITES))
        for site in SITES:
            torch.testing.assert_close(
                toy_store.rows(site, rows), alone[site][0].half().float(), rtol=2e-3, atol=2e-3
            )


def test_token_strings_are_the_documents_text(toy_store):
    whole = {}
    for window in toy_store.windows(SITES[0]):
        number = int(window.document[0])
        whole[number] = whole.get(number, "") + "".join(window.strings)
    assert len(whole) == toy_store.facts["n_documents"]
    for number, text in whole.items():
        assert toy_store.document(number).text.startswith(text)
    assert toy_store.document(0).label in {"a", "b"} or toy_store.document(0).label is None


def test_heldout_documents_are_a_share_and_whole(toy_store):
    kept = {split: toy_store.n_kept(SITES[0], split) for split in ("train", "heldout", "all")}
    assert kept["train"] + kept["heldout"] == kept["all"]
    train = {int(d) for b in toy_store.scan(SITES[0], batch=99, split="train") for d in b.documents}
    held = {
        int(d) for b in toy_store.scan(SITES[0], batch=99, split="heldout") for d in b.documents
    }
    assert held
    assert not train & held


def test_first_positions_are_masked_unless_told_otherwise(
    toy_store, tmp_path, toy_model, toy_corpus
):
    assert toy_store.facts["masked"][SITES[0]]["FIRST"] == toy_store.n_windows
    assert not any(window.kept[0] for window in toy_store.windows(SITES[0]))
    store = open_store(fill(tmp_path, toy_model, toy_corpus, mask_first=False))
    assert store.n_kept(SITES[0], "all") == 700


def test_special_tokens_are_masked_and_kept_in_the_rows(tmp_path, toy_model, toy_corpus):
    options = {"corpus": {"bos": "always"}, "mask_first": False}
    store = open_store(fill(tmp_path / "a", toy_model, toy_corpus, **options))
    assert store.facts["masked"][SITES[0]]["SPECIAL"] == store.n_windows
    assert all(w.ids[0] == toy_model.bos_id and not w.kept[0] for w in store.windows(SITES[0]))
    assert store.window(SITES[0], 0).strings[0] == ""
    store = open_store(fill(tmp_path / "b", toy_model, toy_corpus, mask_special=False, **options))
    assert store.n_kept(SITES[0], "all") == 700


def test_norm_outliers_are_masked_at_their_own_site_only(tmp_path, toy_corpus, broken):
    token = 2 + ord(":")
    store = open_store(fill(tmp_path, broken(SITES[1], token, 1e4), toy_corpus))
    found = {site: store.facts["masked"][site]["NORM_OUTLIER"] for site in SITES}
    ids = torch.cat([window.ids for window in store.windows(SITES[0])])
    assert found == {SITES[0]: 0, SITES[1]: int((ids == token).sum())}
    assert store.n_kept(SITES[1], "all") < store.n_kept(SITES[0], "all")
    both = sum(len(b) for b in store.scan(SITES[0], batch=64, target=SITES[1]))
    assert both == store.n_kept(SITES[1], "all")


def test_the_median_of_the_prepass_is_recorded(toy_store):
    for site in SITES:
        kept = torch.cat([b.x for b in toy_store.scan(site, batch=600)])[:500]
        assert toy_store.stats(site).median_norm == pytest.approx(
            float(kept.norm(dim=1).median()), rel=0.05
        )


def test_nan_names_document_and_position_and_leaves_no_store(tmp_path, toy_corpus, broken):
    with pytest.raises(NonFiniteError, match=r"position \d+ of window \d+, document \d+"):
        fill(tmp_path, broken(SITES[0], 2 + ord(":"), float("nan")), toy_corpus)
    assert artifacts.find_all(tmp_path) == []


def test_nan_in_masked_positions_only_is_a_warning(tmp_path, toy_corpus, broken, caplog):
    with caplog.at_level(logging.WARNING):
        path = fill(
            tmp_path, broken(SITES[0], 0, float("nan")), toy_corpus, corpus={"bos": "always"}
        )
    assert "masked rows hold NaN" in caplog.text
    assert open_store(path).facts["masked"][SITES[0]]["NONFINITE"] > 0


def test_unknown_or_repeated_sites_are_refused_before_anything_runs(
    tmp_path, toy_model, toy_corpus
):
    with pytest.raises(SiteError, match=r"hook_resid_post"):
        fill(tmp_path, toy_model, toy_corpus, sites=["blocks.0.hook_resid_pst"])
    with pytest.raises(ConfigError, match="twice"):
        fill(tmp_path, toy_model, toy_corpus, sites=[SITES[0], SITES[0]])


def test_too_little_text_stops_before_the_model_runs(tmp_path, toy_model, toy_corpus):
    done = []
    with pytest.raises(CorpusError, match=r"99,999 were asked for"):
        fill(tmp_path, toy_model, toy_corpus, tokens=99_999, report=lambda *a: done.append(a))
    assert done == []


def test_a_streamed_corpus_that_is_too_small_leaves_nothing(tmp_path, toy_model, toy_corpus):
    options = {"tokens": 99_999, "corpus": {"streaming": True}}
    with pytest.raises(CorpusError, match=r"99,999 were asked for"):
        fill(tmp_path, toy_model, toy_corpus, **options)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_progress_ends_at_the_asked_tokens(tmp_path, toy_model, toy_corpus):
    seen = []
    fill(tmp_path, toy_model, toy_corpus, report=lambda *values: seen.append(values))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (700, 700)


def test_auto_dtype_follows_the_model():
    config = HarvestConfig(sites=("x",))
    assert store_dtype(config, torch.bfloat16) == "bfloat16"
    assert store_dtype(config, torch.float32) == "float16"
    assert store_dtype(config.model_copy(update={"dtype": "float32"}), torch.bfloat16) == "float32"


def test_batches_hold_windows_of_similar_length_once_each():
    lengths = [32, 8, 32, 9, 31, 32, 20, 8]
    batches = list(batches_of(lengths, 64))
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        assert len(batch) == 1 or len(batch) * max(sizes) <= 64
    alone = [2000] * 3 + [1000] * 3
    assert batches_of(alone, 3000) == [[0], [1], [2], [3, 4, 5]]
    assert batches_of([500] * 4, 1000) == [[0, 1], [2, 3]]


# ---------------------------------------------------------------------------------------- crashes


def test_a_crash_at_any_write_fsync_or_rename_changes_no_byte(tmp_path, toy_model):
    source = write_corpus(tmp_path / "corpus.csv", 3)

    def stage(out):
        return fill(
            out, toy_model, source, tokens=120, shard=64, sites=[SITES[0]], corpus={"holdout": 0}
        )

    assert_survives_every_crash(stage, tmp_path)


def test_a_resumed_harvest_keeps_the_shards_that_were_complete(tmp_path, toy_model, toy_corpus):
    with pytest.raises(Crash), crash_at(30):
        fill(tmp_path, toy_model, toy_corpus)
    seen = []
    fill(tmp_path, toy_model, toy_corpus, report=lambda done, *_: seen.append(done))
    assert len(seen) == 1


def test_a_corpus_that_changed_between_crash_and_resume_is_noticed(tmp_path, toy_model):
    source = write_corpus(tmp_path / "corpus.csv")
    with pytest.raises(Crash), crash_at(30):
        fill(tmp_path, toy_model, source)
    write_corpus(source, seed=1)
    with pytest.raises(ArtifactError, match="other texts"):
        fill(tmp_path, toy_model, source)


def test_what_is_harvested_does_not_depend_on_where_shards_are_cut(tmp_path, toy_model, toy_corpus):
    stores = [
        open_store(fill(tmp_path / str(shard), toy_model, toy_corpus, shard=shard))
        for shard in (100, 1000)
    ]
    first, second = (torch.cat([b.x for b in s.scan(SITES[0], batch=64)]) for s in stores)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    first, second = (torch.cat([w.ids for w in s.windows(SITES[0])]) for s in stores)
    assert torch.equal(first, second)


def test_masks_have_one_bit_per_reason():
    assert [int(reason) for reason in Mask] == [1, 2, 4, 8, 16]
