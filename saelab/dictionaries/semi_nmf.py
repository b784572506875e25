"""Semi-non-negative matrix factorisation: rows as non-negative sums of sparse groups of neurons.

    X ≈ Z W_dec,  Z ≥ 0;  a row of W_dec keeps its ⌈keep · d⌉ largest entries, of either sign

Found by alternating updates of features and codes (`ops.factorise`), with no gradient and no bias;
the features of the smallest loss are kept. A row is coded with them by non-negative least squares
with exact zeros (`ops.nnls`). With `levels` the features are themselves factorised, each level's by
the next; `tree(l)` says which concepts of level l a feature of level l − 1 is made of.

Shafran, Geiger, Geva 2025, "Constructing interpretable features from compositional neuron groups",
arXiv 2506.10920. Ding, Li, Jordan 2010, "Convex and Semi-Nonnegative Matrix Factorizations".
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from saelab.dictionaries.base import BaseDictionary, DictionaryConfig
from saelab.errors import CorpusError
from saelab.ops import factorise, linalg
from saelab.ops.factorise import Factors, Minibatched, Start, Whole
from saelab.ops.nnls import nnls
from saelab.protocols import Solved, Store
from saelab.types import Batch

_READ_ROWS = 4096
"""Rows that are copied at once."""
_WARM_UPDATES = 50
"""Updates on `rows` rows before the first minibatch."""
COUNTS = 0.01
"""Share of a row's largest code below which a code is not counted as one of its latents."""


class SemiNMFConfig(DictionaryConfig):
    """A semi-non-negative factorisation of an MLP's neurons; `d_sae` is its rank."""

    has_lr: ClassVar[bool] = False
    needs_neurons: ClassVar[bool] = True

    type: Literal["semi_nmf"] = "semi_nmf"
    """Name in the registry."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of the neurons that each feature keeps."""
    start: Start = "random"
    """First codes: uniform random, clusters of k-means, or singular vectors cut at 0."""
    iterations: PositiveInt = 2000
    """Most updates, of each level."""
    patience: PositiveInt = 200
    """Updates in a row without a smaller loss after which a level ends."""
    levels: tuple[PositiveInt, ...] = ()
    """Ranks of a hierarchy, `d_sae` first and falling; each level factorises the one before."""
    rows: PositiveInt = 65_536
    """Most training rows that are held in memory; a store with more is solved by minibatches."""
    batch: PositiveInt = 2048
    """Rows of a minibatch."""

    @model_validator(mode="after")
    def _unique_codes(self) -> "SemiNMFConfig":
        if self.d_sae > self.d_in:
            raise ValueError(
                f"d_sae={self.d_sae} exceeds the site's width {self.d_in}: non-negative codes over "
                "more features than neurons are not unique; choose a lower rank"
            )
        return self

    @model_validator(mode="after")
    def _falling(self) -> "SemiNMFConfig":
        ranks = self.levels
        if ranks and (ranks[0] != self.d_sae or list(ranks) != sorted(set(ranks), reverse=True)):
            raise ValueError(
                f"levels={list(ranks)} should start with d_sae={self.d_sae} and fall from level to "
                f"level, for example [{self.d_sae}, {max(1, self.d_sae // 2)}]"
            )
        return self

    @property
    def n_kept(self) -> int:
        """Number of neurons that a feature keeps."""
        return math.ceil(self.keep * self.d_in)

    @classmethod
    def example(cls) -> "SemiNMFConfig":
        """Return a small configuration on which the contract laws are tested."""
        small = {"d_in": 8, "d_sae": 6, "keep": 0.5, "iterations": 12, "levels": [6, 3]}
        return cls.parse(small)


