"""Real models: equal to transformers' own, converted repeatably, refused with reasons."""

import json
import shutil

import pytest
import torch
from tiny_models import save_llama

from saelab import assets
from saelab.errors import AssetError, ConfigError
from saelab.models import fingerprints, identify, load_model, resolve_device, resolve_dtype
from saelab.models.toy import ToyModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def hidden_states(folder, tokens, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        output = network(tokens, output_hidden_states=True)
    return output.hidden_states, output.logits


def weights(source):
    return dict(load_model(str(source), dtype="float32", device="cpu")._network.named_parameters())


def test_redrawn_weights_have_the_models_shapes_and_its_makers_spread(folder, cache):
    config = json.loads((folder / "config.json").read_text())
    before = torch.get_rng_state()
    trained, drawn = weights(folder), weights(f"redrawn:0:{folder}")
    assert torch.equal(torch.get_rng_state(), before)
    assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in trained.items()}
    for name, weight in drawn.items():
        assert not torch.equal(weight, trained[name])
        if "norm" in name:
            assert bool((weight == 1).all())
        else:
            assert float(weight.std()) == pytest.approx(config["initializer_range"], rel=0.1)
    again, other = weights(f"redrawn:0:{folder}"), weights(f"redrawn:1:{folder}")
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again[key], drawn[key]) and not torch.equal(other[key], drawn[key])


