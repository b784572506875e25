"""Stores without a language model: the user's own arrays, and planted dictionaries."""

import numpy as np
import pytest
import torch
from crash import assert_survives_every_crash
from safetensors.torch import load_file

from saelab import artifacts
from saelab.errors import ArtifactError, ConfigError, NonFiniteError, ShapeError, SiteError
from saelab.store import ArraysConfig, from_arrays, open_store, planted
from saelab.store.flat import FlatConfig, FlatWorld
from saelab.store.synthetic import SITE, fill_synthetic


@pytest.fixture
def save(tmp_path):
    """Save an array and return its path."""

    def to_file(name, array):
        np.save(tmp_path / f"{name}.npy", array)
        return tmp_path / f"{name}.npy"

    return to_file


def rows(n=50, d=3, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(n, d)).astype(dtype)


def test_rows_of_an_array_are_documents_of_their_own(save, tmp_path):
    x = rows()
    store = open_store(from_arrays(ArraysConfig(sites={"mine": save("x", x)}), tmp_path, "own"))
    assert torch.equal(store.rows("mine", torch.arange(50)), torch.from_numpy(x))
    assert (store.n_windows, store.facts["n_documents"]) == (50, 50)
    assert store.model_name is None
    assert 0 < store.n_kept("mine", "heldout") < 20
    assert store.window("mine", 3).strings == ("",)


def test_documents_masks_and_aligned_sites_are_taken(save, tmp_path):
    x = rows(dtype=np.float16)
    names = np.array(["a"] * 20 + ["b"] * 10 + ["a"] * 20)
    masked = np.arange(50) % 10 == 0
    config = ArraysConfig(
        sites={"in": save("x", x), "out": save("y", -x[:, :2])},
        documents=save("documents", names),
        masked=save("masked", masked),
        window=8,
        rows_per_shard=32,
    )
    store = open_store(from_arrays(config, tmp_path, "own"))
    assert str(store.dtype) == "torch.float16"
    assert [len(w) for w in store.windows("in")] == [8, 8, 4, 8, 2, 2, 8, 8, 2]
    assert [store.document(n).label for n in range(store.facts["n_documents"])] == ["a", "b"]
    assert store.n_kept("in", "all") == 45
    batch = next(store.batches("in", batch=10, seed=0, split="all", target="out"))
    assert torch.equal(batch.y, -batch.x[:, :2])
    assert torch.equal(batch.documents, ((batch.rows >= 20) & (batch.rows < 30)).long())


def test_gradients_are_taken_beside_the_rows(save, tmp_path):
    x, grad = rows(), rows(d=2) * 1e-6
    files = {"in": save("x", x), "out": save("y", -x[:, :2])}
    masked = save("masked", np.arange(50) == 4)
    grad[4] = np.nan
    options = {"sites": files, "gradients": {"out": save("g", grad)}, "masked": masked}
    store = open_store(from_arrays(ArraysConfig(**options, rows_per_shard=20), tmp_path, "own"))
    assert store.grad_sites == ("out",)
    for batch in store.scan("out", batch=16):
        assert torch.equal(batch.grad, torch.from_numpy(grad)[batch.rows])
    assert next(store.scan("in", batch=16)).grad is None
    assert store.facts["grad_stats"]["out"]["n"] == store.n_kept("out", "train")
    half = ArraysConfig(**options, dtype="float16")
    batch = next(open_store(from_arrays(half, tmp_path, "own")).scan("out", batch=50))
    wanted = torch.from_numpy(grad).bfloat16().float()[batch.rows]
    assert torch.equal(batch.grad, wanted)
    assert wanted.abs().min() > 0
    without = ArraysConfig(sites=files, masked=masked, rows_per_shard=20)
    assert open_store(from_arrays(without, tmp_path, "own")).grad_sites == ()


def test_gradients_that_do_not_fit_are_named(save, tmp_path):
    files = {"mine": save("x", rows())}

    def make(**gradients):
        from_arrays(ArraysConfig(sites=files, gradients=gradients), tmp_path, "own")

    with pytest.raises(ShapeError, match=r"few\.npy should hold .* \(50, 3\), but has shape \(49"):
        make(mine=save("few", rows(49)))
    with pytest.raises(SiteError, match=r"no rows.*mine"):
        make(main=save("g", rows()))
    bad = rows()
    bad[7, 1] = np.inf
    with pytest.raises(NonFiniteError, match=r"the gradient at site 'mine' .* document 7"):
        make(mine=save("bad", bad))


def test_the_same_arrays_make_the_store_once(save, tmp_path):
    config = ArraysConfig(sites={"mine": save("x", rows())})
    path = from_arrays(config, tmp_path, "own")
    before = (path / "manifest.json").stat().st_mtime_ns
    assert from_arrays(config, tmp_path, "own") == path
    assert (path / "manifest.json").stat().st_mtime_ns == before
    other = ArraysConfig(sites={"mine": save("x", rows() + 1)})
    assert from_arrays(other, tmp_path, "own") != path


def test_arrays_that_do_not_fit_are_named(save, tmp_path):
    good = save("good", rows())

    def make(**fields):
        from_arrays(ArraysConfig(**({"sites": {"mine": good}} | fields)), tmp_path, "own")

    with pytest.raises(ShapeError, match=r"flat\.npy has shape \(5,\)"):
        make(sites={"mine": save("flat", np.zeros(5))})
    with pytest.raises(ShapeError, match=r"good\.npy has 50, but .*short\.npy has 49"):
        make(sites={"mine": good, "other": save("short", rows(49))})
    with pytest.raises(ShapeError, match="holds int64"):
        make(sites={"mine": save("ints", np.zeros((4, 2), dtype=np.int64))})
    with pytest.raises(ShapeError, match=r"shape \(50,\), one entry per row"):
        make(documents=save("few", np.zeros(49)))
    with pytest.raises(ConfigError, match="no file"):
        make(sites={"mine": tmp_path / "nowhere.npy"})
    (tmp_path / "torn.npy").write_bytes(good.read_bytes()[:-7])
    with pytest.raises(ConfigError, match=r"torn\.npy is not a whole"):
        make(sites={"mine": tmp_path / "torn.npy"})
    bad = rows()
    bad[7, 1] = np.nan
    with pytest.raises(NonFiniteError, match="position 0 of window 7, document 7"):
        make(sites={"mine": save("bad", bad)})
    assert artifacts.find_all(tmp_path) == []


