"""Patching beside one whole pass per part, and on models whose circuits are known."""

import pytest
import torch
from circuit_tasks import induction, inhibition, random_pairs
from circuit_toys import linear_model

from saelab.circuits import effects, patching
from saelab.circuits.effects import Component, Effects
from saelab.circuits.head_outputs import head_outputs
from saelab.circuits.linear import attribution_patching
from saelab.circuits.patching import PatchConfig
from saelab.errors import ArtifactError, ConfigError, SiteError, TaskError


def slowly(model, data, config: PatchConfig) -> Effects:
    """One whole forward pass per part and pair."""
    components = patching.components_of(model, config.kind)
    noising = config.direction == "noising"
    changes, gaps = [], []
    for row in range(len(data)):
        one = data.rows(torch.tensor([row]))
        width = int(one.lengths)
        clean, corrupted = one.clean[:, :width], one.corrupted[:, :width]
        base, other = (clean, corrupted) if noising else (corrupted, clean)

        def metric(tokens, edits=None, one=one):
            return float(one.measure(model.logits(tokens, edits)[:, -1]))

        m_clean, m_corrupted = metric(clean), metric(corrupted)
        gaps.append(m_clean - m_corrupted)
        line = []
        for part in components:
            site = patching.site_of(config.kind, part.layer)
            put = model.capture(other, [site])[site]
            if config.ablation == "zero":
                put = torch.zeros_like(put)
            if config.ablation == "mean":
                same = (data.templates == data.templates[row]).nonzero()[:, 0]
                put = model.capture(data.corrupted[same, :width], [site])[site].mean(0)[None]
            columns = torch.ones(put.shape[-1], dtype=torch.bool)
            if part.head is not None:
                columns = torch.arange(len(columns)) * model.n_heads // len(columns) == part.head
            places = torch.ones(width, dtype=torch.bool)
            if config.position != "all":
                places = torch.arange(width) == data.slots[config.position][row]
            mask = places[:, None] & columns
            found = metric(base, {site: lambda x, m=mask, p=put: torch.where(m, p, x)})
            line.append(m_clean - found if noising else found - m_corrupted)
        changes.append(line)
    return Effects(components, torch.tensor(changes), torch.tensor(gaps))


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "heads"},
        {"kind": "heads", "direction": "denoising"},
        {"kind": "heads", "ablation": "zero"},
        {"kind": "heads", "ablation": "mean"},
        {"kind": "heads", "position": "end"},
        {"kind": "heads", "position": "middle", "ablation": "zero"},
        {"kind": "mlp", "position": "late"},
        {"kind": "attn", "ablation": "mean", "position": "end"},
        {"kind": "resid", "position": "middle", "direction": "denoising"},
    ],
    ids=lambda config: ",".join(config.values()),
)
def test_patching_in_batches_equals_one_whole_pass_per_part(toy_model, config):
    data, config = random_pairs(toy_model), PatchConfig(**config)
    fast, slow = patching.patch(toy_model, data, config), slowly(toy_model, data, config)
    assert fast.components == slow.components
    torch.testing.assert_close(fast.gaps, slow.gaps, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast.changes, slow.changes, atol=1e-4, rtol=1e-4)
    assert float(slow.changes.abs().max()) > 0.01


def test_the_split_into_passes_does_not_change_effects(toy_model, monkeypatch):
    data, config = random_pairs(toy_model), PatchConfig()
    whole = patching.patch(toy_model, data, config)
    monkeypatch.setattr(patching, "_ROWS", 2)
    monkeypatch.setattr(patching, "_TOKENS", 1)
    done = []
    parts = patching.patch(toy_model, data, config, report=done.append)
    torch.testing.assert_close(parts.changes, whole.changes, atol=1e-5, rtol=1e-5)
    assert done == [2, 3, 5, 6]


def effects_of(model, data, **config):
    found = patching.patch(model, data, PatchConfig(**config))
    return dict(zip(map(str, found.components), found.effect().tolist(), strict=True)), found


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_in_the_induction_model_exactly_the_two_heads_of_the_circuit_have_an_effect(direction):
    model, data = induction()
    found, full = effects_of(model, data, direction=direction)
    assert found["0.1"] == 0 and found["1.1"] == 0
    if direction == "noising":
        assert found["0.0"] == found["1.0"] == 1
        assert bool((full.error() == 0).all())
    else:
        assert found["1.0"] == 1 and found["0.0"] == 1


