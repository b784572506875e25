"""The core evaluator: reconstruction, sparsity and downstream loss, each beside its controls.

Definitions, ends and error bars of every row: docs/metrics.md.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from pydantic import NonNegativeInt, PositiveInt

from saelab.config import Config
from saelab.errors import ArtifactError, ConfigError, CorpusError
from saelab.evals.controls import (
    Arm,
    DictionaryArm,
    Pca,
    PcaArm,
    PcaErrors,
    RandomAtomsArm,
    fit_pca,
    fit_token_means,
)
from saelab.evals.downstream import RandomError, Reconstruct, ablate_to, measure_splices
from saelab.evals.encoders import OwnEncoder, PursuitEncoder
from saelab.evals.gradients import KINDS, live_arms, stored_arm
from saelab.evals.sample import sample_rows, sample_windows, thinned
from saelab.metrics.reconstruction import MEDIAN, MEDIAN_UNIT, MEDIAN_VERSION, Reconstruction
from saelab.metrics.sparsity import Sparsity, counted, density_histogram
from saelab.metrics.sums import Accumulator, Definition
from saelab.ops.refit import Refit, Sign
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.stats import ResultRow, median_over_documents, over_documents, standard_error
from saelab.types import Batch

log = logging.getLogger(__name__)

ZERO, MEAN = "zero_ablation", "mean_ablation"
ISOTROPIC, COVARIANCE = "random_error(isotropic)", "random_error(covariance)"


class CoreConfig(Config):
    """How much is measured; the standard errors say whether it was enough."""

    rows: PositiveInt = 50_000
    """Held-out rows for reconstruction and sparsity; all of them if there are fewer."""
    pursuit_rows: NonNegativeInt = 16_384
    """Of these, evenly spaced, rows for the controls that need pursuit; 0 leaves them out."""
    fit_rows: PositiveInt = 50_000
    """Training rows for PCA."""
    k: PositiveInt | None = None
    """Steps of pursuit and components of PCA; by default the dictionary's L0."""
    sign: Sign = "abs"
    """Selection rule of the pursuit that re-encodes the dictionary."""
    refit: Refit = "mp"
    """Coefficients of that pursuit."""
    windows: NonNegativeInt = 64
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


@dataclass(frozen=True)
class _Scene:
    """What is scored, and where."""

    dictionary: Dictionary
    store: Store
    site: str
    k: int
    """Steps and components of the controls."""
    pca: Pca


@dataclass
class _Scores:
    """What is summed up for one arm."""

    arm: Arm
    share: float
    """Part of the rows that it is given, evenly spaced."""
    reconstruction: Reconstruction
    sparsity: Sparsity | None = None
    floor: float = 0.0
    """Share of a row's largest code below which a code is not counted."""
    seen: int = 0
    n: int = 0
    key: Hashable = None
    """What identifies a control that does not depend on the dictionary; None: it does."""
    aware: bool = False
    """Whether latents are selected with gradients of the model's loss."""

    def update_(self, batch: Batch) -> None:
        batch, self.seen = thinned(batch, self.share, self.seen), self.seen + len(batch)
        if not len(batch):
            return
        x_hat, z = self.arm(batch)
        self.reconstruction.update(batch.y, x_hat, batch.documents)
        if z is not None:
            self.sparsity = self.sparsity or Sparsity(z.d_sae, floor=self.floor)
            self.sparsity.update(z, batch.documents)
        self.n += len(batch)


