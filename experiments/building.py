"""What dictionaries built from activations come to, against the tokens that they have seen.

    python -m saelab_experiments.building runs/itda --output docs/itda.md

A row is a line of `curves.py` (every member of a type that differs in budget and seed only) at one
distinct L0 (`--l0`, 32), interpolated as there; of a trained type also its decoder with the same
pursuit (the core evaluator's `re-encoded`). Beside FVU, KL and CE recovered stand

- *tokens*: as many as the member may have; one that is full takes no more;
- *unique*: different training rows that came to it, or all of the store's if these are fewer; the
  sample that a member begins with is not counted;
- *atoms*: fewest and most of the line's members, marked ‡ where one has fewer than it was to have;
- *begin*: seconds before the member's first step, such as ITDA's search for a threshold; empty for
  runs that did not keep it;
- *after*: these, and seconds of the member's own steps;
- *with harvest*: all these, and the time that the store's harvest took for so many tokens;
- *encode*: milliseconds per 1,000 held-out rows with the codes of that row, the median of
  `--rounds` interleaved rounds on this machine.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from saelab_experiments import pages
from saelab_experiments.lines import METRICS, Line, at, lines_of

from saelab import api, artifacts, leaderboard
from saelab.artifacts import Manifest
from saelab.errors import ArtifactError, ConfigError
from saelab.evals.encoders import OwnEncoder, PursuitEncoder
from saelab.leaderboard import Scored
from saelab.protocols import Encoder, Store
from saelab.types import Batch

ROWS = 4096
"""Held-out rows that encoding is timed on."""
SHOWN = ("fvu", "kl", "ce_recovered_zero")


@dataclass(frozen=True)
class Row:
    """A line of the run, at one L0."""

    label: str
    line: Line
    tokens: int
    seen: int
    """Rows that came to it before it was full."""
    atoms: tuple[int, int]
    """Fewest and most of the line's members."""
    wanted: int
    """How many atoms there were to be."""
    begin: float | None
    """Seconds before the first step."""
    seconds: float | None
    """These, and of its own steps."""
    member: Scored
    """The one whose encoding is timed: the nearest in L0."""
    pursued: bool = False
    """Whether its codes are those of pursuit instead of its own."""


def rows_of(board: Sequence[Scored], l0: float) -> list[Row]:
    """Return the run's lines, and for types with an encoder of their own the same by pursuit."""
    by_name = {one.name: one for one in board}
    found = []
    for arm in ("dictionary", "re-encoded"):
        for line in lines_of(board, arm):
            nearest = min(line.points, key=lambda point: abs(point.l0 - l0))
            member = by_name[nearest.name]
            pursued = arm == "re-encoded"
            if pursued and "center" in member.inputs["dictionary"]:
                continue  # its own codes are these
            label = f"{line.label}, decoder with pursuit" if pursued else line.label
            tokens = member.inputs["train"]["tokens"]
            atoms = [by_name[point.name].facts["d_sae"] for point in line.points]
            found.append(
                Row(
                    label, line, tokens, member.facts.get("tokens_seen", tokens),
                    (min(atoms), max(atoms)), member.inputs["dictionary"]["d_sae"],
                    nearest.init_seconds, nearest.seconds, member, pursued,
                )
            )  # fmt: skip
    return sorted(found, key=lambda row: (row.member.type, row.label, row.tokens))


def encode_times(
    rows: Sequence[Row], folders: Mapping[str, Path], store: Store, rounds: int
) -> list[float]:
    """Return milliseconds per 1,000 rows for each line's codes; the lines take turns."""
    encoders = [_encoder(row, folders) for row in rows]
    batch = next(store.scan(rows[0].member.site, batch=ROWS, split="heldout"))
    taken: list[list[float]] = [[] for _ in rows]
    for number in range(rounds + 1):
        for encode, times in zip(encoders, taken, strict=True):
            started = time.perf_counter()
            _encode(encode, batch)
            if number:  # the first round warms up
                times.append(time.perf_counter() - started)
    return [1e6 * statistics.median(times) / len(batch) for times in taken]


