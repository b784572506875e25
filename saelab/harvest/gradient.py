"""How harvest takes gradients: whether, for which labels, and how much at a time.

What they are gradients of is said in `ops/loss_gradient.py`.
"""

from typing import Literal

Asked = Literal["none", "data", "sampled"]

_LOGITS = 2**26
"""Most logits of a pass with gradients, of which about four copies are held: 1 GiB in float32."""


def pass_tokens(batch_tokens: int, d_vocab: int) -> int:
    """Return how many tokens a pass with gradients takes: its logits have to be held."""
    return max(1, min(batch_tokens, _LOGITS // d_vocab))
