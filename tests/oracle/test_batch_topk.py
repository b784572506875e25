"""Known answers for the types whose rows compete in training (sheet 1.2, 1.4, 7)."""

import pytest
import torch
from doubles import ArrayStore, planted_store

from saelab import dictionaries
from saelab.dictionaries import create
from saelab.errors import ConfigError
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch

COUPLED = ("batch_topk", "matryoshka", "mutual_choice", "feature_choice")


def identity(type_name, n, k, **fields):
    d = create({"type": type_name, "d_in": n, "d_sae": n, "k": k, **fields})
    with torch.no_grad():
        d.W_enc.copy_(torch.eye(n))
    return d


def batch_of(x):
    return Batch(x, x, torch.arange(len(x)), torch.arange(len(x)))


def selected(d, x, progress=1.0):
    return d._select(x, progress).dense().tolist()


def train(config, *, seed=0, tokens=64 * 40, **train_fields):
    store, _ = planted_store(n=1000)
    fields = TrainConfig(batch=64, tokens=tokens, **train_fields)
    (fitted,) = fit([Member("a", create(config), "site", 1e-2, seed)], store, fields)
    return store, fitted


# ------------------------------------------------------------------------------------- batch_topk

TABLE = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]])


def test_batch_topk_of_the_sheet_keeps_five_and_four_of_one_row():
    d = identity("batch_topk", 3, 1)
    assert selected(d, TABLE) == [[5, 4, 0], [0, 0, 0]]
    assert d.loss(batch_of(TABLE), 0.0, torch.zeros(3).bool()).l0 == 1
    rowwise = identity("topk", 3, 1)
    assert rowwise.encode(TABLE).tolist() == [[5, 0, 0], [2, 0, 0]]


def test_the_calibrated_threshold_of_the_sheet_codes_each_row_by_itself():
    d = identity("batch_topk", 3, 1)
    d.calibrate([batch_of(TABLE[:1]), batch_of(TABLE[1:])])
    assert 3 < d.threshold < 4
    assert d.encode(TABLE[:1]).tolist() == [[5, 4, 0]]
    assert d.encode(TABLE[1:]).tolist() == [[0, 0, 0]]


def test_a_fractional_k_keeps_the_whole_part_of_k_times_rows():
    d = create({"type": "batch_topk", "d_in": 4, "d_sae": 8, "k": 1.36})
    x = 5 + torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    loss = d.loss(batch_of(x), 0.0, torch.zeros(8).bool())
    assert float(loss.l0) == pytest.approx(68 / 50)


def test_with_fewer_positive_values_than_places_only_those_fire():
    x = -torch.ones(4, 3)
    x[1] = torch.tensor([2.0, 1.0, 3.0])
    for name in ("batch_topk", "mutual_choice"):
        loss = identity(name, 3, 2).loss(batch_of(x), 0.0, torch.zeros(3).bool())
        assert float(loss.l0) == 3 / 4
        assert sorted(loss.fired.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("name", ["topk", "abs_topk", *COUPLED])
def test_ties_in_bfloat16_do_not_break_the_budget(name):
    d = create({"type": name, "d_in": 4, "d_sae": 32, "k": 3})
    with torch.no_grad():
        d.W_enc.fill_(1)
    x = 1 + torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) / 1000
    with torch.autocast("cpu", torch.bfloat16):
        loss = d.loss(batch_of(x), 0.0, torch.zeros(32).bool())
    assert float(loss.l0) == 3


def test_the_loss_and_its_gradients_are_those_of_the_dense_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator).double()
    d = create({"type": "batch_topk", "d_in": 8, "d_sae": 24, "k": 3}).double()
    d.init_(x, generator)
    d.loss(batch_of(x), 0.0, torch.zeros(24).bool()).total.backward()
    fast = {name: p.grad.clone() for name, p in d.named_parameters()}
    d.zero_grad()
    pre = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    edge = pre.detach().reshape(-1).sort(descending=True).values[3 * 64 - 1]
    z = pre.relu() * (pre.detach() >= edge)
    slow = (x - z @ d.W_dec - d.b_dec).square().sum() / (64 * d.variance)
    slow.backward()
    for name, p in d.named_parameters():
        torch.testing.assert_close(fast[name], p.grad)


