"""Random activations as atoms: what a dictionary that is built or trained has to beat.

    W_dec = the first d_sae rows of the shuffled store, less b_dec, at unit norm;  codes by pursuit

Nothing is learnt. At 32 steps of pursuit such atoms explain about as much of a residual stream as a
short TopK run does with an encoder, so reconstruction alone proves little.
"""

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.dictionaries.atoms import AtomsConfig, KeptRows
from saelab.errors import ConfigError
from saelab.protocols import Intake, Streamed
from saelab.types import Batch


class RandomRowsConfig(AtomsConfig):
    """Random activations as atoms."""

    type: Literal["random_rows"] = "random_rows"
    """Name in the registry."""


@final
class RandomRows(KeptRows, Streamed):
    """The first rows that come, whatever they hold; a row without a direction is passed over."""

    config_class = RandomRowsConfig
    config: RandomRowsConfig

    @torch.no_grad()
    def begin_(
        self, mean: Float[Tensor, " d_in"], sample: Float[Tensor, "n d_in"], n_rows: int
    ) -> None:
        """Drop all atoms and set b_dec. Raises ConfigError if fewer rows than atoms will come."""
        del sample
        if n_rows < self.config.d_sae:
            raise ConfigError(
                f"{self.config.d_sae} atoms are wanted of {n_rows} rows: give more rows, or a "
                "smaller d_sae"
            )
        self._center_(mean)
        self._hold_(self.W_dec.new_zeros(0, self.d_in), {})

    @torch.no_grad()
    def partial_fit(self, batch: Batch) -> Intake:
        """Keep rows until there are d_sae."""
        x, before = self._rows(batch.x) - self.b_dec, self.W_dec.detach()
        norms = x.norm(dim=1)
        taken = (norms > 0).nonzero()[: self.config.d_sae - len(before), 0]
        atoms = torch.cat([before, x[taken] / norms[taken, None]])
        taken = taken.to(batch.rows.device)
        new = {"rows": batch.rows[taken], "documents": batch.documents[taken]}
        self._hold_(atoms, new if len(taken) else {})
        return Intake(len(x), len(taken), 0.0)
