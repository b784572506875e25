"""Doses of edits, strengths matched by them, continuations, and the directions to beat."""

import math

import pytest
import torch

from saelab import dictionaries
from saelab.edits import Directions, Handle, Scales, ablate, add, set_to, steer
from saelab.edits.placement import encode_prompts
from saelab.errors import ConfigError
from saelab.probes import mean_difference
from saelab.steering import baselines, sweep
from saelab.steering.sweep import Matched, match_doses

SITE = "blocks.0.hook_resid_post"
PROMPTS = [
    f"the people {word} of"
    for word in ["can", "may", "will", "must", "should", "would", "could", "did"]
]


@pytest.fixture(scope="module")
def handle() -> Handle:
    dictionary = dictionaries.create({"type": "topk", "d_in": 32, "d_sae": 60, "k": 6})
    generator = torch.Generator().manual_seed(0)
    dictionary.init_(torch.randn(200, 32, generator=generator), generator)
    dictionary.requires_grad_(False)
    return Handle(dictionary, SITE, "topk", Scales(torch.ones(60), 6.0))


@pytest.fixture(scope="module")
def text(toy_model):
    return sweep.clean_text(toy_model, PROMPTS, positions=4)


# --------------------------------------------------------------------------------------------- dose


def test_a_dose_is_the_mean_kl_at_the_continuations_positions(toy_model, handle, text):
    edits = [add(handle, 3, 4.0)]
    found = sweep.dose(toy_model, edits, text, targets=[270, 271])
    kls, last, shifts = [], [], []
    for row, (start, end) in enumerate(zip(text.prompt_lengths, text.lengths, strict=True)):
        alone = text.tokens[row : row + 1, :end]
        clean = toy_model.logits(alone)[0].double().softmax(-1)
        with steer(toy_model, *edits):
            steered = toy_model.logits(alone)[0].double().softmax(-1)
        kl = [(p * (p / q).log()).sum() for p, q in zip(clean, steered, strict=True)]
        kls.append(torch.stack(kl[start:end]).mean())
        last.append(kl[start - 1])
        both = [p[start:, [270, 271]].sum(-1).log() for p in (clean, steered)]
        shifts.append((both[1] - both[0]).mean())
    torch.testing.assert_close(found.per_prompt.double(), torch.stack(kls), atol=1e-5, rtol=1e-4)
    assert found.kl == pytest.approx(float(torch.stack(kls).mean()), rel=1e-4)
    assert found.kl_last_prompt == pytest.approx(float(torch.stack(last).mean()), rel=1e-4)
    assert found.target_shift == pytest.approx(float(torch.stack(shifts).mean()), rel=1e-3)
    assert (text.lengths - text.prompt_lengths <= 4).all()


def test_no_edit_has_no_dose_and_edits_after_the_prompt_none_at_its_end(toy_model, handle, text):
    nothing = sweep.dose(toy_model, [], text)
    assert nothing.kl == nothing.kl_last_prompt == 0
    after = sweep.dose(toy_model, [add(handle, 3, 4.0, where="after")], text)
    assert after.kl > 0
    assert after.kl_last_prompt is None
    prompt = sweep.dose(toy_model, [add(handle, 3, 4.0, where="prompt")], text)
    assert prompt.kl_last_prompt > 0


def test_doses_need_eight_prompts(toy_model):
    with pytest.raises(ConfigError, match="8 prompts"):
        sweep.clean_text(toy_model, PROMPTS[:7])


# ---------------------------------------------------------------------------------- matched doses


def test_strengths_are_found_where_the_curve_first_reaches_the_dose():
    found = match_doses(lambda s: s * s, [0.04, 1.0, 9.0], largest=10.0)
    for matched in found:
        assert matched.strength == pytest.approx(math.sqrt(matched.target), rel=0.01)
        assert matched.target <= matched.kl <= 1.01 * matched.target
        assert matched.monotone
    assert match_doses(lambda s: s * s, [200.0], largest=10.0) == [
        Matched(200.0, None, 100.0, True)
    ]


