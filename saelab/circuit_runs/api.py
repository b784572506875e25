"""Hands models, stores and dictionaries to the circuit evaluators, and fills their artifacts."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from saelab import api
from saelab.artifacts import Draft, canonical_line, read_manifest
from saelab.circuits import ability, effects, examples, heads, linear, patching, ranking, tasks
from saelab.circuits.ability import TaskScore
from saelab.circuits.discrete_codes import Encode, Fit
from saelab.circuits.heads import CodesConfig, EffectsConfig, Truth
from saelab.circuits.patching import Direction, PatchConfig
from saelab.circuits.protocols import PatchableModel
from saelab.circuits.published import is_listed
from saelab.circuits.ranking import RankingConfig
from saelab.circuits.tasks import Draw
from saelab.errors import ConfigError, SiteError, TaskError
from saelab.progress import Bar

GRADIENT = "attribution_patching"
INTEGRATED = "integrated_gradients"
ZERO = "zero_patching"
EFFECTS = "effects.safetensors"


def load_model(source: str, dtype: str, device: torch.device) -> PatchableModel:
    """Load a model whose heads can be patched. Raises SiteError if it cannot be entered midway."""
    model = api.load_model(source, dtype=dtype, device=device)
    if not isinstance(model, PatchableModel):
        raise SiteError(
            f"patching goes on from the middle of a model, but {model.name} has no `remember` and "
            "`resume` for that; take one that saelab loads, or give yours these two methods"
        )
    return model


def task_scores(
    model: PatchableModel, names: list[str], *, pairs: int, seed: int
) -> dict[str, TaskScore | str]:
    """Return how well a model does each task, or why its tokenizer has no such prompts."""
    found: dict[str, TaskScore | str] = {}
    for name in names:
        try:
            found[name] = ability.score(model, tasks.draw(name, model, pairs, seed=seed))
        except TaskError as error:
            found[name] = str(error)
    return found


def code_fitter(codes: CodesConfig) -> Fit:
    """Return what learns a dictionary over head outputs, a fifth of which is held out."""

    def learn(rows: Float[Tensor, "n d"], seed: int) -> Encode:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "outputs.npy"
            np.save(path, rows.float().numpy())
            made = api.store_from_arrays({"heads": path}, Path(folder), holdout=0.2)
            opened = api.open_store(made)
            return api.fit(codes.dictionary, opened, codes.train, lr=codes.lr, seed=seed).encode

    return learn


# ------------------------------------------------------------------------------------- the effects


def effects_inputs(
    fingerprint: str,
    task: str,
    config: EffectsConfig,
    method: Mapping[str, Any],
    *,
    shuffled: bool = False,
) -> dict[str, Any]:
    """Return what decides the effects of one method on one task."""
    control = {"shuffled": True} if shuffled else {}
    return control | {
        "model": fingerprint,
        "task": task,
        "pairs": config.pairs,
        "seed": config.seed,
        "method": dict(method),
        "versions": {
            "examples": examples.VERSION,
            "patching": patching.VERSION,
            "linear": linear.VERSION,
        },
    }


def methods(
    config: EffectsConfig, position: str, direction: Direction
) -> dict[str, dict[str, Any]]:
    """Return what is measured at a position: the truth, named `truth`, and the causal baselines."""
    exact = PatchConfig(position=position, direction=direction)
    zero = PatchConfig(position=position, ablation="zero")
    return {
        "truth": {"name": "patching", **exact.plain()},
        GRADIENT: {"name": "gradient", "position": position, "steps": 1},
        INTEGRATED: {"name": "gradient", "position": position, "steps": config.gradient_steps},
        ZERO: {"name": "patching", **zero.plain()},
    }


def write_effects(
    draft: Draft, model: PatchableModel, inputs: Mapping[str, Any], *, force: bool
) -> dict[str, Any]:
    """Measure the effects that a key's inputs name; return the manifest's facts.

    Raises TaskError with the score if the model cannot do the task, unless forced.
    """
    draw = drawing(shuffled=inputs.get("shuffled", False))
    data = draw(inputs["task"], model, inputs["pairs"], seed=inputs["seed"])
    found = ability.score(model, data)
    ability.require_able(found, force=force)
    method = dict(inputs["method"])
    name = method.pop("name")
    title = f"{inputs['task']}: {name} at {method['position']}"
    with Bar(title, len(data), "pairs") as bar, FlopCounterMode(display=False) as counter:
        if name == "patching":
            config = PatchConfig.parse(method)
            measured = patching.patch(model, data, config, report=bar.update)
        else:
            measured = linear.attribution_patching(model, data, **method)
    draft.write(EFFECTS, effects.to_bytes(measured))
    return {"ability": vars(found), "flops": counter.get_total_flops(), "score": str(found)}


def drawing(*, shuffled: bool) -> Draw:
    """Return what draws prompts: as they are, or with their tokens in an order of chance."""
    return tasks.draw_shuffled if shuffled else tasks.draw


# --------------------------------------------------------------------------------------- the scores


def heads_inputs(fingerprint: str, codes: CodesConfig, ranks: RankingConfig) -> dict[str, Any]:
    """Return what decides the scores of heads, beside the effects that they are held against."""
    return {
        "model": fingerprint,
        "codes": codes.plain(),
        "ranking": ranks.plain(),
        "versions": {"examples": examples.VERSION, "heads": heads.VERSION},
    }


def write_heads(
    draft: Draft,
    model: PatchableModel,
    task: str,
    truths: Mapping[tuple[str, str], Mapping[str, Path]],
    config: tuple[EffectsConfig, CodesConfig, RankingConfig],
    *,
    shuffled: bool = False,
) -> dict[str, Any]:
    """Score heads and hold the scores against each truth; return the manifest's facts.

    `truths` gives the folders of effects by position and direction, and then by method.
    """
    causal, codes, ranks = config
    draw = drawing(shuffled=shuffled)
    data = draw(task, model, causal.pairs, seed=causal.seed)
    known = [_truth(task, ranks, *place, folders) for place, folders in truths.items()]
    fit = code_fitter(codes)
    rows = []
    total = codes.draws * len(codes.negatives) * len(codes.examples)
    with Bar(f"{task}: scores of heads", total, "sets") as bar:
        seen = set[tuple[Any, ...]]()
        for scored in heads.score_heads(model, data, codes, fit, source=draw):
            rows += [heads.compare(scored, truth, ranks) for truth in known]
            seen.add((scored.draw, scored.negatives, scored.examples))
            bar.update(len(seen))
    for truth in known:
        rows += [heads.compare(scored, truth, ranks) for scored in heads.causal_scores(truth)]
    draft.write("results.jsonl", b"".join(canonical_line(row) for row in rows))
    return {
        "task": task,
        "n_results": len(rows),
        "warnings": heads.warnings(data, rows),
        "truths": [_facts(truth, ranks, causal.seed) for truth in known],
    }


def _truth(
    task: str, ranks: RankingConfig, position: str, direction: str, folders: Mapping[str, Path]
) -> Truth:
    held = {name: effects.read(path / EFFECTS) for name, path in folders.items()}
    exact, listed = held.pop("truth"), None
    if ranks.published is not None:
        listed = is_listed(ranks.published, task, exact.components)
    return Truth(position, direction, exact, held, listed)


def _facts(truth: Truth, config: RankingConfig, seed: int) -> dict[str, Any]:
    """Return what is to be known of a truth: its ceiling, its counts, and errors beside it."""
    return {
        "position": truth.position,
        "direction": truth.direction,
        "ceiling": ranking.ceiling(truth.effects, config, splits=20, seed=seed),
        "counts": ranking.counts(truth.effects, config),
        "agreement": {
            name: effects.agreement(found, truth.effects) for name, found in truth.others.items()
        },
    }


def require_able(folder: Path, *, force: bool = False) -> None:
    """Raise TaskError, unless forced, if a finished artifact is of a task that the model cannot do.

    Whoever finds an artifact asks this again: it may have been forced when it was made.
    """
    ability.require_able(TaskScore(**read_manifest(folder).facts["ability"]), force=force)


def check_dictionary(codes: CodesConfig) -> None:
    """Raise ConfigError if the dictionary over outputs is of no type, or has no width."""
    if "type" not in codes.dictionary or "d_sae" not in codes.dictionary:
        raise ConfigError(
            f"codes.dictionary needs `type` and `d_sae`, but has {sorted(codes.dictionary)}"
        )
    if codes.dictionary["d_sae"] <= max(codes.examples):
        raise ConfigError(
            f"codes.dictionary.d_sae={codes.dictionary['d_sae']} leaves no codes to differ over "
            f"{max(codes.examples)} examples; choose it above that"
        )
