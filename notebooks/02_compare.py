# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Train several dictionaries on one stream, and compare them
#
# Which type reconstructs best *at one sparsity*? Two dictionaries from two runs are hard to
# compare: other data, another order, another evaluation. Here all members see the same batches in
# the same order and are scored on the same held-out rows, so that differences can be *paired*.
#
# By default on the toy model (seconds; its numbers mean nothing). `SIZE = "full"` is SmolLM2-135M
# on news articles: some tens of minutes on two cores, less if notebook 01 has read the text before.

# %%
import os

SIZE = os.environ.get("SAELAB_NOTEBOOK_SIZE", "toy")  # or "full"
CONFIG, D_SAE, K, TOKENS = {
    "toy": ("quickstart/toy", 128, [4, 8], 40_000),
    "full": ("quickstart/demo", 2048, [16, 64], 300_000),
}[SIZE]

# %%
from pathlib import Path

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import rich

import saelab
from saelab import leaderboard, report

# %% [markdown]
# ## A grid of members
#
# A list under a key is an axis, and every combination is a member; a key that only some types have
# goes to those (`target_l0` to JumpReLU, which is steered to it, `k` to the others). ITDA learns
# nothing: it keeps activations that those before did not explain. It shares the stream all the
# same.

# %%
OUT = Path("runs/compare")
TYPES = ["topk", "batch_topk", "jump_relu", "itda"]
steps = saelab.run(
    CONFIG,
    overrides=[
        "name=compare", f"out={OUT}", f"train.tokens={TOKENS}", "dictionaries=[]", "index=null",
        f"grid={{type: [{', '.join(TYPES)}], d_sae: {D_SAE}, k: {K}, target_l0: {K}}}",
    ],
)  # fmt: skip
members = leaderboard.scored(OUT)
print(f"{len(members)} members, {sum(step.status == 'made' for step in steps)} artifacts made now")

# %% [markdown]
# ## The table, with intervals
#
# The last column is the 95 % interval of the difference to the best member, from resamples that
# drew the same documents for both. It says what another sample of *documents* would change, and
# nothing about another *seed*: add `seed: [0, 1, 2]` to the grid for that.
#
# Read the column L0 first: members with more latents per token reconstruct better, so the best of
# this table is among those with the largest L0, whatever its type. The curves below are fair.

# %%
rich.print(leaderboard.compare([OUT], "fvu"))

# %% [markdown]
# The same as data, with what the members do to the model's predictions. Watch for a member that
# wins on FVU and loses on KL: it spends its latents on variance that the model does not use.

# %%
METRICS = ["l0", "fvu", "kl", "ce_recovered_zero", "dead_share"]


def shown(member: leaderboard.Scored, metric: str) -> str:
    row = member.row(metric)
    return "" if row is None else report.pretty(row["value"], row["standard_error"])


pd.DataFrame(
    [{"type": m.type} | {metric: shown(m, metric) for metric in METRICS} for m in members],
    index=[m.name for m in members],
)

# %% [markdown]
# ## The curve over L0
#
# What can be compared is curves: of two types, the lower one at an L0 is the better one there. The
# control in grey is made of as many random activations as a member has latents, coded by pursuit. A
# type whose curve does not lie below it has gained nothing by training.

# %%
figure = go.Figure(
    layout={
        "height": 420,
        "xaxis": {"type": "log", "title": "L0"},
        "yaxis": {"title": "FVU, held out"},
    }
)
for name in TYPES:
    mine = sorted((m for m in members if m.type == name), key=lambda m: m.row("l0")["value"])
    figure.add_scatter(
        x=[m.row("l0")["value"] for m in mine],
        y=[m.row("fvu")["value"] for m in mine],
        error_y={"array": [1.96 * m.row("fvu")["standard_error"] for m in mine]},
        name=name, mode="lines+markers",
    )  # fmt: skip
arms = sorted({arm for m in members for arm, _ in m.cells if arm.startswith("random_atoms")})
control = [
    (m.row("l0", arm)["value"], m.row("fvu", arm)["value"])
    for m in members
    for arm in arms
    if m.row("fvu", arm)
]
figure.add_scatter(
    x=[l0 for l0, _ in control], y=[fvu for _, fvu in control],
    name="random activations", mode="markers", marker={"color": "grey", "symbol": "x"},
)  # fmt: skip
figure

# %% [markdown]
# ## While they learnt
#
# One line per member, over the tokens seen, on training batches. A type that is ahead early and is
# overtaken later was not the better one. ITDA has no such curve: it counts its atoms instead.

# %%
logs = pd.concat(
    pd.read_json(step.path / "metrics.jsonl", lines=True).assign(member=step.name)
    for step in steps
    if step.stage == "dictionary"
)
px.line(logs.dropna(subset=["fvu"]), x="tokens", y="fvu", color="member", height=380)

# %% [markdown]
# ## The answer, with its error
#
# At one L0, the difference of two members and its interval. If it contains 0, these documents do
# not tell the two apart.

# %%
sparse = [m for m in members if m.name.endswith(f"-{K[0]}")]
best, *others = sorted(sparse, key=lambda m: m.rank("fvu"))
gaps = {m.name: leaderboard.gap_of(m, best, "fvu") for m in others}
pd.DataFrame(
    {"L0": shown(member, "l0"), "FVU − best": gap.value, "2.5 %": gap.low, "97.5 %": gap.high}
    for member, gap in zip(others, gaps.values(), strict=True)
).set_index(pd.Index(gaps, name=f"over {best.name}"))
