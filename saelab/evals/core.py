"""The core evaluator: reconstruction, sparsity and downstream loss, each beside its controls.

Definitions, ends and error bars of every row: docs/metrics.md.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Int
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from saelab.config import Config
from saelab.errors import ArtifactError, ConfigError, CorpusError
from saelab.evals.controls import (
    Arm,
    DictionaryArm,
    Pca,
    PcaArm,
    RandomAtomsArm,
    TokenMeanArm,
    fit_pca,
)
from saelab.evals.downstream import RandomError, Reconstruct, ablate_to, measure_splices
from saelab.evals.encoders import OwnEncoder, PursuitEncoder
from saelab.evals.sample import head, sample_rows, sample_windows
from saelab.metrics.reconstruction import MedianError, Reconstruction
from saelab.metrics.sparsity import Sparsity, density_histogram
from saelab.metrics.sums import Accumulator, Definition
from saelab.ops.pursuit import Refit, Sign
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.stats import ResultRow, bootstrap_median, error_over_documents, standard_error
from saelab.types import Batch

log = logging.getLogger(__name__)

ZERO, MEAN = "zero_ablation", "mean_ablation"
ISOTROPIC, COVARIANCE = "random_error(isotropic)", "random_error(covariance)"


class CoreConfig(Config):
    """How much is measured; the standard errors say whether it was enough."""

    rows: PositiveInt = 50_000
    """Held-out rows for reconstruction and sparsity; all of them if there are fewer."""
    pursuit_rows: NonNegativeInt = 16_384
    """Of these, rows for the controls that need pursuit; 0 leaves them out."""
    fit_rows: PositiveInt = 50_000
    """Training rows for PCA."""
    k: PositiveInt | None = None
    """Steps of pursuit and components of PCA; by default the dictionary's L0."""
    sign: Sign = "abs"
    """Selection rule of the pursuit that re-encodes the dictionary."""
    refit: Refit = "mp"
    """Coefficients of that pursuit."""
    windows: NonNegativeInt = 32
    """Held-out windows spliced into the model; 0 leaves downstream metrics out."""
    spliced_controls: tuple[Literal["re-encoded", "pca", "random_atoms"], ...] = ("re-encoded",)
    """Controls that are spliced too: each costs a forward pass over the windows."""
    batch: PositiveInt = 2048
    """Rows held at once."""
    window_batch: PositiveInt = 4
    """Windows per forward pass."""
    resamples: PositiveInt = 1000
    """Bootstrap resamples behind each standard error."""
    seed: int = 0
    """Of rows, random atoms, random errors and the bootstrap."""


@dataclass
class _Scores:
    """What is summed up for one arm."""

    arm: Arm
    limit: int
    reconstruction: Reconstruction
    median: MedianError
    sparsity: Sparsity | None = None
    n: int = 0

    def update_(self, batch: Batch) -> None:
        batch = head(batch, self.limit - self.n)
        if not len(batch):
            return
        x_hat, z = self.arm(batch)
        self.reconstruction.update(batch.y, x_hat, batch.documents)
        self.median.update(batch.y, x_hat, batch.documents)
        if z is not None:
            self.sparsity = self.sparsity or Sparsity(z.d_sae)
            self.sparsity.update(z, batch.documents)
        self.n += len(batch)