@pytest.mark.parametrize("type_name", COUPLED)
def test_held_out_l0_of_a_trained_dictionary_is_near_k_and_training_lowers_the_error(type_name):
    config = {"type": type_name, "d_in": 16, "d_sae": 24, "k": 2}
    store, fitted = train(config, tokens=64 * 100, log_every=1, betas=(0.9, 0.999))
    assert fitted.metrics[-1]["fvu"] < 0.85 * fitted.metrics[0]["fvu"]
    assert fitted.metrics[-1]["l0"] == pytest.approx(2, rel=0.02)
    x = torch.cat([b.x for b in store.scan("site", batch=100, split="heldout")])
    l0 = (fitted.dictionary.encode(x) != 0).sum(-1).float().mean()
    assert float(l0) == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("type_name", COUPLED)
def test_the_l0_of_new_rows_is_within_a_twentieth_of_k(type_name):
    store, _ = planted_store(n=20_000)
    d = create({"type": type_name, "d_in": 16, "d_sae": 24, "k": 2})
    config = TrainConfig(batch=256, tokens=256 * 60)
    (fitted,) = fit([Member("a", d, "site", 1e-2)], store, config)
    x = torch.cat([b.x for b in store.scan("site", batch=512, split="heldout")])
    l0 = (fitted.dictionary.encode(x) != 0).sum(-1).float().mean()
    assert float(l0) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("type_name", [*COUPLED, "topk", "jump_relu", "matching_pursuit"])
def test_calibration_moves_thresholds_and_nothing_else(type_name):
    target = {"jump_relu": {"target_l0": 2}, "matching_pursuit": {"k": 6, "target_l0": 2}}
    fields = target.get(type_name, {"k": 2})
    if type_name == "topk":
        fields["threshold"] = True
    d = create({"type": type_name, "d_in": 8, "d_sae": 24} | fields)
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    d.init_(x, torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in d.state_dict().items()}
    d.calibrate([batch_of(x)])
    for name, tensor in d.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name != "threshold")


def test_only_training_rows_set_thresholds():
    base, _ = planted_store(n=1000)
    heldout = torch.arange(1000) // 16 % 5 == 4
    thresholds = []
    for factor in (1.0, 50.0):
        x = base.rows("site", torch.arange(1000)) * torch.where(heldout, factor, 1.0)[:, None]
        d = create({"type": "batch_topk", "d_in": 16, "d_sae": 24, "k": 2})
        config = TrainConfig(batch=64, tokens=64 * 5)
        (fitted,) = fit([Member("a", d, "site", 1e-2)], ArrayStore({"site": x}), config)
        thresholds.append(fitted.dictionary.threshold)
    assert torch.equal(*thresholds)


@pytest.mark.parametrize("type_name", COUPLED)
def test_training_in_bfloat16_keeps_float32_weights_and_l0(type_name):
    config = {"type": type_name, "d_in": 16, "d_sae": 24, "k": 2}
    _, fitted = train(config, tokens=64 * 10, autocast="bfloat16")
    assert fitted.dictionary.W_enc.dtype == torch.float32
    assert fitted.metrics[-1]["l0"] == pytest.approx(2, rel=0.05)


def test_k_above_d_sae_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"k=9\.0 exceeds d_sae=8"):
        create({"type": "batch_topk", "d_in": 4, "d_sae": 8, "k": 9})


# ------------------------------------------------------------------------------------- matryoshka


def test_prefix_losses_of_the_sheet_are_one_and_zero():
    d = identity("matryoshka", 2, 2, prefixes=[1, 2], weights=[1, 0], aux_weight=0)
    x = torch.ones(1, 2)
    assert d.loss(batch_of(x), 0.0, torch.zeros(2).bool()).total == 1
    d = identity("matryoshka", 2, 2, prefixes=[1, 2], weights=[0, 1], aux_weight=0)
    assert d.loss(batch_of(x), 0.0, torch.zeros(2).bool()).total == 0


def test_prefix_errors_and_gradients_are_those_of_the_dense_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator).double()
    config = {"type": "matryoshka", "d_in": 8, "d_sae": 24, "k": 3, "prefixes": [4, 11, 24]}
    d = create(config).double()
    d.init_(x, generator)
    loss = d.loss(batch_of(x), 0.0, torch.zeros(24).bool()).total
    loss.backward()
    fast = {name: p.grad.clone() for name, p in d.named_parameters()}
    d.zero_grad()
    pre = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    edge = pre.detach().reshape(-1).sort(descending=True).values[3 * 64 - 1]
    z = pre.relu() * (pre.detach() >= edge)
    slow = x.new_zeros(())
    for m in (4, 11, 24):
        left = x - z[:, :m] @ d.W_dec[:m] - d.b_dec
        slow = slow + left.square().sum() / (64 * d.variance) / 3
    slow.backward()
    torch.testing.assert_close(loss, slow)
    for name, p in d.named_parameters():
        torch.testing.assert_close(fast[name], p.grad)


