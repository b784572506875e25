"""`saelab circuits supervised`: principled evaluations of dictionaries as an artifact.

A *supervised* artifact holds `results.jsonl`.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saelab import dictionaries
from saelab.artifacts import Draft, Manifest, canonical_line
from saelab.circuit_runs import api as circuits_api
from saelab.circuit_runs.config import RandomDecoderConfig, SupervisedRunConfig
from saelab.circuit_runs.inputs import (
    check_sites,
    chosen_dictionaries,
    find_or_make,
    load_dictionary,
    numbers,
    open_model,
    parted,
    prompts,
)
from saelab.circuits import examples
from saelab.circuits.ability import require_able, score
from saelab.circuits.supervised import SupervisedEvaluation
from saelab.circuits.tasks import TaskData, draw
from saelab.circuits.vectors import vectors
from saelab.errors import ConfigError
from saelab.protocols import Dictionary, GradientTrained, LanguageModel

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"
RANDOM = "untrained random decoder"
"""Arm of random directions with an encoder that is tied to them and not trained."""


def supervised(config: SupervisedRunConfig, *, wait: float = 0.0) -> Path:
    """Find or make a supervised evaluation; return its folder.

    Raises ArtifactError for dictionaries of another model, ConfigError if they are of several
    sites, or for a task whose prompts have no attributes, SiteError if the model lacks the site,
    TaskError if the model cannot do the task.
    """
    chosen = chosen_dictionaries(config)
    sites = {manifest.facts["site"] for manifest in chosen.values()}
    if len(sites) > 1:
        raise ConfigError(
            f"dictionaries are compared at one site, but these are of {', '.join(sorted(sites))}"
        )
    model, (site,) = open_model(config), sites
    check_sites(model, chosen)
    inputs = {
        "model": model.fingerprint,
        "task": numbers(config.task) | {"version": examples.VERSION},
        "supervised": numbers(config.supervised),
        "random_decoder": config.random_decoder and config.random_decoder.plain(),
    }

    def fill(draft: Draft) -> dict[str, Any]:
        return _write_supervised(draft, model, config, chosen, site)

    found = find_or_make(config, "supervised", inputs, list(chosen), fill, wait=wait)
    circuits_api.require_able(found, force=config.task.force)
    return found


def _write_supervised(
    draft: Draft,
    model: LanguageModel,
    config: SupervisedRunConfig,
    chosen: Mapping[Path, Manifest],
    site: str,
) -> dict[str, Any]:
    """Hold dictionaries against labels; return the manifest's facts."""
    n = config.task.fit + config.task.test
    stream = partial(draw, config.task.name, model, seed=config.task.seed)
    data = prompts(stream, n, config.task)
    test, fit = (data.rows(rows) for rows in parted(data, config.task.test))
    able = score(model, test, batch=config.supervised.batch)
    log.info("%s", able)
    require_able(able, force=config.task.force)
    evaluation = SupervisedEvaluation(
        model, site, fit, test, config.supervised, seed=config.task.seed
    )
    section = evaluation.section
    log.info("%s at %s: %.0f %%", section.site, ", ".join(section.slots), 100 * section.moved)
    arms = {manifest.name: load_dictionary(path, model) for path, manifest in chosen.items()}
    if config.random_decoder is not None:
        arms[RANDOM] = random_decoder(model, fit, site, config.random_decoder)
    origin = {"site": site, "model": model.fingerprint}
    rows = list(evaluation.rows(arms))
    draft.write(RESULTS, [canonical_line(row.plain() | origin) for row in rows])
    return {
        "task": config.task.name,
        "ability": vars(able),
        "model": config.model.plain() | {"name": model.name},
        "site": site,
        "slots": list(section.slots),
        "moved": next(row.value for row in rows if row.name == "moved"),
        "n_results": len(rows),
    }


def random_decoder(
    model: LanguageModel, data: TaskData, site: str, config: RandomDecoderConfig
) -> Dictionary:
    """Return an untrained TopK dictionary: random unit directions, an encoder tied to them, and the
    median of the prompts' activations as bias."""
    every = [name for name, at in data.slots.items() if bool((at >= 0).all())]
    x = vectors(model, data, site, every).flatten(0, 1)
    made = dictionaries.create(
        {"type": "topk", "d_in": x.shape[1], "d_sae": config.d_sae, "k": config.k}
    ).to(model.device)
    assert isinstance(made, GradientTrained)
    made.init_(x.float(), torch.Generator().manual_seed(config.seed))
    return made