def test_a_redrawn_model_is_another_model_with_the_same_tokenizer(folder, cache):
    sources = [str(folder), f"redrawn:0:{folder}", f"redrawn:1:{folder}"]
    found = [identify(source, "float32", "cpu") for source in sources]
    assert len({one.fingerprint for one in found}) == 3
    assert found[1].name == f"{found[0].name}-redrawn-0"
    assert found[1].fingerprint in fingerprints(sources[1]) - fingerprints(sources[0])
    models = [load_model(source, dtype="float32", device="cpu") for source in sources]
    runs = [model.tokenize(["the cat"])[0].ids for model in models]
    assert torch.equal(runs[0], runs[1])
    for inner in ("toy", "handwired:induction"):
        with pytest.raises(ConfigError, match=f"{inner} has no trained weights to redraw"):
            identify(f"redrawn:0:{inner}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_residual_stream_is_transformers_own_to_the_bit(folder, cache, dtype):
    model = load_model(str(folder), dtype=dtype, device="cpu")
    tokens = torch.arange(3, 21).reshape(2, 9)
    hidden, logits = hidden_states(folder, tokens, model.dtype)
    captured = model.capture(tokens, [s.name for s in model.sites()])
    assert torch.equal(captured["hook_embed"], hidden[0])
    for layer in range(model.n_layers):
        assert torch.equal(captured[f"blocks.{layer}.hook_resid_pre"], hidden[layer])
    for layer in range(model.n_layers - 1):  # the last of transformers' states is normed
        assert torch.equal(captured[f"blocks.{layer}.hook_resid_post"], hidden[layer + 1])
    assert torch.equal(model.logits(tokens), logits.float())


def test_reading_the_site_names_leaves_the_model_as_it_was(folder, cache):
    model = load_model(str(folder), dtype="float32", device="cpu")
    assert model._network.config._attn_implementation == "sdpa"
    assert all(type(m).__module__.startswith(("torch.", "transformers.")) for m in
               model._network.modules())  # fmt: skip
    assert not any(p.requires_grad for p in model._network.parameters())


def test_a_model_is_identified_without_loading_it(folder, cache, monkeypatch):
    found = identify(str(folder), "float32", "cpu")
    assert (found.context, found.d_model, found.n_layers) == (64, 24, 3)
    model = load_model(str(folder), dtype="float32", device="cpu")
    assert (model.fingerprint, model.name) == (found.fingerprint, found.name)
    assert (model.context, model.d_model, model.d_vocab) == (64, 24, found.d_vocab)
    half = identify(str(folder), "bfloat16", "cpu").fingerprint
    assert half != found.fingerprint
    assert {half, found.fingerprint} <= fingerprints(str(folder))


def test_the_fingerprint_follows_weights_and_tokenizer_but_not_the_place(folder, cache, tmp_path):
    first = identify(str(folder), "float32", "cpu").fingerprint
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    (moved / "README.md").write_text("notes")
    assert identify(str(moved), "float32", "cpu").fingerprint == first
    for name in ("tokenizer.json", "model.safetensors"):
        changed = tmp_path / f"changed-{name}"
        shutil.copytree(folder, changed)
        with (changed / name).open("ab") as file:
            file.write(b" ")
        assert identify(str(changed), "float32", "cpu").fingerprint != first
        assert first in fingerprints(str(moved)) and first not in fingerprints(str(changed))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused_with_what_is_missing(folder, cache, tmp_path, missing):
    partial = tmp_path / "partial"
    shutil.copytree(folder, partial)
    (partial / missing).unlink()
    with pytest.raises(AssetError, match=missing.split(".")[-1]):
        load_model(str(partial), dtype="float32")


def test_a_folder_of_another_kind_of_model_is_refused(folder, cache, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text()) | {"model_type": "nonsense"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssetError, match="cannot be loaded"):
        load_model(str(other), dtype="float32", device="cpu")


def test_files_that_are_no_models_are_refused(cache, tmp_path):
    for name, message in (("notes.txt", "a model is a folder"), ("fake.gguf", "no GGUF file")):
        (tmp_path / name).write_text("hello")
        with pytest.raises(AssetError, match=message):
            load_model(str(tmp_path / name), dtype="float32")
    assert not list(cache.glob("models/*/model.safetensors"))
    with pytest.raises(AssetError, match="smollm2-135m"):
        load_model("smolm2-135m")


def test_dtypes_and_devices_are_checked():
    cpu = torch.device("cpu")
    assert resolve_dtype("bfloat16", cpu) == "bfloat16"
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        resolve_dtype("bfloat61", cpu)
    with pytest.raises(ConfigError, match="cuda"):
        resolve_dtype("float16", cpu)
    with pytest.raises(ConfigError, match="unknown device"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="has none"):
            resolve_device("cuda")


def test_the_fastest_dtype_is_probed_once_per_host(cache, monkeypatch):
    from saelab.models import identity

    cpu, probes = torch.device("cpu"), []
    monkeypatch.setattr(identity, "_probe", lambda _: probes.append(1) or "bfloat16")
    assert [resolve_dtype("auto", cpu) for _ in range(3)] == ["bfloat16"] * 3
    assert len(probes) == 1


def test_the_probe_answers_with_a_dtype():
    from saelab.models import identity

    assert identity._probe(torch.device("cpu")) in ("float32", "bfloat16")


def test_toys_are_seeded(toy_model):
    tokens = torch.arange(2, 10)[None]
    assert torch.equal(load_model("toy").logits(tokens), toy_model.logits(tokens))
    assert not torch.equal(ToyModel(1).logits(tokens), toy_model.logits(tokens))
    assert load_model("toy:seed=1").fingerprint == identify("toy:seed=1").fingerprint
    assert fingerprints("toy:seed=1") == {identify("toy:seed=1").fingerprint}
    assert load_model("toy").fingerprint != load_model("toy:seed=1").fingerprint
    for source, dtype in (("toy:sed=1", "auto"), ("toy", "bfloat16")):
        with pytest.raises(ConfigError):
            load_model(source, dtype=dtype)


# ---------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm():
    return load_model("smollm2-135m", dtype="float32", device="cpu")


@pytest.mark.lm
def test_smollm_answers_and_equals_plain_transformers(smollm):
    assert (smollm.n_layers, smollm.d_model, smollm.context) == (30, 576, 8192)
    assert smollm.adds_bos is False
    assert smollm.special_ids == frozenset(range(17))
    assert len(smollm.sites()) == 1 + 7 * 30
    assert smollm.site("blocks.10.mlp.hook_post").width == 1536
    prompt = smollm.tokenize(["The capital of France is"])[0].ids[None]
    answer = smollm.generate(prompt, max_new_tokens=1)[0].tolist()
    assert "".join(smollm.to_strings(answer)) == "The capital of France is Paris"
    hidden, _ = hidden_states(identify("smollm2-135m", "float32", "cpu").folder, prompt)
    site = "blocks.10.hook_resid_post"
    assert torch.equal(smollm.capture(prompt, [site])[site], hidden[11])


@pytest.mark.lm
def test_smollm_tokens_split_digits_and_cover_the_text(smollm):
    text = "In  1984, 12 people don't 😀"
    run = smollm.tokenize([text])[0]
    strings = smollm.to_strings(run.ids.tolist())
    assert strings[:7] == ["In", "  ", "1", "9", "8", "4", ","]
    assert int(run.end[-1]) == len(text)


@pytest.mark.lm
def test_a_conversion_recorded_every_file_of_its_folder(smollm):
    folder = identify("smollm2-135m", "float32", "cpu").folder
    record = json.loads((folder / "conversion.json").read_text())
    assert record["sha256"] == assets.CATALOGUE["smollm2-135m"].sha256
    for name in ("config.json", "tokenizer.json"):
        assert assets.hash_file(folder / name) == record["files"][name]


@pytest.mark.slow
@pytest.mark.lm
def test_gemma_comes_in_four_wheels_and_predicts_english():
    gemma = load_model("gemma3-270m", dtype="float32", device="cpu")
    assert (gemma.n_layers, gemma.d_model, gemma.adds_bos) == (18, 640, True)
    assert len(gemma.sites()) == 1 + 7 * 18
    text = "In  1984, the president said that people don't go to Zürich 😀."
    run = gemma.tokenize([text])[0]
    spans = list(zip(run.start.tolist(), run.end.tolist(), strict=True))
    assert "".join(text[a:b] for a, b in spans) == text
    ids = torch.cat([torch.tensor([gemma.bos_id]), run.ids])[None]
    loss = torch.nn.functional.cross_entropy(gemma.logits(ids)[0, :-1], ids[0, 1:])
    assert float(loss) < 5
    hidden, _ = hidden_states(identify("gemma3-270m", "float32", "cpu").folder, ids)
    site = "blocks.9.hook_resid_post"
    assert torch.equal(gemma.capture(ids, [site])[site], hidden[10])
