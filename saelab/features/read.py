"""Reading a feature index: point look-ups in milliseconds, read-only, for any thread."""

import bisect
import json
import re
import sqlite3
import threading
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from saelab.errors import ArtifactError
from saelab.features import schema

DENSE = 0.1
"""Density above which a latent says little about any one token."""
DUPLICATE = 0.95
"""Cosine to another decoder direction above which one of the two is superfluous."""
ONE_POSITION = 0.9
"""Share of firings at one position of the window above which a latent marks the position."""


@dataclass(frozen=True)
class LatentStats:
    """The numbers of one latent. Densities and means are over held-out rows."""

    id: int
    fires: int
    """Firings on all kept rows."""
    fires_heldout: int
    density: float | None
    """Share of held-out rows on which it fires; None if nothing is held out."""
    peak: float
    """The value of largest size on any row."""
    mean: float | None
    """Mean of |z| where it fires on held-out rows; None if it never does."""
    position: int | None
    """The window position at which it fires most often."""
    position_share: float
    """Share of its firings at that position."""
    norm: float
    """Length of its decoder direction."""
    cosine: float | None
    """Cosine to the nearest other decoder direction."""
    gist: str
    """The three tokens that carry most of its activation."""

    @property
    def warnings(self) -> list[str]:
        """What to know before believing anything about this latent: short words."""
        if self.fires == 0:
            return ["dead"]
        found = []
        if self.fires_heldout < schema.ENOUGH:
            found.append("too few to score")
        if self.density is not None and self.density > DENSE:
            found.append("dense")
        if self.fires >= 10 and self.position_share >= ONE_POSITION:
            found.append("position-only")
        if self.cosine is not None and self.cosine >= DUPLICATE:
            found.append("duplicate")
        return found


@dataclass(frozen=True)
class Histogram:
    """Counts of a latent's non-zero values in equal bins from `low` to `high`."""

    low: float
    high: float
    train: list[int]
    heldout: list[int]


@dataclass(frozen=True)
class Logits:
    """Direct effect of the decoder direction on the logits, strongest first."""

    up: list[tuple[str, float]]
    down: list[tuple[str, float]]
    spread: float
    """Standard deviation over the vocabulary."""


@dataclass(frozen=True)
class TokenShare:
    """How much of a latent's activation one token carries, over all rows."""

    text: str
    fires: int
    share: float


@dataclass(frozen=True)
class Neighbour:
    """Another latent whose decoder direction is near."""

    id: int
    cosine: float
    gist: str


@dataclass(frozen=True)
class Example:
    """One firing in its window."""

    window: int
    position: int
    value: float
    strip: dict[int, float]
    """The latent's value at each position of the window where it fires."""
    strings: list[str]
    """The window's tokens as text."""
    heldout: bool
    document: int
    masked: frozenset[int]
    """Positions that the store's mask leaves out: the latent was not computed there."""
    label: str | None = None
    """Its document's, where the store knows some."""


@dataclass(frozen=True)
class ExampleGroup:
    """Examples of about one strength."""

    number: int
    """0 for the strongest windows; from 1 on the quantiles of |z|, strongest first."""
    high: float
    low: float
    """Largest and smallest |z| of the group."""
    examples: list[Example]


@dataclass(frozen=True)
class LatentPage:
    """All that a page about one latent shows."""

    stats: LatentStats
    histogram: Histogram
    logits: Logits | None
    """None when the index was built without a model."""
    tokens: list[TokenShare]
    neighbours: list[Neighbour]
    groups: list[ExampleGroup]
    origin: Example | None = None
    """The place in the text whose activation this latent is; None for a direction that was
    learnt."""


@dataclass(frozen=True)
class Hit:
    """A latent that a search found, and where."""

    stats: LatentStats
    where: str
    """`fires on`, `promotes` or `context`."""
    share: float | None
    """For an exact token: the share of the latent's activation that it carries."""


