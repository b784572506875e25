"""BatchTopK: the ⌊kB⌋ largest pre-activations of a batch of B rows.

    training: z = ReLU(pre) on the ⌊kB⌋ largest entries of the (B, d_sae) table, else 0
    after:    z = pre where pre > θ, else 0           θ: mean l0 = k on training rows

Loss: Σ‖x − x_hat‖² / (n · variance) + aux_weight · AuxK. Hard rows may take more latents than easy
ones; only the mean is k.

Bussmann, Leask, Nanda 2024, "BatchTopK Sparse Autoencoders", arXiv 2412.06410.
"""

from typing import Literal, final

from saelab.dictionaries.coupled import CoupledConfig, CoupledDictionary


class BatchTopKConfig(CoupledConfig):
    """A BatchTopK dictionary."""

    type: Literal["batch_topk"] = "batch_topk"
    """Name in the registry."""


@final
class BatchTopK(CoupledDictionary):
    """The BatchTopK dictionary; see the module's docstring for its equations."""

    config_class = BatchTopKConfig
    config: BatchTopKConfig
