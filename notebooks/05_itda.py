# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # ITDA: dictionaries that remember, across layers and models
#
# ITDA learns nothing. It goes through activations once and keeps those that the ones kept so far do
# not explain: the dictionary *is* activations, and every latent has a place in the text that it
# comes from. So two layers, or two models, can be compared without aligning anything: by which
# places they kept.
#
# That only works if all of them read the same rows in the same order, and this notebook says how
# much hangs on it.
#
# By default on toys whose weights are random. `SIZE = "full"` is SmolLM2-135M, five of its layers,
# beside the same model in half precision: some tens of minutes on two cores.

# %%
import os

SIZE = os.environ.get("SAELAB_NOTEBOOK_SIZE", "toy")  # or "full"
MODELS, LAYERS, CORPUS, ATOMS, K = {
    "toy": (
        {
            "toy": ({"source": "toy"}, 0),
            "another order": ({"source": "toy"}, 1),
            "other weights": ({"source": "toy:seed=1"}, 0),
        },
        [0, 1],
        {"source": "toy", "context": 32, "tokens": 8000},
        128,
        8,
    ),
    "full": (
        {
            "SmolLM2": ({"source": "smollm2-135m", "dtype": "float32"}, 0),
            "another order": ({"source": "smollm2-135m", "dtype": "float32"}, 1),
            "bfloat16": ({"source": "smollm2-135m", "dtype": "bfloat16"}, 0),
        },
        [4, 9, 14, 19, 24],
        {"source": "news-articles", "context": 128, "tokens": 60_000},
        1024,
        16,
    ),
}[SIZE]
"""Models by name, each with the seed of the order in which its rows are read."""
SITES = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
ROWS = CORPUS["tokens"] // 2

# %%
import pandas as pd
import plotly.express as px
import torch

import saelab
from saelab import show
from saelab.evals import layers
from saelab.evals.alignment import align, place_keys
from saelab.evals.similarity import chance_jaccard, jaccard

# %% [markdown]
# ## A dictionary for every layer of every model
#
# `shuffle_seed` is the order of the rows. Outliers are kept (`norm_outlier`), so that every site
# has the same rows. All dictionaries get room for the same number of atoms: of two sets of unequal
# size the overlap is bounded by the smaller one.

# %%
stores, dictionaries = {}, {}
for name, (model, order) in MODELS.items():
    steps = saelab.run(
        {
            "name": "itda",
            "model": model,
            "corpus": CORPUS | {"holdout": 0.1},
            "harvest": {"sites": SITES, "norm_outlier": None},
            "grid": {"type": "itda", "d_sae": ATOMS, "k": K, "site": SITES},
            "train": {"batch": 512, "tokens": ROWS, "shuffle_seed": order},
            "out": f"runs/itda/{name.replace(' ', '-')}",
        }
    )
    stores[name] = saelab.open_store(steps[0].path)
    paths = [step.path for step in steps if step.stage == "dictionary"]
    dictionaries[name] = [saelab.load(path) for path in paths]
pd.DataFrame(
    {name: [d.d_sae for d in mine] for name, mine in dictionaries.items()},
    index=pd.Index(SITES, name="atoms"),
)

# %% [markdown]
# ## Atoms with provenance
#
# The first atoms are kept because nothing was there yet. Look at the last ones: they were kept
# because over a hundred others did not explain them. The underlined token is the atom; the colour
# is its code in the rows around it.

# %%
first, *others = MODELS
store, site, atoms = stores[first], SITES[0], dictionaries[first][0]
blocks = []
for latent in range(atoms.d_sae - 5, atoms.d_sae):
    row, position = int(atoms.rows[latent]), int(atoms.positions[latent])
    window = store.window(site, int(store.window_of(atoms.rows[latent : latent + 1])))
    x = store.rows(site, window.first_row + torch.arange(len(window)))
    blocks.append(
        show.heatmap(
            window.strings, atoms.encode(x)[:, latent], at=position,
            caption=f"atom {latent}: row {row}, document {int(atoms.documents[latent])}",
        )
    )  # fmt: skip
show.stack(*blocks)

# %% [markdown]
# ## How alike are two layers?
#
# An atom's key is its place in the text: the document (by its hash) and the character at which the
# token ends, which is the same for any tokenizer. The Jaccard index of two sets of keys is the
# share of places that both kept, of those that either kept.

# %%
keys = {name: [place_keys(d, stores[name]) for d in mine] for name, mine in dictionaries.items()}
labels = [f"{name} {layer}" for name in MODELS for layer in LAYERS]
everything = [kept for mine in keys.values() for kept in mine]
px.imshow(
    [[jaccard(a, b) for b in everything] for a in everything], x=labels, y=labels,
    labels={"color": "Jaccard"}, height=520, zmin=0,
)  # fmt: skip

# %% [markdown]
# Two random choices of as many rows overlap too, by this much. Two comparisons say what an overlap
# is worth. The *same* model in another order: what is lost there is lost by the order alone. And,
# of the toys, *other weights* that have only the text in common: what is left there the text does,
# since a rare token is unusual in any model.

# %%
chance = chance_jaccard(ATOMS, ATOMS, ROWS)
pd.DataFrame(
    [
        {
            "beside": other,
            "mean Jaccard": sum(map(jaccard, keys[first], keys[other])) / len(SITES),
            "by chance": chance,
        }
        for other in others
    ]
)

# %% [markdown]
# ## Which layer is which?
#
# Each layer of the first model is matched with the layer of another that it is most alike. Where
# layer *i* belongs to layer *i* (the same model, read otherwise or in another precision),
# `accuracy` says how often that is found, beside what chance would. Two toys of other weights have
# no counterparts, and nothing should be found.
#
# Linear CKA and its kin look at all rows, do not care for their order, and are the ones to beat.
# They need the same places of both texts, which `align` finds for any two tokenizers.


# %%
def views(name, refs):
    """Return a model's layers as rows at these places, with a hundred of them for anchors."""
    anchors = torch.linspace(0, len(refs) - 1, 100).long()
    return [layers.LayerView(stores[name].rows(site, refs), anchors) for site in SITES]


found = []
for other in others:
    places = align([stores[first], stores[other]], [SITES[0], SITES[0]])
    ours, theirs = places.rows[:, :2000]
    likeness = layers.compare(views(first, ours), views(other, theirs))
    likeness["jaccard"] = layers.compare_keys(keys[first], keys[other])
    for method, pairs in likeness.items():
        matched = [LAYERS[i] for i in pairs.forth.argmax(1).tolist()]
        accuracy = layers.accuracy(pairs.forth)
        found.append({"beside": other, "method": method, "matched": matched, "accuracy": accuracy})
print(f"layers {LAYERS}; accuracy by chance: {1 / len(LAYERS):.2f}")
pd.DataFrame(found).set_index(["beside", "method"])

# %% [markdown]
# Read `accuracy` only where counterparts are known. Neighbouring layers are much alike, so a
# matching is decided by small differences: `layers.layer_error` says how far off a wrong match is,
# and `layers.depth_order` whether deeper layers are matched with deeper ones. The study behind this
# page, with intervals, graded damage and trained tiny models, is `experiments/layers`.
