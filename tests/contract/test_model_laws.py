"""What every language model promises, over the toy and two tiny Hugging Face models."""

import threading

import numpy as np
import pytest
import torch
from tiny_models import save_gpt2, save_llama
from torch import Tensor

from saelab.errors import ShapeError, SiteError
from saelab.models import load_model


@pytest.fixture(scope="module", params=["toy", "llama", "gpt2"])
def model(request, tmp_path_factory):
    if request.param == "toy":
        return load_model("toy:seed=1")
    folder = tmp_path_factory.mktemp(request.param)
    save = {"llama": save_llama, "gpt2": save_gpt2}[request.param]
    return load_model(str(save(folder)), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tokens(model) -> Tensor:
    return torch.randint(3, model.d_vocab, (2, 7), generator=torch.Generator().manual_seed(0))


def hook_counts(model) -> int:
    network = model._network
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_each_layer_has_every_kind_of_site_with_its_true_width(model, tokens):
    sites = model.sites()
    assert len(sites) == 1 + 7 * model.n_layers
    captured = model.capture(tokens, [site.name for site in sites])
    for site in sites:
        assert captured[site.name].shape == (2, 7, site.width), site.name
        assert captured[site.name].dtype == model.dtype
    kinds = {"embed", "resid", "heads", "attn_out", "mlp_neurons", "mlp_out"}
    assert {site.kind for site in sites} == kinds


def test_the_residual_stream_adds_up(model, tokens):
    names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    x = model.capture(tokens, [f"blocks.1.hook_{name}" for name in names])
    pre, attn, mid, mlp, post = (x[f"blocks.1.hook_{name}"] for name in names)
    torch.testing.assert_close(pre + attn, mid)
    torch.testing.assert_close(mid + mlp, post)


def test_directions_reach_the_residual_stream_through_the_output_matrices(model, tokens):
    names = ["attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out"]
    x = model.capture(tokens, [f"blocks.0.{name}" for name in names])
    for source, target in (names[:2], names[2:]):
        inside, outside = (x[f"blocks.0.{name}"][0].float() for name in (source, target))
        # differences between positions are free of the bias
        carried = model.to_residual(f"blocks.0.{source}", inside[1:] - inside[:-1])
        torch.testing.assert_close(carried, outside[1:] - outside[:-1], atol=1e-5, rtol=1e-4)


def test_an_unknown_site_is_refused_with_the_nearest_names(model, tokens):
    with pytest.raises(SiteError, match=r"did you mean .*blocks.1.hook_resid_post"):
        model.capture(tokens, ["blocks.1.hook_resid_pots"])


def test_capture_stops_after_the_last_site(model, tokens):
    ran = []
    last = model._sites[f"blocks.{model.n_layers - 1}.hook_resid_post"].module
    handle = last.register_forward_hook(lambda *_: ran.append(1))
    try:
        model.capture(tokens, ["blocks.0.hook_resid_post", "hook_embed"])
        assert not ran
        model.logits(tokens)
        assert ran
    finally:
        handle.remove()


def test_editing_nothing_changes_no_bit_and_zeroing_changes_logits(model, tokens):
    clean = model.logits(tokens)
    assert clean.dtype == torch.float32
    for site in model.sites():
        same = model.logits(tokens, {site.name: lambda x: x.clone()})
        assert torch.equal(same, clean), site.name
        zeroed = model.logits(tokens, {site.name: torch.zeros_like})
        assert (zeroed - clean).abs().max() > 1e-4, site.name


def test_splicing_acts_on_kept_positions_only(model, tokens):
    site = "blocks.0.hook_resid_post"
    x = model.capture(tokens, [site])[site]
    everywhere = torch.ones(2, 7, dtype=torch.bool)
    clean = model.logits(tokens)
    assert torch.equal(model.splice(tokens, site, x, everywhere), clean)
    assert torch.equal(model.splice(tokens, site, 0 * x, ~everywhere), clean)
    late = everywhere.clone()
    late[:, :4] = False
    spliced = model.splice(tokens, site, 0 * x, late)
    assert torch.equal(spliced[:, :4], clean[:, :4])
    assert (spliced[:, 4:] - clean[:, 4:]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"])
def test_repeated_splices_give_the_bits_of_a_first_one(model, tokens, name):
    site = f"blocks.1.{name}"
    x = model.capture(tokens, [site])[site]
    keep = torch.tensor([[True, False] * 3 + [True]] * 2)
    ran = []
    handle = model._sites["blocks.0.mlp.hook_post"].module.register_forward_hook(
        lambda *_: ran.append(1)
    )
    for other in (tokens, tokens.flip(0), tokens):
        wanted = [
            model.logits(other, {site: lambda h, s=s: torch.where(keep[..., None], s * x, h)})
            for s in (0.5, 2.0, 0.0)
        ]
        ran.clear()
        spliced = [model.splice(other, site, s * x, keep) for s in (0.5, 2.0, 0.0)]
        assert len(ran) == (3 if name == "hook_resid_mid" else 1)
        for got, expected in zip(spliced, wanted, strict=True):
            assert torch.equal(got, expected)
    handle.remove()


def test_the_middle_of_the_residual_stream_is_edited_for_mlp_and_skip_alike(model, tokens):
    shift = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    at_middle = model.logits(tokens, {"blocks.0.hook_resid_mid": lambda x: x + shift})
    at_branch = model.logits(tokens, {"blocks.0.hook_attn_out": lambda x: x + shift})
    torch.testing.assert_close(at_middle, at_branch, atol=1e-4, rtol=1e-4)


def test_no_hook_outlives_a_call_even_when_an_edit_fails(model, tokens):
    before = hook_counts(model)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    edits = {"blocks.0.hook_resid_mid": fail, "hook_embed": lambda x: x}
    for call in (
        lambda: model.logits(tokens, edits),
        lambda: model.generate(tokens, max_new_tokens=2, edits=edits),
        lambda: model.grad_at(tokens, ["hook_embed"], lambda z: z.sum(), edits),
    ):
        with pytest.raises(RuntimeError, match="on purpose"):
            call()
        assert hook_counts(model) == before
    with pytest.raises(ShapeError, match="should return"):
        model.logits(tokens, {"hook_embed": lambda x: x[:, 1:]})
    with pytest.raises(SiteError):
        model.logits(tokens, {"hook_embed": torch.zeros_like, "hook_nowhere": torch.zeros_like})
    model.capture(tokens, ["blocks.1.hook_resid_mid"])
    assert hook_counts(model) == before


def test_two_threads_never_see_each_others_edits(model, tokens):
    site = "blocks.0.hook_resid_post"
    edits = [{site: lambda x: x * 0.5}, {site: lambda x: x + 1.0}, None]
    wanted = [model.logits(tokens, edit) for edit in edits]
    wrong = []

    def work(edit, expected) -> None:
        for _ in range(8):
            if not torch.equal(model.logits(tokens, edit), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(edits, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_edit_that_calls_the_model_gets_a_clean_forward_pass(model, tokens):
    site, inner = "blocks.0.hook_resid_post", []
    clean = model.capture(tokens, [site])[site]

    def edit(x: Tensor) -> Tensor:
        inner.append(model.capture(tokens, [site])[site])
        return 0 * x

    model.logits(tokens, {site: edit, "hook_embed": lambda x: x * 2})
    assert torch.equal(inner[0], clean)


def directional(model, tokens, site, objective, direction, eps=1e-2) -> float:
    """The slow derivative: central difference of the objective along a direction of the site."""
    up, down = (
        objective(model.logits(tokens, {site: lambda x, s=s: x + s * eps * direction}))
        for s in (1, -1)
    )
    return float((up - down) / (2 * eps))


def test_gradients_agree_with_finite_differences_at_every_kind_of_site(model, tokens):
    def objective(logits: Tensor) -> Tensor:
        return logits[:, -1].log_softmax(-1)[:, 5].sum()

    names = [s.name for s in model.sites() if s.layer in (None, 1)]
    found = model.grad_at(tokens, names, objective)
    captured = model.capture(tokens, names)
    for name in names:
        x, grad = found[name]
        torch.testing.assert_close(x, captured[name], atol=1e-5, rtol=1e-5)
        direction = grad / grad.norm()
        slow = directional(model, tokens, name, objective, direction)
        assert slow == pytest.approx(float(grad.norm()), rel=0.02), name


def test_gradients_are_taken_after_the_edit(model, tokens):
    site = "blocks.0.hook_resid_post"
    edits = {site: lambda x: 0 * x}
    x, grad = model.grad_at(tokens, [site], lambda z: z[0, 0, 0], edits)[site]
    assert torch.equal(x, torch.zeros_like(x))
    assert grad[0, 0].abs().sum() > 0
    assert grad[0, 1:].abs().sum() == 0


@pytest.mark.parametrize("target", ["blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"])
def test_a_vector_jacobian_product_agrees_with_finite_differences(model, tokens, target):
    source, eps = "blocks.0.hook_resid_mid", 1e-3
    y = model.capture(tokens, [target])[target]
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(y.shape, generator=generator)
    back = model.vjp(tokens, source, target, cotangent)
    direction = back / back.norm()

    def moved(sign: int) -> Tensor:
        seen = {}

        def note(x: Tensor) -> Tensor:
            seen["x"] = x.double()
            return x

        model.logits(tokens, {source: lambda x: x + sign * eps * direction, target: note})
        return seen["x"]

    slow = ((moved(1) - moved(-1)) * cotangent).sum() / (2 * eps)
    assert float(slow) == pytest.approx(float(back.norm()), rel=0.02)
    with pytest.raises(SiteError, match="should come after"):
        model.vjp(tokens, target, source, cotangent)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("beginning", [0, 3])
def test_going_on_from_the_middle_gives_the_logits_of_a_whole_pass(model, tokens, layer, beginning):
    site, stream = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_resid_pre"
    before = hook_counts(model)
    shift = torch.randn(2, 3, 7, model.site(site).width, generator=torch.Generator().manual_seed(1))
    shift[:, :, :beginning] = 0
    entering = model.capture(tokens, [stream])[stream][:, beginning:]
    past = model.remember(tokens[:, :beginning]) if beginning else None
    edits = {site: lambda z: z + shift.flatten(0, 1)[:, beginning:]}
    for _ in range(2):
        found = model.resume(entering.repeat_interleave(3, 0), layer, edits, past)
    whole = model.logits(tokens.repeat_interleave(3, 0), {site: lambda z: z + shift.flatten(0, 1)})
    torch.testing.assert_close(found, whole[:, -1], atol=1e-4, rtol=1e-4)
    assert hook_counts(model) == before
    assert not torch.allclose(found, model.logits(tokens.repeat_interleave(3, 0))[:, -1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_with_a_cache_equals_the_loop_without_one(model, tokens, temperature):
    edits = {"blocks.0.hook_resid_mid": lambda x: 0.7 * x}
    fast = model.generate(tokens, max_new_tokens=6, temperature=temperature, seed=3, edits=edits)
    streams = [np.random.default_rng((3, row)) for row in range(2)]
    slow, ended = tokens, torch.zeros(2, dtype=torch.bool)
    while slow.shape[1] < tokens.shape[1] + 6 and not ended.all():
        last = model.logits(slow, edits)[:, -1]
        if temperature == 0:
            new = last.argmax(-1)
        else:
            races = np.stack([one.standard_exponential(last.shape[1]) for one in streams])
            new = (last.softmax(-1) / torch.from_numpy(races).float()).argmax(-1)
        new = torch.where(ended, model.eos_id, new)
        ended |= new == model.eos_id
        slow = torch.cat([slow, new[:, None]], dim=1)
    assert torch.equal(fast, slow)
    assert torch.equal(fast[:, :7], tokens)
    again = model.generate(tokens, max_new_tokens=6, temperature=temperature, seed=3, edits=edits)
    assert torch.equal(fast, again)


def test_a_row_draws_by_its_seed_whatever_stands_beside_it(model, tokens):
    writing = {"max_new_tokens": 6, "temperature": 1.0}
    both = model.generate(tokens, seed=[8, -5], **writing)
    for row, seed in enumerate([8, -5]):
        alone = model.generate(tokens[row : row + 1], seed=seed, **writing)[0]
        assert torch.equal(both[row, : len(alone)], alone)
        assert set(both[row, len(alone) :].tolist()) <= {model.eos_id}
    with pytest.raises(ShapeError, match="3 came for 2 prompts"):
        model.generate(tokens, seed=[1, 2, 3], **writing)


def test_padding_does_not_change_real_positions(model, tokens):
    lengths = torch.tensor([7, 4])
    padded = tokens.clone()
    padded[1, 4:] = model.pad_id
    site = f"blocks.{model.n_layers - 1}.hook_resid_post"
    alone = model.capture(tokens[1:, :4], [site])[site]
    together = model.capture(padded, [site], lengths)[site]
    torch.testing.assert_close(together[1:, :4], alone, atol=1e-5, rtol=1e-5)
    both = model.logits(padded, lengths=lengths)
    torch.testing.assert_close(both[1:, :4], model.logits(tokens[1:, :4]), atol=1e-5, rtol=1e-5)


def test_logit_effect_is_the_small_step_limit_at_fixed_norm(model, tokens):
    # slow way: through the real final norm and unembedding, with the norm's divisor held fixed
    site = f"blocks.{model.n_layers - 1}.hook_resid_post"
    directions = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(4))
    scale, centres, unembed = model._read_out()
    slow = torch.zeros(3, model.d_vocab, dtype=torch.float64)
    for i, direction in enumerate(directions.double()):
        r = direction - direction.mean() if centres else direction
        for v in range(model.d_vocab):
            slow[i, v] = sum(r[j] * scale[j].double() * unembed[v, j].double() for j in range(4))
            slow[i, v] += (r[4:] * scale[4:].double() * unembed[v, 4:].double()).sum()
    slow -= slow.mean(-1, keepdim=True)
    effect = model.logit_effect(site, directions)
    torch.testing.assert_close(effect.double(), slow, atol=1e-5, rtol=1e-4)


def test_logit_effect_predicts_how_the_last_layer_moves_the_logits(model, tokens):
    # across x the norm's divisor stands still, so the logits move in proportion to the effect
    site = f"blocks.{model.n_layers - 1}.hook_resid_post"
    x = model.capture(tokens, [site])[site][0, -1]
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(5))
    direction -= direction.mean() + (x - x.mean()) * (direction @ (x - x.mean())) / (
        (x - x.mean()) @ (x - x.mean())
    )
    direction -= x * (direction @ x) / (x @ x)
    eps = 1e-2

    def add(sign: int) -> Tensor:
        return model.logits(tokens, {site: lambda h: h + sign * eps * direction})[0, -1].double()

    moved = add(1) - add(-1)
    moved -= moved.mean()
    effect = model.logit_effect(site, direction[None])[0].double()
    assert torch.cosine_similarity(moved, effect, dim=0) > 0.995


def test_neurons_and_heads_reach_the_logits_through_their_output_matrix(model):
    for kind in ("mlp.hook_post", "attn.hook_z"):
        site = model.site(f"blocks.1.{kind}")
        directions = torch.eye(site.width)[:5]
        residual = model.to_residual(site.name, directions)
        assert residual.shape == (5, model.d_model)
        torch.testing.assert_close(
            model.logit_effect(site.name, directions),
            model.logit_effect("blocks.1.hook_resid_post", residual),
        )
    with pytest.raises(ShapeError, match="width"):
        model.to_residual("blocks.1.hook_resid_post", torch.ones(1, 3))


def test_tokens_that_do_not_fit_are_refused(model):
    long = torch.zeros(1, model.context + 1, dtype=torch.int64)
    with pytest.raises(ShapeError, match="shorter windows"):
        model.logits(long)
    with pytest.raises(ShapeError, match="fewer tokens"):
        model.generate(long[:, :-1], max_new_tokens=1)
    with pytest.raises(ShapeError, match="batch, pos"):
        model.logits(long[:, :0])
    with pytest.raises(ShapeError, match="lengths"):
        model.logits(long[:, :4], lengths=torch.tensor([5]))


TEXTS = ["the cat in the hat", "", "héllo 😀 日本\n\n語", "  two  spaces ", "e\u0301 \u200d"]


def test_spans_of_tokens_rebuild_the_text(model):
    for text, run in zip(TEXTS, model.tokenize(TEXTS), strict=True):
        assert run.ids.shape == run.start.shape == run.end.shape
        covered = 0
        for start, end in zip(run.start.tolist(), run.end.tolist(), strict=True):
            assert 0 <= start <= covered <= end <= len(text), "no character is left out"
            assert start < end
            covered = end
        assert covered == len(text)
        assert (run.start.diff() >= 0).all()
        if text.isascii():
            strings = model.to_strings(run.ids.tolist())
            spans = [text[s:e] for s, e in zip(run.start, run.end, strict=True)]
            assert strings == spans


def test_texts_longer_than_the_context_are_tokenized_whole(model):
    text = "the end. " * 100
    run = model.tokenize([text])[0]
    assert len(run) > model.context
    assert int(run.end[-1]) == len(text)


def test_special_tokens_are_known(model):
    assert model.bos_id in model.special_ids
    assert model.eos_id in model.special_ids
    assert model.adds_bos is False
