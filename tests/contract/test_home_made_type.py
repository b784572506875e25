"""A type defined in one file, with one registration, is a type like the others.

It obeys all laws, trains beside the others, goes through the whole line, and opens in the app.
"""

import json
from contextlib import closing
from typing import Annotated, Literal, final

import pytest
import torch
from doubles import planted_store
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

import saelab
from saelab import dictionaries, laws
from saelab.dictionaries.base import BaseDictionary, DictionaryConfig
from saelab.errors import ArtifactError, ConfigError
from saelab.ops import linalg
from saelab.protocols import GradientTrained, Loss
from saelab.train.fit import Member, TrainConfig, fit
from saelab.types import Batch


class HomeMadeConfig(DictionaryConfig):
    """A signed dictionary with soft thresholds."""

    type: Literal["home_made"] = "home_made"
    """Name in the registry."""
    l1: Annotated[float, Field(ge=0)] = 0.01
    """Weight of Σ|z|."""


@final
class HomeMade(BaseDictionary, GradientTrained):
    """z = soft threshold of (x − b_dec) W_decᵀ: tied, signed, without a bound on l0."""

    config_class = HomeMadeConfig
    config: HomeMadeConfig

    def __init__(self, config: HomeMadeConfig) -> None:
        super().__init__(config)
        self.threshold = nn.Parameter(torch.full((config.d_sae,), 0.5))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self._code(self._rows(x)).reshape(*x.shape[:-1], self.d_sae)

    def _code(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.W_dec.T
        return pre.sign() * (pre.abs() - self.threshold).relu()

    def scale_(self, factor: float) -> None:
        super().scale_(factor)
        self.threshold.mul_(factor)

    @torch.no_grad()
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        self.W_dec.copy_(linalg.unit_rows(torch.randn(self.W_dec.shape, generator=generator)))
        self.b_dec.copy_(sample.mean(0))

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        z = self._code(batch.x)
        error = (batch.y - self.decode(z)).square().sum() / batch.y.square().sum()
        penalty = self.config.l1 * z.abs().sum() / len(batch)
        fires = (z != 0).detach()
        return Loss(error + penalty, {"fvu": error}, fires.nonzero()[:, 1], fires.sum() / len(z))

    @torch.no_grad()
    def constrain_(self) -> None:
        self.W_dec.copy_(linalg.unit_rows(self.W_dec))


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dictionaries.REGISTRY, "home_made", HomeMade)
        yield


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_a_home_made_type_obeys_the_law(law):
    law(lambda: laws.ready("home_made"))


def test_a_home_made_type_trains_beside_the_shipped_ones():
    store, _ = planted_store(n=1000)
    configs = [{"type": "home_made", "d_in": 16, "d_sae": 24}]
    configs.append({"type": "topk", "d_in": 16, "d_sae": 24, "k": 2})
    members = [Member(c["type"], dictionaries.create(c), "site", 1e-2) for c in configs]
    mine, _ = fit(members, store, TrainConfig(batch=64, tokens=64 * 60))
    assert mine.metrics[-1]["fvu"] < 0.7 * mine.metrics[0]["fvu"]
    assert mine.dictionary.config.type == "home_made"