@pytest.mark.parametrize(
    "fields", [{"type": "matryoshka", "prefixes": [24]}, {"type": "mutual_choice", "aux": "auxk"}]
)
def test_one_prefix_and_mutual_choice_with_auxk_equal_batch_topk_bit_for_bit(fields):
    same = {"d_in": 16, "d_sae": 24, "k": 1.5}
    _, batch = train({"type": "batch_topk", **same}, dead_window=64, log_every=1)
    _, other = train(same | fields, dead_window=64, log_every=1)
    assert any(line["aux"] > 0 for line in batch.metrics)
    assert other.metrics == batch.metrics
    theirs = other.dictionary.state_dict()
    for name, tensor in batch.dictionary.state_dict().items():
        assert torch.equal(theirs[name], tensor)


def test_default_prefixes_double_and_end_with_all_latents():
    config = create({"type": "matryoshka", "d_in": 8, "d_sae": 64, "k": 4}).config
    assert config.resolved_prefixes == (4, 8, 16, 32, 64)
    assert sum(config.resolved_weights) == 1


@pytest.mark.parametrize(
    "fields", [{"prefixes": [4, 2, 8]}, {"prefixes": [4]}, {"prefixes": [4, 8], "weights": [1]}]
)
def test_prefixes_that_do_not_nest_are_refused(fields):
    with pytest.raises(ConfigError, match="prefixes"):
        create({"type": "matryoshka", "d_in": 4, "d_sae": 8, "k": 2, **fields})


# ---------------------------------------------------------------------- mutual and feature choice

AFFINITY = torch.tensor([[5.0, 1.0], [4.0, 3.0]])


def test_choices_of_the_sheet_row_mutual_feature():
    assert identity("topk", 2, 1).encode(AFFINITY).tolist() == [[5, 0], [4, 0]]
    assert selected(identity("mutual_choice", 2, 1), AFFINITY) == [[5, 0], [4, 0]]
    feature = identity("feature_choice", 2, 1, exponent=0)
    assert selected(feature, AFFINITY) == [[5, 0], [0, 3]]
    assert selected(feature, AFFINITY, progress=0.0) == [[5, 0], [4, 0]]


def test_the_loss_names_the_share_of_picks_that_quotas_forced():
    d = identity("feature_choice", 2, 1, exponent=0)
    for progress, share in ((0.0, 0.0), (1.0, 0.5)):
        loss = d.loss(batch_of(AFFINITY), progress, torch.zeros(2).bool())
        assert loss.terms["forced"] == share


def test_quotas_of_whole_columns_make_a_relu_dictionary():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    d = identity("feature_choice", 6, 6)
    assert selected(d, x) == x.relu().tolist()


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_feature_choice_follows_any_order_of_rows_and_of_features(progress):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 8, generator=generator)
    d = identity("feature_choice", 8, 2)
    d.density.copy_(torch.rand(8, generator=generator))
    z = torch.tensor(selected(d, x, progress))
    rows, columns = torch.randperm(32), torch.randperm(8)
    assert torch.equal(torch.tensor(selected(d, x[rows], progress)), z[rows])
    d.density.copy_(d.density[columns])
    assert torch.equal(torch.tensor(selected(d, x[:, columns], progress)), z[:, columns])


def test_fractions_of_quotas_are_carried_until_they_make_a_row():
    d = create({"type": "feature_choice", "d_in": 4, "d_sae": 16, "k": 0.8, "shift": 2})
    x = torch.rand(10, 4, generator=torch.Generator().manual_seed(0)) + 1
    d.init_(x, torch.Generator().manual_seed(0))
    before = d.carry.clone()
    assert 0 <= before.min() < before.max() < 1
    expected, taken = d._expected_density(), torch.zeros(16)
    for _ in range(50):
        taken += d._quota(10)[0]
        loss = d.loss(batch_of(x), 1.0, torch.zeros(16).bool())
        loss.observed["density"] = d.density
        d.observe_(loss)
    assert (taken - 500 * expected).abs().max() <= 1.001