def test_each_sign_is_matched_by_itself():
    def lopsided(s):
        return s * s if s > 0 else 4 * s * s

    up, down = (match_doses(lopsided, [1.0], largest=8.0, sign=sign)[0] for sign in (1, -1))
    assert up.strength == pytest.approx(1.0, rel=0.01)
    assert down.strength == pytest.approx(-0.5, rel=0.01)


def test_a_curve_that_falls_is_flagged_and_its_first_crossing_taken():
    found = match_doses(lambda s: 4 * s * math.exp(1 - s), [2.0], largest=16.0)[0]
    assert not found.monotone
    assert found.strength < 1
    assert 4 * found.strength * math.exp(1 - found.strength) == pytest.approx(2.0, rel=0.02)


def test_strengths_far_from_the_doses_are_not_tried():
    tried = []
    match_doses(lambda s: tried.append(s) or s * s, [0.04, 1.0], largest=16.0)
    assert (min(tried), max(tried)) == (0.0625, 2.0)


@pytest.mark.parametrize(("targets", "largest", "sign"), [([0.0], 1.0, 1), ([1.0], -1.0, 1)])
def test_doses_that_cannot_be_are_refused(targets, largest, sign):
    with pytest.raises(ConfigError, match="positive"):
        match_doses(lambda s: s, targets, largest=largest, sign=sign)


def test_edits_of_a_model_are_matched(toy_model, handle, text):
    found = sweep.matched_strengths(
        toy_model, lambda s: [add(handle, 3, s)], text, [0.05], largest=20.0, sign=-1
    )[0]
    assert found.strength < 0
    again = sweep.dose(toy_model, [add(handle, 3, found.strength)], text).kl
    assert again == found.kl == pytest.approx(0.05, rel=0.01)


def test_a_grid_is_in_multiples_of_the_typical_maximum(handle):
    edits = sweep.grid(add(handle, [3, 4], 1.0, where="after"), [0.5, 2.0])
    assert [multiple for multiple, _ in edits] == [0.5, 2.0]
    assert all(edit.config.unit == "typical_max" for _, edit in edits)
    assert [edit.strengths().tolist() for _, edit in edits] == [[0.5, 0.5], [2.0, 2.0]]
    with pytest.raises(ConfigError, match="cannot be scaled"):
        sweep.grid(ablate(handle, 3), [1.0])


# ---------------------------------------------------------------------------------------- response


def test_continuations_are_the_text_after_each_prompt(toy_model, handle):
    edits = [add(handle, 3, 4.0)]
    found = sweep.continuations(toy_model, PROMPTS[:3], edits, max_new_tokens=4, batch=2)
    with steer(toy_model, *edits):
        whole = [toy_model.generate(prompt, max_new_tokens=4) for prompt in PROMPTS[:3]]
    assert [p + t for p, t in zip(found.prompts, found.texts, strict=True)] == whole


def test_presence_is_the_share_of_written_positions_on_which_latents_fire(toy_model, handle):
    written = sweep.Continuations(("the people", "we know"), (" of this", " the way to"))
    found = sweep.presence(toy_model, handle, written)
    codes = []
    for prompt, more in zip(written.prompts, written.texts, strict=True):
        tokens, _ = encode_prompts(toy_model, [prompt + more])
        start = len(encode_prompts(toy_model, [prompt])[0][0])
        x = toy_model.capture(tokens, [SITE])[SITE][0, start:]
        codes.append(handle.dictionary.encode(x) != 0)
    torch.testing.assert_close(found, torch.cat(codes).float().mean(0))


# --------------------------------------------------------------------------------------- baselines


