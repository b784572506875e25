"""Arms that select latents by gradients: marked, as harvest's, and of no effect on other arms."""

import dataclasses

import pytest
import torch
from conftest import SITES
from test_core_evaluator import QUICK, SITE, ToyStore, topk
from test_harvest_gradient import fill

from saelab.dictionaries import create
from saelab.evals.core import CoreEvaluator
from saelab.evals.downstream import measure_splices
from saelab.evals.gradients import LiveGradients, gradient_arms
from saelab.evals.sample import sample_windows
from saelab.models.toy import ToyModel
from saelab.ops.loss_gradient import LossGradient
from saelab.store import open_store

ARMS = ("gradient_data", "gradient_sampled")


class GradientStore(ToyStore):
    """The toy model's activations with the gradients of sampled labels."""

    def __init__(self, model: ToyModel) -> None:
        super().__init__(model)
        windows = list(self.windows(SITE))
        numbers = [window.number for window in windows]
        grads = LossGradient(model, [SITE], "sampled", 0)(self.ids, windows, numbers)[1]
        self._grads = {SITE: grads[SITE].flatten(0, 1)}
        self.grad_sites, self.grad_labels = (SITE,), "sampled"


@pytest.fixture(scope="module")
def model() -> ToyModel:
    return ToyModel()


@pytest.fixture(scope="module")
def store(model: ToyModel) -> GradientStore:
    return GradientStore(model)


def aware(plain, beta: float):
    """A gradient-TopK dictionary with the weights of a TopK one."""
    fields = {"type": "gradient_topk", "d_in": plain.d_in, "d_sae": plain.d_sae, "beta": beta}
    dictionary = create(fields | {"k": plain.config.k})
    dictionary.load_state_dict(plain.state_dict(), strict=False)
    return dictionary


def measured(dictionary, store, model):
    return list(CoreEvaluator(QUICK)(dictionary, store, model))


def by_arm(rows, arm):
    """Everything measured of one arm, with neither its name nor its encoder's."""
    found = {r.name: dataclasses.replace(r, arm="", encoder="") for r in rows if r.arm == arm}
    return {name: row for name, row in found.items() if not name.startswith(("pca_", "kl_over"))}


@pytest.fixture
def passes(monkeypatch):
    """The calls of the model's backward pass."""
    seen = []
    plain = ToyModel.grad_at
    monkeypatch.setattr(ToyModel, "grad_at", lambda *given: seen.append(1) or plain(*given))
    return seen


# ------------------------------------------------------------------------------------------- rows


def test_rows_that_knew_a_gradient_say_so_by_arm_and_encoder(model, store):
    rows = measured(aware(topk(store), 3), store, model)
    assert len({(row.name, row.arm) for row in rows}) == len(rows)
    assert {(r.arm, r.encoder) for r in rows if "gradient" in r.arm + r.encoder} == {
        ("gradient_data", "gradient(data)"),
        ("gradient_sampled", "gradient(sampled)"),
    }
    cells = {(row.arm, row.name): row for row in rows}
    for arm in ARMS:
        for name in ("ce", "delta_ce", "kl", "ce_recovered_zero", "ce_recovered_mean"):
            assert cells[arm, name].n == cells["dictionary", name].n
            assert cells[arm, name].standard_error is not None
    assert cells["gradient_sampled", "fvu"].n == store.n_kept(SITE, "heldout")
    assert cells["gradient_sampled", "l0"].value <= 4
    assert ("gradient_sampled", "dead_share") in cells
    assert ("gradient_data", "fvu") not in cells  # the store's gradients are of sampled labels


def test_without_weight_on_gradients_their_arms_are_the_dictionary_s_own_to_the_bit(model, store):
    rows = measured(aware(topk(store), 0), store, model)
    own = by_arm(rows, "dictionary")
    assert by_arm(rows, "gradient_sampled") == own
    shared = by_arm(rows, "gradient_data")
    assert shared.items() <= own.items()
    assert {"ce", "delta_ce", "kl"} <= shared.keys()


def test_with_much_weight_on_gradients_their_arms_differ(model, store):
    rows = measured(aware(topk(store), 1000), store, model)
    own, data, sampled = (by_arm(rows, arm) for arm in ("dictionary", *ARMS))
    assert sampled["fvu"].value > own["fvu"].value
    assert len({arm["kl"].value for arm in (own, data, sampled)}) == 3
    assert len({arm["delta_ce"].value for arm in (own, data, sampled)}) == 3


def test_no_other_row_changes_by_a_bit_where_gradient_arms_are_measured(model, store):
    plain = topk(store)
    for model_or_none in (model, None):
        rows = measured(aware(plain, 1000), store, model_or_none)
        assert [r for r in rows if r.arm not in ARMS] == measured(plain, store, model_or_none)


