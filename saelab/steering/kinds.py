"""The evaluators that steer, and what of their settings lies outside their configuration."""

from collections.abc import Sequence
from typing import Any

from saelab.config import Config
from saelab.harvest.sources import checksum
from saelab.steering.equal_norm import EqualNormEvaluator
from saelab.steering.evaluator import SteeringEvaluator
from saelab.steering.scene import SteeringConfig
from saelab.steering.signs import SignsEvaluator

STEERING = (SteeringEvaluator, SignsEvaluator, EqualNormEvaluator)


def judge_inputs(configs: Sequence[Config]) -> dict[str, Any]:
    """Return what else goes into a results key: the checksums of the corpora on which judges
    learn."""
    judges = [one.judge for one in configs if isinstance(one, SteeringConfig)]
    sources = sorted({judge.source for judge in judges if judge is not None})
    return {"judges": {source: checksum(source) for source in sources}} if sources else {}