def test_random_directions_have_their_covariance():
    scale = torch.tensor([3.0, 1.0, 0.2])
    rows = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) * scale + 5
    round_, long = (
        make.square().mean(0)
        for make in (
            baselines.isotropic(3, 2000, seed=1),
            baselines.from_covariance(rows, 2000, seed=1),
        )
    )
    torch.testing.assert_close(round_, torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    assert long[0] > 0.7 > 0.3 > long[1] > long[2]
    again = baselines.from_covariance(rows, 5, seed=2)
    assert torch.equal(again, baselines.from_covariance(rows, 5, seed=2))
    torch.testing.assert_close(again.norm(dim=1), torch.ones(5))


def test_matched_latents_are_live_and_alike(toy_model, handle):
    density = torch.rand(60, generator=torch.Generator().manual_seed(0))
    density[10:16] = 0
    density[20:30] = 10.0 ** -torch.arange(3, 13)
    found = baselines.matched_latents(toy_model, handle, 0, density, 4, seed=0)
    assert len(set(found)) == 4
    assert not {0, *range(10, 16), *range(20, 30)} & set(found)
    W = handle.dictionary.W_dec.detach()
    norms = toy_model.logit_effect(SITE, torch.nn.functional.normalize(W, dim=1)).norm(dim=1)
    apart = torch.stack([(v / v[0]).log().abs() for v in (density, norms)]).amax(0)
    assert apart[found].max() <= apart[1:].sort().values[11]
    with pytest.raises(ConfigError, match="needs it and 4 others to be live"):
        baselines.matched_latents(toy_model, handle, 10, density, 4, seed=0)


def test_latents_are_matched_whatever_the_length_of_their_rows(toy_model, handle):
    density = torch.rand(60, generator=torch.Generator().manual_seed(0)) + 0.01
    lengths = 10.0 ** torch.linspace(-2, 2, 60)[:, None]
    rescaled = Handle(Directions(lengths * handle.dictionary.W_dec.detach()), SITE)
    wanted, found = (
        baselines.matched_latents(toy_model, one, 5, density, 4, seed=0)
        for one in (handle, rescaled)
    )
    assert found == wanted


def test_shuffled_labels_point_nowhere_and_true_ones_to_the_concept(toy_model, handle):
    generator = torch.Generator().manual_seed(0)
    positive = torch.arange(200) % 2 == 0
    x = torch.randn(200, 32, generator=generator)
    x[positive, 0] += 4
    true = baselines.supervised(x, positive, "mean_difference")
    wanted = mean_difference(x, positive[:, None])
    torch.testing.assert_close(true, (wanted / wanted.norm()).float())
    assert true[0, 0] > 0.9
    shuffled = baselines.shuffled_labels(x, positive, 20, seed=1)
    assert shuffled[:, 0].mean().abs() < 0.3
    found = baselines.random_controls(
        toy_model, handle, 3, x=x, positive=positive, rows=x, density=torch.ones(60), seed=0
    )
    assert set(found) == {"isotropic", "covariance", "matched_latents", "shuffled_labels"}
    for name, control in found.items():
        assert control.dictionary.W_dec.shape == (20, 32), name
        torch.testing.assert_close(control.dictionary.W_dec.norm(dim=1), torch.ones(20))
    with pytest.raises(ConfigError, match="20 random directions"):
        baselines.random_controls(
            toy_model, handle, 3, x=x, positive=positive, rows=x, density=torch.ones(60),
            seed=0, n=19,
        )  # fmt: skip


def test_directions_as_latents_say_how_often_they_are_contained(toy_model):
    W = torch.tensor([[3.0, 4.0] + 30 * [0.0]])
    handle = Handle(Directions(W), SITE)
    x = torch.randn(5, 32)
    torch.testing.assert_close(handle.dictionary.encode(2 * W), torch.tensor([[2.0]]))
    moved = x + set_to(handle, 0, 0.0).change(x)
    torch.testing.assert_close(moved @ W[0], torch.zeros(5), atol=1e-5, rtol=0)


def test_instructions_stand_before_the_prompts():
    assert baselines.instructed(["a", "b"], " Be kind. ") == ["Be kind.\na", "Be kind.\nb"]
