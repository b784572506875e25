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
    """Return what else goes into a results key: the checksums of the corpora on which judges learn
    and side effects are measured."""
    steering = [one for one in configs if isinstance(one, SteeringConfig)]
    corpora = {
        "judges": [one.judge for one in steering],
        "neutral": [one.neutral for one in steering],
    }
    return {
        use: {source: checksum(source) for source in sorted({c.source for c in own if c})}
        for use, own in corpora.items()
        if any(own)
    }
