"""The core evaluator: identity and ablation splices, masks, controls, refusals."""

import dataclasses

import pytest
import torch
from doubles import ArrayStore, planted_store
from torch import Tensor

from saelab.dictionaries.topk import TopK, TopKConfig
from saelab.errors import ArtifactError, ConfigError, CorpusError
from saelab.evals.controls import PcaArm, PcaErrors, RandomAtomsArm, fit_pca, fit_token_means
from saelab.evals.core import CoreConfig, CoreEvaluator
from saelab.evals.downstream import RandomError, ablate_to, measure_splices
from saelab.evals.encoders import OwnEncoder, PursuitEncoder, decode
from saelab.evals.sample import sample_rows, sample_windows, thinned, units
from saelab.metrics.reconstruction import fvu
from saelab.models.toy import ToyModel
from saelab.protocols import Encoder
from saelab.types import Window

SITE = "blocks.0.hook_resid_post"
N_WINDOWS = 30


class ToyStore(ArrayStore):
    """The toy model's activations at SITE on random tokens; first positions are masked."""

    def __init__(self, model: ToyModel) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, model.d_vocab, (N_WINDOWS, 16), generator=generator)
        x = model.capture(self.ids, [SITE])[SITE].flatten(0, 1)
        super().__init__({SITE: x})
        self.model_name, self.model_fingerprint = model.name, model.fingerprint

    def window(self, site: str, number: int) -> Window:
        window = super().window(site, number)
        kept = torch.arange(16) > 0
        return dataclasses.replace(window, ids=self.ids[number].int(), kept=kept)

    def _kept(self, split: str) -> Tensor:
        rows = super()._kept(split)  # type: ignore[arg-type]
        return rows[rows % 16 > 0]


@pytest.fixture(scope="module")
def model() -> ToyModel:
    return ToyModel()


@pytest.fixture(scope="module")
def store(model: ToyModel) -> ToyStore:
    return ToyStore(model)


def topk(store: ArrayStore, d_sae: int = 24, k: int = 4) -> TopK:
    site = store.sites[0]
    config = TopKConfig.parse({"type": "topk", "d_in": store.width(site), "d_sae": d_sae, "k": k})
    dictionary = TopK(config)
    sample = next(store.batches(site, batch=256, seed=0)).x
    dictionary.init_(sample, torch.Generator().manual_seed(0))
    return dictionary


def totals(model: ToyModel, store: ToyStore, arms: dict) -> dict[str, dict[str, float]]:
    windows = sample_windows(store, SITE, 4)
    mean = store.stats(SITE).mean
    arms = arms | {"zero": ablate_to(torch.zeros(32)), "mean": ablate_to(mean)}
    found = measure_splices(model, SITE, windows, arms, batch=3)
    sums = found.sums.totals()
    ablations = {"zero": "zero", "mean": "mean"}
    return {a: {d.name: float(d.of(sums)) for d in found.of_arm(a, ablations)} for a in arms}


# ------------------------------------------------------------------------------------- downstream


def test_splicing_the_identity_has_kl_exactly_zero_and_recovers_everything(model, store):
    scores = totals(model, store, {"identity": lambda batch: batch.x})["identity"]
    assert scores["kl"] == 0
    assert scores["delta_ce"] == 0
    assert scores["ce_recovered_zero"] == 1
    assert scores["ce_recovered_mean"] == 1


def test_splicing_an_ablation_recovers_nothing_of_it(model, store):
    scores = totals(model, store, {"arm": lambda batch: torch.zeros_like(batch.x)})
    assert scores["arm"]["ce_recovered_zero"] == 0
    assert scores["mean"]["ce_recovered_mean"] == 0
    assert scores["arm"]["kl"] > 0
    assert scores["arm"]["kl"] == scores["zero"]["kl"]


