"""Control reconstructions: what a dictionary has to beat before it has learnt anything.

PCA with as many components as the dictionary has latents per row, the mean activation of each
token id, and training activations drawn at random as atoms. All are fitted on training rows only.
"""

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saelab.evals.encoders import decode
from saelab.evals.sample import sample_rows, token_ids
from saelab.ops.pursuit import gram_of, pursue
from saelab.ops.sparse import decode_ragged
from saelab.protocols import Dictionary, Encoder, Store
from saelab.types import Batch, SparseLatents

TOKEN_ROWS = 1_000_000
"""Training rows that token means are taken over, at most."""
_CHUNK_ROWS = 1 << 15


@runtime_checkable
class Arm(Protocol):
    """A way to reconstruct activations: a dictionary, or a control."""

    name: str
    encoder: str

    def __call__(self, batch: Batch) -> tuple[Float[Tensor, "n d"], SparseLatents | None]:
        """Return the reconstruction, and the codes where there are any."""
        ...


@final
class DictionaryArm:
    """A dictionary with its own codes, or with those of another encoder."""

    def __init__(self, name: str, dictionary: Dictionary, encoder: Encoder) -> None:
        """Reconstruct with `dictionary` from the codes of `encoder`."""
        self.name = name
        self.encoder = encoder.name
        self._dictionary = dictionary
        self._encode = encoder

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Float[Tensor, "n d"], SparseLatents | None]:
        """Return the reconstruction and the codes."""
        z = self._encode(batch)
        return decode(self._dictionary, z, batch.x).cpu(), z


# ------------------------------------------------------------------------------------------- PCA


@dataclass(frozen=True)
class Pca:
    """Principal components of a site's training rows."""

    mean: Float[Tensor, " d"]
    """Mean of all kept training rows."""
    variances: Float[Tensor, " d"]
    """Descending, float64."""
    basis: Float[Tensor, "d d"]
    """Column i is the i-th component."""


def fit_pca(store: Store, site: str, *, rows: int, batch: int, seed: int) -> Pca:
    """Return the components of up to `rows` training rows, by eigh of the float64 covariance."""
    mean = store.stats(site).mean.double()
    second = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    n = 0
    for part in sample_rows(store, site, "train", rows, batch=batch, seed=seed):
        centred = part.y.double() - mean
        second += centred.T @ centred
        n += len(centred)
    variances, basis = torch.linalg.eigh(second / n)
    return Pca(mean, variances.flip(0).clamp(min=0), basis.flip(1))


@final
class PcaArm:
    """Projection on the first k components about the training mean; its L0 is k."""

    encoder = "projection"

    def __init__(self, pca: Pca, k: int) -> None:
        """Keep `k` components."""
        self.k = min(k, len(pca.mean))
        self.name = f"pca(k={self.k})"
        self._mean = pca.mean.float()
        self._basis = pca.basis[:, : self.k].float()

    def __call__(self, batch: Batch) -> tuple[Float[Tensor, "n d"], SparseLatents | None]:
        """Return the projection; it has no latents."""
        centred = batch.y.float() - self._mean
        return centred @ self._basis @ self._basis.T + self._mean, None


@final
class PcaErrors:
    """Squared error of every number of components at once, over the rows it has seen."""

    def __init__(self, pca: Pca) -> None:
        """Start with no rows."""
        self._mean, self._basis = pca.mean.float(), pca.basis.float()
        self._energy = torch.zeros(len(pca.mean), dtype=torch.float64)
        self._total = 0.0

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Take in rows."""
        centred = x.float() - self._mean
        self._energy += (centred @ self._basis).double().square().sum(0)
        self._total += float(centred.double().square().sum())

    def rank_at(self, squared_error: float) -> int:
        """Return the fewest components that leave at most this summed squared error."""
        left = self._total - torch.cat([self._energy.new_zeros(1), self._energy.cumsum(0)])
        reached = (left <= squared_error).nonzero()
        return int(reached[0]) if len(reached) else len(self._energy)


# ------------------------------------------------------------------------------------ token means


@final
class TokenMeanArm:
    """Predicts each row by the mean training row of its token id; unseen ids by the mean."""

    name = "token_mean"
    encoder = "token id"

    def __init__(
        self,
        refs: Int[Tensor, " n"],
        place: Int[Tensor, " n"],
        means: Float[Tensor, "m d"],
    ) -> None:
        """Predict row `refs[i]` (ascending) by `means[place[i]]`; see `fit_token_means`."""
        self._refs, self._place, self._means = refs, place, means

    def __call__(self, batch: Batch) -> tuple[Float[Tensor, "n d"], SparseLatents | None]:
        """Return the means of the rows' ids; only rows that it was fitted for can be predicted."""
        at = torch.searchsorted(self._refs, batch.rows.cpu())
        assert torch.equal(self._refs[at], batch.rows.cpu())
        return self._means[self._place[at]], None