@final
class CoreEvaluator:
    """Scores one dictionary on one site of a store, and in the live model where there is one."""

    name = "core"
    version = 1

    def __init__(self, config: CoreConfig | None = None, site: str | None = None) -> None:
        """Measure at `site`; by default the store's only one."""
        self.config = config or CoreConfig()
        self.site = site

    def __call__(
        self, dictionary: Dictionary, store: Store, model: LanguageModel | None
    ) -> Iterable[ResultRow]:
        """Yield the dictionary's rows, then the controls', then the downstream ones.

        Raises ShapeError or ArtifactError if dictionary, store and model do not belong together,
        and CorpusError if fewer than two held-out rows are kept.
        """
        site = self._check(dictionary, store, model)
        config = self.config
        k = self._steps(dictionary, store, site)
        pca = fit_pca(store, site, rows=config.fit_rows, batch=config.batch, seed=config.seed)
        own = DictionaryArm("dictionary", dictionary, OwnEncoder(dictionary))
        projection = PcaArm(pca, k)
        arms: list[Arm] = [own, projection]
        costly: list[Arm] = []
        if config.pursuit_rows:
            costly = self._pursuits(dictionary, store, site, k)
        tokens = TokenMeanArm(store, site, self._refs(store, site))
        if tokens.known:
            arms.insert(1, tokens)
        else:
            log.info("the rows of this store are no tokens: the token-mean control is left out")
        yield from self._reconstruction(store, site, pca, arms, costly, projection)
        if model is None or not config.windows:
            log.info("no live model: downstream metrics are left out")
            return
        chosen = self._spliced([own, projection, *costly])
        yield from self._downstream(store, site, model, pca, chosen)

    # ----------------------------------------------------------------------------------- set-up

    def _check(self, dictionary: Dictionary, store: Store, model: LanguageModel | None) -> str:
        if self.site is None and len(store.sites) > 1:
            raise ConfigError(
                f"the store has the sites {', '.join(store.sites)}: say which one to evaluate."
            )
        site = self.site or next(iter(store.sites))
        width = store.width(site)
        if dictionary.d_in != width:
            raise ArtifactError(
                f"the dictionary takes vectors of width {dictionary.d_in}, but {site} has width "
                f"{width}: evaluate it on the site it was trained on."
            )
        if store.n_kept(site, "heldout") < 2:
            raise CorpusError(
                "scores need held-out rows, but the store keeps fewer than two: harvest with a "
                "larger `holdout`, or more documents."
            )
        if model is not None and store.model_fingerprint not in (None, model.fingerprint):
            raise ArtifactError(
                f"the store was harvested from model {store.model_name} with fingerprint "
                f"{store.model_fingerprint}, but {model.name} with {model.fingerprint} was given: "
                "splice into the model (and dtype) that the activations came from."
            )
        return site

    def _steps(self, dictionary: Dictionary, store: Store, site: str) -> int:
        """Return the controls' k: as configured, the dictionary's bound, or its measured L0."""
        if self.config.k or dictionary.l0_bound:
            return self.config.k or dictionary.l0_bound or 1
        batch = next(iter(self._rows(store, site)))
        return max(1, round(float(OwnEncoder(dictionary)(batch).l0().double().mean())))

    def _rows(self, store: Store, site: str) -> Iterator[Batch]:
        config = self.config
        return sample_rows(
            store, site, "heldout", config.rows, batch=config.batch, seed=config.seed
        )

    def _refs(self, store: Store, site: str) -> Int[Tensor, " n"]:
        return torch.cat([batch.rows for batch in self._rows(store, site)])

    def _pursuits(self, dictionary: Dictionary, store: Store, site: str, k: int) -> list[Arm]:
        config = self.config
        encoder = PursuitEncoder(dictionary, k, sign=config.sign, refit=config.refit)
        n_atoms = dictionary.d_sae
        return [
            DictionaryArm("re-encoded", dictionary, encoder),
            RandomAtomsArm(store, site, n_atoms=n_atoms, k=k, seed=config.seed),
        ]

    # --------------------------------------------------------------------------- reconstruction

    def _reconstruction(
        self,
        store: Store,
        site: str,
        pca: Pca,
        arms: Sequence[Arm],
        costly: Sequence[Arm],
        projection: PcaArm,
    ) -> Iterator[ResultRow]:
        limits = [(arm, self.config.rows) for arm in arms]
        limits += [(arm, self.config.pursuit_rows) for arm in costly]
        scores = [
            _Scores(arm, limit, Reconstruction(pca.mean), MedianError(pca.mean))
            for arm, limit in limits
        ]
        for batch in self._rows(store, site):
            projection.observe_(batch)
            for score in scores:
                score.update_(batch)
        for score in scores:
            main = score.arm.name == "dictionary"
            yield from self._fit_rows(score, None if main else ("fvu", "l0", "description_length"))
        yield _plain(projection, "l0", float(projection.k), "components", scores[0].n)
        yield from _usage_rows(scores[0])
        error = scores[0].reconstruction.compute()["mse"] * scores[0].n * len(pca.mean)
        rank = projection.rank_at(error)
        yield _plain(scores[0].arm, "pca_rank_of_equal_fvu", float(rank), "components", scores[0].n)

    def _fit_rows(self, score: _Scores, only: tuple[str, ...] | None) -> Iterator[ResultRow]:
        parts: list[Accumulator] = [score.reconstruction]
        parts += [score.sparsity] if score.sparsity else []
        for part in parts:
            for definition in part.definitions:
                if only is None or definition.name in only:
                    yield self._measured(
                        part, definition, score.n, score.arm.name, score.arm.encoder
                    )
        median = score.median
        errors, documents = median.rows()
        drawn = bootstrap_median(
            errors, documents, resamples=self.config.resamples, seed=self.config.seed
        )
        error = standard_error(drawn) if len(torch.unique(documents)) > 1 else None
        name, encoder = score.arm.name, score.arm.encoder
        yield ResultRow(
            median.name,
            median.compute(),
            median.unit,
            score.n,
            error,
            median.version,
            name,
            encoder,
        )

    # ------------------------------------------------------------------------------- downstream

    def _spliced(self, arms: Sequence[Arm]) -> list[Arm]:
        wanted = ("dictionary", *self.config.spliced_controls)
        return [arm for arm in arms if arm.name.split("(")[0] in wanted]

    def _downstream(
        self, store: Store, site: str, model: LanguageModel, pca: Pca, arms: Sequence[Arm]
    ) -> Iterator[ResultRow]:
        config = self.config
        own = _reconstruct(arms[0])
        replace: dict[str, Reconstruct] = {arm.name: _reconstruct(arm) for arm in arms}
        replace |= {
            ZERO: ablate_to(torch.zeros_like(pca.mean)),
            MEAN: ablate_to(pca.mean),
            ISOTROPIC: RandomError(own, "isotropic", pca, config.seed),
            COVARIANCE: RandomError(own, "covariance", pca, config.seed),
        }
        windows = sample_windows(store, site, config.windows)
        total = measure_splices(model, site, windows, replace, batch=config.window_batch)
        n = int(total.sums.totals()[0, 0])
        if not n:
            log.warning("no position can be scored downstream: no kept position has a target")
            return
        encoders = {arm.name: arm.encoder for arm in arms}
        yield self._measured(total, total.definitions[0], n, "clean", "none")
        for name in replace:
            ablations = {"zero": ZERO, "mean": MEAN} if name not in (ZERO, MEAN) else {}
            for definition in total.of_arm(name, ablations):
                yield self._measured(total, definition, n, name, encoders.get(name, "none"))
        for name, other in (("isotropic", ISOTROPIC), ("covariance", COVARIANCE)):
            ratio = total.kl_ratio("dictionary", other, f"kl_over_random_error({name})")
            yield self._measured(total, ratio, n, "dictionary", "own")

    # ------------------------------------------------------------------------------------- rows

    def _measured(
        self, part: Accumulator, definition: Definition, n: int, arm: str, encoder: str
    ) -> ResultRow:
        """Return a metric of sums with its bootstrap error."""
        config = self.config
        value = float(definition.of(part.sums.totals()))
        error = error_over_documents(
            part.sums.table, definition.of, resamples=config.resamples, seed=config.seed
        )
        name, unit, version = definition.name, definition.unit, definition.version
        return ResultRow(name, value, unit, n, error, version, arm, encoder)


def _usage_rows(score: _Scores) -> Iterator[ResultRow]:
    """Yield shares of latents: they describe one window of rows and have no error bar."""
    usage = score.sparsity
    assert usage is not None
    shares = {
        "dead_share": usage.dead_share(),
        "rare_share": usage.rare_share(),
        "dense_share": usage.dense_share(),
    }
    for low, high, share in density_histogram(usage.density()):
        shares[f"density_histogram[{low:g},{high:g})"] = share
    for name, value in shares.items():
        yield _plain(score.arm, name, value, "share of latents", usage.n)


def _plain(arm: Arm, name: str, value: float, unit: str, n: int) -> ResultRow:
    """Return a row without an error bar."""
    return ResultRow(name, value, unit, n, None, 1, arm.name, arm.encoder)


def _reconstruct(arm: Arm) -> Reconstruct:
    return lambda batch: arm(batch)[0]