def test_clean_ce_is_that_of_a_loop_over_kept_positions_and_their_targets(model, store):
    windows = sample_windows(store, SITE, 4)
    found = measure_splices(model, SITE, windows, {"x": lambda batch: batch.x}, batch=2)
    losses = []
    for window in windows:
        logits = model.logits(window.ids.long()[None])[0]
        for t in range(1, 15):
            losses.append(-float(logits[t].log_softmax(-1)[window.ids[t + 1]]))
    assert found.compute()["ce"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert int(found.sums.totals()[0, 0]) == 4 * 14


def test_masked_positions_keep_their_own_activation_and_never_reach_an_arm(model, store):
    windows = sample_windows(store, SITE, 2)
    seen, spliced = [], []

    class Watched:
        def __getattr__(self, name: str):
            return getattr(model, name)

        def splice(self, tokens, site, x_hat, keep, lengths=None):
            spliced.append((x_hat, keep))
            return model.splice(tokens, site, x_hat, keep, lengths)

    def arm(batch):
        seen.append(batch.rows)
        return 0 * batch.x

    measure_splices(Watched(), SITE, windows, {"arm": arm}, batch=2)  # type: ignore[arg-type]
    assert bool((torch.cat(seen) % 16 > 0).all())
    x_hat, keep = spliced[0]
    own = model.capture(torch.stack([w.ids.long() for w in windows]), [SITE])[SITE]
    assert not keep[:, 0].any()
    assert keep[:, 1:].all()
    assert torch.equal(x_hat[:, 0], own[:, 0])
    assert not x_hat[:, 1:].any()


def test_special_targets_and_those_of_another_document_do_not_count(model, store):
    window = store.window(SITE, 0)
    ids = window.ids.clone()
    ids[5] = model.eos_id
    document = torch.tensor([0] * 8 + [7] * 8)
    window = dataclasses.replace(window, ids=ids, document=document)
    found = measure_splices(model, SITE, [window], {"x": lambda batch: batch.x}, batch=1)
    assert int(found.sums.totals()[0, 0]) == 14 - 2
    assert found.sums.documents.tolist() == [0]


def test_windows_of_different_length_score_as_they_do_alone(model, store):
    long = store.window(SITE, 0)
    short = dataclasses.replace(
        store.window(SITE, 1), ids=store.ids[1, :9].int(), document=torch.full((9,), 1),
        kept=torch.arange(9) > 0,
    )  # fmt: skip
    arms = {"half": lambda batch: 0.5 * batch.x}
    together = measure_splices(model, SITE, [long, short], arms, batch=2).sums
    apart = measure_splices(model, SITE, [long, short], arms, batch=1).sums
    torch.testing.assert_close(together.table, apart.table, rtol=1e-5, atol=1e-5)


def test_random_errors_have_the_norm_of_the_arm_s_error_and_the_covariance_s_directions(store):
    pca = fit_pca(store, SITE, rows=10_000, batch=64, seed=0)
    batch = next(sample_rows(store, SITE, "heldout", 50, batch=50, seed=0))
    for kind in ("isotropic", "covariance"):
        error = RandomError(lambda b: 0.9 * b.x, kind, pca, seed=0)(batch) - batch.x
        torch.testing.assert_close(error.norm(dim=1), 0.1 * batch.x.norm(dim=1), rtol=1e-3, atol=0)
        share = float((error @ pca.basis[:, :4].float()).square().sum() / error.square().sum())
        top = float(pca.variances[:4].sum() / pca.variances.sum())
        assert share == pytest.approx(top if kind == "covariance" else 4 / 32, abs=0.1)


def test_documents_that_share_a_window_are_one_bootstrap_unit(store):
    window = store.window(SITE, 0)
    documents = [[0, 1], [1, 2], [5, 5], [6, 2]]
    windows = [dataclasses.replace(window, document=torch.tensor(d * 8)) for d in documents]
    assert units(windows) == {0: 0, 1: 0, 2: 0, 5: 5, 6: 0}


# --------------------------------------------------------------------------------------- controls


def test_pca_with_all_components_is_perfect_and_with_k_has_the_fvu_of_its_eigenvalues(store):
    pca = fit_pca(store, SITE, rows=10**6, batch=100, seed=0)
    batch = next(store.scan(SITE, batch=10**6, split="train"))
    whole, few = PcaArm(pca, 32), PcaArm(pca, 5)
    torch.testing.assert_close(whole(batch)[0], batch.x, atol=1e-4, rtol=0)
    expected = float(pca.variances[5:].sum() / pca.variances.sum())
    assert fvu(batch.x, few(batch)[0]) == pytest.approx(expected, rel=1e-4)
    errors = PcaErrors(pca)
    errors.update(batch.x)
    error = float((batch.x - few(batch)[0]).double().square().sum())
    assert errors.rank_at(error * 1.001) == 5
    assert errors.rank_at(error * 0.999) == 6
    assert errors.rank_at(float("inf")) == 0


def test_token_means_are_those_of_a_loop_and_unseen_ids_get_the_mean(store):
    refs = next(store.scan(SITE, batch=10**6, split="heldout")).rows
    arm = fit_token_means(store, SITE, refs)
    assert arm is not None
    batch = next(sample_rows(store, SITE, "heldout", 40, batch=40, seed=3))
    found = arm(batch)[0]
    ids, train = store.ids.flatten(), store._kept("train")
    for row, ref in zip(found, batch.rows, strict=True):
        same = train[ids[train] == ids[ref]]
        expected = store.rows(SITE, same if len(same) else train).mean(0)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_random_atoms_are_centred_unit_training_rows(store):
    arm = RandomAtomsArm(store, SITE, n_atoms=20, k=3, seed=0)
    torch.testing.assert_close(arm.atoms.norm(dim=1), torch.ones(20))
    train = store.rows(SITE, store._kept("train")) - store.stats(SITE).mean.float()
    cosines = torch.nn.functional.normalize(train) @ arm.atoms.T
    torch.testing.assert_close(cosines.max(0).values, torch.ones(20))
    batch = next(sample_rows(store, SITE, "heldout", 10, batch=10, seed=0))
    x_hat, z = arm(batch)
    assert z is not None
    assert int(z.l0().max()) <= 3
    torch.testing.assert_close(x_hat, z.dense() @ arm.atoms + arm.mean)


def test_pursuit_codes_decode_with_a_decoder_of_any_norm(store):
    dictionary = topk(store)
    batch = next(sample_rows(store, SITE, "heldout", 10, batch=10, seed=0))
    unit = decode(dictionary, PursuitEncoder(dictionary, 4)(batch), batch.x)
    with torch.no_grad():
        dictionary.W_dec.mul_(torch.linspace(0.5, 2, 24)[:, None])
    scaled = decode(dictionary, PursuitEncoder(dictionary, 4)(batch), batch.x)
    torch.testing.assert_close(scaled, unit, atol=1e-4, rtol=1e-4)
    assert isinstance(PursuitEncoder(dictionary, 4), Encoder)
    assert isinstance(OwnEncoder(dictionary), Encoder)
    assert PursuitEncoder(dictionary, 4, sign="nonneg").name == "pursuit(k=4, nonneg)"
    positive = PursuitEncoder(dictionary, 4, sign="nonneg")(batch)
    assert bool((positive.values > 0).all())


def test_a_sample_of_rows_has_no_row_twice(store):
    batches = list(sample_rows(store, SITE, "train", 100, batch=32, seed=0))
    rows = torch.cat([b.rows for b in batches])
    assert len(rows) == len(rows.unique()) == 100
    everything = list(sample_rows(store, SITE, "train", 10**6, batch=32, seed=0))
    assert sum(len(b) for b in everything) == store.n_kept(SITE, "train")


# -------------------------------------------------------------------------------------- evaluator

QUICK = CoreConfig(windows=4, resamples=50, batch=64, spliced_controls=("re-encoded", "pca"))


def test_every_number_says_its_arm_encoder_count_and_error_and_repeats_to_the_bit(model, store):
    dictionary = topk(store)
    rows = list(CoreEvaluator(QUICK)(dictionary, store, model))
    assert rows == list(CoreEvaluator(QUICK)(dictionary, store, model))
    assert len({(row.name, row.arm) for row in rows}) == len(rows)
    cells = {(row.arm, row.name): row for row in rows}
    arms = ("dictionary", "re-encoded", "token_mean", "pca(k=4)", "random_atoms(n=24)")
    for arm in arms:
        assert 0 < cells[arm, "fvu"].value < 2
        assert cells[arm, "fvu"].standard_error is not None
        assert cells[arm, "fvu"].n == store.n_kept(SITE, "heldout")
    assert cells["re-encoded", "fvu"].encoder == "pursuit(k=4)"
    assert cells["dictionary", "dead_share"].standard_error is None
    spliced = ("dictionary", "re-encoded", "pca(k=4)", "zero_ablation", "random_error(isotropic)")
    for arm in spliced:
        assert cells[arm, "kl"].value > 0
        assert cells[arm, "kl"].n == 4 * 14
    assert ("zero_ablation", "ce_recovered_zero") not in cells
    ratio = cells["dictionary", "kl_over_random_error(isotropic)"].value
    of_random = cells["random_error(isotropic)", "kl"].value
    assert ratio == pytest.approx(cells["dictionary", "kl"].value / of_random)


def test_one_evaluator_scores_several_dictionaries_as_fresh_ones_do_with_fewer_passes(
    model, store, monkeypatch
):
    splices = []
    plain = type(model).splice
    monkeypatch.setattr(type(model), "splice", lambda *given: splices.append(1) or plain(*given))
    members = [topk(store), topk(store, k=3), topk(store)]
    members[2].b_dec.data += 0.1
    fresh = [list(CoreEvaluator(QUICK)(member, store, model)) for member in members]
    apart = len(splices)
    evaluator = CoreEvaluator(QUICK)
    assert [list(evaluator(member, store, model)) for member in members] == fresh
    assert len(splices) == 2 * apart - 2 * 2  # two ablations, for two of the three
    other = list(evaluator(members[0], store, None))
    assert other == [row for row in fresh[0] if row in other]  # no model: nothing spliced is kept


def test_the_dictionary_s_fvu_is_that_of_its_own_reconstruct():
    store, _ = planted_store()
    dictionary = topk(store)
    rows = {(r.arm, r.name): r.value for r in CoreEvaluator()(dictionary, store, None)}
    x = next(store.scan("site", batch=10**6, split="heldout")).x
    expected = fvu(x, dictionary.reconstruct(x).detach())
    assert rows["dictionary", "fvu"] == pytest.approx(expected, rel=1e-5)
    assert rows["dictionary", "l0"] == pytest.approx(4)
    assert not any(name == "kl" for _, name in rows)


def test_what_does_not_belong_together_is_refused(model, store):
    dictionary = topk(store)
    with pytest.raises(ArtifactError, match="width"):
        list(CoreEvaluator(QUICK)(topk(planted_store()[0]), store, None))
    with pytest.raises(ArtifactError, match="fingerprint"):
        list(CoreEvaluator(QUICK)(dictionary, store, ToyModel(seed=1)))
    tiny = ArrayStore({"site": torch.randn(32, 32)})
    two = ArrayStore({"a": torch.randn(160, 32), "b": torch.randn(160, 32)})
    with pytest.raises(CorpusError, match="held-out"):
        list(CoreEvaluator(QUICK)(dictionary, tiny, None))
    with pytest.raises(ConfigError, match="say which"):
        list(CoreEvaluator(QUICK)(dictionary, two, None))


def test_thinning_a_stream_takes_the_same_even_share_whatever_the_batches(store):
    def thin(batch: int) -> list[int]:
        seen, rows = 0, []
        for part in store.scan(SITE, batch=batch, split="train"):
            rows += thinned(part, 0.3, seen).rows.tolist()
            seen += len(part)
        return rows

    assert thin(7) == thin(100)
    assert len(thin(7)) == int(0.3 * store.n_kept(SITE, "train"))
    batch = next(store.scan(SITE, batch=50))
    assert torch.equal(thinned(batch, 1.0, 13).rows, batch.rows)
