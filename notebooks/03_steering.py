# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Steer a model by a latent, beside controls
#
# Adding a latent's direction to the activations changes what the model writes. So does adding
# *any* direction, if it is long enough. Whether the latent is a handle on its concept shows only
# beside directions that know nothing of it, pushed equally far.
#
# By default on the toy model, whose weights are random (seconds; it writes no sentences, and its
# numbers mean nothing). `SIZE = "full"` is SmolLM2-135M on film reviews, with a judge that learnt
# from other texts: about half an hour on two cores, most of it for the controls.

# %%
import os

SIZE = os.environ.get("SAELAB_NOTEBOOK_SIZE", "toy")  # or "full"
SOURCE, CONFIG, MEMBER, CONCEPT, DOSES, NEW = {
    "toy": (
        "toy", "quickstart/toy", "{type: abs_topk, d_sae: 256, k: 8}", "harbour", (0.1, 0.8), 8,
    ),
    "full": (
        "smollm2-135m", "steering/sentiment", "{type: abs_topk, d_sae: 4096, k: 32, lr: 6e-3}",
        "fresh", (0.05, 0.1, 0.2, 0.4, 0.8), 32,
    ),
}[SIZE]  # fmt: skip

# %%
import pandas as pd
import torch

import saelab

run = saelab.run(
    CONFIG, overrides=["out=runs/steering", "grid=[]", f"dictionaries=[{MEMBER}]"], until="train"
)
made = {step.stage: step.path for step in run}
pd.DataFrame([{"stage": s.stage, "status": s.status, "folder": s.path.name} for s in run])

# %% [markdown]
# ## The judge, before anything is steered
#
# It reads text only, and is fixed first. In the toy it counts the concept's words; at full size
# it is a classifier of n-grams that learnt from *another* corpus than the one that will choose
# the latent, without the sentences that both hold.

# %%
from saelab.steering.judge_configs import NgramsConfig
from saelab.steering.judges import LexiconJudge, NgramJudge
from saelab.steering.judging import read_corpus

if SIZE == "toy":
    words = ("boat", "rope", "tide", "anchor", "gull", "sail", "crane", "wave")
    judge = LexiconJudge({word: [f"{word}s"] for word in words}, source="harbour")
else:
    store = saelab.open_store(made["store"])
    known = [store.document(number).text for number in range(store.n_documents)]
    rated = read_corpus(NgramsConfig(source="rated-sentences", label_field="sentiment"), known)
    positive = torch.tensor([label == "positive" for label in rated.labels])
    judge = NgramJudge(rated.texts, positive, corpus="rated-sentences")
TEXTS = ["A lovely, funny film.", "Dull from start to end.", "The boat and its sail were wet."]
pd.DataFrame({"text": TEXTS, judge.name: judge(TEXTS)})

# %% [markdown]
# ## A first experiment
#
# Load, choose a latent by the label of *training* documents, steer by it and by its controls at
# equal doses, and draw. A dose is the KL between what the clean and the steered model predict, on
# the clean model's own continuations: equal doses push the model equally far, equal strengths do
# not.

# %%
from saelab.steering.candidates import by_detection, concept_tokens
from saelab.steering.scene import SteeringConfig, scene_of
from saelab.steering.sweep import presence

model = saelab.load_model(SOURCE)
store = saelab.open_store(made["store"])
handle = saelab.handle(made["dictionary"], store)
scene = scene_of(
    SteeringConfig(concepts=(CONCEPT,), per_label=2), handle.dictionary, store, handle.site
)
positive = scene.positive(scene.places[0])
best = by_detection(scene.codes, positive)[0]
found = saelab.dose_response(
    model, handle, best.latent, judge, store=store, sign=best.sign, doses=DOSES,
    max_new_tokens=NEW, instruction=f"This is about {CONCEPT}.",
    tokens=concept_tokens(model, scene.train.texts, positive),
)  # fmt: skip
found.figure(f"{CONCEPT}: latent {best.latent} of {handle.name}")

# %% [markdown]
# Read it so. Coloured above grey: the latent says something of its concept that random directions
# do not. Grey rises too: pushing alone moves the judge, or fluency has gone and the judge reads
# noise. The middle panel tells which. The instruction is the level to beat, and in small models
# it often does not work either.
#
# One latent was chosen here, on training documents, and every prompt counts. `evaluate: {evals:
# [steering]}` chooses among ten latents and five doses on half of the prompts and reports the
# others.

# %%
rows = [
    {
        "arm": one.arm, "dose": one.target, "lift": one.lift, "fluency": one.fluency,
        "score": one.score, "low": one.interval().low, "high": one.interval().high,
        "reached": one.directions_reached, "not monotone": one.non_monotone,
        "KL after the prompt": one.kl_last_prompt, "shift of its tokens": one.target_shift,
    }
    for one in found.responses
]  # fmt: skip
pd.DataFrame(rows).round(3)

# %% [markdown]
# Does the latent fire when the unsteered model reads what it wrote? And other latents, which
# nobody asked for?