@dataclass(frozen=True)
class State:
    """Where a solution stands: the level at work, its best features, and the levels before it."""

    part: Whole | Minibatched
    seeds: Int[Tensor, " seeds"]
    """Of each level's start, and of the stream."""
    solved: tuple[Tensor, ...] = ()
    """Best features of the levels that are through."""
    step: int = 0
    """Updates of this level."""
    best: Tensor | None = None
    best_loss: float = math.inf
    stale: int = 0
    """Updates since then."""
    done: bool = False

    @property
    def loss(self) -> float:
        """The level's FVU after the last update."""
        return self.part.loss

    def metrics(self) -> dict[str, float]:
        """Return FVU, codes per row above `COUNTS` of its largest, and features in no such code."""
        codes = self.part.codes()
        counted = (codes > 0) & (codes >= COUNTS * codes.amax(0))
        return {
            "fvu": self.loss,
            "level": len(self.solved),
            "l0": float(counted.sum() / codes.shape[1]),
            "dead": float((~counted.any(1)).float().mean()),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all but the rows."""
        numbers = [len(self.solved), self.step, self.best_loss, self.stale, self.done]
        found = {f"solved.{i}": features for i, features in enumerate(self.solved)}
        found |= {f"part.{name}": tensor for name, tensor in self.part.tensors().items()}
        if self.best is not None:
            found["best"] = self.best.clone()  # it may be the part's
        return found | {"seeds": self.seeds, "numbers": torch.tensor(numbers, dtype=torch.float64)}


@final
class SemiNMF(BaseDictionary, Solved):
    """The semi-non-negative factorisation; see the module's docstring for its equations."""

    config_class = SemiNMFConfig
    config: SemiNMFConfig
    l0_floor = COUNTS

    def __init__(self, config: SemiNMFConfig) -> None:
        """Allocate the features of every level, and the trees between them."""
        super().__init__(config)
        for level, (below, rank) in enumerate(
            zip(config.levels[:-1], config.levels[1:], strict=True), 1
        ):
            self.register_buffer(f"features_{level}", torch.zeros(rank, config.d_in))
            self.register_buffer(f"tree_{level}", torch.zeros(below, rank))

    # --------------------------------------------------------------------------------- codes

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the non-negative least-squares code of each row, with exact zeros. Raises
        ShapeError."""
        z = nnls(self._rows(x) - self.b_dec, self.W_dec)
        return z.reshape(*x.shape[:-1], self.d_sae)

    # ----------------------------------------------------------------------------- hierarchy

    @property
    def n_levels(self) -> int:
        """Number of levels; 1 without a hierarchy."""
        return max(1, len(self.config.levels))

    def features(self, level: int) -> Float[Tensor, "rank d_in"]:
        """Return a level's features, at unit norm: those of level 0 are `W_dec`."""
        return self.W_dec if level == 0 else getattr(self, f"features_{level}")

    def tree(self, level: int) -> Float[Tensor, "below rank"]:
        """Return the weights of level ≥ 1 in each feature of the level below it: its
        non-negative least-squares code."""
        return getattr(self, f"tree_{level}")

    def edges(self, level: int, share: float = 0.1) -> Int[Tensor, "m 2"]:
        """Return (feature of the level below, concept of `level`) where the weight is at least
        `share` of the concept's largest."""
        weights = self.tree(level)
        return ((weights > 0) & (weights >= share * weights.amax(0))).nonzero()

    def at_level(self, level: int) -> "SemiNMF":
        """Return a level as a dictionary of its own, to encode, index and save like any other."""
        features = self.features(level)
        fields = self.config.plain() | {"d_sae": len(features), "levels": ()}
        alone = SemiNMF(SemiNMFConfig.parse(fields)).to(self.W_dec)
        with torch.no_grad():
            alone.W_dec.copy_(features)
            alone.b_dec.copy_(self.b_dec)
        return alone

    # ------------------------------------------------------------------------------- solving

    @property
    def most_iterations(self) -> int:
        """How many updates there may be, of all levels."""
        return self.n_levels * self.config.iterations

    @property
    def working_bytes(self) -> float:
        """Memory of the rows, their codes and an update."""
        c = self.config
        return 4.0 * (c.rows * (c.d_in + 6 * c.d_sae) + 8 * c.d_sae * c.d_in)

    def rows_read(self, n: int) -> int:
        """Return how many of n training rows an update reads: all, or a minibatch."""
        return n if n <= self.config.rows else self.config.batch

    @torch.no_grad()
    def start(self, store: Store, generator: torch.Generator) -> State:
        """Return first codes of the training rows, or, by minibatches, features of some of them.

        Raises CorpusError if there are fewer rows than features.
        """
        config, n = self.config, store.n_kept(store.sites[0], "train")
        if n < self.d_sae:
            raise CorpusError(
                f"a factorisation of rank {self.d_sae} needs at least as many training rows, but "
                f"{store.sites[0]!r} keeps {n}; lower d_sae, or harvest more text"
            )
        seeds = torch.randint(2**31, (self.n_levels + 1,), generator=generator)
        if self.rows_read(n) == n:
            return State(self._begin(_rows_of(store, n), 0, seeds), seeds)
        sample = next(_stream(store, config.rows, int(seeds[-1]), 0)).x
        part = self._begin(sample.T.contiguous(), 0, seeds)
        for _ in range(_WARM_UPDATES):
            part = part.next(config.n_kept)
        return State(self._follow(store, seeds, part.features), seeds)

    def _begin(self, xt: Tensor, level: int, seeds: Tensor) -> Whole:
        rank = self.config.levels[level] if level else self.d_sae
        seeded = torch.Generator().manual_seed(int(seeds[level]))
        return Whole.of(xt, factorise.start_codes(xt, rank, self.config.start, seeded))

    def _follow(self, store: Store, seeds: Tensor, features: Tensor, step: int = 0) -> Minibatched:
        batch = self.config.batch
        stream = (b.x for b in _stream(store, batch, int(seeds[-1]), step))
        variance = store.stats(store.sites[0]).total_variance
        return Minibatched.of(stream, batch, features, variance=variance)

    @torch.no_grad()
    def advance(self, store: Store, state: State) -> State:
        """Return the state after an update; a level that is through starts the next.

        Until a stream's loss is of enough batches to be compared, its last features are the best.
        """
        del store  # its rows are in the state
        if self._is_through(state):
            state = self._next_level(state)
        part, step = state.part.next(self.config.n_kept), state.step + 1
        loss = part.loss if part.is_settled else math.inf
        if loss < state.best_loss or not part.is_settled or state.best is None:
            now = replace(state, part=part, step=step, best=part.features, best_loss=loss, stale=0)
        else:
            now = replace(state, part=part, step=step, stale=state.stale + 1)
        last = len(now.solved) + 1 == self.n_levels
        return replace(now, done=last and self._is_through(now))

    def _is_through(self, state: State) -> bool:
        return state.step >= self.config.iterations or state.stale >= self.config.patience

    def _next_level(self, state: State) -> State:
        assert state.best is not None
        solved = (*state.solved, state.best)
        part = self._begin(state.best.T.contiguous(), len(solved), state.seeds)
        return State(part, state.seeds, solved)

    @torch.no_grad()
    def restore(self, store: Store, tensors: Mapping[str, Tensor]) -> State:
        """Return the state that gave these tensors; the rows are read again."""
        own = {name: t.to(self.W_dec.device) for name, t in tensors.items()}
        seeds, (level, step, lowest, stale, done) = tensors["seeds"], tensors["numbers"].tolist()
        kept = {k.removeprefix("part."): t for k, t in own.items() if k.startswith("part.")}
        solved = tuple(own[f"solved.{i}"] for i in range(int(level)))
        if "recent" in kept:
            part = self._follow(store, seeds, kept["following"], int(step))
            part = replace(part, step=int(step), **kept | {"recent": kept["recent"].cpu()})
        else:
            n = store.n_kept(store.sites[0], "train")
            xt = solved[-1].T.contiguous() if solved else _rows_of(store, n)
            loss = float(kept.pop("loss"))
            part = Whole(xt, *factorise.spread(xt), Factors(**kept, loss=loss))
        return State(
            part, seeds, solved, int(step), own.get("best"), lowest, int(stale), bool(done)
        )

    @torch.no_grad()
    def finish(self, state: State) -> None:
        """Take the best features of each level, at unit norm, and the trees between them."""
        assert state.best is not None
        found = [linalg.unit_rows(features) for features in (*state.solved, state.best)]
        self.W_dec.copy_(found[0])
        self.b_dec.zero_()
        for level in range(1, len(found)):
            self.features(level).copy_(found[level])
            self.tree(level).copy_(nnls(found[level - 1], found[level]))


def _rows_of(store: Store, n: int) -> Float[Tensor, "d n"]:
    """Return the training rows of the store's only site as columns."""
    site, done = store.sites[0], 0
    xt = torch.empty(0)
    for batch in store.scan(site, batch=_READ_ROWS, split="train"):
        if done == 0:
            xt = batch.x.new_empty(batch.x.shape[1], n)
        xt[:, done : done + len(batch)] = batch.x.T
        done += len(batch)
    assert done == n
    return xt


def _stream(store: Store, batch: int, seed: int, start: int) -> Iterator[Batch]:
    return store.batches(store.sites[0], batch=batch, seed=seed, split="train", start=start)
