"""Types that select latents, with a frozen decoder: its bits stay, the encoder learns, all laws
hold."""

import pytest
import test_training_laws as training
import torch
from dictionary_laws import ready
from doubles import ArrayStore

from saelab import dictionaries
from saelab.dictionaries import REGISTRY, config_class
from saelab.dictionaries.affine import REVIVED
from saelab.dictionaries.linear import LinearDictionary
from saelab.laws import LAWS, revive_law, some_rows
from saelab.ops import linalg
from saelab.train.fit import fit

LINEAR = sorted(name for name, kind in REGISTRY.items() if issubclass(kind, LinearDictionary))


@pytest.fixture
def frozen(monkeypatch):
    """Every example is one with a frozen decoder."""
    for name in LINEAR:
        kind = config_class(name)
        fields = kind.example().plain() | {"freeze_decoder": True}
        monkeypatch.setattr(kind, "example", lambda kind=kind, fields=fields: kind.parse(fields))
    monkeypatch.setattr("saelab.train.fit.CALIBRATION_ROWS", 1000)


@pytest.fixture(scope="module")
def store():
    x = some_rows(8, n=200)
    return ArrayStore({"site": x}, grads={"site": torch.sin(3 * x)})


@training.CONFIGS
@pytest.mark.usefixtures("frozen")
def test_directions_keep_their_bits_and_the_encoder_moves(store, config):
    members = [training.member(name, seed) for seed, name in enumerate(LINEAR)]
    for seed, fitted in enumerate(fit(members, store, config)):
        start = torch.randn(24, 8, generator=torch.Generator().manual_seed(seed))
        start = linalg.unit_rows(start)
        assert torch.equal(fitted.dictionary.W_dec, start)
        assert (fitted.dictionary.W_enc != start / 2).any(1).float().mean() > 0.5
        assert fitted.dictionary.b_enc.any()


@training.CONFIGS
@pytest.mark.usefixtures("frozen")
def test_company_changes_no_bit(store, config, monkeypatch):
    monkeypatch.setattr(training, "TRAINED", LINEAR)
    monkeypatch.setattr(training, "SOLVED", [])
    training.test_members_of_all_types_in_one_sweep_are_those_of_their_solo_runs(store, config)


@pytest.mark.usefixtures("frozen")
def test_interruption_changes_no_bit(store, tmp_path):
    law = training.test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one
    law("topk", training.RESAMPLED, store, tmp_path)


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("law", [law for law in LAWS if law is not revive_law])
def test_it_is_a_dictionary_like_others(law):
    law(lambda: ready("topk"))


@pytest.mark.usefixtures("frozen")
def test_it_is_loaded_frozen(tmp_path):
    ready("topk").save(tmp_path / "a")
    assert not dictionaries.load(tmp_path / "a").W_dec.requires_grad


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("name", LINEAR)
def test_a_revived_latent_starts_again_along_its_own_direction(name):
    d = ready(name)
    ids, before = torch.tensor([11, 3]), {k: v.clone() for k, v in d.state_dict().items()}
    others = [i for i in range(d.d_sae) if i not in ids.tolist()]
    d.revive_(ids, some_rows(d.d_in, 4, 2))
    norm = REVIVED * before["W_enc"][others].norm(dim=1).mean()
    torch.testing.assert_close(d.W_enc[ids], before["W_dec"][ids] * norm)
    assert not d.b_enc[ids].any()
    for key in ("W_enc", "b_enc"):
        assert torch.equal(d.state_dict()[key][others], before.pop(key)[others])
    before.pop("W_dec")
    assert torch.equal(d.W_dec, ready(name).W_dec)
    assert all(torch.equal(d.state_dict()[key], old) for key, old in before.items())


@pytest.mark.parametrize("name", LINEAR)
def test_the_switch_is_written_down_only_where_it_is_on(name):
    kind = config_class(name)
    off = kind.example()
    assert "freeze_decoder" not in off.plain()
    assert kind.parse(off.plain() | {"freeze_decoder": False}) == off
    on = kind.parse(off.plain() | {"freeze_decoder": True})
    assert on.plain() == off.plain() | {"freeze_decoder": True}
