"""The feature index: one pass over a store for all latents of a dictionary at once.

    1  encode every kept row once; spill the firings, sorted by latent (`events`)
    2  directions: logit effect, nearest others, neurons (`directions`), edges of a tree (`nodes`)
    3  per block of latents: counts, histogram, quantiles, examples with strips, tokens (`select`),
       and the place in the text that a latent is made of, if it is (`origins`)
    4  copy in the windows that are shown, with labels, and make the text search

A dictionary with a hierarchy has the concepts above its latents indexed as latents are (`nodes`).

Examples come from all rows, each marked train or held-out; densities and mean activations from
held-out rows only (measurement page, section 13). All of it goes into one SQLite file in one
transaction, so equal inputs give equal bytes; an interrupted build starts again.
"""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from saelab import artifacts
from saelab.artifacts import Draft
from saelab.config import Config, canonical_json
from saelab.errors import ShapeError
from saelab.features import directions, schema, select
from saelab.features.cells import named, pairs, short, shorts, window_row, word
from saelab.features.events import Firings, collect
from saelab.features.labels import Labels
from saelab.features.nodes import Nodes
from saelab.features.origins import origins
from saelab.features.select import Layout, Sorted
from saelab.features.strings import Strings
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.types import holds_neurons

Report = Callable[[str, float], None]
"""Called with the step's name and the share of it that is done."""


class IndexConfig(Config):
    """What the feature index keeps per latent."""

    top: int = Field(default=20, ge=1)
    """Strongest examples, at most one per window."""
    quantiles: int = Field(default=5, ge=1)
    """Groups of equal numbers of firings, by strength."""
    per_quantile: int = Field(default=5, ge=0)
    """Examples drawn from each quantile group."""
    context: int = Field(default=10, ge=1)
    """Tokens before and after that are shown at first and searched; windows are kept whole."""
    bins: int = Field(default=40, ge=2)
    """Bins of the activation histogram."""
    logits: int = Field(default=10, ge=1)
    """Tokens kept at either end of the logit effect."""
    neighbours: int = Field(default=10, ge=1)
    """Nearest decoder directions kept."""
    neurons: int = Field(default=50, ge=1)
    """Most neurons kept per latent, where its direction is a sum of an MLP's neurons."""
    tokens: int = Field(default=8, ge=1)
    """Tokens kept of those that a latent fires on most."""
    batch: int = Field(default=2048, ge=1)
    """Rows encoded at a time."""
    seed: int = Field(default=0, ge=0)
    """Which examples are drawn from the quantile groups."""


@dataclass(frozen=True)
class Source:
    """What an index is made of."""

    dictionary: Dictionary
    store: Store
    model: LanguageModel | None
    site: str


def _silent(step: str, share: float) -> None:
    pass


def build(
    draft: Draft,
    dictionary: Dictionary,
    store: Store,
    model: LanguageModel | None,
    config: IndexConfig,
    *,
    site: str,
    meta: dict[str, Any] | None = None,
    report: Report = _silent,
) -> dict[str, Any]:
    """Write `features.db` into the draft; return facts for its manifest.

    Without a model there are no logit effects. `meta` is stored as it is, beside the mean
    activation, and must be JSON-ready and free of times and paths. Memory: a few hundred MB for
    firings, whatever their number, and 4 bytes per row; disk: 12 bytes per firing while building.
    Raises SiteError if the store lacks the site, ShapeError if it has another width.
    """
    source = Source(dictionary, store, model, site)
    _check(source)
    nodes = Nodes.of(dictionary)
    layout = Layout.of(store.windows(site))
    n_kept = store.n_kept(site, "all")
    firings = collect(
        nodes, store, site,
        folder=draft.scratch, batch=config.batch,
        progress=lambda done: report("encode", done / max(n_kept, 1)),
    )  # fmt: skip
    temporary = draft.folder / f".{schema.FILE}.tmp"
    artifacts._syscall("write", temporary)
    db = schema.create(temporary)
    try:
        writer = _Writer(db, source, nodes, config, layout)
        facts = writer.write(firings, meta or {}, report)
        artifacts._syscall("write", temporary)
        schema.close(db)
    finally:
        db.close()
    artifacts.sync_file(temporary)
    artifacts.rename(temporary, draft.folder / schema.FILE)
    shutil.rmtree(draft.scratch, ignore_errors=True)
    return facts


def _check(source: Source) -> None:
    width = source.store.width(source.site)
    if width != source.dictionary.d_in:
        raise ShapeError(
            f"the dictionary takes activations of width {source.dictionary.d_in}, but "
            f"{source.site} of this store has width {width}. Was it trained on another site?"
        )


