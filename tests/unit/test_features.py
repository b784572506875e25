"""The feature index against a brute-force reading of the dense codes."""

import sqlite3

import numpy as np
import pytest
import torch
from feature_fakes import WORDS, TinyDictionary, TinyModel, TinyStore

from saelab import artifacts
from saelab.errors import ArtifactError, ShapeError
from saelab.features import events, schema
from saelab.features.build import IndexConfig, build
from saelab.features.read import Features
from saelab.store import ArraysConfig, from_arrays, open_store

CONFIG = IndexConfig(
    top=4, quantiles=3, per_quantile=2, bins=6, logits=3, neighbours=4, tokens=3, batch=16
)


def make(out, *, store=None, dictionary=None, model=None, config=CONFIG, name="tiny"):
    """Build and finish an index of the tiny things; return (folder, facts)."""
    with artifacts.open_draft(out, "features", name, "0" * 64) as draft:
        if draft.is_finished:
            return draft.target, {}
        facts = build(
            draft, dictionary or TinyDictionary(), store or TinyStore(), model or TinyModel(),
            config, site="here", meta={"model": {"source": "toy", "dtype": "float32"}},
        )  # fmt: skip
        draft.finish(stage="features", name=name, inputs={}, parents=[], facts=facts)
    return draft.target, facts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def features(made):
    opened = Features(made[0])
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def dense():
    """Codes of every row, zero on masked rows."""
    store = TinyStore()
    z = TinyDictionary().encode(store.x)
    z[~store.kept] = 0
    return z


def strongest_first(z):
    """Row numbers where a latent fires, by falling size and then by row."""
    rows = z.nonzero().squeeze(1).tolist()
    return sorted(rows, key=lambda r: (-abs(float(z[r])), r))


def test_counts_and_densities_are_those_of_the_dense_codes(features, dense):
    store = TinyStore()
    held = store.kept & store.heldout
    for latent in range(13):
        stats = features.stats(latent)
        z = dense[:, latent]
        assert stats.fires == int((z != 0).sum())
        assert stats.fires_heldout == int((z[held] != 0).sum())
        assert stats.density == pytest.approx(float((z[held] != 0).double().mean()), abs=1e-12)
        if stats.fires:
            assert stats.peak == float(z[z.abs().argmax()])
        if stats.fires_heldout:
            fired = z[held][z[held] != 0].abs().double()
            assert stats.mean == pytest.approx(float(fired.mean()), rel=1e-6)


def test_top_examples_are_the_strongest_firing_of_the_best_windows(features, dense):
    store = TinyStore()
    for latent in range(13):
        best, seen = [], set()
        for row in strongest_first(dense[:, latent]):
            window = int(store.window_number[row])
            if window not in seen:
                seen.add(window)
                best.append((window, row - int(store.first[window]), float(dense[row, latent])))
        top = [g for g in features.latent(latent).groups if g.number == 0]
        found = [(e.window, e.position, e.value) for g in top for e in g.examples]
        assert found == best[: CONFIG.top]


