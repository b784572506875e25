"""Gradients in the store: of a fixed sum of losses, whatever the batches, shards and crashes."""

import io
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from conftest import SITES
from crash import assert_survives_every_crash
from rich.console import Console
from safetensors.torch import load_file
from test_harvest import KEY

from saelab import api, artifacts, pipeline, planning
from saelab.errors import ConfigError, NonFiniteError
from saelab.harvest.corpus import CorpusConfig, TextWindow
from saelab.harvest.forward import HarvestConfig
from saelab.harvest.gradient import pass_tokens
from saelab.harvest.harvest import harvest, store_dtype
from saelab.harvest.online import OnlineStore
from saelab.models import identify
from saelab.models.toy import ToyModel
from saelab.ops.loss_gradient import LossGradient, inverse_draw, next_tokens, sampled_tokens
from saelab.store import StoreWriter, open_store

FIELDS = {"tokens": 700, "context": 32, "holdout": 0.25, "min_tail": 8}


def fill(out, model, source, *, shard=300, corpus=None, **options):
    """Harvest rows and gradients under `out`; return the finished store's folder."""
    fields = {"sites": SITES, "batch_tokens": 256, "dtype": "float32", "gradient": "data"}
    config = HarvestConfig.parse(fields | {"rows_per_shard": shard} | options)
    with artifacts.open_draft(out, "store", "toy", KEY) as draft:
        if draft.is_finished:
            return draft.target
        widths = {site: model.site(site).width for site in config.sites}
        dtype = store_dtype(config, model.dtype)
        with StoreWriter(
            draft, widths, dtype, rows_per_shard=shard, grad_sites=config.grad_sites
        ) as writer:
            asked = CorpusConfig(source=str(source), **(FIELDS | (corpus or {})))
            facts = harvest(model, asked, config, writer)
        draft.finish(stage="store", name="toy", inputs={}, parents=[], facts=facts)
    return artifacts.artifact_path(out, "store", "toy", KEY)


@pytest.fixture(scope="module")
def paths(tmp_path_factory, toy_model, toy_corpus):
    """A store with gradients for each kind of labels."""
    base = tmp_path_factory.mktemp("gradients")
    return {
        kind: fill(base / kind, toy_model, toy_corpus, gradient=kind)
        for kind in ("data", "sampled")
    }


def stored(path, name):
    """One tensor of all shards, in order."""
    return torch.cat([load_file(file)[name] for file in sorted(path.glob("shard-*"))])


def autograd(model, ids, label, site):
    """The slow way: one window alone, through plain autograd, without the protocol."""
    seen = {}

    def hook(x):
        seen["x"] = x.detach().requires_grad_()
        return seen["x"]

    point = model._sites[site].module
    handle = point.register_forward_hook(lambda _, __, output: hook(output))
    try:
        with torch.enable_grad():
            logits = model._network(ids.long()[None], None, None)[0][0]
            loss = -logits.log_softmax(-1)[torch.arange(len(ids)), label][label >= 0].sum()
            loss.backward()
    finally:
        handle.remove()
    return seen["x"].grad[0]


@pytest.mark.parametrize("kind", ["data", "sampled"])
def test_stored_gradients_are_those_of_each_window_alone_by_plain_autograd(paths, toy_model, kind):
    store, label = open_store(paths[kind]), stored(paths[kind], "label").long()
    for window in islice(store.windows(SITES[0]), 8):
        rows = slice(window.first_row, window.first_row + len(window))
        for site in SITES:
            slow = autograd(toy_model, window.ids, label[rows], site)
            torch.testing.assert_close(stored(paths[kind], f"grad:{site}")[rows], slow)


