"""Edits against a slow loop over positions; cached, padded and batched against one at a time."""

import threading

import pytest
import torch
from tiny_models import save_llama

import saelab
from saelab import artifacts, dictionaries
from saelab.edits import (
    Directions,
    Handle,
    Scales,
    TokenPattern,
    ablate,
    add,
    cap,
    from_yaml,
    measure_scales,
    project_out,
    scale,
    set_to,
    to_yaml,
)
from saelab.edits.placement import encode_prompts
from saelab.errors import ArtifactError, ConfigError, NonFiniteError, ShapeError, SiteError
from saelab.models import generation, load_model

SITE = "blocks.0.hook_resid_post"
PROMPTS = ["the people of this great state", "we know", "there must be a way to make life good"]
LATENTS = [1, 4, 7]


def make_handle(model, kind="abs_topk", name="sentiment") -> Handle:
    width = model.site(SITE).width
    dictionary = dictionaries.create({"type": kind, "d_in": width, "d_sae": 40, "k": 12})
    generator = torch.Generator().manual_seed(0)
    dictionary.init_(torch.randn(200, width, generator=generator), generator)
    dictionary.requires_grad_(False)
    scales = Scales(torch.linspace(0.5, 2, 40), 6.0)
    return Handle(dictionary, SITE, name, scales)


@pytest.fixture(scope="module")
def handle(toy_model):
    return make_handle(toy_model)


@pytest.fixture(scope="module", params=["toy", "llama", "handwired"])
def model(request, toy_model, tmp_path_factory):
    if request.param == "toy":
        return toy_model
    if request.param == "handwired":
        return load_model("handwired:induction")
    folder = save_llama(tmp_path_factory.mktemp("llama"))
    return load_model(str(folder), dtype="float32", device="cpu")


EDITS = {
    "nothing": lambda h: [],
    "add": lambda h: [add(h, 1, 4.0)],
    "add_typical": lambda h: [add(h, LATENTS, [2.0, -1.0, 0.5], unit="typical_max")],
    "add_norm": lambda h: [add(h, 4, 0.5, unit="norm", where="after")],
    "set": lambda h: [set_to(h, LATENTS, 3.0, where="prompt")],
    "scale": lambda h: [scale(h, LATENTS, -2.0)],
    "cap": lambda h: [cap(h, list(range(40)), 0.2)],
    "ablate": lambda h: [ablate(h, list(range(20)), where=TokenPattern(tokens="e"))],
    "project_out": lambda h: [project_out(h, LATENTS)],
    "both": lambda h: [set_to(h, 1, 3.0, where="prompt"), add(h, [1, 2], 2.0, where="after")],
}
every_edit = pytest.mark.parametrize("name", EDITS)


def slow_row(handle, config, x):
    """One position, one latent at a time, from the definition."""
    W, z = handle.dictionary.W_dec, handle.dictionary.encode(x[None])[0]
    units = {"latent": None, "typical_max": handle.scales.typical_max}
    moved = x.clone()
    if config.operation == "project_out":
        Q = torch.linalg.qr(W[list(config.latents)].T).Q
        return x - Q @ (Q.T @ x)
    for place, i in enumerate(config.latents):
        s = config.strengths[place] if config.strengths else 0.0
        if config.unit == "norm":
            s *= handle.scales.mean_norm / float(W[i].norm())
        elif units[config.unit] is not None:
            s *= float(units[config.unit][i])
        old = float(z[i])
        new = {
            "add": old + s,
            "set": s,
            "scale": s * old,
            "ablate": 0.0,
            "cap": max(min(old, s), -s),
        }[config.operation]
        moved = moved + (new - old) * W[i]
    return moved


