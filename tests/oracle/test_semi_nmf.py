"""Known answers for semi-NMF (sheet 6), and its update beside a straightforward implementation."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from doubles import ArrayStore

from saelab import dictionaries
from saelab.dictionaries import create
from saelab.dictionaries.semi_nmf import State
from saelab.errors import ConfigError, CorpusError, DivergedError, SiteError
from saelab.ops import factorise
from saelab.ops.nnls import nnls
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import holds_neurons

TRAIN = TrainConfig(batch=32, tokens=64, log_every=1)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sparse_features(k, d, share=0.2, seed=0):
    return normal(k, d, seed=seed) * (uniform(k, d, seed=seed + 1) < share)


def start(x, k, how="random", seed=0):
    codes = factorise.start_codes(x.T.contiguous(), k, how, torch.Generator().manual_seed(seed))
    return factorise.Whole.of(x.T.contiguous(), codes)


def updates(state, n, keep):
    """Yield the state after each of n updates."""
    for _ in range(n):
        state = state.next(keep)
        yield state


def straightforward(x, g, n, keep):
    """Return (G, F, losses) by the sheet's steps, each written as it stands there."""
    losses = []
    for _ in range(n):
        f = torch.linalg.inv(g.T @ g + 1e-6 * torch.eye(g.shape[1], dtype=g.dtype)) @ (g.T @ x)
        least = f.abs().topk(keep, dim=1).values[:, -1:]
        f = f * (f.abs() >= least)
        norms = g.norm(dim=0)
        g, f = g / norms, f * norms[:, None]
        p, q = x @ f.T, f @ f.T
        up = p.clamp(min=0) + g @ (-q).clamp(min=0)
        down = (-p).clamp(min=0) + g @ q.clamp(min=0) + 1e-6
        g = g * (up / down).sqrt()
        losses.append(float((x - g @ f).square().sum()))
    return g, f, losses


# ------------------------------------------------------------------------------------------ updates


