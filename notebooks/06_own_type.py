# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Add your own dictionary type
#
# A method is one file. It says how rows are coded and what its loss is; reading, sweeping, stopping
# and going on, scoring, indexing and the app come by themselves. This notebook writes such a file,
# holds it against the laws that all types obey, trains it beside TopK on one stream, and looks at
# what came out.
#
# The method here: **soft thresholds**, as in iterative shrinkage, with a tied encoder.
#
#     a = (x − b) Wᵀ            z = sign(a) · max(|a| − t, 0)            x̂ = z W + b
#
# Codes have both signs; nothing bounds how many latents fire, and λ Σ|z| in the loss keeps them
# few.
#
# By default on the toy model (seconds). `SIZE = "full"` is SmolLM2-135M on news articles: some
# tens of minutes on two cores, less if notebook 01 has read the text before.

# %%
import os

SIZE = os.environ.get("SAELAB_NOTEBOOK_SIZE", "toy")  # or "full"
CONFIG, D_SAE, K, TOKENS = {
    "toy": ("quickstart/toy", 128, 8, 60_000),
    "full": ("quickstart/demo", 2048, 32, 300_000),
}[SIZE]

# %% [markdown]
# ## The file
#
# This cell is all of `saelab/dictionaries/soft.py`. A type inherits one of three capabilities:
# `GradientTrained` (gives a `loss`), `Streamed` (takes batches and keeps what it needs) or `Solved`
# (iterates over a store). Of a gradient-trained one three things are its own:
#
# - `encode`: row by row, for any leading axes;
# - `init_` and `loss`: weights from a sample, and the loss of a batch. `Loss` also says which
# latents fired: that is how dead ones are counted;
# - `scale_`: what carries the unit of x. Training works on scaled rows, and the finished dictionary
# takes raw ones; here thresholds have that unit as well as the bias.
#
# `constrain_` is called after each step, here to keep directions at length 1: else the penalty
# could be had for nothing, by long directions and small codes. Annotations such as `Float[Tensor,
# "n d_in"]` are checked when tests run.

# %%
from typing import Annotated, Literal, final

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from saelab.dictionaries.base import BaseDictionary, DictionaryConfig
from saelab.ops import linalg
from saelab.protocols import GradientTrained, Loss
from saelab.types import Batch


class SoftConfig(DictionaryConfig):
    """A dictionary with soft thresholds."""

    type: Literal["soft"] = "soft"
    """Name in the registry."""
    l1: Annotated[float, Field(ge=0)] = 0.3
    """Weight λ of a row's mean Σ|z| / √d_in, beside the FVU-scaled error."""


