"""The feature index: one pass over a store for all latents of a dictionary at once.

    1  encode every kept row once; spill the firings, sorted by latent (`events`)
    2  per block of latents: counts, histogram, quantiles, examples with strips, tokens (`select`)
    3  directions: logit effect and nearest others (`directions`)
    4  copy in the windows that hold an example, and make the text search

Examples come from all rows, each marked train or held-out; densities and mean activations from
held-out rows only (measurement page, section 13). All of it goes into one SQLite file in one
transaction, so equal inputs give equal bytes; an interrupted build starts again.
"""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
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
from saelab.features.events import Block, Firings, collect
from saelab.features.select import Layout, Sorted
from saelab.protocols import Dictionary, LanguageModel, Store
from saelab.types import Window

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
    layout = Layout.of(store.windows(site))
    n_kept = store.n_kept(site, "all")
    firings = collect(
        dictionary, store, site,
        folder=draft.scratch, batch=config.batch,
        progress=lambda done: report("encode", done / max(n_kept, 1)),
    )  # fmt: skip
    temporary = draft.folder / f".{schema.FILE}.tmp"
    artifacts._syscall("write", temporary)
    db = schema.create(temporary)
    try:
        writer = _Writer(db, source, config, layout)
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
        self, db: sqlite3.Connection, source: Source, config: IndexConfig, layout: Layout
    ) -> None:
        self.db = db
        self.source = source
        self.config = config
        self.layout = layout
        self.n_heldout = source.store.n_kept(source.site, "heldout")
        self.strings = _Strings(source)
        self.shown: set[int] = set()
        self.dead = self.too_few = 0

    def write(self, firings: Firings, meta: dict[str, Any], report: Report) -> dict[str, Any]:
        d_sae = self.source.dictionary.d_sae
        drawn = torch.Generator().manual_seed(self.config.seed)
        shape = (d_sae, self.config.quantiles, self.config.per_quantile)
        draws = torch.rand(shape, generator=drawn, dtype=torch.float64)
        report("directions", 0.0)
        details = self._directions()
        for block in firings.blocks():
            last = block.first + len(block.fires)
            self._block(block, draws[block.first : last], details[block.first : last])
            report("examples", last / d_sae)
        report("windows", 0.0)
        self._windows()
        self._search()
        facts = self._facts()
        self._meta(meta | facts)
        report("windows", 1.0)
        return facts

    def _insert(self, table: str, rows: Iterator[tuple[Any, ...]] | list[tuple[Any, ...]]) -> None:
        columns = [c[1] for c in self.db.execute(f"PRAGMA table_info({table})")]
        marks = ", ".join("?" * len(columns))
        self.db.executemany(
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})",  # noqa: S608 (our names)
            rows,
        )

    # --------------------------------------------------------------------------------- directions

    def _directions(self) -> list[dict[str, Any]]:
        """Return per latent what its direction says: neighbours, logits if there is a model."""
        W_dec = self.source.dictionary.W_dec.detach()
        ids, cosines = directions.nearest(W_dec, self.config.neighbours)
        details: list[dict[str, Any]] = [
            {"norm": _short(norm), "neighbours": _pairs(i, c)}
            for norm, i, c in zip(
                W_dec.norm(dim=1).tolist(), ids.tolist(), cosines.tolist(), strict=True
            )
        ]
        if self.source.model is None:
            return details
        for chunk in directions.logit_effects(
            self.source.model, self.source.site, W_dec, self.config.logits
        ):
            names = self.strings.of(torch.cat([chunk.up.flatten(), chunk.down.flatten()]))
            for row in range(len(chunk.up)):
                details[chunk.first + row]["logits"] = {
                    "up": _named(chunk.up[row], chunk.up_values[row], names),
                    "down": _named(chunk.down[row], chunk.down_values[row], names),
                    "spread": _short(float(chunk.spread[row])),
                }
        return details

    # ------------------------------------------------------------------------------------- latents

    def _block(self, block: Block, draws: Tensor, details: list[dict[str, Any]]) -> None:
        s = Sorted.of(block, self.layout)
        gists = self._tokens(s)
        edges, bars = select.histogram(s, self.config.bins)
        groups = select.quantile_edges(s, self.config.quantiles)
        found = {k: v.tolist() for k, v in select.counts(s).items()}
        rows = []
        for i, fires in enumerate(block.fires.tolist()):
            detail = details[i] | {
                "histogram": {
                    "edges": _shorts(edges[i]), "train": bars[i, 0].tolist(),
                    "heldout": bars[i, 1].tolist(),
                },
                "groups": [_shorts(g) for g in groups[i]],
            }  # fmt: skip
            held = found["fires_heldout"][i]
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
        self._examples(s, draws)

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
            rows.append((s.block.first + i, rank, names[t], f, _short(w)))
            if rank < 3:
                word = _word(names[t])
                gists[i] = f"{gists[i]} · {word}" if rank else word
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

    # ----------------------------------------------------------------------- windows, search, meta

    def _windows(self) -> None:
        shown = (w for w in self.source.store.windows(self.source.site) if w.number in self.shown)
        self._insert("window", (_window_row(w) for w in shown))

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
        }
        self._insert("meta", [(key, canonical_json(meta[key])) for key in sorted(meta)])


class _Strings:
    """Token ids as text: the model's vocabulary, or what the store's windows show."""

    def __init__(self, source: Source) -> None:
        self._model = source.model
        self._known: dict[int, str] = {}
        if source.model is None:
            for window in source.store.windows(source.site):
                for token, text in zip(window.ids.tolist(), window.strings, strict=True):
                    self._known.setdefault(token, text)

    def of(self, ids: Int[Tensor, " n"]) -> dict[int, str]:
        """Return a mapping that holds at least these ids."""
        unknown = sorted(set(ids.tolist()) - self._known.keys())
        if unknown:
            assert self._model is not None
            self._known.update(zip(unknown, self._model.to_strings(unknown), strict=True))
        return self._known


def _window_row(window: Window) -> tuple[Any, ...]:
    documents = window.document
    changes = [0, *((documents.diff() != 0).nonzero().squeeze(1) + 1).tolist()]
    return (
        window.number,
        int(window.heldout),
        canonical_json(list(window.strings)),
        canonical_json([[int(documents[at]), at] for at in changes]),
        canonical_json((~window.kept).nonzero().squeeze(1).tolist()),
    )


def _word(token: str) -> str:
    """A token for a gist: without the spaces around, line ends as a mark."""
    return token.strip(" ").replace("\n", "↵") or "␣"


def _short(value: float) -> float:
    """Six significant digits: what a page can show."""
    return float(f"{value:.6g}")


def _shorts(values: Tensor) -> list[float]:
    return [_short(v) for v in values.tolist()]


def _pairs(ids: list[int], values: list[float]) -> list[list[Any]]:
    return [[i, _short(v)] for i, v in zip(ids, values, strict=True)]


def _named(ids: Tensor, values: Tensor, names: dict[int, str]) -> list[list[Any]]:
    return [[names[i], _short(v)] for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