@pytest.mark.parametrize("how", ["random", "kmeans", "svd"])
@pytest.mark.parametrize("keep", [3, 15, 60])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_an_update_is_that_of_a_straightforward_implementation(how, keep, dtype, tolerance):
    x = (uniform(200, 8) @ sparse_features(8, 60) + 0.3 * normal(200, 60, seed=2)).to(dtype)
    first = start(x, 8, how)
    *_, last = updates(first, 40, keep)
    g, f, losses = straightforward(x, first.factors.codes.T, 40, keep)
    assert last.factors.loss == pytest.approx(losses[-1], rel=tolerance)
    if dtype == torch.float64:
        torch.testing.assert_close(last.features, f, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(last.factors.codes, g.T, atol=1e-7, rtol=1e-7)
    again = float((x.double() - (last.factors.codes.T @ last.features).double()).square().sum())
    assert last.factors.loss == pytest.approx(again, rel=max(tolerance, 1e-9))
    assert ((last.features != 0).sum(1) == keep).all()
    assert (last.factors.codes >= 0).all()


def test_clusters_found_by_kmeans_are_solved_by_one_update_and_stay():
    features = 3 * normal(5, 12)
    label = torch.arange(60) % 5
    x = features[label]
    tries = (start(x, 5, "kmeans", seed) for seed in range(20))
    first = next(t for t in tries if len(t.factors.codes.argmax(0).unique()) == 5)
    states = list(updates(first, 6, 12))
    energy = float(x.square().sum())
    for state in states:
        assert state.factors.loss < 1e-9 * energy
        torch.testing.assert_close(state.factors.codes.T @ state.features, x, atol=1e-4, rtol=1e-4)
    for one, two in itertools.pairwise(states):
        same = one.factors.codes / one.factors.codes.norm(dim=1, keepdim=True)
        moved = two.factors.codes / two.factors.codes.norm(dim=1, keepdim=True)
        inside = same > 1e-3
        torch.testing.assert_close(moved[inside] / same[inside], torch.ones(60).double())


def test_rank_one_recovers_the_feature_up_to_a_positive_scale():
    feature, amount = normal(10), uniform(50, seed=1) + 0.1
    x = amount[:, None] * feature
    *_, last = updates(start(x, 1), 200, 10)
    assert last.factors.loss < 1e-10 * float(x.square().sum())
    cosine = torch.nn.functional.cosine_similarity(last.features[0], feature, dim=0)
    assert float(cosine) == pytest.approx(1)
    store = ArrayStore({"site": x.float()})
    config = {"type": "semi_nmf", "d_in": 10, "d_sae": 1, "keep": 1.0}
    (fitted,) = fit([Member("m", create(config), "site")], store, TRAIN)
    torch.testing.assert_close(fitted.dictionary.W_dec[0], (feature / feature.norm()).float())
    z = fitted.dictionary.encode(x.float())
    torch.testing.assert_close(z[:, 0], (amount * feature.norm()).float())


@pytest.mark.parametrize("how", ["random", "kmeans", "svd"])
def test_without_winner_take_all_the_loss_never_increases(how):
    x = uniform(150, 7) @ normal(7, 20) + 0.5 * normal(150, 20, seed=3)
    losses = [s.factors.loss for s in updates(start(x, 6, how), 150, 20)]
    assert all(later <= sooner * (1 + 1e-9) for sooner, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_with_winner_take_all_it_may():
    x = uniform(150, 7) @ normal(7, 20) + 0.5 * normal(150, 20, seed=3)
    losses = [s.factors.loss for s in updates(start(x, 6), 150, 2)]
    assert any(later > sooner for sooner, later in itertools.pairwise(losses))


def test_as_many_features_as_rows_with_codes_of_the_identity_are_the_rows():
    x = normal(9, 12)
    state = factorise.Whole.of(x.T.contiguous(), torch.eye(9, dtype=torch.float64))
    (last,) = updates(state, 1, 12)
    torch.testing.assert_close(last.features, x, atol=1e-5, rtol=1e-5)
    assert last.factors.loss < 1e-9 * float(x.square().sum())


def test_ties_at_the_threshold_are_kept_and_too_large_a_share_keeps_all():
    f = torch.tensor([[1.0, -2.0, 2.0, 0.5], [0.0, 0.0, 0.0, 3.0]])
    assert factorise.keep_largest(f, 1).tolist() == [[0, -2, 2, 0], [0, 0, 0, 3]]
    assert torch.equal(factorise.keep_largest(f, 4), f)


def test_least_squares_of_dependent_codes_stays_finite():
    codes = uniform(3, 40, dtype=torch.float32)
    codes = 1e3 * torch.cat([codes, codes[:1]])
    found = factorise.least_squares(codes @ codes.T, codes @ normal(40, 5, dtype=torch.float32))
    assert found.isfinite().all()


@pytest.mark.parametrize("n", [30, 8])
def test_svd_codes_are_the_positive_parts_of_scaled_singular_vectors(n):
    x = normal(n, 12)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    codes = start(x, 4, "svd").factors.codes
    for k in range(4):
        both = [(sign * s[k].sqrt() * u[:, k]).clamp(min=1e-6) for sign in (1, -1)]
        want = max(both, key=lambda c: float(c.square().sum()))
        torch.testing.assert_close(codes[k], want, atol=1e-8, rtol=1e-8)


def test_kmeans_puts_each_row_with_its_nearest_centre():
    centres = 20 * normal(3, 6)
    x = (centres[:, None] + normal(3, 20, 6, seed=1)).reshape(60, 6)
    found = [start(x, 3, "kmeans", seed).factors.codes.argmax(0) for seed in range(4)]
    truth = torch.arange(60) // 20
    exact = [f for f in found if len({*zip(f.tolist(), truth.tolist(), strict=True)}) == 3]
    assert exact


# --------------------------------------------------------------------------------------- dictionary


def neurons(n=600, d=40, k=6, seed=0):
    """Return a store of non-negative sums of sparse signed features, and the features."""
    features = sparse_features(k, d, 0.15, seed).float()
    z = uniform(n, k, seed=seed + 5, dtype=torch.float32) + 0.2
    on = uniform(n, k, seed=seed + 6) < 0.4
    return ArrayStore({"site": (z * on) @ features}), features


def solved(store, draft=None, seed=0, **fields):
    d = store.width("site")
    config = {"type": "semi_nmf", "d_in": d, "d_sae": 6, "keep": 0.3, "iterations": 300} | fields
    (fitted,) = fit([Member("m", create(config), "site", seed=seed, draft=draft)], store, TRAIN)
    return fitted


@pytest.mark.parametrize("how", ["random", "kmeans", "svd"])
def test_planted_groups_of_neurons_are_found_from_every_start(how):
    store, features = neurons()
    fitted = solved(store, start=how, iterations=600)
    rows = fitted.dictionary.W_dec.detach()
    truth = features / features.norm(dim=1, keepdim=True)
    assert float((truth @ rows.T).max(1).values.mean()) > 0.85
    assert ((rows != 0).sum(1) <= 12).all()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    assert fitted.dictionary.b_dec.count_nonzero() == 0


def test_the_best_features_are_kept_and_patience_ends_a_level():
    store, _ = neurons()
    fitted = solved(store, keep=0.05, patience=7, iterations=5000)
    losses = [line["loss"] for line in fitted.metrics]
    assert len(losses) < 5000
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) - 1 - best == 7
    x = torch.cat([b.x for b in store.scan("site", batch=64, split="train")])
    error = (x - fitted.dictionary.reconstruct(x)).detach().square().sum()
    fvu = float(error / (x - x.mean(0)).square().sum())
    assert fvu <= losses[best] * (1 + 1e-4)


def test_codes_are_least_squares_on_the_raw_rows():
    store, _ = neurons()
    fitted = solved(store)
    x = store.rows("site", torch.arange(50))
    torch.testing.assert_close(fitted.dictionary.encode(x), nnls(x, fitted.dictionary.W_dec))
    assert (fitted.dictionary.encode(x) >= 0).all()


def test_l0_counts_codes_above_a_hundredth_of_the_rows_largest():
    store, _ = neurons()
    part = factorise.Whole.of(torch.zeros(2, 3), torch.ones(2, 3))
    codes = torch.tensor([[1.0, 0.0, 2.0], [0.0099, 0.0, 0.02]])
    features = torch.eye(2)
    factors = factorise.Factors(codes, codes @ codes.T, features, 0.0)
    state = State(replace(part, factors=factors), torch.zeros(1, dtype=torch.int64))
    assert state.metrics()["l0"] == pytest.approx(3 / 3)
    assert state.metrics()["dead"] == 0
    assert solved(store).metrics[-1]["l0"] <= 6


@torch.no_grad()
def test_minibatches_come_near_what_all_rows_at_once_give():
    store, _ = neurons(n=1500)
    whole = solved(store, start="kmeans")
    batched = solved(store, start="kmeans", rows=400, batch=100)
    assert batched.metrics[0]["tokens"] == 100
    x = store.rows("site", torch.arange(1500))
    errors = [
        float((x - f.dictionary.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum())
        for f in (whole, batched)
    ]
    assert errors[1] < errors[0] + 0.03
    assert ((batched.dictionary.W_dec != 0).sum(1) <= 12).all()


@torch.no_grad()
@pytest.mark.parametrize("n_batches", [5, 40])
def test_an_easy_first_batch_does_not_decide_which_features_are_kept(n_batches):
    first, planted = (sparse_features(4, 12, 0.4, seed).float() for seed in (0, 9))
    easy = [uniform(30, 4, dtype=torch.float32) @ first]
    others = [uniform(30, 4, seed=s, dtype=torch.float32) @ planted for s in range(1, n_batches)]
    fields = {"type": "semi_nmf", "d_in": 12, "d_sae": 4, "keep": 1.0, "iterations": n_batches}
    dictionary, (store, _) = create(fields), neurons(n=9)
    part = factorise.Minibatched.of(iter(easy + others), 30, first, variance=1.0)
    state, losses = State(part, torch.zeros(2, dtype=torch.int64)), []
    while not state.done:
        state = dictionary.advance(store, state)
        losses.append(state.loss)
    assert losses[0] < 1e-6 < losses[-1] < losses[1]
    if n_batches < factorise.RECENT:
        assert torch.equal(state.best, state.part.features)
    else:
        assert state.best_loss == min(losses[factorise.RECENT - 1 :])
    assert not torch.equal(state.best, first)


# ---------------------------------------------------------------------------------------- hierarchy


@torch.no_grad()
def test_each_level_factorises_the_features_before_it_and_the_tree_says_how():
    store, _ = neurons(n=800, k=12)
    fitted = solved(store, d_sae=12, levels=[12, 6, 3], iterations=150)
    d = fitted.dictionary
    assert [tuple(d.features(level).shape) for level in range(3)] == [(12, 40), (6, 40), (3, 40)]
    levels = [line["level"] for line in fitted.metrics]
    assert levels == sorted(levels)
    assert set(levels) == {0, 1, 2}
    for level in (1, 2):
        below, above, tree = d.features(level - 1), d.features(level), d.tree(level)
        torch.testing.assert_close(tree, nnls(below, above))
        assert float((below - tree @ above).square().sum() / below.square().sum()) < 0.9
        edges = d.edges(level, 0.5)
        assert (tree[edges[:, 0], edges[:, 1]] >= 0.5 * tree.amax(0)[edges[:, 1]]).all()
        assert set(edges[:, 1].tolist()) == set(tree.amax(0).nonzero()[:, 0].tolist())


def test_a_level_is_a_dictionary_of_its_own_and_the_tree_is_saved(tmp_path):
    store, _ = neurons()
    d = solved(store, levels=[6, 3], iterations=30).dictionary
    d.save(tmp_path / "all")
    loaded = dictionaries.load(tmp_path / "all")
    assert torch.equal(loaded.tree(1), d.tree(1))
    alone = loaded.at_level(1)
    x = store.rows("site", torch.arange(20))
    torch.testing.assert_close(alone.encode(x), nnls(x, d.features(1)))
    alone.save(tmp_path / "one")
    assert dictionaries.load(tmp_path / "one").d_sae == 3


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_sae": 41}, r"d_sae=41 exceeds the site's width 40.*lower rank"),
        ({"levels": [5, 3]}, r"should start with d_sae=6"),
        ({"levels": [6, 6]}, r"fall from level to level"),
        ({"levels": [6, 3, 4]}, r"fall from level to level"),
        ({"keep": 0}, "keep"),
        ({"start": "knn"}, "start"),
    ],
)
def test_bad_configurations_are_one_clear_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        create({"type": "semi_nmf", "d_in": 40, "d_sae": 6} | fields)


