"""Centres of k-means as atoms: the plainest way to learn directions from activations.

    x' = x − b_dec goes to argmin_i ‖x' − c_i‖;  c_i = the mean of all rows that it was given
    W_dec = the centres at unit norm;  codes by pursuit

One pass, batch by batch, from random rows: MacQueen 1967; Sculley 2010, "Web-scale k-means
clustering". A centre that is given no row stays the row that it began as.
"""

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.dictionaries.atoms import Atoms, AtomsConfig
from saelab.errors import ConfigError
from saelab.ops.linalg import unit_rows
from saelab.protocols import Intake, Streamed
from saelab.types import Batch


class KMeansConfig(AtomsConfig):
    """Centres of k-means as atoms."""

    type: Literal["k_means"] = "k_means"
    """Name in the registry."""


@final
class KMeans(Atoms, Streamed):
    """Centres, each the running mean of the rows that were nearest to it."""

    config_class = KMeansConfig
    config: KMeansConfig

    def __init__(self, config: KMeansConfig) -> None:
        """Allocate the centres."""
        super().__init__(config)
        self.register_buffer("centres", torch.zeros(self.d_sae, self.d_in))
        self.centres: Tensor
        """In the unit of x, less b_dec."""
        self.register_buffer("counts", torch.zeros(self.d_sae, dtype=torch.int64))
        self.counts: Tensor
        """Rows that each centre is the mean of."""

    @torch.no_grad()
    def begin_(
        self, mean: Float[Tensor, " d_in"], sample: Float[Tensor, "n d_in"], n_rows: int
    ) -> None:
        """Set b_dec, and start from rows of the sample. Raises ConfigError if they are too few."""
        del n_rows
        self._center_(mean)
        x = self._rows(sample) - self.b_dec
        x = x[x.norm(dim=1) > 0]
        if len(x) < self.d_sae:
            raise ConfigError(
                f"{self.d_sae} centres start from as many rows, but the sample holds {len(x)} that "
                "are not zero: harvest more text, or lower d_sae"
            )
        self.centres.copy_(x[: self.d_sae])
        self.counts.zero_()
        self.W_dec.copy_(unit_rows(self.centres))

    @torch.no_grad()
    def partial_fit(self, batch: Batch) -> Intake:
        """Give each row to the nearest centre, then move the centres."""
        x = self._rows(batch.x) - self.b_dec
        nearest = (x @ self.centres.T - self.centres.square().sum(1) / 2).argmax(1)
        energy = x.square().sum(1)
        error = (x - self.centres[nearest]).square().sum(1)
        error = torch.where(energy > 0, error / energy.clamp(min=1e-12), 0)  # a share of nothing
        sums = torch.zeros_like(self.centres).index_add_(0, nearest, x)
        here = torch.bincount(nearest, minlength=self.d_sae)
        self.counts += here
        old = (self.counts - here)[:, None] * self.centres + sums
        moved = self.counts > 0
        self.centres[moved] = old[moved] / self.counts[moved, None]
        self.W_dec.copy_(unit_rows(self.centres))
        return Intake(len(x), 0, float(error.double().sum()))

    def scale_(self, factor: float) -> None:
        """Change the unit of x: centres and bias scale, directions do not."""
        super().scale_(factor)
        self.centres.mul_(factor)
