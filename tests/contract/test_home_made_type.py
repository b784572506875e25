"""A type defined in one file, with one registration, obeys all laws and trains like the others."""

from typing import Annotated, Literal, final

import pytest
import torch
from dictionary_laws import LAWS, round_trip_law
from doubles import planted_store
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from saelab import dictionaries
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


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(dictionaries.REGISTRY, "home_made", HomeMade)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_home_made_type_obeys_the_law(law):
    law("home_made")


def test_a_home_made_type_is_loaded_as_it_was_saved(tmp_path):
    round_trip_law("home_made", tmp_path)


def test_a_home_made_type_trains_beside_the_shipped_ones():
    store, _ = planted_store(n=1000)
    configs = [{"type": "home_made", "d_in": 16, "d_sae": 24}]
    configs.append({"type": "topk", "d_in": 16, "d_sae": 24, "k": 2})
    members = [Member(c["type"], dictionaries.create(c), "site", 1e-2) for c in configs]
    mine, _ = fit(members, store, TrainConfig(batch=64, tokens=64 * 60))
    assert mine.metrics[-1]["fvu"] < 0.7 * mine.metrics[0]["fvu"]
    assert mine.dictionary.config.type == "home_made"


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