@every_edit
def test_an_edit_equals_a_loop_over_positions_and_latents(toy_model, handle, name):
    tokens, lengths = encode_prompts(toy_model, PROMPTS)
    prompt = torch.tensor([3, 2, 4])
    edits = EDITS[name](handle)
    clean = toy_model.capture(tokens, [SITE], lengths)[SITE]
    with saelab.steer(toy_model, *edits, prompt_lengths=prompt):
        moved = toy_model.capture(tokens, [SITE], lengths)[SITE]
    wanted = clean.clone()
    strings = toy_model.to_strings(range(toy_model.d_vocab))
    for row in range(len(tokens)):
        for pos in range(int(lengths[row])):
            for edit in edits:
                where = edit.config.where
                if isinstance(where, TokenPattern):
                    acts = where.tokens in strings[int(tokens[row, pos])]
                else:
                    first = pos < int(prompt[row])
                    acts = {"all": True, "prompt": first, "after": not first}[where]
                if acts:
                    change = slow_row(handle, edit.config, clean[row, pos]) - clean[row, pos]
                    wanted[row, pos] += change
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=1e-5)
    assert name == "nothing" or not torch.equal(moved, clean)


def test_an_empty_edit_and_an_edit_of_nothing_change_no_bit(toy_model, handle):
    tokens, _ = encode_prompts(toy_model, PROMPTS[:1])
    clean = toy_model.logits(tokens)
    absent = TokenPattern(tokens="no such token")
    for edits in [
        [],
        [add(handle, 3, 0.0)],
        [ablate(handle, 3, where=absent)],
        [scale(handle, 3, 1.0)],
    ]:
        with saelab.steer(toy_model, *edits):
            assert torch.equal(toy_model.logits(tokens), clean)


def test_adding_moves_by_the_decoder_direction_and_ablating_is_setting_to_zero(toy_model, handle):
    tokens, _ = encode_prompts(toy_model, PROMPTS[:1])
    clean = toy_model.capture(tokens, [SITE])[SITE]
    with saelab.steer(toy_model, add(handle, 5, 2.5)):
        moved = toy_model.capture(tokens, [SITE])[SITE]
    direction = 2.5 * handle.dictionary.W_dec[5]
    torch.testing.assert_close(moved, clean + direction, atol=0, rtol=1e-6)
    both = []
    for edit in (ablate(handle, LATENTS), set_to(handle, LATENTS, 0.0)):
        with saelab.steer(toy_model, edit):
            both.append(toy_model.logits(tokens))
    torch.testing.assert_close(both[0], both[1], atol=0, rtol=0)


def recorded(monkeypatch, model, tokens, lengths, n):
    """Generate greedily, and return the tokens and each step's logits."""
    seen = []

    def chooser(temperature, seed):
        return lambda logits: seen.append(logits) or logits.argmax(-1)

    monkeypatch.setattr(generation, "chooser", chooser)
    whole = model.generate(tokens, max_new_tokens=n, lengths=lengths)
    return whole, torch.stack(seen, 1)


def slow_generation(model, edits, prompt, n):
    """One prompt without a cache: the whole text again at each step."""
    length, logits = torch.tensor([prompt.shape[1]]), []
    tokens = prompt
    with saelab.steer(model, *edits, prompt_lengths=length):
        for _ in range(n):
            logits.append(model.logits(tokens)[:, -1])
            tokens = torch.cat([tokens, logits[-1].argmax(-1)[:, None]], 1)
            if int(tokens[0, -1]) == model.eos_id:
                break
    return tokens[0], torch.cat(logits)


@every_edit
def test_batched_generation_with_a_cache_equals_single_without_one(model, name, monkeypatch):
    handle = make_handle(model)
    edits, n = EDITS[name](handle), 5
    tokens, lengths = encode_prompts(model, [p[:24] for p in PROMPTS])
    with saelab.steer(model, *edits):
        whole, logits = recorded(monkeypatch, model, tokens, lengths, n)
    for row, length in enumerate(lengths.tolist()):
        alone, single = slow_generation(model, edits, tokens[row : row + 1, :length], n)
        for step in range(len(single)):
            torch.testing.assert_close(logits[row, step], single[step], atol=1e-3, rtol=0)
            best = single[step].topk(2).values
            if best[0] - best[1] < 1e-3:
                break
            assert whole[row, length + step] == alone[length + step]
        assert torch.equal(whole[row, :length], tokens[row, :length])


