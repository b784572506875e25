"""The evaluators that steer, and what of their settings lies outside their configuration."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from saelab.config import Config
from saelab.harvest.sources import checksum
from saelab.steering.equal_norm import EqualNormEvaluator
from saelab.steering.evaluator import SteeringEvaluator
from saelab.steering.judge_configs import LexiconConfig, ModelJudgeConfig, NgramsConfig
from saelab.steering.scene import SteeringConfig
from saelab.steering.signs import SignsEvaluator

STEERING = (SteeringEvaluator, SignsEvaluator, EqualNormEvaluator)


READING = (SteeringEvaluator, SignsEvaluator)
"""Those that may read with other models, which they are given a way to load."""


class Identity(Protocol):
    """Which model a source means, without loading it."""

    @property
    def fingerprint(self) -> str:
        """Hash of what decides its numbers."""
        ...


def judge_inputs(configs: Sequence[Config], identify: Callable[[str], Identity]) -> dict[str, Any]:
    """Return what else goes into a results key: the checksums of the corpora on which judges learn
    and of the lists whose words they count, those of neutral text, and the fingerprints of the
    other models that read."""
    steering = [one for one in configs if isinstance(one, SteeringConfig)]
    judges = [one.judge for one in steering]
    texts = {one.source for one in judges if isinstance(one, NgramsConfig | LexiconConfig)}
    asked = {one.source for one in judges if isinstance(one, ModelJudgeConfig)}
    asked |= {one.fluency_model for one in steering}
    neutral = {one.neutral.source for one in steering if one.neutral is not None}
    found = {
        "neutral": {source: checksum(source) for source in sorted(neutral)},
        "judges": {source: checksum(source) for source in sorted(filter(None, texts))},
        "readers": {source: identify(source).fingerprint for source in sorted(filter(None, asked))},
    }
    return {name: inputs for name, inputs in found.items() if inputs}