class _Writer:
    """Fills the tables of one database, in a fixed order."""

    def __init__(
        self,
        db: sqlite3.Connection,
        source: Source,
        nodes: Nodes,
        config: IndexConfig,
        layout: Layout,
    ) -> None:
        self.db = db
        self.source = source
        self.nodes = nodes
        self.config = config
        self.layout = layout
        self.n_heldout = source.store.n_kept(source.site, "heldout")
        self.strings = Strings(source.store, source.site, source.model)
        self.labels = Labels(source.store)
        self.shown: set[int] = set()
        self.dead = self.too_few = 0

    def write(self, firings: Firings, meta: dict[str, Any], report: Report) -> dict[str, Any]:
        n = len(self.nodes)
        drawn = torch.Generator().manual_seed(self.config.seed)
        shape = (n, self.config.quantiles, self.config.per_quantile)
        draws = torch.rand(shape, generator=drawn, dtype=torch.float64)
        report("directions", 0.0)
        details = self._directions()
        self._insert("edge", self._edges())
        self._insert("neuron", self._neurons())
        origin = origins(self.source.dictionary, self.layout)
        for block in firings.blocks():
            last = block.first + len(block.fires)
            mine = slice(block.first, last)
            s = Sorted.of(block, self.layout)
            self._latents(s, details[mine])
            self._examples(s, draws[mine])
            self._origins(s, origin[mine])
            report("examples", last / n)
        report("windows", 0.0)
        self._windows()
        self._search()
        facts = self._facts()
        self._meta(meta | facts)
        report("windows", 1.0)
        return facts

    def _insert(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        columns = [c[1] for c in self.db.execute(f"PRAGMA table_info({table})")]
        marks = ", ".join("?" * len(columns))
        self.db.executemany(
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})",  # noqa: S608 (our names)
            rows,
        )

    # --------------------------------------------------------------------------------- directions

    def _directions(self) -> list[dict[str, Any]]:
        """Return per latent what its direction says: neighbours, logits if there is a model."""
        details: list[dict[str, Any]] = []
        for level in self.nodes.levels:
            first = len(details)
            ids, cosines = directions.nearest(level, self.config.neighbours)
            details += [
                {"norm": short(norm), "neighbours": pairs(i, c)}
                for norm, i, c in zip(
                    level.norm(dim=1).tolist(), (ids + first).tolist(), cosines.tolist(),
                    strict=True,
                )
            ]  # fmt: skip
        if self.source.model is None:
            return details
        for chunk in directions.logit_effects(
            self.source.model, self.source.site, self.nodes.directions, self.config.logits
        ):
            names = self.strings.of(torch.cat([chunk.up.flatten(), chunk.down.flatten()]))
            for row in range(len(chunk.up)):
                details[chunk.first + row]["logits"] = {
                    "up": named(chunk.up[row], chunk.up_values[row], names),
                    "down": named(chunk.down[row], chunk.down_values[row], names),
                    "spread": short(float(chunk.spread[row])),
                }
        return details

    def _edges(self) -> Iterator[tuple[int, int, float]]:
        for child, parent, weight in self.nodes.edges():
            yield from zip(
                child.tolist(), parent.tolist(), map(short, weight.tolist()), strict=True
            )

    def _neurons(self) -> Iterator[tuple[int, int, int, float]]:
        """Yield (latent, rank, neuron, weight), if coordinates are neurons."""
        source = self.source
        grouped = getattr(source.dictionary.config, "needs_neurons", False)
        if not grouped and not holds_neurons(source.site):
            return
        *places, weights = directions.largest(self.nodes.directions, self.config.neurons)
        yield from zip(
            *(place.tolist() for place in places), map(short, weights.tolist()), strict=True
        )

    # ------------------------------------------------------------------------------------- latents

    def _latents(self, s: Sorted, details: list[dict[str, Any]]) -> None:
        block, gists = s.block, self._tokens(s)
        edges, bars = select.histogram(s, self.config.bins)
        groups = select.quantile_edges(s, self.config.quantiles)
        found = {k: v.tolist() for k, v in select.counts(s).items()}
        rows = []
        for i, fires in enumerate(block.fires.tolist()):
            detail = details[i] | {
                "histogram": {
                    "edges": shorts(edges[i]), "train": bars[i, 0].tolist(),
                    "heldout": bars[i, 1].tolist(),
                },
                "groups": [shorts(g) for g in groups[i]],
            }  # fmt: skip
            held = found["fires_heldout"][i]
            if block.first + i < self.source.dictionary.d_sae:
                self.dead += fires == 0
                self.too_few += held < schema.ENOUGH
            neighbours = detail["neighbours"]
            rows.append(
                (
                    block.first + i, fires, held,
                    held / self.n_heldout if self.n_heldout else None,
                    found["peak"][i],
                    found["mean"][i] if held else None,
                    found["position"][i] if fires else None,
                    found["position_share"][i],
                    detail.pop("norm"),
                    neighbours[0][1] if neighbours else None,
                    gists.get(i, ""),
                    canonical_json(detail),
                )
            )  # fmt: skip
        self._insert("latent", rows)

    def _tokens(self, s: Sorted) -> dict[int, str]:
        """Write the tokens that each latent fires on most; return a gist of the first few."""
        latent, token, fires, share = select.top_tokens(s, self.config.tokens)
        names = self.strings.of(token)
        rows, gists = [], {}
        rank, previous = 0, -1
        for i, t, f, w in zip(
            latent.tolist(), token.tolist(), fires.tolist(), share.tolist(), strict=True
        ):
            rank = rank + 1 if i == previous else 0
            previous = i
            rows.append((s.block.first + i, rank, names[t], f, short(w)))
            if rank < 3:
                shown = word(names[t])
                gists[i] = f"{gists[i]} · {shown}" if rank else shown
        self._insert("token", rows)
        return gists

    def _examples(self, s: Sorted, draws: Tensor) -> None:
        config = self.config
        picks = select.with_strips(
            s,
            [
                select.pick_top(s, config.top),
                select.pick_quantiles(s, config.quantiles, config.per_quantile, draws),
            ],
        )
        strips = schema.pack_strips(
            picks.strip_positions.numpy(), picks.strip_values.numpy(), picks.strip_offsets.numpy()
        )
        numbers = self.layout.number[picks.window].tolist()
        self.shown.update(numbers)
        self._insert(
            "example",
            zip(
                (picks.latent + s.block.first).tolist(), picks.group.tolist(), picks.rank.tolist(),
                numbers, picks.position.tolist(), picks.value.tolist(), strips, strict=True,
            ),
        )  # fmt: skip

    def _origins(self, s: Sorted, rows: Int[Tensor, " latents"]) -> None:
        """Write the places in the text of the latents that are rows of the store."""
        latent = (rows >= 0).nonzero().squeeze(1)
        window, position = self.layout.place(rows[latent])
        offsets, positions, values = select.strips_in(s, latent, window)
        strips = schema.pack_strips(positions.numpy(), values.numpy(), offsets.numpy())
        numbers = self.layout.number[window].tolist()
        self.shown.update(numbers)
        ids = (latent + s.block.first).tolist()
        self._insert("origin", zip(ids, numbers, position.tolist(), strips, strict=True))

    # ----------------------------------------------------------------------- windows, search, meta

    def _windows(self) -> None:
        self._insert("window", self._shown())
        self._insert("document", sorted(self.labels.shown.items()))

    def _shown(self) -> Iterator[tuple[Any, ...]]:
        for window in self.source.store.windows(self.source.site):
            shown = window.number in self.shown
            self.labels.add(window, shown=shown)
            if shown:
                yield window_row(window)

    def _search(self) -> None:
        """Index per latent the tokens it fires on, those it promotes, text around top examples."""
        latents = self.db.execute(
            "SELECT id, detail, (SELECT group_concat(text, ' ') FROM"
            " (SELECT text FROM token WHERE latent = id ORDER BY rank)) FROM latent ORDER BY id"
        )
        rows = []
        for latent, detail, tokens in latents:
            up = json.loads(detail).get("logits", {}).get("up", [])
            context = " … ".join(self._context(latent))
            rows.append((latent, tokens or "", " ".join(t for t, _ in up), context))
        self.db.executemany(
            "INSERT INTO search (rowid, fires, promotes, context) VALUES (?, ?, ?, ?)", rows
        )

    def _context(self, latent: int, examples: int = 5) -> Iterator[str]:
        n = self.config.context
        for strings, position in self.db.execute(
            "SELECT strings, position FROM example JOIN window ON number = window"
            " WHERE latent = ? AND grp = 0 AND rank < ? ORDER BY rank",
            (latent, examples),
        ):
            yield "".join(json.loads(strings)[max(0, position - n) : position + n + 1])

    def _facts(self) -> dict[str, Any]:
        store, site = self.source.store, self.source.site
        return {
            "d_sae": self.source.dictionary.d_sae,
            "levels": self.nodes.sizes,
            "site": site,
            "n_rows": store.n_rows,
            "n_kept": store.n_kept(site, "all"),
            "n_heldout": self.n_heldout,
            "dead": self.dead,
            "too_few": self.too_few,
            "model_name": store.model_name,
        }

    def _meta(self, meta: dict[str, Any]) -> None:
        mean = self.source.store.stats(self.source.site).mean.tolist()
        meta = meta | {
            "index": self.config.plain(),
            "store": self.source.store.content_hash,
            "mean": mean,
            "labels": dict(self.labels.windows),
        }
        self._insert("meta", [(key, canonical_json(meta[key])) for key in sorted(meta)])