@final
class CoreEvaluator:
    """Scores dictionaries on one site of a store, and in the live model where there is one.

    What does not depend on the dictionary (PCA, most controls, the ablations) is measured once, and
    kept as long as store, site and model stay the same. Values are those of a fresh evaluator.
    """

    name = "core"
    version = 1

    def __init__(self, config: CoreConfig | None = None, site: str | None = None) -> None:
        """Measure at `site`; by default the store's only one."""
        self.config = config or CoreConfig()
        self.site = site
        self._kept: dict[Hashable, Any] = {}
        self._kept_for: Hashable = None

    def __call__(
        self, dictionary: Dictionary, store: Store, model: LanguageModel | None
    ) -> Iterator[ResultRow]:
        """Yield the rows of the dictionary and its controls, then the downstream ones.

        Raises ArtifactError if dictionary, store and model do not belong together, ConfigError if
        the site is ambiguous, and CorpusError if fewer than two held-out rows are kept.
        """
        scene = self._scene(dictionary, store, model)
        arms = self._arms(scene)
        yield from self._reconstruction(scene, arms)
        if model is None or not self.config.windows:
            log.info("no live model: downstream metrics are left out")
            return
        yield from self._downstream(scene, model, arms)

    # ----------------------------------------------------------------------------------- set-up

    def _scene(self, dictionary: Dictionary, store: Store, model: LanguageModel | None) -> _Scene:
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
        config = self.config
        self._forget_unless((store.content_hash, site, model and model.fingerprint))
        pca = self._once(
            "pca",
            lambda: fit_pca(
                store, site, rows=config.fit_rows, batch=config.batch, seed=config.seed
            ),
        )
        return _Scene(dictionary, store, site, self._steps(dictionary, store, site), pca)

    def _forget_unless(self, circumstances: Hashable) -> None:
        if self._kept_for != circumstances:
            self._kept, self._kept_for = {}, circumstances

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _steps(self, dictionary: Dictionary, store: Store, site: str) -> int:
        """Return the controls' k: as configured, the dictionary's bound, or its measured L0."""
        given = self.config.k or dictionary.l0_bound
        if given:
            return given
        batch = next(self._rows(store, site))
        z = OwnEncoder(dictionary)(batch)
        return max(1, round(float(counted(z, _l0_floor(dictionary)).sum()) / z.n_rows))

    def _rows(self, store: Store, site: str) -> Iterator[Batch]:
        config = self.config
        return sample_rows(
            store, site, "heldout", config.rows, batch=config.batch, seed=config.seed
        )

    def _arms(self, scene: _Scene) -> list[_Scores]:
        """Return the dictionary first, then its controls, with how many rows each is given."""
        config, store, site = self.config, scene.store, scene.site
        dictionary, k, n_atoms = scene.dictionary, scene.k, scene.dictionary.d_sae
        own = DictionaryArm("dictionary", dictionary, OwnEncoder(dictionary))
        found = [self._scores(scene, own, 1.0)]
        found[0].floor = _l0_floor(dictionary)
        if config.pursuit_rows:
            encoder = PursuitEncoder(dictionary, k, sign=config.sign, refit=config.refit)
            share = min(1.0, config.pursuit_rows / min(config.rows, store.n_kept(site, "heldout")))
            found.append(
                self._scores(scene, DictionaryArm("re-encoded", dictionary, encoder), share)
            )
            found.append(
                self._control(
                    scene,
                    ("random_atoms", n_atoms, k),
                    lambda: RandomAtomsArm(store, site, n_atoms=n_atoms, k=k, seed=config.seed),
                    share,
                )
            )
        found.append(self._control(scene, ("pca", k), lambda: PcaArm(scene.pca, k), 1.0))
        tokens = self._once("token_mean", lambda: self._token_means(store, site))
        if tokens is None:
            log.info("the rows of this store are no tokens: the token-mean control is left out")
        else:
            found.append(self._control(scene, "token_mean arm", lambda: tokens, 1.0))
        aware = stored_arm(dictionary, store, site)
        if aware is not None:
            found.append(self._scores(scene, aware, 1.0))
            found[-1].aware = True
        return found

    def _scores(self, scene: _Scene, arm: Arm, share: float) -> _Scores:
        return _Scores(arm, share, Reconstruction(scene.pca.mean))

    def _control(
        self, scene: _Scene, key: Hashable, make: Callable[[], Arm], share: float
    ) -> _Scores:
        """Return a control's finished scores, where there are any, or new ones."""
        if key in self._kept:
            return self._kept[key]
        scores = self._scores(scene, make(), share)
        scores.key = key
        return scores

    def _token_means(self, store: Store, site: str) -> Arm | None:
        return fit_token_means(
            store, site, torch.cat([batch.rows for batch in self._rows(store, site)])
        )

    # --------------------------------------------------------------------------- reconstruction

    def _reconstruction(self, scene: _Scene, arms: Sequence[_Scores]) -> Iterator[ResultRow]:
        pca_errors = self._measure(scene, arms)
        own, *controls = arms
        yield from self._fit_rows(own, None)
        yield from _usage_rows(own)
        error = own.reconstruction.compute()["mse"] * own.n * len(scene.pca.mean)
        rank = float(pca_errors.rank_at(error))
        yield _plain(own.arm, "pca_rank_of_equal_fvu", rank, "components", own.n)
        for scores in controls:
            if scores.aware:
                yield from self._fit_rows(scores, None)
                yield from _usage_rows(scores)
                continue
            yield from self._fit_rows(scores, ("fvu", "l0", "description_length"))
            if isinstance(scores.arm, PcaArm):
                yield _plain(scores.arm, "l0", float(scores.arm.k), "components", scores.n)

    def _measure(self, scene: _Scene, arms: Sequence[_Scores]) -> PcaErrors:
        """Give all arms that are not finished the rows; return PCA's errors on them."""
        errors = self._kept.get("pca_errors") or PcaErrors(scene.pca)
        new = [scores for scores in arms if scores.key is None or scores.key not in self._kept]
        for batch in self._rows(scene.store, scene.site):
            if "pca_errors" not in self._kept:
                errors.update(batch.y)
            for scores in new:
                scores.update_(batch)
        self._kept["pca_errors"] = errors
        self._kept |= {scores.key: scores for scores in new if scores.key is not None}
        return errors

    def _fit_rows(self, scores: _Scores, only: tuple[str, ...] | None) -> Iterator[ResultRow]:
        name, encoder, n = scores.arm.name, scores.arm.encoder, scores.n
        parts: list[Accumulator] = [scores.reconstruction]
        parts += [scores.sparsity] if scores.sparsity else []
        for part in parts:
            for definition in part.definitions:
                if only is None or definition.name in only:
                    yield self._measured(part, definition, n, name, encoder)
        drawn = median_over_documents(*scores.reconstruction.errors(), **self._resampling())
        yield ResultRow(
            MEDIAN, scores.reconstruction.median(), MEDIAN_UNIT, n, standard_error(drawn),
            MEDIAN_VERSION, name, encoder, replicates=drawn,
        )  # fmt: skip

    # ------------------------------------------------------------------------------- downstream

    def _downstream(
        self, scene: _Scene, model: LanguageModel, arms: Sequence[_Scores]
    ) -> Iterator[ResultRow]:
        config = self.config
        replace, encoders = self._replacements(scene, [scores.arm for scores in arms])
        taken = self._once("gradients", lambda: {kind: {} for kind in KINDS})
        aware, gradients = live_arms(
            scene.dictionary, model, scene.site, seed=config.seed, kept=taken
        )
        windows = sample_windows(scene.store, scene.site, config.windows)
        measured = measure_splices(
            model, scene.site, windows, replace | {arm.name: _reconstruct(arm) for arm in aware},
            batch=config.window_batch,
            known=self._once("ablations", lambda: {ZERO: {}, MEAN: {}}),
            gradients=gradients,
        )  # fmt: skip
        total = measured.only(list(replace))
        n = int(total.sums.totals()[0, 0]) if len(total.sums.documents) else 0
        if not n:
            log.warning("no position can be scored downstream: no kept position has a target")
            return
        yield self._measured(total, total.definitions[0], n, "clean", "none")
        for name in replace:
            scale = {"zero": ZERO, "mean": MEAN} if name not in (ZERO, MEAN) else {}
            for definition in total.of_arm(name, scale):
                yield self._measured(total, definition, n, name, encoders.get(name, "none"))
        for name, other in (("isotropic", ISOTROPIC), ("covariance", COVARIANCE)):
            ratio = total.kl_ratio("dictionary", other, f"kl_over_random_error({name})")
            yield self._measured(total, ratio, n, "dictionary", "own")
        for arm in aware:
            for definition in measured.of_arm(arm.name, {"zero": ZERO, "mean": MEAN}):
                yield self._measured(measured, definition, n, arm.name, arm.encoder)

    def _replacements(
        self, scene: _Scene, arms: Sequence[Arm]
    ) -> tuple[dict[str, Reconstruct], dict[str, str]]:
        """Return what is spliced by arm, and the encoder of each arm that has one."""
        pca, seed = scene.pca, self.config.seed
        wanted = ("dictionary", *self.config.spliced_controls)
        chosen = [arm for arm in arms if arm.name.split("(")[0] in wanted]
        own = _reconstruct(chosen[0])
        replace = {arm.name: _reconstruct(arm) for arm in chosen}
        replace |= {
            ZERO: ablate_to(torch.zeros_like(pca.mean)),
            MEAN: ablate_to(pca.mean),
            ISOTROPIC: RandomError(own, "isotropic", pca, seed),
            COVARIANCE: RandomError(own, "covariance", pca, seed),
        }
        return replace, {arm.name: arm.encoder for arm in chosen}

    # ------------------------------------------------------------------------------------- rows

    def _resampling(self) -> dict[str, int]:
        return {"resamples": self.config.resamples, "seed": self.config.seed}

    def _measured(
        self, part: Accumulator, definition: Definition, n: int, arm: str, encoder: str
    ) -> ResultRow:
        """Return a metric of sums with its bootstrap error."""
        value = float(definition.of(part.sums.totals()))
        drawn = over_documents(part.sums.table, definition.of, **self._resampling())
        return ResultRow(
            definition.name, value, definition.unit, n, standard_error(drawn), definition.version,
            arm, encoder, replicates=drawn,
        )  # fmt: skip


def _l0_floor(dictionary: Dictionary) -> float:
    """Return from which share of a row's largest on a value counts: 0 unless the type says so."""
    return getattr(dictionary, "l0_floor", 0.0)


def _usage_rows(scores: _Scores) -> Iterator[ResultRow]:
    """Yield shares of latents: they describe one window of rows and have no error bar."""
    usage = scores.sparsity
    assert usage is not None
    shares = {
        "dead_share": usage.dead_share(),
        "rare_share": usage.rare_share(),
        "dense_share": usage.dense_share(),
    }
    for low, high, share in density_histogram(usage.density()):
        shares[f"density_histogram[{low:g},{high:g})"] = share
    for name, value in shares.items():
        yield _plain(scores.arm, name, value, "share of latents", usage.n)


def _plain(arm: Arm, name: str, value: float, unit: str, n: int) -> ResultRow:
    """Return a row without an error bar."""
    return ResultRow(name, value, unit, n, None, 1, arm.name, arm.encoder)


def _reconstruct(arm: Arm) -> Reconstruct:
    return lambda batch: arm(batch)[0]