def fit_token_means(store: Store, site: str, refs: Int[Tensor, " n"]) -> TokenMeanArm | None:
    """Return the predictor of the rows `refs`; None where the store's rows are no tokens.

    Means are taken over the first `TOKEN_ROWS` training rows, of the ids that occur in `refs`.
    """
    refs = refs.sort().values
    ids, place = torch.unique(token_ids(store, site, refs), return_inverse=True)
    if bool((ids < 0).any()):
        return None
    return TokenMeanArm(refs, place, _token_means(store, site, ids))


def _token_means(store: Store, site: str, ids: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """Return the mean kept training row of each (ascending) token id."""
    mean = store.stats(site).mean.double()
    sums = torch.zeros(len(ids), len(mean), dtype=torch.float64)
    counts = torch.zeros(len(ids), dtype=torch.float64)
    refs: list[Tensor] = []
    found: list[Tensor] = []
    waiting, seen = 0, 0

    def flush() -> None:
        rows, tokens = torch.cat(refs), torch.cat(found)
        place, order = torch.searchsorted(ids, tokens).sort(stable=True)
        here, n = torch.unique_consecutive(place, return_counts=True)
        starts = n.cumsum(0) - n
        sums[here] += F.embedding_bag(order, store.rows(site, rows), starts, mode="sum").double()
        counts[here] += n
        refs.clear()
        found.clear()

    for window in store.windows(site, split="train"):
        tokens = window.ids.long()
        wanted = window.kept & torch.isin(tokens, ids)
        refs.append(window.first_row + wanted.nonzero()[:, 0])
        found.append(tokens[wanted])
        waiting += len(found[-1])
        seen += len(window)
        if waiting >= _CHUNK_ROWS:
            flush()
            waiting = 0
        if seen >= TOKEN_ROWS:
            break
    if waiting:
        flush()
    return torch.where(counts[:, None] > 0, sums / counts[:, None], mean).float()


# ------------------------------------------------------------------------------------ random atoms


@final
class RandomAtomsArm:
    """Random centred unit training rows as atoms, encoded by signed matching pursuit.

    Its L0 is the number of distinct atoms that `k` steps chose.
    """

    def __init__(self, store: Store, site: str, *, n_atoms: int, k: int, seed: int) -> None:
        """Draw the atoms; as many as there are training rows, if they are fewer than `n_atoms`."""
        self.mean = store.stats(site).mean.float()
        n_atoms = min(n_atoms, store.n_kept(site, "train"))
        parts = sample_rows(store, site, "train", n_atoms, batch=n_atoms, seed=seed)
        centred = torch.cat([part.y for part in parts]).float() - self.mean
        self.atoms = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
        self.k = k
        self.name = f"random_atoms(n={n_atoms})"
        self.encoder = f"pursuit(k={k})"
        self._gram = gram_of(self.atoms)

    def __call__(self, batch: Batch) -> tuple[Float[Tensor, "n d"], SparseLatents | None]:
        """Return the reconstruction and the codes over the atoms."""
        z = pursue(batch.y.float() - self.mean, self.atoms, self.k, gram=self._gram).codes
        return decode_ragged(z, self.atoms) + self.mean, z