def test_a_store_without_gradients_or_their_labels_gives_the_spliced_arms_only(model, store):
    dictionary = aware(topk(store), 3)
    expected = [r for r in measured(dictionary, store, model) if r.arm in ARMS]
    expected = [r for r in expected if r.name in ("ce", "kl", "delta_ce") or "recovered" in r.name]
    assert len(expected) == 2 * 5
    unlabelled = GradientStore(model)
    unlabelled.grad_labels = None
    for other in (ToyStore(model), unlabelled):
        assert [r for r in measured(dictionary, other, model) if r.arm in ARMS] == expected


def test_without_a_model_there_is_the_store_s_own_arm_only(store):
    rows = measured(aware(topk(store), 3), store, None)
    assert {row.arm for row in rows} & set(ARMS) == {"gradient_sampled"}


def test_a_model_in_float16_gives_no_gradient_arms(model, store):
    class Half:
        dtype = torch.float16

        def __getattr__(self, name):
            return getattr(model, name)

    rows = measured(aware(topk(store), 3), ToyStore(model), Half())
    assert not {row.arm for row in rows} & set(ARMS)


# ------------------------------------------------------------------------------------------- cost


def test_a_dictionary_that_takes_no_gradients_costs_no_backward_pass(model, store, passes):
    assert gradient_arms(topk(store)) == {}
    measured(topk(store), store, model)
    assert not passes


def test_each_window_is_differentiated_once_per_kind_of_labels_for_all_dictionaries(
    model, store, passes
):
    members = [aware(topk(store), beta) for beta in (1, 1000)]
    fresh = [measured(member, store, model) for member in members]
    assert len(passes) == 2 * 2  # four windows are one batch
    evaluator = CoreEvaluator(QUICK)
    assert [list(evaluator(member, store, model)) for member in members] == fresh
    assert len(passes) == 2 * 2 + 2


def test_gradients_beyond_what_is_kept_are_taken_anew_and_are_the_same(
    model, store, passes, monkeypatch
):
    windows = sample_windows(store, SITE, 4)
    ids = torch.stack([window.ids.long() for window in windows])
    kept = LiveGradients(model, SITE, "sampled", seed=1, kept={})
    first = kept(ids, windows)
    assert kept(ids, windows) is first
    monkeypatch.setattr("saelab.evals.gradients.KEPT_BYTES", first.nbytes - 1)
    anew = LiveGradients(model, SITE, "sampled", seed=1, kept={})
    assert torch.equal(anew(ids, windows), anew(ids, windows))
    assert torch.equal(anew(ids, windows), first)
    assert len(passes) == 1 + 3


# --------------------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("kind", ["data", "sampled"])
def test_live_gradients_are_those_that_harvest_stored(tmp_path, toy_model, toy_corpus, kind):
    store = open_store(fill(tmp_path, toy_model, toy_corpus, gradient=kind, gradient_seed=5))
    site = SITES[0]
    stored = next(store.scan(site, batch=10**6, split="heldout"))
    assert stored.grad is not None
    windows = list(store.windows(site, split="heldout"))
    seen = []

    def arm(batch):
        seen.append(batch)
        return batch.x

    live = LiveGradients(toy_model, site, kind, seed=5, kept={})
    measure_splices(toy_model, site, windows, {"arm": arm}, batch=3, gradients={"arm": live})
    assert torch.equal(torch.cat([batch.rows for batch in seen]), stored.rows)
    torch.testing.assert_close(
        torch.cat([batch.grad for batch in seen]), stored.grad, rtol=1e-4, atol=1e-6
    )


def test_the_seed_chooses_the_sampled_labels_and_not_those_of_the_data(model, store):
    windows = sample_windows(store, SITE, 2)
    ids = torch.stack([window.ids.long() for window in windows])

    def taken(kind, seed):
        return LiveGradients(model, SITE, kind, seed=seed, kept={})(ids, windows)

    assert torch.equal(taken("sampled", 1), taken("sampled", 1))
    assert not torch.equal(taken("sampled", 1), taken("sampled", 2))
    assert torch.equal(taken("data", 1), taken("data", 2))


def test_masked_positions_keep_their_own_activation_whatever_their_gradient(model, store):
    windows = sample_windows(store, SITE, 2)
    spliced = []

    class Watched:
        def __getattr__(self, name: str):
            return getattr(model, name)

        def splice(self, tokens, site, x_hat, keep, lengths=None):
            spliced.append(x_hat)
            return model.splice(tokens, site, x_hat, keep, lengths)

    def gradient(at_masked: float):
        def call(ids, windows):
            grad = torch.ones(*ids.shape, 32)
            grad[:, 0] = at_masked
            return grad

        return call

    arm = gradient_arms(aware(topk(store), 1000))["sampled"]
    for at_masked in (0.0, float("nan")):
        measure_splices(
            Watched(), SITE, windows, {"arm": lambda batch: arm(batch)[0]}, batch=2,
            gradients={"arm": gradient(at_masked)},
        )  # fmt: skip
    own = model.capture(torch.stack([w.ids.long() for w in windows]), [SITE])[SITE]
    assert torch.equal(spliced[0][:, 0], own[:, 0])
    assert not torch.equal(spliced[0][:, 1:], own[:, 1:])
    assert torch.equal(spliced[0], spliced[1])
