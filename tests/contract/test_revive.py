"""Dead latents are pointed at badly reconstructed rows."""

import pytest
import torch
from dictionary_laws import ready
from doubles import ArrayStore

from saelab.dictionaries import REGISTRY, create
from saelab.dictionaries.affine import REVIVED
from saelab.laws import batch_of, some_rows
from saelab.protocols import GradientTrained
from saelab.train.fit import Member, Sweep, TrainConfig

TRAINED = sorted(name for name, kind in REGISTRY.items() if issubclass(kind, GradientTrained))
PLAIN = ("topk", "abs_topk", "batch_topk", "relu", "gated", "jump_relu")


@pytest.mark.parametrize("name", PLAIN)
def test_a_revived_latent_looks_for_its_row_softly_and_writes_it_at_unit_norm(name):
    d = ready(name)
    ids, rows = torch.tensor([5, 2]), some_rows(d.d_in, 4, 2)
    norm = torch.cat([d.W_enc[:2], d.W_enc[3:5], d.W_enc[6:]]).norm(dim=1).mean()
    d.revive_(ids, rows)
    direction = (rows - d.b_dec) / (rows - d.b_dec).norm(dim=1, keepdim=True)
    torch.testing.assert_close(d.W_dec[ids], direction)
    torch.testing.assert_close(d.W_enc[ids], REVIVED * norm * direction)
    assert not d.b_enc[ids].any()


def test_both_paths_of_a_revived_gated_latent_are_equal():
    d = ready("gated")
    ids, rows = torch.tensor([5, 2]), some_rows(d.d_in, 4, 2)
    d.revive_(ids, rows)
    gate = ((rows - d.b_dec) @ d.W_enc[ids].T).relu()
    torch.testing.assert_close(d.encode(rows)[:, ids], gate)


def test_a_revived_jump_relu_latent_fires_as_far_along_its_direction_as_the_others():
    d = create({"type": "jump_relu", "d_in": 4, "d_sae": 6, "target_l0": 2})
    with torch.no_grad():
        d.W_enc.copy_(2 * torch.eye(6, 4) + 1e-9)
        d.threshold.fill_(4.0)
        d.b_enc.fill_(1.0)
        d.bandwidth.fill_(0.5)
        d.W_enc[4:].copy_(2 * torch.eye(2, 4))
    d.revive_(torch.tensor([1]), torch.tensor([[0.0, 0.0, 3.0, 4.0]]))
    torch.testing.assert_close(d.W_enc[1].norm(), torch.tensor(2 * REVIVED))
    torch.testing.assert_close(d.threshold[1], torch.tensor(1.5 * 2 * REVIVED))
    torch.testing.assert_close(d.bandwidth[1], torch.tensor(0.25 * 2 * REVIVED))
    along = torch.tensor([[0.0, 0.0, 0.6, 0.8]])
    assert (d.encode(1.49 * along)[:, 1] == 0) & (d.encode(1.51 * along)[:, 1] > 0)


@pytest.mark.parametrize("name", PLAIN)
def test_all_latents_may_be_revived_at_once_and_a_row_without_direction_is_harmless(name):
    d = ready(name)
    rows = some_rows(d.d_in, 4, d.d_sae)
    rows[3] = d.b_dec.detach()
    before = d.W_dec[3].clone()
    d.revive_(torch.arange(d.d_sae), rows)
    assert torch.equal(d.W_dec[3], before)
    assert all(torch.isfinite(t).all() for t in d.state_dict().values())
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(d.d_sae))


@pytest.mark.parametrize("name", ["relu", "gated", "jump_relu"])
def test_a_revived_latent_is_reached_by_the_loss_on_its_row(name):
    d = ready(name, seed=3)
    with torch.no_grad():
        d.b_enc[7] = -1e6
    ids, rows = torch.tensor([7]), 20 * some_rows(d.d_in, 8, 1)
    d.revive_(ids, rows)
    batch = batch_of(rows.repeat(16, 1))
    d.loss(batch, 0.5, torch.zeros(d.d_sae).bool()).total.backward()
    assert d.W_dec.grad[7].any()
    assert d.W_enc.grad[7].any()


@pytest.mark.parametrize("name", ["topk", "abs_topk"])
def test_latents_that_are_revived_together_fire_each_on_its_own_row(name):
    d = ready(name)
    rows = some_rows(d.d_in, 4, d.d_sae)
    d.revive_(torch.arange(d.d_sae), rows)
    assert d.encode(rows).diagonal().all()


def state_of(trainer):
    """Weights, then Adam's state, by name."""
    named = dict(trainer.dictionary.state_dict())
    for name, parameter in trainer.dictionary.named_parameters():
        adam = trainer.optimizer.state.get(parameter, {})
        named |= {f"{name}.{key}": value for key, value in adam.items()}
    return {name: value.clone() for name, value in named.items()}


@pytest.mark.parametrize("name", TRAINED)
def test_resampling_changes_the_dead_latents_and_no_bit_of_the_others(name):
    def after_one_step(**fields):
        config = TrainConfig(batch=3, tokens=3 * 10, dead_window=3, **fields)
        sweep = Sweep([Member("a", ready(name), "site", 1e-2, initialised=True)], store, config)
        sweep.step()
        return sweep.active[0]

    x = some_rows(8, n=200)
    store = ArrayStore({"site": x}, grads={"site": torch.sin(3 * x)})
    plain, resampled = after_one_step(), after_one_step(resample_every=0.1)
    ids = (plain.silent >= 3).nonzero()[:3, 0]  # one for each of the batch's rows
    assert len(ids) > 0
    assert not resampled.silent[ids].any()
    others = [i for i in range(24) if i not in ids.tolist()]
    assert torch.equal(plain.silent[others], resampled.silent[others])
    before, after = state_of(plain), state_of(resampled)
    assert "W_dec.exp_avg_sq" in after
    for key, old in before.items():
        new, per_latent = after[key], old.ndim > 0 and len(old) == 24
        assert torch.equal(new[others], old[others]) if per_latent else torch.equal(new, old)
        assert not (per_latent and "exp_avg" in key and new[ids].any())
    assert (after["W_dec"][ids] != before["W_dec"][ids]).any(1).all()
