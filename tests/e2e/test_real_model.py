"""The whole line on the real language model and real text, small."""

import json

import pytest
import torch

import saelab
from saelab import artifacts

pytestmark = pytest.mark.lm


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "out"
    return saelab.run(
        {
            "name": "real",
            "model": {"source": "smollm2-135m", "dtype": "float32"},
            "corpus": {"source": "news-articles", "context": 64, "tokens": 4000, "holdout": 0.3},
            "harvest": {"sites": ["blocks.3.hook_resid_post"], "dtype": "float16"},
            "dictionaries": [{"type": "topk", "d_sae": 512, "k": 16}],
            "train": {"batch": 256, "tokens": 10_240},
            "evaluate": {"core": {"windows": 2, "pursuit_rows": 256, "resamples": 50}},
            "index": {},
            "out": str(out),
        }
    )


def test_a_real_model_goes_through_the_whole_line(steps):
    assert [step.stage for step in steps] == ["store", "dictionary", "results", "features"]
    for step in steps:
        artifacts.verify(step.path)


def test_the_dictionary_of_a_real_model_explains_most_of_the_variance(steps):
    rows = [json.loads(line) for line in (steps[2].path / "results.jsonl").read_text().splitlines()]
    scores = {(row["arm"], row["name"]): row["value"] for row in rows}
    assert scores["dictionary", "fvu"] < 0.5
    assert scores["dictionary", "l0"] <= 16
    assert 0 < scores["dictionary", "kl"] < scores["zero_ablation", "kl"]
    assert scores["dictionary", "ce_recovered_zero"] > 0.5


def test_the_store_holds_what_the_model_computes(steps):
    store = saelab.open_store(steps[0].path)
    model = saelab.load_model("smollm2-135m", dtype="float32")
    site = store.sites[0]
    window = next(store.windows(site))
    live = model.capture(window.ids[None].long(), [site])[site][0]
    rows = torch.arange(window.first_row, window.first_row + len(window))
    torch.testing.assert_close(store.rows(site, rows), live.half().float(), rtol=2e-3, atol=2e-2)
    text = store.document(int(window.document[0])).text
    assert text.startswith("".join(window.strings)[:40])


def test_the_index_shows_words_of_the_text(steps):
    features = saelab.open_features(steps[3].path)
    pages = [features.latent(i) for i in range(64)]
    examples = [e for page in pages for group in page.groups for e in group.examples]
    assert examples
    for example in examples:
        assert example.strip[example.position] == pytest.approx(example.value)
        assert len(example.strings) > example.position
    assert any(page.logits for page in pages)
