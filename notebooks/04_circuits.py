# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Circuits: from a task to its heads, and from heads to features
#
# Which parts of a model carry a behaviour? First whole attention heads: exactly, by patching, and
# by cheaper scores that are held against it. Then latents of dictionaries and what flows between
# them.
#
# By default on a model whose circuit is **known**, because its weights were written by hand: head
# 0.0 writes into each position which token stood before it, head 1.0 looks for a place whose token
# before is the present one and says its token. Two more heads write where nothing is read. A method
# that does not find this finds nothing. `SIZE = "full"` is SmolLM2-135M on indirect object
# identification: some tens of minutes on two cores.

# %%
import os

SIZE = os.environ.get("SAELAB_NOTEBOOK_SIZE", "toy")  # or "full"
SETUP = {
    "toy": {
        "model": "handwired:induction:sharpness=5",
        "task": "induction",
        "pairs": 16,
        "best": 1,
        "codes": {
            "dictionary": {"type": "topk", "d_sae": 16, "k": 2},
            "train": {"batch": 16, "tokens": 3200}, "examples": [8], "draws": 1,
        },
        "layers": [0, 1],
        "dictionary": {"type": "topk", "d_sae": 128, "k": 8},
        "corpus": {
            "source": "runs/words.txt", "sample_by": "line", "context": 32, "min_tail": 8,
            "tokens": 20_000,
        },
        "tokens": 100_000,
    },
    "full": {
        "model": "smollm2-135m",
        "task": "ioi",
        "pairs": 16,
        "best": 10,
        "codes": {"examples": [10], "negatives": ["unpredictable"], "draws": 1},
        "layers": [10, 15, 20],
        "dictionary": {"type": "topk", "d_sae": 2048, "k": 32},
        "corpus": {"source": "news-articles", "context": 128, "tokens": 200_000},
        "tokens": 300_000,
    },
}[SIZE]  # fmt: skip

# %%
import random
from pathlib import Path

import pandas as pd
import plotly.express as px

import saelab
from saelab import figures, show
from saelab.circuit_runs.api import code_fitter
from saelab.circuit_runs.config import FeaturesConfig
from saelab.circuit_runs.features import features, open_circuit, read_curves
from saelab.circuits import ability, tasks
from saelab.circuits.heads import CodesConfig, Truth, causal_scores, compare, score_heads
from saelab.circuits.linear import attribution_patching
from saelab.circuits.patching import PatchConfig, patch
from saelab.circuits.ranking import RankingConfig

# %% [markdown]
# ## Can the model do it?
#
# There is no circuit to look for where there is no behaviour. Each prompt has a corrupted version
# of equal length with another right answer, and effects are shares of the difference between the
# two.

# %%
model = saelab.load_model(SETUP["model"], dtype="float32")
data = tasks.draw(SETUP["task"], model, SETUP["pairs"], seed=0)
for version in ("clean", "corrupted"):
    print(f"{version}:", model.to_text(getattr(data, version)[0, : int(data.lengths[0])].tolist()))
print(ability.score(model, data))

# %% [markdown]
# ## Heads, exactly
#
# Each head's output in the clean run is replaced by what it is in the corrupted one. 1: the head
# carries all of the difference; 0: none of it; below 0: it works against it. Effects do not add up
# to 1: heads that depend on each other are each counted in full.

# %%
exact = patch(model, data, PatchConfig(kind="heads", position="all"))
order = exact.effect().abs().argsort(descending=True)[:10]
pd.DataFrame(
    {
        "head": [str(exact.components[i]) for i in order],
        "effect": exact.effect()[order].tolist(),
        "± standard error": exact.error()[order].tolist(),
    }
)

# %%
px.imshow(
    exact.effect().reshape(-1, model.n_heads).numpy(),
    labels={"x": "head", "y": "layer", "color": "effect"},
    color_continuous_scale="RdBu", color_continuous_midpoint=0, aspect="auto", height=360,
)  # fmt: skip

# %% [markdown]
# ## Heads, cheaply
#
# *Attribution patching* takes one gradient instead of a run per head. It is exact where the metric
# is linear in a head's output, and blind where it is flat. Look at the heads off the diagonal:
# those that decide what another head attends to are the usual ones. (With `model =
# "handwired:induction"` the attention is hard, and head 0.0 has effect 1 and attribution 0.)

# %%
first_order = attribution_patching(model, data)
px.scatter(
    x=exact.effect().tolist(), y=first_order.effect().tolist(),
    hover_name=[str(part) for part in exact.components],
    labels={"x": "effect by patching", "y": "effect to first order"}, height=380,
).add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"dash": "dot"})  # fmt: skip

# %% [markdown]
# *Codes* look at outputs alone: a small dictionary over all heads' last outputs, and for each head
# the number of codes that positive examples have and negative ones have not. The table holds them,
# and what else can be said without an intervention, against patching at the last position.
#
# Compare a line of the group `codes` with `distinct_codes` and `output_norm` in the group
# `observational`: what a score has beyond those is its own. `kendall` is 1 for the same order as
# the effects and 0 for a score that knows nothing.