@final
class Soft(BaseDictionary, GradientTrained):
    """Soft thresholds of (x − b_dec) W_decᵀ."""

    config_class = SoftConfig
    config: SoftConfig

    def __init__(self, config: SoftConfig) -> None:
        """Allocate directions and thresholds."""
        super().__init__(config)
        self.threshold = nn.Parameter(torch.full((config.d_sae,), 0.5))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of each row; row-wise, for any leading axes. Raises ShapeError."""
        return self._code(self._rows(x)).reshape(*x.shape[:-1], self.d_sae)

    def _code(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.W_dec.T
        return pre.sign() * (pre.abs() - self.threshold).relu()

    def scale_(self, factor: float) -> None:
        """Change the unit of x: bias and thresholds scale, directions stay."""
        super().scale_(factor)
        self.threshold.mul_(factor)

    @torch.no_grad()
    def init_(self, sample: Float[Tensor, "n d_in"], generator: torch.Generator) -> None:
        """Begin with random directions and the mean as bias."""
        self.W_dec.copy_(linalg.unit_rows(torch.randn(self.W_dec.shape, generator=generator)))
        self.b_dec.copy_(sample.mean(0))

    def loss(self, batch: Batch, progress: float, dead: Bool[Tensor, " d_sae"]) -> Loss:
        """Return the batch FVU plus λ times the mean Σ|z| / √d_in."""
        del progress, dead
        z = self._code(batch.x)
        away = (batch.y - batch.y.mean(0)).square().sum()
        error = (batch.y - self.decode(z)).square().sum() / away
        penalty = self.config.l1 * z.abs().sum() / len(batch) / self.d_in**0.5
        fires = (z != 0).detach()
        terms = {"fvu": error.detach(), "penalty": penalty.detach()}
        return Loss(error + penalty, terms, fires.nonzero()[:, 1], fires.sum() / len(batch))

    @torch.no_grad()
    def constrain_(self) -> None:
        """Keep directions at length 1, and thresholds at 0 or above."""
        self.W_dec.copy_(linalg.unit_rows(self.W_dec))
        self.threshold.clamp_(min=0)


# %% [markdown]
# ## The one line
#
# From here on `type: soft` may stand in any configuration, and a misspelt key is refused by name.

# %%
from saelab import dictionaries

dictionaries.REGISTRY["soft"] = Soft
dictionaries.create({"type": "soft", "d_in": 32, "d_sae": 128, "l1": 0.5}).config

# %% [markdown]
# ## The laws
#
# What every evaluator, splice and edit relies on, checked on a small example. The usual surprise is
# `scale_law`: a threshold that was forgotten in `scale_` makes a dictionary that trains well and is
# wrong on raw activations.

# %%
import pandas as pd

from saelab import laws

pd.set_option("display.max_colwidth", 160)
broken = laws.broken(lambda: laws.ready("soft"))
pd.DataFrame(
    {
        "law": law.__name__.removesuffix("_law"),
        "says": law.__doc__,
        "holds": law.__name__ not in broken,
        "seen": broken.get(law.__name__, ""),
    }
    for law in laws.LAWS
)

# %% [markdown]
# A broken law says what was seen. Here is what forgetting `scale_` looks like:

# %%
from unittest import mock

with mock.patch.object(Soft, "scale_", BaseDictionary.scale_):
    forgotten = laws.broken(lambda: laws.ready("soft"))
for law, seen in forgotten.items():
    print(law, seen, sep="\n")

# %% [markdown]
# ## Train it beside others
#
# Three weights λ, and TopK at two L0, on the same batches. What to look at: where the curve of the
# new type lies *at equal L0*, as measured, since nothing bounds the L0 of the new one. And why: a
# penalty on Σ|z| makes codes small as well as few (*shrinkage*). `saelab report runs/own` has
# `norm_ratio` and `reconstruction_bias`, which are 1 where nothing shrinks.

# %%
from pathlib import Path

import rich

import saelab
from saelab import leaderboard

OUT = Path("runs/own")
steps = saelab.run(
    CONFIG,
    overrides=[
        "name=own", f"out={OUT}", f"train.tokens={TOKENS}", "dictionaries=[]",
        f"grid=[{{type: soft, d_sae: {D_SAE}, l1: [0.1, 0.2, 0.4]}}, "
        f"{{type: topk, d_sae: {D_SAE}, k: [{K}, {2 * K}]}}]",
    ],
)  # fmt: skip
rich.print(leaderboard.compare([OUT], "fvu"))

# %%
import plotly.express as px

members = leaderboard.scored(OUT)
px.scatter(
    {
        "L0": [m.row("l0")["value"] for m in members],
        "FVU, held out": [m.row("fvu")["value"] for m in members],
        "type": [m.type for m in members],
        "member": [m.name for m in members],
    },
    x="L0", y="FVU, held out", color="type", hover_name="member", log_x=True, height=380,
)  # fmt: skip

# %% [markdown]
# ## Its features
#
# The index was built by the same call. Codes are signed: orange is below zero, where the latent
# stands for the opposite of its direction.

# %%
from saelab import show

index = next(s.path for s in steps if s.stage == "features" and s.name.startswith("own-soft"))
features = saelab.open_features(index)
latent = next(
    (latent.id for latent in features.table("fires", 200, descending=True) if not latent.warnings),
    0,
)
page = features.latent(latent)
show.examples(
    [example for group in page.groups for example in group.examples[:3]],
    caption=f"latent {latent}: from its strongest firings to its weakest",
)

# %% [markdown]
# ## To keep it
#
# 1. The file, in `saelab/dictionaries/soft.py`; its line in `REGISTRY`, and its module in the
# independence contract of `pyproject.toml`.
# 2. `docs/methods/soft.md`: idea, equations, paper, defaults, when it fails.
# 3. Tests of what is its own, against a slow and obvious reference. The laws test it by themselves.
#
# Without touching saelab at all: keep the file in your own package, and import it before
# `saelab.run`.