def test_quantile_examples_belong_to_their_group_and_differ(features, dense):
    store = TinyStore()
    for latent in range(13):
        ranked = strongest_first(dense[:, latent])
        groups = [g for g in features.latent(latent).groups if g.number > 0]
        for group in groups:
            low = (group.number - 1) * len(ranked) // 3
            members = ranked[low : group.number * len(ranked) // 3]
            rows = [int(store.first[e.window]) + e.position for e in group.examples]
            assert set(rows) <= set(members)
            assert len(set(rows)) == len(rows) == min(2, len(members))
            assert group.high == pytest.approx(abs(float(dense[members[0], latent])), rel=1e-5)
            assert group.low == pytest.approx(abs(float(dense[members[-1], latent])), rel=1e-5)


def test_strips_hold_the_latents_values_over_the_whole_window(features, dense):
    store = TinyStore()
    for latent in range(13):
        for group in features.latent(latent).groups:
            for e in group.examples:
                window = store.window("here", e.window)
                rows = range(window.first_row, window.first_row + len(window))
                values = {p: float(dense[r, latent]) for p, r in enumerate(rows)}
                assert e.strip == {p: v for p, v in values.items() if v != 0}
                assert e.strings == list(window.strings)
                assert e.heldout == window.heldout
                assert e.document == e.window
                assert e.masked == {0}


def test_histograms_count_every_firing_once_in_its_bin(features, dense):
    store = TinyStore()
    for latent in range(13):
        z = dense[:, latent]
        low, high = min(0.0, float(z.min())), max(0.0, float(z.max()))
        shown = features.latent(latent).histogram
        assert (shown.low, shown.high) == pytest.approx((low, high), rel=1e-5)
        for split, counts in ((~store.heldout, shown.train), (store.heldout, shown.heldout)):
            wanted = [0] * 6
            for value in z[split & (z != 0)].double().tolist():
                wanted[min(5, int((value - low) / (high - low) * 6))] += 1
            assert counts == wanted


def test_neighbours_are_the_nearest_decoder_directions(features):
    W = TinyDictionary().W_dec
    cosine = W @ W.T
    cosine.fill_diagonal_(-2)
    for latent in range(13):
        found = features.latent(latent).neighbours
        assert [n.id for n in found] == cosine[latent].topk(4).indices.tolist()
        assert found[0].cosine == pytest.approx(float(cosine[latent].max()), rel=1e-5)


def test_logits_name_the_tokens_pushed_most_in_both_directions(features):
    effect = TinyDictionary().W_dec @ TinyModel().W_U
    logits = features.latent(5).logits
    assert [t for t, _ in logits.up] == [WORDS[i] for i in effect[5].topk(3).indices]
    assert [t for t, _ in logits.down] == [WORDS[i] for i in (-effect[5]).topk(3).indices]


def test_token_shares_are_shares_of_the_latents_activation(features, dense):
    store = TinyStore()
    for latent in range(12):
        z = dense[:, latent].abs().double()
        mass = torch.zeros(len(WORDS), dtype=torch.float64).index_add_(0, store.ids, z) / z.sum()
        found = features.latent(latent).tokens
        assert [t.text for t in found] == [WORDS[i] for i in mass.topk(3).indices]
        assert found[0].share == pytest.approx(float(mass.max()), rel=1e-5)


def test_a_latent_that_never_fires_has_a_page_and_says_dead(features):
    page = features.latent(12)
    assert page.stats.warnings == ["dead"]
    assert page.groups == []
    assert page.tokens == []
    assert sum(page.histogram.train + page.histogram.heldout) == 0
    assert page.stats.peak == 0
    assert len(page.neighbours) == 4


def test_fewer_than_fifty_heldout_firings_are_too_few_to_score(features):
    stats = features.stats(0)
    assert stats.fires_heldout < 50
    assert "too few to score" in stats.warnings


def test_search_finds_a_token_first_by_its_share_of_the_activation(features):
    hits = features.search("not")
    shares = [h.share for h in hits if h.share is not None]
    assert shares == sorted(shares, reverse=True)
    assert shares
    best = features.latent(hits[0].stats.id)
    assert any(t.text == " not" for t in best.tokens)


def test_search_keeps_the_spaces_of_quoted_text_and_survives_syntax(features):
    assert all(h.share is None for h in features.search('"not"'))
    assert any(h.share for h in features.search('" not"'))
    for text in ("", '"', "AND OR (", "fires:", "<script>", "'; DROP TABLE latent", "."):
        features.search(text)


def test_search_finds_promoted_tokens_and_context(features):
    token = features.latent(5).logits.up[0][0]
    assert features.search("script") != []
    assert any(h.stats.id == 5 for h in features.search(token, limit=60))


def test_the_table_is_ordered_with_missing_numbers_last(features):
    densities = [s.density for s in features.table("density", 13, descending=True)]
    assert densities == sorted(densities, reverse=True)
    means = [s.mean for s in features.table("mean", 13)]
    assert means[-1] is None
    with pytest.raises(ArtifactError, match="cannot order"):
        features.table("id; DROP TABLE latent")


def test_two_builds_give_the_same_bytes_in_any_run_length(tmp_path, made, monkeypatch):
    again, _ = make(tmp_path)
    assert (again / schema.FILE).read_bytes() == (made[0] / schema.FILE).read_bytes()
    monkeypatch.setattr(events, "RUN_FIRINGS", 50)
    monkeypatch.setattr(events.Firings.__init__, "__defaults__", (50,))
    short, _ = make(tmp_path / "short")
    assert (short / schema.FILE).read_bytes() == (made[0] / schema.FILE).read_bytes()


class Stop(Exception):
    """Stands for a crash."""


def test_a_crash_at_any_write_ends_in_the_same_bytes_after_a_new_start(tmp_path, monkeypatch):
    store = TinyStore(n_windows=8)
    calls = []
    monkeypatch.setattr(artifacts, "_syscall", lambda kind, path: calls.append(kind))
    wanted = (make(tmp_path / "count", store=store)[0] / schema.FILE).read_bytes()
    assert {"write", "fsync", "rename"} <= set(calls)
    for fatal in range(len(calls)):
        left = iter(range(fatal + 1))

        def stop(kind, path, left=left, fatal=fatal):
            if next(left, None) == fatal:
                raise Stop

        out = tmp_path / str(fatal)
        monkeypatch.setattr(artifacts, "_syscall", stop)
        with pytest.raises(Stop):
            make(out, store=store)
        monkeypatch.setattr(artifacts, "_syscall", lambda kind, path: None)
        folder, _ = make(out, store=store)
        assert (folder / schema.FILE).read_bytes() == wanted
        assert sorted(p.name for p in folder.iterdir()) == [
            "features.db",
            "manifest.json",
            "run.json",
        ]


def test_an_index_without_a_model_or_heldout_rows_says_so(tmp_path):
    store = TinyStore()
    store.heldout[:] = False
    with artifacts.open_draft(tmp_path, "features", "bare", "1" * 64) as draft:
        build(draft, TinyDictionary(), store, None, CONFIG, site="here")
        opened = Features(draft.folder)
    page = opened.latent(3)
    opened.close()
    assert page.logits is None
    assert page.stats.density is None
    assert page.stats.mean is None
    assert page.tokens[0].text in WORDS


def test_rows_that_are_no_tokens_count_in_the_shares_only(tmp_path):
    store = TinyStore()
    half = torch.arange(store.n_rows) % 2 == 0
    plain = Features(make(tmp_path / "plain", store=store)[0])
    store.ids[half] = -1
    mixed = Features(make(tmp_path / "mixed", store=store)[0])
    for latent in range(12):
        tokens = mixed.latent(latent).tokens
        assert tokens
        assert sum(t.share for t in tokens) < 1
    assert mixed.latent(3).stats.fires == plain.latent(3).stats.fires
    plain.close(), mixed.close()


def test_a_store_of_own_arrays_is_indexed_without_tokens(tmp_path):
    np.save(tmp_path / "x.npy", TinyStore().x.numpy())
    config = ArraysConfig(sites={"here": tmp_path / "x.npy"})
    store = open_store(from_arrays(config, tmp_path, "own"))
    with artifacts.open_draft(tmp_path, "features", "own", "2" * 64) as draft:
        build(draft, TinyDictionary(), store, None, CONFIG, site="here")
        opened = Features(draft.folder)
    page = opened.latent(3)
    opened.close()
    assert page.stats.fires > 0
    assert page.tokens == []
    assert page.logits is None


def test_a_dictionary_of_another_width_is_refused(tmp_path):
    with pytest.raises(ShapeError, match="width 8"):
        make(tmp_path, dictionary=TinyDictionary(d=6))


def test_the_file_is_opened_read_only_and_other_files_are_refused(tmp_path, made, features):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        features._db.execute("DELETE FROM latent")
    with pytest.raises(ArtifactError, match="does not exist"):
        Features(tmp_path)
    (tmp_path / schema.FILE).write_bytes(b"not a database at all" * 100)
    with pytest.raises(ArtifactError, match="not a feature index"):
        Features(tmp_path)
    old = sqlite3.connect(tmp_path / "old.db")
    old.execute("PRAGMA user_version = 99")
    old.close()
    with pytest.raises(ArtifactError, match="schema"):
        Features(tmp_path / "old.db")
    with pytest.raises(ArtifactError, match="no latent 13"):
        features.latent(13)


def test_facts_and_metadata_tell_what_was_indexed(made, features):
    _, facts = made
    assert (facts["d_sae"], facts["site"], facts["dead"]) == (13, "here", 1)
    assert facts["n_rows"] == TinyStore().n_rows
    assert features.n_latents == 13
    assert features.meta["model"] == {"source": "toy", "dtype": "float32"}
