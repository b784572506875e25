"""Metrics to Weights & Biases: imported only when asked for, and never a reason to stop a run."""

import logging
from typing import Any

from saelab.errors import ConfigError

log = logging.getLogger(__name__)


class WandbLog:
    """A report callback that sends each member's metrics; offline if there is no network."""

    def __init__(self, project: str, config: dict[str, Any]) -> None:
        """Start a run of the project. Raises ConfigError if wandb is not installed."""
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"train.wandb={project!r} needs wandb: "
                "`pip install 'saelab[wandb]'`, or drop the key"
            ) from None
        try:
            self._run = wandb.init(project=project, config=config)
        except Exception as error:  # any failure to reach the service must not cost a run
            log.warning("wandb could not start (%s); its records are kept offline", error)
            self._run = wandb.init(project=project, config=config, mode="offline")

    def __call__(self, info: dict[str, Any]) -> None:
        """Send the newest line of every member."""
        data = {f"{m}/{k}": v for m, line in info["members"].items() for k, v in line.items()}
        try:
            self._run.log(
                data | {"tokens_per_second": info["tokens_per_second"]}, step=info["step"]
            )
        except Exception as error:  # as above
            log.warning("wandb lost the metrics of step %d: %s", info["step"], error)