@torch.no_grad()
def _encode(encode: Encoder, batch: Batch) -> None:
    encode(batch)


def _encoder(row: Row, folders: Mapping[str, Path]) -> Encoder:
    dictionary = api.load(folders[row.member.content_hash])
    if row.pursued:
        return PursuitEncoder(dictionary, row.member.inputs["dictionary"]["k"])
    return OwnEncoder(dictionary)


def table(
    rows: Sequence[Row], l0: float, unique: int, per_token: float, encoding: Sequence[float]
) -> list[str]:
    """Return the Markdown table. `unique` rows are for training; harvest took `per_token` s."""
    heads = [
        "", "tokens", "unique", "atoms", *(METRICS[m] for m in SHOWN), "begin, s", "after, s",
        "with harvest, s", "encode, ms per 1,000",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for row, milliseconds in zip(rows, encoding, strict=True):
        seen = min(row.seen, unique)
        whole = None if row.seconds is None else row.seconds + per_token * seen
        seconds = ["" if s is None else f"{s:.1f}" for s in (row.begin, row.seconds, whole)]
        scores = [str(found) if (found := at(row.line, m, l0)) else "" for m in SHOWN]
        cells = [
            f"**{row.label}**", f"{row.tokens:,}", f"{seen:,}", _atoms(row), *scores, *seconds,
            f"{milliseconds:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _atoms(row: Row) -> str:
    fewest, most = row.atoms
    text = f"{most:,}" if fewest == most else f"{fewest:,}–{most:,}"
    return text if fewest == row.wanted else f"{text} ‡"


def page(folder: Path, l0: float, rounds: int) -> str:
    """Return the page of a run. Raises ArtifactError if it has no scores, or several sites."""
    members = [s for s in leaderboard.scored(folder) if s.row("fvu") and s.row("l0")]
    boards = leaderboard.boards(members, "fvu") if members else []
    if len(boards) != 1:
        raise ArtifactError(
            f"{folder} should hold members scored on one site of one store, not on {len(boards)}"
        )
    [board] = boards
    store = _store(folder, board[0])
    found = rows_of(board, l0)
    folders = {m.content_hash: path for path, m in artifacts.find_all(folder, "dictionary")}
    encoding = encode_times(found, folders, store, rounds)
    unique = store.n_kept(board[0].site, "train")
    per_token = _harvest_seconds(store) / store.n_rows
    n = next(row["n"] for row in board[0].rows if row["name"] == "fvu")
    head = (
        f"{board[0].site}, {n:,} held-out rows, at a distinct L0 of {l0:g} († the nearest that was "
        f"measured; ‡ fewer atoms than there was room for). Harvest: {1 / per_token:,.0f} tokens/s."
    )
    return "\n".join([head, "", *table(found, l0, unique, per_token, encoding), ""])


def _store(folder: Path, one: Scored) -> Any:
    wanted = one.results.parent("store").content_hash
    for path, manifest in _stores(folder):
        if manifest.content_hash == wanted:
            return api.open_store(path)
    raise ArtifactError(f"{folder} lacks the store that its members were scored on")


def _stores(folder: Path) -> list[tuple[Path, Manifest]]:
    return artifacts.find_all(folder, "store")


def _harvest_seconds(store: Any) -> float:
    run = artifacts.read_json(store.path / "run.json")
    return float(run["seconds"])


def main(argv: list[str], say: Callable[[str], Any] = sys.stdout.write) -> None:
    """Print the table, or write it to `--output`."""
    parser = argparse.ArgumentParser(prog="python -m saelab_experiments.building")
    parser.add_argument("run", type=Path, help="a run's `out` folder")
    parser.add_argument("--output", type=Path, help="Markdown file; printed if left out")
    parser.add_argument("--l0", type=float, default=32.0, help="distinct L0 (32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing (5)")
    given = parser.parse_args(argv)
    if given.l0 <= 0 or given.rounds < 1:
        raise ConfigError("--l0 should be above 0, and --rounds at least 1")
    text = page(given.run, given.l0, given.rounds)
    pages.put(text, given.output, say)


if __name__ == "__main__":
    pages.run(main)