# %%
truth = Truth(
    "end", "noising", patch(model, data, PatchConfig(position="end")),
    {"attribution_patching": attribution_patching(model, data, position="end")},
)  # fmt: skip
codes = CodesConfig.parse(SETUP["codes"])
ranking = RankingConfig(precision_at=[SETUP["best"]], cutoffs=[0.05], least=1)
scores = [*score_heads(model, data, codes, code_fitter(codes)), *causal_scores(truth)]
agreement = pd.DataFrame([compare(score, truth, ranking) for score in scores])
shown = ["kendall", f"precision@{SETUP['best']}"]
agreement.groupby(["group", "method"])[shown].mean().sort_values("kendall", ascending=False)

# %% [markdown]
# ## From heads to features: dictionaries of the residual stream
#
# One for each of several layers. Texts for the hand-wired model are runs of random words that
# repeat, since it knows nothing else.

# %%
if SIZE == "toy":
    chance = random.Random(0)
    runs = [chance.sample(model.words, 6) for _ in range(2000)]
    Path("runs").mkdir(exist_ok=True)
    Path("runs/words.txt").write_text("\n".join(" ".join(words + words) for words in runs))

sites = [f"blocks.{layer}.hook_resid_post" for layer in SETUP["layers"]]
steps = saelab.run(
    {
        "name": "circuit",
        "model": {"source": SETUP["model"], "dtype": "float32"},
        "corpus": SETUP["corpus"] | {"holdout": 0.1},
        "harvest": {"sites": sites},
        "grid": SETUP["dictionary"] | {"site": sites},
        "train": {"batch": 512, "tokens": SETUP["tokens"]},
        "index": {},
        "out": "runs/circuits",
    }
)
dictionaries = [step.path for step in steps if step.stage == "dictionary"]
indexes = [saelab.open_features(step.path) for step in steps if step.stage == "features"]
index_of = dict(zip(sites, indexes, strict=True))

# %% [markdown]
# ## The graph
#
# A node is a latent at a place of the prompt's template (`end` is its last token), or a
# dictionary's *error* there: what it does not reconstruct. A node's effect is how much the metric
# falls when it takes its value in the corrupted prompt; an edge is the part of it that passes
# through another node.
#
# Look at the errors' share before believing the latents: what runs through error nodes has not been
# explained.

# %%
folder = features(
    FeaturesConfig.parse(
        {
            "name": SETUP["task"],
            "model": {"source": SETUP["model"], "dtype": "float32"},
            "dictionaries": dictionaries,
            "task": {"name": SETUP["task"], "pairs": SETUP["pairs"], "test_pairs": SETUP["pairs"]},
            "graph": {"nodes": 40, "edge_share": 0.005},
            "curves": {"sizes": [1, 10, 30, 100, 300, 1000, 3000], "draws": 1},
            "out": "runs/circuits",
        }
    )
)
circuit = open_circuit(folder)
graph = circuit.graph
sizes = pd.DataFrame([{"kind": node.kind, "effect": abs(node.effect)} for node in graph.nodes])
print(f"{len(graph.nodes)} nodes hold {graph.share:.0%} of all effects; of theirs are")
print((sizes.groupby("kind")["effect"].sum() / sizes["effect"].sum()).to_string())
figures.circuit(graph, graph.nodes, graph.edges)

# %%
nodes = pd.DataFrame(graph.nodes[:15])
nodes["fires on"] = [
    index_of[node.site].stats(node.latent).gist if node.latent is not None else "(error)"
    for node in graph.nodes[:15]
]
nodes

# %% [markdown]
# The latent of largest effect, in the text that its dictionary was trained on. Does what it reads
# there fit what it does in the task?

# %%
top = next(node for node in graph.nodes if node.latent is not None)
page = index_of[top.site].latent(top.latent)
show.examples(page.groups[0].examples[:6], caption=top.id)

# %% [markdown]
# ## How much of the behaviour is it?
#
# Every node outside the circuit is held at its mean, on *other* prompts than those it was found on.
# 1: the circuit does what the model does. Three comparisons decide what the curve is worth: random
# latents, the same number of plain coordinates (`neurons`), and the ceiling of all latents
# together, which says what the dictionaries lose whatever is chosen.
#
# A surprise of the toy: its circuit is two heads, but its features are words, and every prompt has
# other words. Where a curve stays low for long, ask first what the prompts have in common.

# %%
figures.curves(read_curves(folder), ceiling=circuit.manifest.facts["ceiling"])

# %% [markdown]
# *Completeness* is the faithfulness of all nodes that the circuit leaves out: low once nothing that
# matters is outside.

# %%
figures.curves(read_curves(folder, "completeness"), "completeness")

# %% [markdown]
# In a terminal, `saelab app runs/circuits` opens the graph: click a node for its edges and its
# feature page, switch nodes off and see what becomes of the metric.
