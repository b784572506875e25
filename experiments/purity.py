"""Do the nodes of a concept tree stand for labels? Purity of some nodes drawn by seed, and trees.

    python -m saelab_experiments.purity runs/semi_nmf-hierarchy [--nodes 10] [--trees 3] [--seed 0]

Reads the feature index of every dictionary of the run that has a hierarchy, of a corpus with
labels, and prints Markdown. Nodes are drawn from all levels alike, dead ones included. A node's
label is chosen on every second one of its strongest examples, each of another document, and scored
on the rest (`saelab/metrics/purity.py`), so that random examples come to the base rate. `p` is the
probability of as many hits by chance; below the table stands how many of the nodes reach twice the
base rate, and how many would if all their examples were random.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from saelab_experiments import pages

from saelab import api, artifacts
from saelab.errors import ArtifactError, ConfigError
from saelab.features import relations
from saelab.features.read import Features
from saelab.features.relations import TreeNode
from saelab.metrics.purity import Purity
from saelab.ops.shuffle import permutation

LIFT = 2.0
"""Times its base rate from which a label counts as a node's own."""
_TREES = 1
"""Stream of the drawn trees."""


def table(features: Features, nodes: Sequence[int], purities: Mapping[int, Purity]) -> list[str]:
    """Return the purity of some nodes as a table, and how many reach `LIFT`."""
    lines = [
        "| node | level | fires on | label | purity | base rate | times | p |",
        "|--:|--:|---|---|--:|--:|--:|--:|",
    ]
    for node in nodes:
        gist = _cell(features.stats(node).gist) or "never"
        lines.append(
            f"| {node} | {features.level_of(node)} | {gist} | {_scores(purities.get(node))} |"
        )
    known = [purities[node] for node in nodes if node in purities]
    reached = sum(purity.lift >= LIFT for purity in known)
    chance = sum(purity.chance_of(LIFT) for purity in known)
    return [
        *lines,
        "",
        f"{reached} of {len(nodes)} nodes have a label at {LIFT:g} times its base rate or more; by "
        f"chance {chance:.1f} would.",
    ]


def _scores(purity: Purity | None) -> str:
    if purity is None:
        return "– | – | – | – | –"
    return (
        f"{_cell(purity.label)} | {purity.share:.2f} ({purity.hits} of {purity.n}) | "
        f"{purity.base:.3f} | {purity.lift:.1f} | {purity.p_value:.2g}"
    )


def _cell(text: str) -> str:
    """Return text that stands in a table as it is."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def outline(node: TreeNode, purities: Mapping[int, Purity], depth: int = 0) -> Iterator[str]:
    """Yield a tree as a nested list: number, weight in its concept, tokens, label."""
    weight = "" if node.weight is None else f" {node.weight:.2f}"
    purity = purities.get(node.id)
    label = "" if purity is None else f", {_cell(purity.label)} {purity.hits} of {purity.n}"
    yield f"{'  ' * depth}- **{node.id}**{weight}: {_cell(node.gist) or 'never fires'}{label}"
    for child in node.children:
        yield from outline(child, purities, depth + 1)


def page(features: Features, *, nodes: int, trees: int, seed: int) -> list[str]:
    """Return the table of drawn nodes and the drawn trees of one index.

    Raises ArtifactError if its corpus had no labels.
    """
    if not features.meta["labels"]:
        raise ArtifactError(
            f"{features.path} knows no labels of its documents; harvest with corpus.label_field"
        )
    drawn = permutation(features.n_nodes, seed)[:nodes].sort().values.tolist()
    purities = relations.purities(features)
    roots = [root for root in relations.forest(features) if root.children]
    shown = permutation(len(roots), seed, _TREES)[:trees].sort().values.tolist()
    levels = " → ".join(map(str, features.levels))
    lines = [f"Levels {levels}, seed {seed}.", "", *table(features, drawn, purities), ""]
    return [*lines, *(line for i in shown for line in outline(roots[i], purities))]


def indexes(run: Path) -> list[tuple[str, Path]]:
    """Return (name, path) of a run's indexes with a hierarchy. Raises ArtifactError if none has."""
    found = [
        (manifest.name, path)
        for path, manifest in artifacts.find_all(run, "features")
        if len(manifest.facts.get("levels", [])) > 1
    ]
    if not found:
        raise ArtifactError(
            f"{run} holds no feature index with a hierarchy: run a semi_nmf dictionary with "
            "`levels`, and `saelab index CONFIG`"
        )
    return found


def main(argv: list[str], say: Callable[[str], Any] = sys.stdout.write) -> None:
    """Print the tables and trees of a run as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m saelab_experiments.purity")
    parser.add_argument("run", type=Path, help="a run's `out` folder")
    parser.add_argument("--nodes", type=int, default=10, help="nodes in the table (10)")
    parser.add_argument("--trees", type=int, default=3, help="trees below it (3)")
    parser.add_argument("--seed", type=int, default=0, help="of both draws (0)")
    given = parser.parse_args(argv)
    if given.nodes < 1 or given.trees < 0:
        raise ConfigError(
            "--nodes should be at least 1 and --trees at least 0, not "
            f"{given.nodes} and {given.trees}"
        )
    for name, path in indexes(given.run):
        with closing(api.open_features(path)) as features:
            lines = page(features, nodes=given.nodes, trees=given.trees, seed=given.seed)
        say("\n".join([f"## {name}", "", *lines]) + "\n\n")


if __name__ == "__main__":
    pages.run(main)
