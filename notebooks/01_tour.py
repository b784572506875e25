# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A tour of the line
#
# What directions does a language model's activation space have, and does a sparse dictionary find
# them? One run answers in five steps, and each leaves something to look at:
#
#     text ──harvest──▶ store ──train──▶ dictionary ──evaluate──▶ scorecard
#                                            └────────index─────▶ features
#
# As it stands, this notebook reads a **toy**: a seeded two-layer transformer whose weights are
# random, on a few shipped sentences. It takes seconds and downloads nothing, and it shows how
# things work, not what a language model has learnt. For that, set `SIZE = "full"`: SmolLM2-135M on
# news articles, about ten minutes on two cores, and a download of 98 MB the first time.

# %%
import os

SIZE = os.environ.get("SAELAB_NOTEBOOK_SIZE", "toy")  # or "full"
CONFIG = {"toy": "quickstart/toy", "full": "quickstart/demo"}[SIZE]

# %%
from pathlib import Path

import pandas as pd
import plotly.express as px
import rich
import torch

import saelab
from saelab import report, show
from saelab.features import live
from saelab.results import read_rows

# %% [markdown]
# ## One call makes everything
#
# The YAML file says which model, which text, which site, which dictionary. What is finished is
# found again: run this cell twice, and every status is `found`. Change a value
# (`overrides=["train.tokens=2e6"]`) and only what depends on it is made anew, beside the old.

# %%
steps = saelab.run(CONFIG, overrides=["out=runs/tour"])
made = {step.stage: step.path for step in steps}
pd.DataFrame([{"stage": s.stage, "status": s.status, "folder": s.path.name} for s in steps])

# %% [markdown]
# ## The store: activations that know where they come from
#
# A row is one token's activation at one site. It knows its document and characters, and the site's
# mask says whether it counts: dim tokens are left out of training and scores.
#
# Look at the first token of the window. In trained transformers its vector is often many times as
# long as all others (an *attention sink*), which is why it is masked. The toy has no such thing.

# %%
store = saelab.open_store(made["store"])
(site,) = store.sites
window = store.window(site, 0)
rows = torch.arange(window.first_row, window.first_row + len(window))
show.heatmap(
    window.strings,
    store.rows(site, rows).norm(dim=1),
    masked=frozenset((~window.kept).nonzero()[:, 0].tolist()),
    caption=f"‖x‖ at {site}; {store.n_rows:,} rows, {store.n_kept(site, 'heldout'):,} held out",
)

# %% [markdown]
# ## The dictionary: its training log
#
# `fvu` is the share of the variance that is lost on the training batch, `dead` the share of latents
# that have been silent for a while. A curve that is still falling at the end asks for more tokens,
# not for another method.

# %%
log = pd.read_json(made["dictionary"] / "metrics.jsonl", lines=True)
px.line(log, x="tokens", y=[name for name in ("fvu", "dead") if name in log], height=320)

# %% [markdown]
# ## The scorecard: what it has to beat
#
# On held-out documents. Read the line of the dictionary beside those of its controls: as many
# *random* activations, coded by pursuit; the mean activation of each token's id; principal
# components. A dictionary that does not beat them has found no structure of its own, whatever its
# features look like. `KL` and `CE` say what happens to the model's predictions when the
# reconstruction is put in the activation's place.

# %%
rich.print(report.scorecard(made["results"]))

# %%
scores = pd.DataFrame(read_rows(made["results"])).query("name == 'fvu'").sort_values("value")
px.bar(
    scores, x="value", y="arm", error_x="standard_error", height=320,
    labels={"value": "FVU on held-out rows, lower is better", "arm": ""},
)  # fmt: skip

# %% [markdown]
# ## The features: what latents respond to
#
# The index has a page for every latent. `warnings` are reasons to doubt one before looking at it:
# it fires nearly everywhere, only at one position of the window, or too seldom to be scored.

# %%
features = saelab.open_features(made["features"])
table = features.table("density", features.n_latents, descending=True)
listed = pd.DataFrame(table)[["id", "density", "peak", "cosine", "gist"]]
listed["warnings"] = [", ".join(latent.warnings) for latent in table]
listed.head(12)

# %% [markdown]
# Strongest examples nearly always look as if they had one meaning. Look at the second block too: it
# is drawn at random from the weakest fifth of the firings, and most names for a latent fail there.

# %%
latent = next((latent.id for latent in table if not latent.warnings), table[0].id)
page = features.latent(latent)
strongest, weakest = page.groups[0], page.groups[-1]
peak = abs(page.stats.peak)
show.stack(
    show.examples(
        strongest.examples[:8], peak=peak, caption=f"latent {latent}: its strongest windows"
    ),
    show.examples(
        weakest.examples[:8], peak=peak, caption="the weakest of its firings, drawn at random"
    ),
)

# %% [markdown]
# What it reads and what it writes: the tokens that carry its activation, and those whose logits its
# direction raises. They need not be alike.

# %%
pd.DataFrame(
    {
        "fires on": pd.Series([show.plain(token.text) for token in page.tokens[:8]]),
        "share": pd.Series([token.share for token in page.tokens[:8]]),
        "raises": pd.Series([show.plain(text) for text, _ in page.logits.up[:8]]),
        "per unit": pd.Series([effect for _, effect in page.logits.up[:8]]),
    }
)

# %% [markdown]
# ## Your own text
#
# The live model reads a sentence and the dictionary codes it. `peaks` are the latents' largest
# values on the store: ranked by the share of them that is reached, always-on latents do not come
# first.

# %%
TEXT = "They said that the work of the state was never done, but people went on with it."

source = features.meta["model"]
model = saelab.load_model(source["source"], dtype=source["dtype"])
dictionary = saelab.load(made["dictionary"])
reading = live.read(model, dictionary, site, TEXT, features.meta["mean"])
ranks = live.ranked(reading, features.column("peak"))[:10]
pd.DataFrame(ranks).assign(gist=[features.stats(rank.latent).gist for rank in ranks])

# %%
best = ranks[0].latent
lost = {p: -share for p, share in enumerate(reading.error) if p not in reading.masked}
show.stack(
    show.heatmap(
        reading.strings, live.values(reading, best),
        peak=abs(features.stats(best).peak), masked=reading.masked,
        caption=f"latent {best}; full colour is its largest value on the store",
    ),
    show.heatmap(
        reading.strings, lost, peak=1.0, masked=reading.masked,
        caption="share of each token that the dictionary misses",
    ),
)  # fmt: skip

# %% [markdown]
# ## Where every number comes from
#
# Each artifact knows what it was made from, back to the text: a number without this is not worth
# publishing. In a terminal, `saelab app runs/tour` opens the browser on the same folder.

# %%
rich.print(report.lineage(Path(made["features"])))