def test_masked_rows_may_hold_nan_and_do_not_touch_the_median(save, tmp_path):
    x, masked = rows(), np.arange(50) < 20
    x[masked] = np.nan
    config = ArraysConfig(sites={"mine": save("x", x)}, masked=save("masked", masked))
    store = open_store(from_arrays(config, tmp_path, "own"))
    wanted = np.median(np.linalg.norm(x[20:].astype(np.float64), axis=1))
    assert store.stats("mine").median_norm == pytest.approx(wanted)
    assert store.n_kept("mine", "all") == 30


def test_a_store_whose_rows_are_all_masked_has_no_median(save, tmp_path):
    x = np.full((10, 3), np.nan, dtype=np.float32)
    config = ArraysConfig(sites={"mine": save("x", x)}, masked=save("masked", np.ones(10)))
    store = open_store(from_arrays(config, tmp_path, "own"))
    assert (store.stats("mine").median_norm, store.n_kept("mine", "all")) == (0.0, 0)


def test_rows_that_cannot_be_kept_say_which_option_helps(save, tmp_path):
    for value, dtype, option in ((np.inf, "auto", "--masked"), (1e6, "float16", "--dtype")):
        x = rows()
        x[3, 1] = value
        config = ArraysConfig(sites={"mine": save("bad", x)}, dtype=dtype)
        with pytest.raises(NonFiniteError, match=option):
            from_arrays(config, tmp_path, "own")


# ------------------------------------------------------------------------------------------ planted


def plant(out, config):
    with artifacts.open_draft(out, "store", "planted", "9" * 64) as draft:
        if draft.is_finished:
            return draft.target
        facts = fill_synthetic(draft, config)
        draft.finish(stage="store", name="planted", inputs={}, parents=[], facts=facts)
    return artifacts.artifact_path(out, "store", "planted", "9" * 64)


SMALL = FlatConfig(n_features=12, d=6, l0=2, n_rows=300, window=10, rows_per_shard=128, seed=3)


def test_planted_rows_are_codes_times_directions(tmp_path):
    path = plant(tmp_path, SMALL)
    store = open_store(path)
    truth = load_file(path / planted.TRUTH)
    torch.testing.assert_close(truth["directions"].norm(dim=1), torch.ones(12))
    a = torch.cat(
        [next(FlatWorld(SMALL).codes(shard, n)) for shard, n in enumerate((120, 120, 60))]
    )
    x = torch.cat([b.x for b in store.scan(SITE, batch=64)])
    torch.testing.assert_close(x, a @ truth["directions"], rtol=1e-5, atol=1e-5)
    assert (a >= 0).all()
    assert abs(float((a > 0).sum(1).float().mean()) - 2) < 0.3


def test_the_truth_of_any_rows_can_be_read_back_in_any_order(tmp_path):
    store = open_store(plant(tmp_path, SMALL))
    truth = store.truth()
    assert truth is not None
    refs = torch.tensor([299, 3, 130, 131, 3, 0])
    a = store.codes(refs).dense()
    x = store.rows(SITE, refs)
    torch.testing.assert_close(x, a @ truth.directions + truth.bias, rtol=1e-5, atol=1e-5)
    assert truth.parents.tolist() == [-1] * 12


def test_a_store_of_bare_arrays_has_no_truth(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((20, 3), dtype=np.float32))
    config = ArraysConfig.parse({"sites": {"a": tmp_path / "a.npy"}})
    store = open_store(from_arrays(config, tmp_path / "out", "a"))
    assert store.truth() is None
    with pytest.raises(ArtifactError, match="nothing was planted"):
        store.codes(torch.tensor([0]))


def test_planted_tokens_are_called_after_their_strongest_direction(tmp_path):
    store = open_store(plant(tmp_path, SMALL))
    window = store.window(SITE, 12)
    assert window.strings == tuple(f"f{i} " for i in window.ids)
    assert len(window) == 10
    assert "".join(window.strings) == store.document(12).text


def test_noise_and_bias_are_as_asked(tmp_path):
    config = SMALL.model_copy(update={"noise": 0.5, "bias": 3.0, "n_rows": 2000})
    path = plant(tmp_path, config)
    truth = load_file(path / planted.TRUTH)
    assert float(truth["bias"].norm()) == pytest.approx(3.0)
    x = torch.cat([b.x for b in open_store(path).scan(SITE, batch=500)])
    sizes = [120] * 16 + [80]
    a = torch.cat([next(FlatWorld(config).codes(shard, n)) for shard, n in enumerate(sizes)])
    assert float((x - a @ truth["directions"] - truth["bias"]).std()) == pytest.approx(
        0.5, abs=0.03
    )


def test_impossible_plans_are_refused():
    with pytest.raises(ConfigError, match="must not exceed n_features"):
        FlatConfig.parse({"n_features": 3, "l0": 4})


def test_a_crash_while_planting_changes_no_byte(tmp_path):
    config = SMALL.model_copy(update={"n_rows": 150})
    assert_survives_every_crash(lambda out: plant(out, config), tmp_path, stride=3)