def test_at_the_end_only_the_head_that_answers_has_an_effect():
    found, _ = effects_of(*induction(), position="end")
    assert found == {"0.0": 0, "0.1": 0, "1.0": 1, "1.1": 0}


def test_in_the_inhibition_model_effects_are_those_that_follow_by_hand():
    found, full = effects_of(*inhibition())
    expected = {"0.0": 0.0, "0.1": -0.5, "1.0": 1.5, "1.1": 0.0}
    assert found == pytest.approx(expected, abs=1e-6)
    assert full.negligible().tolist() == [True, False, False, True]


def test_the_whole_stream_has_effect_one():
    model, data = inhibition()
    found, _ = effects_of(model, data, kind="resid")
    assert found == pytest.approx({"0": 1.0, "1": 1.0}, abs=1e-6)


def test_effects_are_ratios_of_means_with_the_error_of_a_ratio():
    changes, gaps = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([2.0, 4.0])
    found = Effects((Component(0, 0), Component(0, 1)), changes, gaps)
    assert found.effect().tolist() == pytest.approx([2 / 3, 0.0])
    residual = torch.tensor([1 - 4 / 3, 3 - 8 / 3]).std() / (2**0.5 * 3)
    assert found.error().tolist() == pytest.approx([float(residual), 0.0])


def test_the_error_of_an_effect_is_the_spread_of_repeated_measurements():
    g = torch.Generator().manual_seed(0)
    gaps = 3 + torch.randn(400, 50, generator=g)
    changes = 0.3 * gaps + 0.5 * torch.randn(400, 50, generator=g)
    found = [Effects((Component(0),), c[:, None], x) for c, x in zip(changes, gaps, strict=True)]
    spread = torch.stack([e.effect() for e in found]).std()
    typical = torch.stack([e.error() for e in found]).mean()
    assert float(typical / spread) == pytest.approx(1.0, abs=0.1)


def test_reliability_is_one_without_noise_and_none_without_signal():
    from scipy.stats import spearmanr

    def spearman(a, b):
        return float(spearmanr(a.numpy(), b.numpy()).statistic)

    components = effects.heads_of(5, 8)
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(40, generator=g).expand(64, 40)
    assert Effects(components, exact, torch.ones(64)).reliability(spearman) == pytest.approx(1.0)
    noise = torch.randn(64, 40, generator=g)
    assert abs(Effects(components, noise, torch.ones(64)).reliability(spearman)) < 0.2


def test_what_cannot_be_patched_is_refused(toy_model):
    data = random_pairs(toy_model)
    with pytest.raises(ConfigError, match="denoising restores clean values"):
        patching.patch(toy_model, data, PatchConfig(direction="denoising", ablation="zero"))
    with pytest.raises(ConfigError, match="no slot 'ende'; did you mean 'end'"):
        patching.patch(toy_model, data, PatchConfig(position="ende"))
    model, data = inhibition()
    with pytest.raises(SiteError, match="no site for mlp"):
        patching.patch(model, data, PatchConfig(kind="mlp"))


def test_a_model_without_sites_for_heads_is_refused_whoever_asks(toy_model):
    model, data = linear_model(), random_pairs(toy_model)
    for ask in (
        lambda: patching.patch(model, data, PatchConfig()),
        lambda: attribution_patching(model, data),
        lambda: head_outputs(model, data, "clean"),
    ):
        with pytest.raises(SiteError, match=r"linear has no site for heads \(attn\.hook_z"):
            ask()


def test_a_difference_within_noise_is_refused():
    model, data = inhibition()
    swapped = torch.arange(len(data)) % 2 == 0
    right = torch.where(swapped[:, None], data.right, data.wrong)
    wrong = torch.where(swapped[:, None], data.wrong, data.right)
    fields = {**vars(data), "right": right, "wrong": wrong}
    with pytest.raises(TaskError, match="within noise"):
        patching.patch(model, type(data)(**fields), PatchConfig())


def test_effects_are_read_as_they_were_written(tmp_path):
    found = patching.patch(*inhibition(), PatchConfig())
    path = tmp_path / "effects.safetensors"
    path.write_bytes(effects.to_bytes(found))
    again = effects.read(path)
    assert again.components == found.components
    assert torch.equal(again.changes, found.changes) and torch.equal(again.gaps, found.gaps)
    layers = Effects(effects.layers_of([0, 3]), found.changes[:, :2], found.gaps)
    path.write_bytes(effects.to_bytes(layers))
    assert effects.read(path).components == (Component(0), Component(3))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match="holds no effects"):
        effects.read(path)