def test_gradients_are_the_finite_differences_of_the_summed_loss(toy_model):
    toy = ToyModel(1)
    toy._network.double()
    toy.dtype = torch.float64
    ids = torch.randint(2, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    window = text_window(ids[0])
    for labels in ("data", "sampled"):
        for site in ("blocks.0.hook_resid_mid", "blocks.0.mlp.hook_post"):
            x, grad, label = LossGradient(toy, [site], labels, 3)(ids, [window], [7])

            def loss(x, site=site, label=label):
                with torch.no_grad(), toy._sites.hooked({}, {site: lambda _: x}, None):
                    logits = toy._forward(ids)[0]
                return F.cross_entropy(logits[0], label[0], ignore_index=-1, reduction="sum")

            assert grad[site].dtype == torch.float64
            for position, coordinate in ((0, 0), (3, 5), (7, 31), (8, 2)):
                moved = [x[site].clone(), x[site].clone()]
                for y, eps in zip(moved, (1e-4, -1e-4), strict=True):
                    y[0, position, coordinate] += eps
                slow = (loss(moved[0]) - loss(moved[1])) / 2e-4
                fast = grad[site][0, position, coordinate]
                assert float(fast) == pytest.approx(float(slow), rel=1e-5, abs=1e-7)


def text_window(ids, document=None):
    n = len(ids)
    zeros = torch.zeros(n, dtype=torch.int64)
    return TextWindow(ids, zeros if document is None else document, zeros, zeros, False, ())


def test_labels_of_the_data_are_next_tokens_of_the_same_text():
    first = text_window(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 0, 1, 1]))
    second = text_window(torch.tensor([9, 1, 4]))
    found = next_tokens([first, second], 5, torch.tensor([0, 1]))
    assert found.tolist() == [[6, -1, 8, -1, -1], [-1, 4, -1, -1, -1]]


def test_sampled_labels_follow_their_seed_and_window_number_only():
    logits = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0))
    windows = [text_window(torch.zeros(n, dtype=torch.int64)) for n in (6, 4, 2)]
    found = sampled_tokens(logits, windows, [4, 5, 6], seed=1)
    assert found[1, 4:].tolist() == [-1, -1]
    assert (found[0] >= 0).all()
    alone = sampled_tokens(logits[1:2, :4], windows[1:2], [5], seed=1)
    assert torch.equal(alone[0], found[1, :4])
    assert not torch.equal(sampled_tokens(logits, windows, [4, 5, 6], seed=2), found)
    assert not torch.equal(sampled_tokens(logits, windows, [5, 6, 7], seed=1), found)


def test_draws_have_the_frequencies_of_the_prediction():
    chance = torch.tensor([0.5, 0.0, 0.3, 0.2])
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = inverse_draw(chance.log().expand(len(u), -1), u)
    share = torch.bincount(drawn, minlength=4) / len(u)
    assert share[1] == 0
    torch.testing.assert_close(share, chance, atol=0.015, rtol=0)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    edge = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    assert inverse_draw(edge.expand(2, -1), ends).tolist() == [1, 2]


def test_batches_and_shards_change_nothing_but_the_rounding(paths, tmp_path, toy_model, toy_corpus):
    for kind, path in paths.items():
        other = fill(
            tmp_path / kind, toy_model, toy_corpus, gradient=kind, shard=100, batch_tokens=40
        )
        assert torch.equal(stored(other, "label"), stored(path, "label"))
        for site in SITES:
            name = f"grad:{site}"
            torch.testing.assert_close(
                stored(other, name), stored(path, name), atol=1e-5, rtol=1e-5
            )


def test_a_last_position_has_a_gradient_only_with_sampled_labels(paths):
    for kind, path in paths.items():
        store, grad = open_store(path), stored(path, f"grad:{SITES[1]}")
        windows = [w for w in store.windows(SITES[0]) if len(w) > 1]
        last = [w.first_row + len(w) - 1 for w in windows]
        inner = [w.first_row + len(w) - 2 for w in windows]
        assert bool(grad[inner].any(1).all())
        assert bool(grad[last].any(1).all()) == (kind == "sampled")
        assert bool(grad[last].any()) == (kind == "sampled")


def test_rows_masks_and_documents_are_those_of_a_store_without_gradients(
    paths, tmp_path, toy_model, toy_corpus
):
    without = fill(tmp_path, toy_model, toy_corpus, gradient="none")
    for file in sorted(without.glob("*.safetensors")):
        plain, both = load_file(file), load_file(paths["data"] / file.name)
        extra = {*both} - {*plain}
        wanted = {"grad:" + site for site in SITES}
        wanted = {"shard": {*wanted, "label"}, "stats": wanted}.get(file.name.split("-")[0][:5])
        assert extra == (wanted or set()), file.name
        for name, tensor in plain.items():
            assert torch.equal(tensor, both[name]), (file.name, name)
    facts = open_store(without).facts
    assert not {"gradient", "grad_dtype", "grad_stats"} & {*facts}