def test_a_home_made_type_without_a_resampling_rule_says_so():
    store, _ = planted_store(n=400)
    mine = dictionaries.create({"type": "home_made", "d_in": 16, "d_sae": 24})
    config = TrainConfig(batch=64, tokens=64 * 20, resample_every=0.2)
    with pytest.raises(ConfigError, match=r"mine: .*HomeMade has no resampling rule"):
        fit([Member("mine", mine, "site")], store, config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the home-made type on the toy model, as a user writes it down; and its steps."""
    root = tmp_path_factory.mktemp("own")
    config = {
        "name": "own",
        "model": {"source": "toy", "dtype": "float32"},
        "corpus": {"source": "toy", "context": 32, "tokens": 3000, "holdout": 0.3},
        "harvest": {"sites": ["blocks.1.hook_resid_post"], "dtype": "float32"},
        "grid": {"type": "home_made", "d_sae": 48, "l1": [0.01, 0.1], "lr": 0.01},
        "train": {"batch": 128, "tokens": 128 * 40},
        "evaluate": {
            "evals": ["core"],
            "core": {"resamples": 20, "windows": 8, "pursuit_rows": 128},
        },
        "index": {},
        "out": str(root / "out"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(root / "cache"))
        yield config, saelab.run(config)


def test_a_home_made_type_is_trained_scored_and_indexed_by_a_run_and_found_again(finished):
    config, steps = finished
    stages = ["store", "dictionary", "dictionary", "results", "features", "results", "features"]
    assert [(s.stage, s.status) for s in steps] == [(stage, "made") for stage in stages]
    assert [s.status for s in saelab.run(config)] == ["found"] * len(stages)
    weak, strong = (s for s in steps if s.stage == "dictionary")
    assert (weak.name, strong.name) == ("own-home_made-48-l10.01", "own-home_made-48-l10.1")
    dictionary = saelab.load(weak.path)
    assert dictionary.config.plain() == {"type": "home_made", "d_in": 32, "d_sae": 48, "l1": 0.01}
    index = next(s.path for s in steps if s.stage == "features")
    with closing(saelab.open_features(index)) as features:
        assert features.n_latents == 48


def test_the_scorecard_of_a_home_made_type_has_its_numbers_and_the_controls(finished):
    weak, strong = (_scores(s.path) for s in finished[1] if s.stage == "results")
    for name in ("fvu", "l0", "ce_recovered_zero", "kl", "dead_share"):
        assert ("dictionary", name) in weak
    assert {"pca", "token_mean", "random_atoms"} <= {arm.split("(")[0] for arm, _ in weak}
    assert weak["dictionary", "fvu"] < strong["dictionary", "fvu"] < 1
    assert weak["dictionary", "l0"] > strong["dictionary", "l0"] > 0


def _scores(folder):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {(row["arm"], row["name"]): row["value"] for row in rows}


@pytest.mark.app
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_app_shows_a_home_made_type_on_every_page(finished, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1")
    from saelab_app import serve, state

    monkeypatch.setenv(state.DIRECTORY, finished[0]["out"])
    home = testing.AppTest.from_file(str(serve.HOME), default_timeout=60)
    for page, choices, shown in (
        ("runs", {}, "home_made · 48 latents"),
        ("feature", {"latent": "5"}, "Latent 5"),
        ("text", {"latent": "5", "text": "It was not the same."}, "Token by token"),
    ):
        home.switch_page(f"pages/{page}.py")
        for key, value in choices.items():
            home.query_params[key] = value
        home.run()
        assert [e.value for e in (*home.exception, *home.error)] == []
        assert shown in "".join(h.proto.body for h in home.get("html"))


def test_an_unknown_type_or_key_names_the_nearest():
    with pytest.raises(ConfigError, match="no dictionary type 'top_k'; did you mean 'topk'"):
        dictionaries.create({"type": "top_k"})
    with pytest.raises(ConfigError, match="unknown key 'kk'"):
        dictionaries.create({"type": "topk", "d_in": 4, "d_sae": 8, "k": 2, "kk": 2})
    with pytest.raises(ConfigError, match="needs a `type`"):
        dictionaries.create({"d_in": 4})


def test_altered_missing_or_exchanged_files_are_named(tmp_path):
    dictionaries.create({"type": "topk", "d_in": 4, "d_sae": 8, "k": 2}).save(tmp_path / "a")
    dictionaries.create({"type": "home_made", "d_in": 4, "d_sae": 8}).save(tmp_path / "b")
    weights = tmp_path / "a" / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(ArtifactError, match=r"weights\.safetensors.*truncated or altered"):
        dictionaries.load(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    config.write_text((tmp_path / "b" / "config.json").read_text())
    weights.write_bytes((tmp_path / "b" / "weights.safetensors").read_bytes())
    config.write_text(config.read_text().replace('"home_made"', '"topk"').replace('"l1"', '"k"'))
    config.write_text(config.read_text().replace("0.01", "2"))
    with pytest.raises(ArtifactError, match="different: W_enc, b_enc, threshold, variance"):
        dictionaries.load(tmp_path / "a")
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors is missing"):
        dictionaries.load(tmp_path / "a")
    config.write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        dictionaries.load(tmp_path / "a")
    with pytest.raises(ArtifactError, match="does not exist"):
        dictionaries.load(tmp_path / "nowhere")