def test_fewer_rows_than_features_are_refused():
    store = ArrayStore({"site": normal(5, 40, dtype=torch.float32)})
    with pytest.raises(CorpusError, match=r"rank 6 needs at least as many.*keeps 5"):
        solved(store)


def test_rows_without_length_are_solved_like_others():
    x = neurons()[0].rows("site", torch.arange(600))
    x[::7] = 0
    fitted = solved(ArrayStore({"site": x}), iterations=50)
    assert math.isfinite(fitted.metrics[-1]["loss"])
    assert (fitted.dictionary.encode(x)[::7] == 0).all()


def test_a_site_without_neurons_is_refused_where_the_rows_are_a_models():
    assert holds_neurons("blocks.1.mlp.hook_post")
    assert not holds_neurons("blocks.1.hook_mlp_out")
    store, _ = neurons()
    store.model_name = "some model"
    with pytest.raises(SiteError, match=r"m: semi_nmf groups an MLP's neurons, but 'site' has"):
        solved(store)


def test_a_solution_that_is_not_finite_is_stopped(monkeypatch):
    store, _ = neurons()
    calls, real = [], factorise.update

    def update(*args, **how):
        calls.append(1)
        found = real(*args, **how)
        return replace(found, loss=math.nan) if len(calls) == 5 else found

    monkeypatch.setattr(factorise, "update", update)
    with pytest.raises(DivergedError, match="m: the loss became nan at iteration 5"):
        solved(store)
    assert len(calls) == 5


def test_a_finished_dictionary_is_not_continued():
    store, _ = neurons()
    with pytest.raises(ConfigError, match="drop `init`"):
        fit([Member("m", solved(store).dictionary, "site", initialised=True)], store, TRAIN)
