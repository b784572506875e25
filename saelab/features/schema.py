"""The tables of `features.db`, and how strips of activations are packed into them.

One file holds everything that a page about a latent shows, so that the store may be deleted:

    meta       one JSON value per key: dictionary, site, model, counts, configuration
    latent     per latent its counts and densities, and a JSON `detail` (histogram, logits, …)
    token      per latent the tokens that it fires on most, by share of its activation
    window     the windows that hold an example: token strings, split, documents, kept positions
    document   the labels of those windows' documents, where the store knows some
    example    (latent, group, rank) → window, position, value, and the strip of values
    edge       (child, parent) → weight, where the dictionary has a hierarchy
    neuron     (latent, rank) → neuron, weight, where directions are sums of neurons
    origin     latent → window, position, strip, where a latent is a row of the store
    search     full text: tokens fired on, tokens promoted, text around top examples

Group 0 holds the strongest windows; groups 1, 2, … the quantiles of |z|, strongest first. The
concepts of a hierarchy are numbered on from the latents, level by level (`nodes`), and have every
row that a latent has.
"""

import sqlite3
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

SCHEMA = 2
"""Stored as `PRAGMA user_version`; readers refuse any other."""
FILE = "features.db"
ENOUGH = 50
"""Held-out firings below which a latent is too rare to score (measurement page, section 13)."""

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE latent (
    id INTEGER PRIMARY KEY,
    fires INTEGER NOT NULL,
    fires_heldout INTEGER NOT NULL,
    density REAL,
    peak REAL NOT NULL,
    mean REAL,
    position INTEGER,
    position_share REAL NOT NULL,
    norm REAL NOT NULL,
    cosine REAL,
    gist TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE TABLE token (
    latent INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    text TEXT NOT NULL,
    fires INTEGER NOT NULL,
    share REAL NOT NULL,
    PRIMARY KEY (latent, rank)
) WITHOUT ROWID;
CREATE TABLE window (
    number INTEGER PRIMARY KEY,
    heldout INTEGER NOT NULL,
    strings TEXT NOT NULL,
    documents TEXT NOT NULL,
    masked TEXT NOT NULL
);
CREATE TABLE document (number INTEGER PRIMARY KEY, label TEXT NOT NULL);
CREATE TABLE example (
    latent INTEGER NOT NULL,
    grp INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    window INTEGER NOT NULL,
    position INTEGER NOT NULL,
    value REAL NOT NULL,
    strip BLOB NOT NULL,
    PRIMARY KEY (latent, grp, rank)
) WITHOUT ROWID;
CREATE TABLE edge (
    child INTEGER NOT NULL,
    parent INTEGER NOT NULL,
    weight REAL NOT NULL,
    PRIMARY KEY (child, parent)
) WITHOUT ROWID;
CREATE TABLE neuron (
    latent INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    neuron INTEGER NOT NULL,
    weight REAL NOT NULL,
    PRIMARY KEY (latent, rank)
) WITHOUT ROWID;
CREATE TABLE origin (
    latent INTEGER PRIMARY KEY,
    window INTEGER NOT NULL,
    position INTEGER NOT NULL,
    strip BLOB NOT NULL
);
CREATE VIRTUAL TABLE search USING fts5 (fires, promotes, context, content='', detail=column);
"""
INDEXES = """
CREATE INDEX token_text ON token (text, share);
CREATE INDEX edge_parent ON edge (parent, child, weight);
CREATE INDEX neuron_latents ON neuron (neuron, latent, weight);
"""

_STRIP = np.dtype([("position", "<i4"), ("value", "<f4")])


def create(path: Path) -> sqlite3.Connection:
    """Open a new database inside its one transaction; equal inserts give equal bytes."""
    path.unlink(missing_ok=True)
    db = sqlite3.connect(path, isolation_level=None)
    # No journal and no syncs: a crash throws the whole file away, and the caller syncs it once.
    for pragma in (
        "page_size = 8192", "journal_mode = OFF", "synchronous = OFF",
        "locking_mode = EXCLUSIVE", "cache_size = -65536", f"user_version = {SCHEMA}",
    ):  # fmt: skip
        db.execute(f"PRAGMA {pragma}")
    db.execute("BEGIN")
    for statement in TABLES.split(";\n"):
        db.execute(statement)
    return db


def close(db: sqlite3.Connection) -> None:
    """Add the indexes, commit the transaction and close."""
    for statement in INDEXES.strip().split(";\n"):
        db.execute(statement)
    db.execute("COMMIT")
    db.close()


def pack_strips(
    positions: Int[ndarray, " nnz"],
    values: Float[ndarray, " nnz"],
    offsets: Int[ndarray, " m_plus_1"],
) -> list[bytes]:
    """Return m strips of (position, value) pairs as bytes, cut at `offsets`."""
    pairs = np.empty(len(positions), _STRIP)
    pairs["position"], pairs["value"] = positions, values
    data, size = pairs.tobytes(), _STRIP.itemsize
    edges = (offsets * size).tolist()
    return [data[a:b] for a, b in pairwise(edges)]


def unpack_strip(data: bytes) -> dict[int, float]:
    """Return a strip as position → value."""
    pairs = np.frombuffer(data, _STRIP)
    return dict(zip(pairs["position"].tolist(), pairs["value"].tolist(), strict=True))