# %%
usual = presence(model, handle, found.trial.usual)
name = f"latent {best.latent}"
reached = [dose for dose in DOSES if found.at(name, dose).written]
at_doses = {dose: found.presence(name, dose) for dose in reached}
pd.DataFrame(
    {
        dose: {
            "share of positions": float(own[best.latent]),
            "more than unsteered": float((own - usual)[best.latent]),
            "changes of all other latents": float((own - usual).abs().sum())
            - abs(float((own - usual)[best.latent])),
        }
        for dose, own in at_doses.items()
    }
).T.round(3)

# %% [markdown]
# ## What it wrote
#
# Numbers hide a lot. The same prompts unsteered, steered at the largest dose, and steered by a
# random direction at the same dose (of twenty, each continues a quarter of the prompts).

# %%
dose = max(DOSES)
own, other = found.at(name, dose), found.at("covariance", dose)
at_random = {p: t for some in other.written for p, t in zip(some.prompts, some.texts, strict=True)}
pd.DataFrame(
    [
        {
            "prompt": prompt, "unsteered": usual, f"{name}, {dose} nats": steered,
            "a random direction": at_random.get(prompt, ""),
        }
        for prompt, usual, steered in zip(
            found.trial.prompts, found.trial.usual.texts, own.written[0].texts, strict=False
        )
    ]
).head(6)  # fmt: skip

# %% [markdown]
# ## Edits by hand, and where they stand
#
# An edit changes codes, and what the dictionary does not reconstruct stays as it is. Strength may
# be in units of the latent's typical maximum; positions are all, the prompt's, those after it, or
# tokens that match a pattern. Edits are plain data: the YAML below can be read back.

# %%
from saelab.edits import TokenPattern, add, project_out, to_yaml
from saelab.steering.sweep import clean_text
from saelab.steering.sweep import dose as dose_of

text = clean_text(model, found.trial.usual.prompts[:8], positions=NEW)
places = {
    "all": "all",
    "prompt": "prompt",
    "after": "after",
    "tokens with a t": TokenPattern(tokens="t"),
}
edits = {
    where: add(handle, best.latent, best.sign * 2.0, unit="typical_max", where=at)
    for where, at in places.items()
}
edits["the direction taken out"] = project_out(handle, best.latent)
doses = {where: dose_of(model, [edit], text) for where, edit in edits.items()}
print(to_yaml([edits["after"]]))
pd.DataFrame({w: {"KL": d.kl, "KL after the prompt": d.kl_last_prompt} for w, d in doses.items()}).T

# %%
with saelab.steer(model, edits["after"]):
    print(model.generate("The first thing to say is", max_new_tokens=NEW))

# %% [markdown]
# ## Side effects
#
# What the edit costs on text that is about something else: the change of the cross-entropy on
# news (in the toy: on held-out documents with other labels), for the latent and for random
# directions at the same dose.

# %%
from saelab.edits import Directions, Handle
from saelab.steering.baselines import isotropic
from saelab.steering.neutral import NeutralConfig, corpus_windows, windows_without
from saelab.steering.side_effects import ce_sums

if SIZE == "toy":
    neutral = windows_without(store, handle.site, model, {CONCEPT}, n=8)
else:
    neutral = corpus_windows(NeutralConfig(source="news-articles"), model, handle.site)
unit = torch.nn.functional.normalize(handle.dictionary.W_dec.detach()[[best.latent]].float(), dim=1)
rows = torch.cat([best.sign * unit, isotropic(unit.shape[1], 20, seed=0)])
directions = Handle(Directions(rows), handle.site)
strengths = [own.matched[0], *found.at("isotropic", dose).matched[:3]]


reached = [(i, one) for i, one in enumerate(strengths) if one.strength is not None]
each = [ce_sums(model, [[add(directions, i, one.strength)]], neutral)[0] for i, one in reached]
pd.DataFrame(
    [
        {
            "direction": name if i == 0 else f"isotropic {i}",
            "strength": one.strength,
            "KL": one.kl,
            "ΔCE in nats": float(sums[:, 0].sum() / sums[:, 1].sum()),
        }
        for (i, one), sums in zip(reached, each, strict=True)
    ]
).round(3)

# %% [markdown]
# ## Both signs
#
# A signed latent may carry a concept and its opposite. But any direction, steered backwards, does
# the opposite to first order: a claim of two signs needs controls as well, and both sides at one
# dose.

# %%
from saelab.steering.trial import adding

arms = {name: adding(directions, [0]), "isotropic": adding(directions, range(1, 21))}
largest = 8 * handle.scales.mean_norm
back = found.trial.responses(arms, [dose], largest=largest, sign=-1)
pd.DataFrame(
    [
        {
            "arm": one.arm, "forwards": found.at(one.arm, dose).lift, "backwards": one.lift,
            "fluency forwards": found.at(one.arm, dose).fluency, "fluency backwards": one.fluency,
        }
        for one in back
    ]
).round(3)  # fmt: skip

# %% [markdown]
# The random arm is a mean over 20 directions, which is small on either side whatever one of them
# does. The evaluator `signs` holds the best of ten latents against the best of ten random
# directions instead, and `python -m saelab_experiments.verdicts claims/steering-signs` asks it on
# three seeds.