class Features:
    """An index opened read-only; every method may be called from several threads."""

    def __init__(self, path: str | Path) -> None:
        """Open `features.db`, or the folder that holds it.

        Raises ArtifactError if it is missing, no index, or of another schema.
        """
        path = Path(path)
        self.path = path / schema.FILE if path.is_dir() else path
        if not self.path.exists():
            raise ArtifactError(f"{self.path} does not exist; `saelab index` makes it")
        self._lock = threading.Lock()
        # immutable: no locks are taken, so that the file may lie on a read-only or shared disk
        uri = f"{self.path.resolve().as_uri()}?mode=ro&immutable=1"
        self._db = sqlite3.connect(uri, uri=True, check_same_thread=False)
        try:
            version = self.query("PRAGMA user_version")[0][0]
        except sqlite3.DatabaseError:
            self.close()
            raise ArtifactError(
                f"{self.path} is not a feature index: it was truncated or altered; make it again"
            ) from None
        if version != schema.SCHEMA:
            self.close()
            raise ArtifactError(
                f"{self.path} has schema {version}, but this version of saelab reads "
                f"schema {schema.SCHEMA}; make the index again with `saelab index`"
            )

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What the index was made of: dictionary, site, model, counts, configuration."""
        return {key: json.loads(value) for key, value in self.query("SELECT key, value FROM meta")}

    @property
    def n_latents(self) -> int:
        """Number of latents; the concepts above them are numbered on from it."""
        return self.meta["d_sae"]

    @property
    def levels(self) -> list[int]:
        """Number of nodes of each level of the hierarchy; without one, the number of latents."""
        return self.meta["levels"]

    @property
    def n_nodes(self) -> int:
        """Number of latents and concepts: of all that has a page."""
        return sum(self.levels)

    def level_of(self, node: int) -> int:
        """Return a node's level; 0 for latents."""
        return bisect.bisect_right(list(accumulate(self.levels)), node)

    def stats(self, latent: int) -> LatentStats:
        """Return the numbers of one latent. Raises ArtifactError if there is no such latent."""
        rows = self.query(f"SELECT {_STATS} FROM latent WHERE id = ?", latent)  # noqa: S608
        if not rows:
            raise ArtifactError(
                f"there is no latent {latent}; this dictionary has 0 to {self.n_nodes - 1}"
            )
        return LatentStats(*rows[0])

    def latent(self, latent: int) -> LatentPage:
        """Return everything about one latent. Raises ArtifactError if there is no such latent."""
        stats = self.stats(latent)
        detail = json.loads(self.query("SELECT detail FROM latent WHERE id = ?", latent)[0][0])
        histogram, logits = detail["histogram"], detail.get("logits")
        tokens = self.query(
            "SELECT text, fires, share FROM token WHERE latent = ? ORDER BY rank", latent
        )
        return LatentPage(
            stats,
            Histogram(
                histogram["edges"][0],
                histogram["edges"][1],
                histogram["train"],
                histogram["heldout"],
            ),
            logits and Logits(_tuples(logits["up"]), _tuples(logits["down"]), logits["spread"]),
            [TokenShare(*row) for row in tokens],
            self._neighbours(detail["neighbours"]),
            self._groups(latent, stats, detail["groups"]),
            self._origin(latent),
        )

    def table(
        self, order_by: str = "id", limit: int = 100, *, descending: bool = False
    ) -> list[LatentStats]:
        """Return the first latents in an order; those without the number come last, ties by id."""
        if order_by not in _COLUMNS:
            raise ArtifactError(f"cannot order by {order_by!r}; known: {', '.join(_COLUMNS)}")
        direction = "DESC" if descending else "ASC"
        rows = self.query(
            f"SELECT {_STATS} FROM latent ORDER BY {order_by} {direction} NULLS LAST, id LIMIT ?",  # noqa: S608
            limit,
        )
        return [LatentStats(*row) for row in rows]

    def search(self, text: str, limit: int = 30) -> list[Hit]:
        """Return the latents that fire on a token, promote it, or have it around their examples.

        Latents whose activation is carried by exactly this token come first, by share. A quoted
        text keeps its spaces (`" not"`); else the word is looked for with and without one in front.
        Then the full text follows, where words may be prefixes. `limit` holds for each way in which
        a latent can be found; one that is found in two ways is returned twice.
        """
        hits: dict[tuple[str, int], Hit] = {}
        for hit in self._exact(text, limit) + self._full_text(text, limit):
            hits.setdefault((hit.where, hit.stats.id), hit)
        return list(hits.values())

    def _exact(self, text: str, limit: int) -> list[Hit]:
        quoted = re.fullmatch(r'\s*"(.+)"\s*', text, flags=re.DOTALL)
        bare = text.strip()
        forms = [quoted[1]] if quoted else [f"{space}{bare}" for space in ("", " ") if bare]
        marks = ", ".join("?" * len(forms))
        rows = self.query(
            f"SELECT {_STATS}, sum(share) AS part FROM token"  # noqa: S608
            " JOIN latent ON latent.id = token.latent"
            f" WHERE text IN ({marks}) GROUP BY latent.id ORDER BY part DESC, latent.id LIMIT ?",
            *forms, limit,
        )  # fmt: skip
        return [Hit(LatentStats(*row[:-1]), "fires on", row[-1]) for row in rows]

    def _full_text(self, text: str, limit: int) -> list[Hit]:
        words = re.findall(r"\w+", text)
        if not words:
            return []
        hits = []
        for column, where in (
            ("fires", "fires on"),
            ("promotes", "promotes"),
            ("context", "context"),
        ):
            query = " AND ".join(f'{column}:"{word}"*' for word in words)
            rows = self.query(
                f"SELECT {_STATS} FROM search JOIN latent ON latent.id = search.rowid"  # noqa: S608
                " WHERE search MATCH ? ORDER BY bm25(search), latent.id LIMIT ?",
                query, limit,
            )  # fmt: skip
            hits += [Hit(LatentStats(*row), where, None) for row in rows]
        return hits

    def _neighbours(self, pairs: list[list[Any]]) -> list[Neighbour]:
        gists = self.gists([int(i) for i, _ in pairs])
        return [Neighbour(int(i), cosine, gists[int(i)]) for i, cosine in pairs]

    def gists(self, latents: list[int]) -> dict[int, str]:
        """Return the gist of several latents at once."""
        marks = ", ".join("?" * len(latents))
        return dict(self.query(f"SELECT id, gist FROM latent WHERE id IN ({marks})", *latents))  # noqa: S608

    def column(self, name: str) -> list[Any]:
        """Return one number of every latent, by id; see `LatentStats` for the names."""
        if name not in _COLUMNS:
            raise ArtifactError(f"no number is called {name!r}; known: {', '.join(_COLUMNS)}")
        return [row[0] for row in self.query(f"SELECT {name} FROM latent ORDER BY id")]  # noqa: S608

    def _groups(
        self, latent: int, stats: LatentStats, edges: list[list[Any]]
    ) -> list[ExampleGroup]:
        examples: dict[int, list[Example]] = {}
        rows = self.query(
            f"SELECT grp, position, value, strip, {_WINDOW}"  # noqa: S608
            " FROM example JOIN window ON number = window WHERE latent = ? ORDER BY grp, rank",
            latent,
        )
        for group, position, value, strip, *window in rows:
            found = self._example(position, value, schema.unpack_strip(strip), window)
            examples.setdefault(group, []).append(found)
        top = examples.get(0, [])
        strongest = min((abs(e.value) for e in top), default=0.0)
        groups = [ExampleGroup(0, abs(stats.peak), strongest, top)] if top else []
        for number, (high, low) in enumerate(edges, start=1):
            if number in examples:
                groups.append(ExampleGroup(number, high, low, examples[number]))
        return groups

    def _origin(self, latent: int) -> Example | None:
        rows = self.query(
            f"SELECT position, strip, {_WINDOW}"  # noqa: S608
            " FROM origin JOIN window ON number = window WHERE latent = ?",
            latent,
        )
        if not rows:
            return None
        position, packed, *window = rows[0]
        strip = schema.unpack_strip(packed)
        return self._example(position, strip.get(position, 0.0), strip, window)

    def _example(
        self, position: int, value: float, strip: dict[int, float], window: list[Any]
    ) -> Example:
        number, strings, heldout, documents, masked = window
        document = document_at(documents, position)
        return Example(
            number, position, value, strip, json.loads(strings), bool(heldout), document,
            frozenset(json.loads(masked)), self._labels.get(document),
        )  # fmt: skip

    @cached_property
    def _labels(self) -> dict[int, str]:
        return dict(self.query("SELECT number, label FROM document"))

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of one query; `schema` has the tables. For any thread."""
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def close(self) -> None:
        """Close the file; the object is of no more use."""
        with self._lock:
            self._db.close()


_COLUMNS = (
    "id", "fires", "fires_heldout", "density", "peak", "mean", "position", "position_share",
    "norm", "cosine", "gist",
)  # fmt: skip
_WINDOW = "number, strings, heldout, documents, masked"
_STATS = ", ".join(f"latent.{name}" for name in _COLUMNS)


def document_at(documents: str, position: int) -> int:
    """Return the document of a position, from the window's column `documents`."""
    return [number for number, start in json.loads(documents) if start <= position][-1]


def _tuples(pairs: list[list[Any]]) -> list[tuple[str, float]]:
    return [(text, value) for text, value in pairs]
