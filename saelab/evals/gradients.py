"""Arms of dictionaries that can select latents by the gradient of the model's loss.

They stand beside the dictionary's own arm, since they are told more than x: with the gradient of
the text's next token they know that token, with that of a sampled one only what the model makes of
x.
"""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.evals.controls import DictionaryArm
from saelab.evals.encoders import GradientAware, GradientEncoder
from saelab.ops.loss_gradient import Labels, LossGradient
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.types import Window

log = logging.getLogger(__name__)

KINDS: tuple[Labels, ...] = ("data", "sampled")
KEPT_BYTES = 2**28
"""Gradients of one kind that are kept for the next dictionary, at most."""

Kept = MutableMapping[tuple[int, ...], Tensor]
"""Gradients by the numbers of the windows that the model saw together."""


def gradient_arms(dictionary: Dictionary) -> dict[Labels, DictionaryArm]:
    """Return `gradient_data` and `gradient_sampled`; nothing for a type that takes no gradient."""
    if not isinstance(dictionary, GradientAware):
        return {}
    return {
        kind: DictionaryArm(f"gradient_{kind}", dictionary, GradientEncoder(dictionary, kind))
        for kind in KINDS
    }


def stored_arm(dictionary: Dictionary, store: Store, site: str) -> DictionaryArm | None:
    """Return the arm of the store's own gradients; None where it or the dictionary has none."""
    arms = gradient_arms(dictionary)
    if not arms or site not in store.grad_sites:
        return None
    if store.grad_labels is None:
        log.info("nobody knows the labels of this store's gradients: no arm selects by them")
        return None
    return arms[store.grad_labels]


def live_arms(
    dictionary: Dictionary,
    model: LanguageModel,
    site: str,
    *,
    seed: int,
    kept: Mapping[Labels, Kept],
) -> tuple[list[DictionaryArm], dict[str, "LiveGradients"]]:
    """Return the arms for both kinds of labels, and what takes each one's gradients.

    None where the dictionary takes no gradients, or where they would underflow in the model's
    dtype.
    """
    arms = gradient_arms(dictionary)
    if arms and model.dtype == torch.float16:
        log.info("the model computes in float16: arms that need its gradients are left out")
        return [], {}
    taken = {
        arm.name: LiveGradients(model, site, kind, seed=seed, kept=kept[kind])
        for kind, arm in arms.items()
    }
    return list(arms.values()), taken


@final
class LiveGradients:
    """The loss's gradient at the clean model's activations, as harvest takes it.

    What was taken once lies in `kept`, and is the same for every dictionary.
    """

    def __init__(
        self, model: LanguageModel, site: str, labels: Labels, *, seed: int, kept: Kept
    ) -> None:
        """`seed` is of the sampled labels. Raises ConfigError for a float16 model."""
        self._gradient = LossGradient(model, [site], labels, seed)
        self._site = site
        self._kept = kept

    def __call__(
        self, ids: Int[Tensor, "batch pos"], windows: Sequence[Window]
    ) -> Float[Tensor, "batch pos d"]:
        """Return the gradients of windows, given right-padded too, on the CPU."""
        numbers = tuple(window.number for window in windows)
        if numbers in self._kept:
            return self._kept[numbers]
        found = self._gradient(ids, windows, numbers)[1][self._site].detach().cpu()
        if sum(grad.nbytes for grad in self._kept.values()) + found.nbytes <= KEPT_BYTES:
            self._kept[numbers] = found
        return found