def test_batches_scans_and_targets_carry_the_gradient_of_their_input(paths):
    store = open_store(paths["data"])
    assert (store.grad_sites, store.grad_labels) == (SITES, "data")
    whole = {site: stored(paths["data"], f"grad:{site}") for site in SITES}
    for site, target in ((SITES[0], None), (SITES[1], SITES[0])):
        for b in [
            *islice(store.batches(site, batch=48, seed=1, target=target), 30),
            *store.scan(site, batch=48, target=target),
            *store.scan(site, batch=48, masked=True, target=target),
        ]:
            assert b.grad is not None
            assert torch.equal(b.grad, whole[site][b.rows])
    kept = torch.cat([b.rows for b in store.scan(SITES[0], batch=64)])
    assert not any(bool(w.kept[0]) for w in store.windows(SITES[0]))
    assert len(kept) == store.n_kept(SITES[0], "all")


def test_the_order_of_the_batches_does_not_depend_on_gradients(
    paths, tmp_path, toy_model, toy_corpus
):
    without = open_store(fill(tmp_path, toy_model, toy_corpus, gradient="none"))
    store = open_store(paths["data"])
    for one in (store, without):
        one.buffer_bytes = 1
    pairs = zip(
        store.batches(SITES[0], batch=8, seed=5),
        without.batches(SITES[0], batch=8, seed=5),
        strict=False,
    )
    for a, b in islice(pairs, 100):
        assert torch.equal(a.rows, b.rows)
        assert b.grad is None


