"""`saelab circuits`: which features carry a task, and what a dictionary sees of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from saelab.circuits.graph import Graph

app = typer.Typer(no_args_is_help=True, help="Which parts of a model carry a task.")

Config = Annotated[Path, typer.Argument(help="A YAML file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value …")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for another run's lock.")]
Top = Annotated[int, typer.Option(help="Nodes to list.")]


@app.command()
def features(config: Config, overrides: Overrides = None, top: Top = 15, wait: Wait = 0.0) -> None:
    """Find the latents and errors that carry a task, how faithful they are, and draw the graph."""
    from saelab import circuit_config, circuit_runs

    settings = circuit_config.load_features_config(config, overrides or [])
    made = circuit_runs.features(settings, wait=wait)
    Console().print(circuit_table(made, circuit_runs.open_circuit(made).graph, top))
    Console().print(f"\nBrowse it:  saelab app {settings.out}", highlight=False)


@app.command()
def supervised(config: Config, overrides: Overrides = None, wait: Wait = 0.0) -> None:
    """Hold dictionaries against what labels see: reconstructions, sparse edits, F1."""
    from saelab import circuit_config, circuit_runs

    settings = circuit_config.load_supervised_config(config, overrides or [])
    made = circuit_runs.supervised(settings, wait=wait)
    Console().print(supervised_table(made))


def circuit_table(path: Path, graph: "Graph", top: int) -> Group:
    """Return a circuit's curves and its strongest nodes."""
    from saelab.report import pretty, read_rows

    rows = read_rows(path)
    curve = [row for row in rows if row["name"] == "faithfulness" and "(n=" in row["arm"]]
    arms = list(dict.fromkeys(row["arm"].split("(n=")[0] for row in curve))
    sizes = sorted({_nodes(row) for row in curve})
    table = _table("faithfulness of n nodes", [str(n) for n in sizes])
    for arm in arms:
        own = {_nodes(r): r for r in curve if r["arm"].split("(n=")[0] == arm}
        cells = [
            pretty(own[n]["value"], own[n]["standard_error"]) if n in own else "" for n in sizes
        ]
        table.add_row(arm, *cells)
    nodes = _table("node", ["effect", "activation"])
    for node in graph.nodes[:top]:
        nodes.add_row(node.id, pretty(node.effect, node.standard_error), pretty(node.activation))
    return Group(
        *(Text(line) for line in _facts(rows, graph)), Text(), table, Text(), nodes, Text(str(path))
    )


def _facts(rows: Sequence[dict[str, Any]], graph: "Graph") -> list[str]:
    from saelab.report import pretty

    found = {(r["name"], r["arm"]): r for r in rows}
    ceiling = found["faithfulness", "all latents, no errors"]
    lines = [
        f"{graph.name}: metric {graph.clean:.3g} on clean and {graph.corrupted:.3g} on corrupted "
        f"prompts; {len(graph.nodes)} nodes have {graph.share:.0%} of all effects",
        f"ceiling without error nodes: {pretty(ceiling['value'], ceiling['standard_error'])}",
    ]
    lines += [
        f"{row['name'].replace('_', ' ')}, {row['arm']}: {row['value']:.0f}"
        for row in rows
        if row["name"].startswith("nodes_at")
    ]
    return lines


def supervised_table(path: Path) -> Table:
    """Return a supervised evaluation: a row per score, a column per dictionary."""
    from saelab.report import pretty, read_rows

    rows = read_rows(path)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    table = _table("score", arms)
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {row["arm"]: row for row in rows if row["name"] == name}
        table.add_row(
            name,
            *(pretty(own[a]["value"], own[a]["standard_error"]) if a in own else "" for a in arms),
        )
    return table


def _nodes(row: dict[str, Any]) -> int:
    return int(row["arm"].rpartition("(n=")[2].rstrip(")"))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column(title)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table