def test_running_densities_start_with_the_first_batch_and_forget_the_oldest():
    d = identity("mutual_choice", 2, 1)
    for _ in range(3):
        d.observe_(d.loss(batch_of(AFFINITY), 0.0, torch.zeros(2).bool()))
    assert d.density.tolist() == [1, 0]
    for _ in range(40):
        d.observe_(d.loss(batch_of(AFFINITY.flip(1)), 0.0, torch.zeros(2).bool()))
    torch.testing.assert_close(d.density, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def test_aux_zipf_with_weights_one_on_dead_latents_and_zero_elsewhere_is_auxk():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    d = create({"type": "mutual_choice", "d_in": 8, "d_sae": 24, "k": 3, "aux_k": 4})
    d.init_(x, generator)
    d.batches_seen.fill_(1)
    dead = torch.arange(24) >= 20
    d.density.copy_(torch.where(dead, 0.0, 1.0))
    auxk = create(d.config.model_copy(update={"aux": "auxk"}))
    auxk.load_state_dict(d.state_dict())
    first, second = (m.loss(batch_of(x), 0.0, dead) for m in (d, auxk))
    assert second.terms["aux"] > 0
    assert torch.equal(first.total, second.total)


def test_the_latent_that_fires_most_should_by_zipfs_law_fire_most():
    d = create({"type": "mutual_choice", "d_in": 4, "d_sae": 4, "k": 1, "shift": 1})
    d.density.copy_(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    law = torch.tensor([1 / 5, 1 / 2, 1 / 4, 1 / 3])
    torch.testing.assert_close(d._expected_density(), law / law.sum())


@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice"])
def test_aux_zipf_reaches_latents_below_the_law_and_nothing_else(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    d = create({"type": name, "d_in": 8, "d_sae": 24, "k": 3, "aux_k": 4})
    d.init_(x, generator)
    d.batches_seen.fill_(1)
    below = torch.arange(24) % 4 == 1
    d.density.copy_(torch.where(below, 0.01, 0.9))
    grads = []
    for weight in (0.0, 1.0):
        same = create(d.config.model_copy(update={"aux_weight": weight}))
        same.load_state_dict(d.state_dict())
        same.loss(batch_of(x), 0.0, torch.zeros(24).bool()).total.backward()
        grads.append({key: p.grad for key, p in same.named_parameters()})
    without, with_aux = grads
    assert torch.equal(without["b_dec"], with_aux["b_dec"])
    for key in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(without[key][~below], with_aux[key][~below])
        assert not torch.equal(without[key][below], with_aux[key][below])


def test_aux_zipf_ranks_by_lack_times_size():
    d = identity("mutual_choice", 3, 0.75, aux_k=1, exponent=0)
    d.batches_seen.fill_(1)
    d.density.copy_(torch.tensor([0.25, 0.2, 0.05]))  # they lack none, 1/5 and 4/5 of 1/4
    error = torch.tensor([[0.0, 3.0, 2.0], [0.0, -3.0, -2.0]])
    x = torch.tensor([[9.0, 3.0, 2.0], [9.0, -1.0, -1.0]])
    expected = (3**2 + 0.4**2 + 13) / 26
    assert float(d._aux_zipf(x, error).detach()) == pytest.approx(expected)


def test_aux_zipf_weights_what_under_used_latents_add_by_their_lack():
    d = identity("mutual_choice", 2, 0.5, aux_k=2, exponent=0)
    d.batches_seen.fill_(1)
    d.density.copy_(torch.tensor([0.25, 0.05]))
    error = torch.tensor([[0.0, 2.0], [0.0, -2.0]])
    x = torch.tensor([[7.0, 2.0], [7.0, -1.0]])
    # latent 1 lacks 0.8 of its 0.25: it explains 1.6 of the 2, and nothing of the other row
    expected = (0.4**2 + 4) / 8 * (1 / 2)
    assert float(d._aux_zipf(x, error).detach()) == pytest.approx(expected)


def test_feature_choice_is_calibrated_to_each_latents_density_in_training():
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    d = identity("feature_choice", 4, 1)
    d.density.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    d.calibrate([batch_of(x)])
    density = (d.encode(x) != 0).float().mean(0)
    torch.testing.assert_close(density, d.density)


def test_loading_keeps_per_latent_thresholds(tmp_path):
    _, fitted = train({"type": "feature_choice", "d_in": 16, "d_sae": 24, "k": 2})
    fitted.dictionary.save(tmp_path)
    assert dictionaries.load(tmp_path).threshold.shape == (24,)