def test_the_manifest_says_what_the_gradients_are_of_and_their_statistics(paths):
    store, path = open_store(paths["sampled"]), paths["sampled"]
    assert store.facts["gradient"] == {
        "labels": "sampled",
        "seed": 0,
        "reduction": "sum over a window's labelled positions of the cross-entropy in nats",
    }
    assert open_store(paths["data"]).facts["gradient"]["labels"] == "data"
    assert store.facts["grad_dtype"] == "float32"
    for site in SITES:
        rows = [b.grad.double() for b in store.scan(site, batch=99, split="train")]
        grad, found = torch.cat(rows), store.facts["grad_stats"][site]
        assert found["n"] == len(grad) == store.n_kept(site, "train")
        assert found["mean_norm"] == pytest.approx(float(grad.norm(dim=1).mean()))
        assert found["mean_square_norm"] == pytest.approx(float(grad.square().sum(1).mean()))
        mean = load_file(path / "stats.safetensors")[f"grad:{site}"]
        torch.testing.assert_close(mean, grad.mean(0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_beside_two_byte_rows_are_bfloat16(paths, tmp_path, toy_model, toy_corpus, dtype):
    path = fill(tmp_path, toy_model, toy_corpus, dtype=dtype)
    wanted = {site: stored(paths["data"], f"grad:{site}").bfloat16() for site in SITES}
    store = open_store(path)
    for site in SITES:
        assert torch.equal(stored(path, f"grad:{site}"), wanted[site])
        b = next(store.batches(site, batch=32, seed=0))
        assert torch.equal(b.grad, wanted[site][b.rows].float())


def test_an_interrupted_harvest_ends_in_the_bytes_of_an_uninterrupted_one(
    tmp_path, toy_model, toy_corpus
):
    assert_survives_every_crash(
        lambda out: fill(out, toy_model, toy_corpus, gradient="sampled"), tmp_path, stride=7
    )


def test_gradients_without_a_disk_are_those_on_disk(paths, toy_model, toy_corpus):
    for kind, path in paths.items():
        config = HarvestConfig(
            sites=SITES, batch_tokens=256, rows_per_shard=300, dtype="float32", gradient=kind
        )
        online = OnlineStore(toy_model, CorpusConfig(source=str(toy_corpus), **FIELDS), config)
        whole = stored(path, f"grad:{SITES[1]}")
        assert (online.grad_sites, online.grad_labels) == (SITES, kind)
        for b in online.scan(SITES[1], batch=64, target=SITES[0]):
            assert torch.equal(b.grad, whole[b.rows])
        for b in islice(online.batches(SITES[1], batch=64, seed=0), 20):
            assert torch.equal(b.grad, whole[b.rows])


class BrokenGradient:
    """A model whose gradient at one site is NaN wherever a token id occurs."""

    def __init__(self, model, site, token):
        self._model, self._site, self._token = model, site, token

    def __getattr__(self, name):
        return getattr(self._model, name)

    def grad_at(self, tokens, sites, objective, edits=None):
        found = self._model.grad_at(tokens, sites, objective, edits)
        x, grad = found[self._site]
        grad[tokens == self._token] = torch.nan
        return found | {self._site: (x, grad)}


def test_a_gradient_that_is_not_finite_is_named_unless_its_row_is_masked(
    tmp_path, toy_model, toy_corpus, caplog
):
    broken = BrokenGradient(toy_model, SITES[0], 2 + ord(":"))
    wanted = r"the gradient at site 'blocks.0.*holds NaN.* position \d+ of window \d+, document \d+"
    with pytest.raises(NonFiniteError, match=wanted):
        fill(tmp_path / "a", broken, toy_corpus)
    config = HarvestConfig(sites=SITES, gradient="data")
    online = OnlineStore(broken, CorpusConfig(source=str(toy_corpus), **FIELDS), config)
    with pytest.raises(NonFiniteError, match=r"the gradient at .* position \d+, document \d+"):
        list(online.scan(SITES[0], batch=64))
    masked = BrokenGradient(toy_model, SITES[0], toy_model.bos_id)
    path = fill(tmp_path / "b", masked, toy_corpus, corpus={"bos": "always"})
    assert "the gradient at site 'blocks.0.hook_resid_post'" in caplog.text
    b = next(open_store(path).batches(SITES[0], batch=200, seed=0))
    assert bool(b.grad.isfinite().all())


def test_a_float16_model_is_refused(toy_model):
    class Half:
        dtype = torch.float16

        def __getattr__(self, name):
            return getattr(toy_model, name)

    with pytest.raises(ConfigError, match="bfloat16"):
        LossGradient(Half(), SITES, "data", 0)


def test_gradients_enter_the_key_only_where_they_are_asked_for():
    corpus = CorpusConfig(source="toy", tokens=1200, context=32)
    identity = identify("toy", "float32", torch.device("cpu"))

    def key(**options):
        config = HarvestConfig(sites=("blocks.1.hook_resid_post",), **options)
        inputs = api.store_inputs(identity, corpus, config)
        return artifacts.stage_key("store", 1, inputs, [])

    # the key of such a store before there were gradients
    assert key() == "4622e8be44ff07a0c79eace1bbcd07312317a1ecea3237179226038daec764c5"
    assert key(gradient_seed=1) == key()
    assert key(gradient="data", gradient_seed=1) == key(gradient="data") != key()
    assert key(gradient="sampled", gradient_seed=1) != key(gradient="sampled")


def test_a_pass_with_gradients_holds_a_bounded_number_of_logits():
    assert pass_tokens(4096, 400) == 4096
    assert pass_tokens(4096, 49_152) == 1365
    assert pass_tokens(8, 2**30) == 1


def toy_run(out, **changes):
    return {
        "name": "toy",
        "model": {"source": "toy", "dtype": "float32"},
        "corpus": {"source": "toy", "context": 32, "tokens": 1500, "holdout": 0.3},
        "harvest": {"sites": ["blocks.1.hook_resid_post"], "gradient": "sampled"},
        "dictionaries": [{"type": "gradient_topk", "d_sae": 24, "k": 3}],
        "train": {"batch": 64, "tokens": 384},
        "out": str(out),
    } | changes


def test_a_run_with_a_type_that_needs_gradients_is_planned_and_made(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    render = Console(record=True, width=140, file=io.StringIO())
    render.print(planning.plan(pipeline.load_config(toy_run(tmp_path / "out"))))
    assert "with gradients" in render.export_text()
    steps = pipeline.run(toy_run(tmp_path / "out"))
    assert [step.stage for step in steps] == ["store", "dictionary"]
    assert open_store(steps[0].path.resolve()).facts["gradient"]["labels"] == "sampled"


def test_gradients_that_will_be_missing_are_named_before_anything_runs(tmp_path, toy_store):
    plain = {"sites": ["blocks.1.hook_resid_post"]}
    with pytest.raises(ConfigError, match=r"dictionaries\.0: .* set harvest\.gradient"):
        pipeline.load_config(toy_run(tmp_path, harvest=plain))
    planted = {"corpus": None, "harvest": None, "model": None, "synthetic": {"n_rows": 500}}
    with pytest.raises(ConfigError, match="a planted store has none"):
        pipeline.load_config(toy_run(tmp_path, **planted))
    member = {"type": "gradient_topk", "d_sae": 24, "k": 3}
    with pytest.raises(ConfigError, match=r"holds none at blocks\.0"):
        api.fit(member, toy_store, {"tokens": 128, "batch": 64}, site=SITES[0])