def test_texts_are_continued_as_their_tokens_are(toy_model, handle):
    clean = toy_model.generate(PROMPTS, max_new_tokens=6)
    with saelab.steer(toy_model, add(handle, 1, 30.0)):
        steered = toy_model.generate(PROMPTS, max_new_tokens=6)
        alone = [toy_model.generate(prompt, max_new_tokens=6) for prompt in PROMPTS]
    assert steered == alone != clean
    assert all(text.startswith(prompt) for text, prompt in zip(steered, PROMPTS, strict=True))


def test_edits_stand_for_one_block_and_one_thread_and_nest(toy_model, handle):
    tokens, _ = encode_prompts(toy_model, PROMPTS[:1])
    clean = toy_model.logits(tokens)
    elsewhere = []
    with saelab.steer(toy_model, add(handle, 1, 2.0)):
        once = toy_model.logits(tokens)
        other = threading.Thread(target=lambda: elsewhere.append(toy_model.logits(tokens)))
        other.start()
        other.join()
        with saelab.steer(toy_model, add(handle, 1, -2.0)):
            torch.testing.assert_close(toy_model.logits(tokens), clean, atol=1e-4, rtol=0)
        assert torch.equal(toy_model.logits(tokens), once)
    assert torch.equal(elsewhere[0], clean)
    with pytest.raises(ZeroDivisionError), saelab.steer(toy_model, add(handle, 1, 2.0)):
        _ = 1 / 0
    assert torch.equal(toy_model.logits(tokens), clean)


def test_splices_under_standing_edits_see_them(toy_model, handle):
    tokens, _ = encode_prompts(toy_model, PROMPTS[:1])
    site = "blocks.1.hook_resid_post"
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    x_hat = torch.zeros(*tokens.shape, 32)
    clean = toy_model.splice(tokens, site, x_hat, keep)
    with saelab.steer(toy_model, add(handle, 1, 2.0)):
        torch.testing.assert_close(
            toy_model.splice(tokens, site, x_hat, keep), toy_model.logits(tokens)
        )
    assert torch.equal(toy_model.splice(tokens, site, x_hat, keep), clean)


def test_a_pass_that_goes_on_from_the_middle_refuses_edits_that_stand(toy_model, handle):
    tokens, _ = encode_prompts(toy_model, PROMPTS[:1])
    stream = toy_model.capture(tokens, [SITE])[SITE]
    with saelab.steer(toy_model, add(handle, 1, 4.0)):
        with pytest.raises(ConfigError, match=r"cannot place add .*leave the block of `steer`"):
            toy_model.resume(stream, 1)
        with pytest.raises(ConfigError, match="cannot place"):
            toy_model.remember(tokens)
    found = toy_model.resume(stream, 1, past=None)
    torch.testing.assert_close(found, toy_model.logits(tokens)[:, -1])


def test_edits_round_trip_through_yaml(handle):
    edits = [edit for build in EDITS.values() for edit in build(handle)]
    again = from_yaml(to_yaml(edits), [handle])
    assert [edit.config for edit in again] == [edit.config for edit in edits]
    assert to_yaml(again) == to_yaml(edits)
    with pytest.raises(ConfigError, match="no dictionary 'sentiment'"):
        from_yaml(to_yaml(edits), [])
    elsewhere = Handle(handle.dictionary, "blocks.1.hook_resid_post", "sentiment", handle.scales)
    with pytest.raises(ConfigError, match=r"at 'blocks.0.hook_resid_post'.*acts at 'blocks.1"):
        from_yaml(to_yaml(edits), [elsewhere])
    # written by hand, an edit may leave the site to its dictionary
    by_hand = "- {operation: ablate, dictionary: sentiment, latent: 3}"
    assert from_yaml(by_hand, [handle])[0].config == ablate(handle, 3).config
    assert from_yaml(by_hand, [elsewhere])[0].config.site == "blocks.1.hook_resid_post"
    with pytest.raises(ConfigError, match="two dictionaries are called"):
        to_yaml([edits[0], add(Handle(handle.dictionary, SITE, "sentiment"), 1, 1.0)])


