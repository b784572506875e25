"""Two-sided fluency, and the score that joins it with a concept's lift.

Text can be odd in two ways: improbable, or so probable that it repeats itself. A continuation is
fluent if its loss per token under another model and its share of distinct trigrams both lie within
the 5–95 % band of unsteered continuations of the same prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.edits.placement import encode_prompts
from saelab.errors import ConfigError
from saelab.protocols import LanguageModel
from saelab.steering.sweep import Continuations, text_logits

_EDGES = (0.05, 0.95)


@torch.no_grad()
def token_losses(model: LanguageModel, written: Continuations) -> Float[Tensor, " n"]:
    """Return each continuation's loss per token under a model that reads prompt and continuation.

    In nats. A token belongs to the continuation if it ends after the prompt's last character. NaN
    where there is none.
    """
    whole = [p + t for p, t in zip(written.prompts, written.texts, strict=True)]
    tokens, lengths = encode_prompts(model, whole)
    losses = []
    runs = zip(
        text_logits(model, tokens, lengths), model.tokenize(whole), written.prompts, tokens,
        strict=True,
    )  # fmt: skip
    for logits, run, prompt, ids in runs:
        head = len(logits) - len(run)
        own = torch.arange(head, len(logits))[run.end > len(prompt)]
        own = own[own > 0]
        log_probs = logits[own - 1].log_softmax(-1)
        losses.append(-log_probs.gather(1, ids[own][:, None]).mean())
    return torch.stack(losses)


def distinct_3(texts: Sequence[str]) -> Float[Tensor, " n"]:
    """Return the share of each text's word trigrams that are different; 1 with none."""
    shares = []
    for text in texts:
        words = text.split()
        grams = list(zip(words, words[1:], words[2:], strict=False))
        shares.append(len(set(grams)) / len(grams) if grams else 1.0)
    return torch.tensor(shares)


@dataclass(frozen=True)
class Band:
    """The 5–95 % range of unsteered continuations in both measures."""

    loss: tuple[float, float]
    distinct: tuple[float, float]

    def holds(self, loss: Float[Tensor, " n"], distinct: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return which continuations lie inside in both; one without tokens does not."""
        (low, high), (least, most) = self.loss, self.distinct
        return (loss >= low) & (loss <= high) & (distinct >= least) & (distinct <= most)


def band(judge: LanguageModel, unsteered: Continuations) -> Band:
    """Return the band of unsteered continuations. Raises ConfigError if fewer than 8 have text."""
    losses = token_losses(judge, unsteered)
    known = ~losses.isnan()
    if int(known.sum()) < 8:
        raise ConfigError(
            f"a band needs 8 unsteered continuations with text or more, but {int(known.sum())} of "
            f"{len(losses)} have some; take more prompts or more samples of each"
        )
    edges = torch.tensor(_EDGES)
    loss = torch.quantile(losses[known], edges).tolist()
    distinct = torch.quantile(distinct_3(unsteered.texts)[known], edges).tolist()
    return Band((loss[0], loss[1]), (distinct[0], distinct[1]))


def fluent(judge: LanguageModel, steered: Continuations, usual: Band) -> Bool[Tensor, " n"]:
    """Return which continuations are fluent; their share is the fluency."""
    return usual.holds(token_losses(judge, steered), distinct_3(steered.texts))


def steering_score(lift: float, fluency: float) -> float:
    """Return the harmonic mean of the concept's lift over unsteered text and the fluency.

    0 where there is no lift. Not comparable with AxBench's numbers, which are of other judges.
    """
    if lift <= 0 or fluency <= 0:
        return 0.0
    return 2 * lift * fluency / (lift + fluency)