def test_typical_maxima_are_means_of_documents_largest(toy_model, toy_store):
    handle = make_handle(toy_model)
    scales = measure_scales(handle.dictionary, toy_store, SITE, batch=100)
    (rows,) = toy_store.scan(SITE, batch=5000, split="train")
    z = handle.dictionary.encode(rows.x.float()).abs()
    peak = torch.stack([z[rows.documents == d].amax(0) for d in rows.documents.unique()])
    wanted = torch.stack([p[p > 0].mean() for p in peak.T])
    torch.testing.assert_close(scales.typical_max, wanted, equal_nan=True)
    assert scales.mean_norm == toy_store.stats(SITE).mean_norm


def test_what_does_not_fit_is_refused(toy_model, handle):
    def refused(error, match, *edits):
        with pytest.raises(error, match=match), saelab.steer(toy_model, *edits):
            pass

    refused(ConfigError, "numbered 0 to 39", add(handle, 40, 1.0))
    elsewhere = Handle(handle.dictionary, "blocks.7.hook_resid_post")
    refused(SiteError, "no site", add(elsewhere, 1, 1.0))
    wide = Handle(handle.dictionary, "blocks.0.mlp.hook_post")
    refused(ShapeError, "has width 128", add(wide, 1, 1.0))
    bare = Handle(handle.dictionary, SITE)
    refused(ConfigError, "measure_scales", add(bare, 1, 1.0, unit="norm"))
    silent = Handle(handle.dictionary, SITE, scales=Scales(torch.full((40,), float("nan")), 1.0))
    refused(ConfigError, "never fired", add(silent, 1, 1.0, unit="typical_max"))
    refused(ConfigError, "contradict", ablate(handle, 1), add(handle, [0, 1], 2.0))
    with pytest.raises(ConfigError, match="site=") as _:
        add(handle.dictionary, 1, 1.0)
    with pytest.raises(ConfigError, match="not of"):
        add(handle, 1, 1.0, site="hook_embed")
    with pytest.raises(ConfigError, match="one for each of 2"):
        add(handle, [1, 2], [1.0])
    with pytest.raises(ConfigError, match="different ones"):
        ablate(handle, [1, 1])
    with pytest.raises(ShapeError, match=r"prompts \[1\] are empty"):
        toy_model.generate(["the", ""], max_new_tokens=1)
    with pytest.raises(ConfigError, match="no text"):
        toy_model.generate([], max_new_tokens=1)
    with pytest.raises(ConfigError, match="cannot be negative"):
        cap(handle, 1, -1.0)


def test_a_strength_that_overflows_is_named(toy_model, handle):
    tokens, _ = encode_prompts(toy_model, PROMPTS[:1])
    with (
        saelab.steer(toy_model, *8 * [add(handle, 1, 3e38)]),
        pytest.raises(NonFiniteError, match=r"activations are not finite after add 3e\+38"),
    ):
        toy_model.logits(tokens)
    # the neurons stay finite, and overflow where the layer sums them up
    neurons = Handle(Directions(torch.ones(1, 128)), "blocks.1.mlp.hook_post")
    for call in (toy_model.logits, lambda t: toy_model.generate(t, max_new_tokens=1)):
        with (
            saelab.steer(toy_model, add(neurons, 0, 3e38)),
            pytest.raises(NonFiniteError, match=r"logits are not finite under add 3e\+38"),
        ):
            call(tokens)
    with pytest.raises(ConfigError, match="finite"):
        add(handle, 1, float("inf"))


def test_a_finished_dictionary_is_a_handle(tmp_path, toy_model, toy_store):
    own = make_handle(toy_model)
    with artifacts.open_draft(tmp_path, "dictionary", "mine", "b" * 64) as draft:
        own.dictionary.save(draft.folder)
        draft.finish(stage="dictionary", name="mine", inputs={}, parents=[], facts={"site": SITE})
    found = saelab.handle(draft.target, toy_store)
    assert (found.name, found.site) == ("mine", SITE)
    assert torch.equal(found.dictionary.W_dec, own.dictionary.W_dec)
    assert found.scales is not None
    assert saelab.handle(draft.target).scales is None
    with pytest.raises(ArtifactError, match="a dictionary is wanted"):
        saelab.handle(toy_store.path)
