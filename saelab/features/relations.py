"""How latents and concepts of an index hang together: tree, shared neurons, shared labels.

A node may be part of several concepts. Where a tree has to be drawn it stands below the one that it
holds most of: its *first* concept.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from saelab.features.read import Features, document_at
from saelab.metrics.purity import Purity, label_purity


@dataclass(frozen=True)
class Link:
    """A node at the other end of an edge of the hierarchy."""

    id: int
    weight: float
    """How much of the concept the node below holds, between directions of unit norm."""
    gist: str


@dataclass(frozen=True)
class TreeNode:
    """A latent or concept with all that stands below it in the drawn tree."""

    id: int
    level: int
    """0 for latents."""
    gist: str
    fires: int
    weight: float | None
    """How much of the concept above it holds; None for a node without one."""
    also: tuple[Link, ...]
    """Other concepts that it is part of, largest weight first."""
    children: list["TreeNode"] = field(default_factory=list)
    """Largest weight first."""

    @property
    def n_leaves(self) -> int:
        """Number of nodes below it that have none below them; 1 for such a node."""
        return sum(child.n_leaves for child in self.children) or 1

    def walk(self) -> Iterator["TreeNode"]:
        """Yield the node and all below it, each before its children."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class NeuronUse:
    """A neuron of a latent's direction."""

    neuron: int
    weight: float
    users: int
    """Number of nodes of the same level that use it, this one included."""


@dataclass(frozen=True)
class Overlap:
    """Another node of the same level that uses some of the same neurons."""

    id: int
    shared: int
    jaccard: float
    """Share of the neurons of either that both use."""
    cosine: float
    """Of the two directions, each cut to its kept neurons."""
    gist: str


# ---------------------------------------------------------------------------------------- the tree


def parents(features: Features, node: int) -> list[Link]:
    """Return the concepts that a node is part of, largest weight first."""
    return _links(features, "parent", "child", node)


def children(features: Features, node: int) -> list[Link]:
    """Return the nodes that are part of a concept, largest weight first."""
    return _links(features, "child", "parent", node)


def _links(features: Features, wanted: str, given: str, node: int) -> list[Link]:
    rows = features.query(
        f"SELECT {wanted}, weight, gist FROM edge JOIN latent ON latent.id = {wanted}"  # noqa: S608
        f" WHERE {given} = ? ORDER BY weight DESC, {wanted}",
        node,
    )
    return [Link(*row) for row in rows]


def forest(features: Features) -> list[TreeNode]:
    """Return the drawn trees, those with the most leaves first; nothing without a hierarchy.

    Roots are the concepts of the highest level, and whatever is part of none.
    """
    if len(features.levels) == 1:
        return []
    above: dict[int, list[Link]] = defaultdict(list)
    for child, *link in features.query(
        "SELECT child, parent, weight, gist FROM edge JOIN latent ON latent.id = parent"
        " ORDER BY child, weight DESC, parent"
    ):
        above[child].append(Link(*link))
    nodes: dict[int, TreeNode] = {}
    for node, gist, fires in features.query("SELECT id, gist, fires FROM latent ORDER BY id"):
        links = above.get(node, [])
        weight = links[0].weight if links else None
        nodes[node] = TreeNode(
            node, features.level_of(node), gist, fires, weight, tuple(links[1:])
        )  # fmt: skip
    for child, links in above.items():
        nodes[links[0].id].children.append(nodes[child])
    for node in nodes.values():
        node.children.sort(key=lambda child: (-(child.weight or 0.0), child.id))
    roots = [node for node in nodes.values() if node.id not in above]
    return sorted(roots, key=lambda root: (-root.level, -root.n_leaves, root.id))


# ----------------------------------------------------------------------------------------- neurons


def neurons(features: Features, node: int) -> list[NeuronUse]:
    """Return the neurons that a node uses, largest weight first; none where it has none."""
    rows = features.query(
        "SELECT neuron, weight, (SELECT count(*) FROM neuron AS other"
        " WHERE other.neuron = mine.neuron AND other.latent BETWEEN ? AND ?)"
        " FROM neuron AS mine WHERE latent = ? ORDER BY rank",
        *_level_of(features, node), node,
    )  # fmt: skip
    return [NeuronUse(*row) for row in rows]


def overlapping(features: Features, node: int, limit: int = 10) -> list[Overlap]:
    """Return the nodes of its level that share neurons with a node, largest Jaccard first."""
    rows = features.query(
        "WITH near AS (SELECT other.latent AS id, count(*) AS shared,"
        " sum(mine.weight * other.weight) AS product"
        " FROM neuron AS mine JOIN neuron AS other ON other.neuron = mine.neuron"
        " WHERE mine.latent = ? AND other.latent != mine.latent AND other.latent BETWEEN ? AND ?"
        " GROUP BY other.latent)"
        " SELECT id, shared, product, gist, (SELECT count(*) FROM neuron WHERE latent = id),"
        " (SELECT sum(weight * weight) FROM neuron WHERE latent = id)"
        " FROM near JOIN latent USING (id)",
        node, *_level_of(features, node),
    )  # fmt: skip
    weights = [use.weight for use in neurons(features, node)]
    energy = sum(weight**2 for weight in weights)
    found = [
        Overlap(
            other, shared, shared / (len(weights) + n - shared),
            product / math.sqrt(energy * their_energy), gist,
        )
        for other, shared, product, gist, n, their_energy in rows
    ]  # fmt: skip
    return sorted(found, key=lambda other: (-other.jaccard, other.id))[:limit]


def overlaps(features: Features, nodes: Sequence[int]) -> list[list[float]] | None:
    """Return the Jaccard index of the neurons of each two nodes; None if none has neurons."""
    users: dict[int, list[int]] = defaultdict(list)
    place = {node: i for i, node in enumerate(nodes)}
    sizes = [0] * len(nodes)
    for node, neuron in features.query("SELECT latent, neuron FROM neuron ORDER BY latent, rank"):
        if node in place:
            users[neuron].append(place[node])
            sizes[place[node]] += 1
    if not users:
        return None
    shared = np.zeros((len(nodes), len(nodes)))
    for together in users.values():
        shared[np.ix_(together, together)] += 1
    either = np.add.outer(sizes, sizes) - shared
    return np.divide(shared, either, where=either > 0, out=np.zeros_like(shared)).tolist()


def _level_of(features: Features, node: int) -> tuple[int, int]:
    """Return the first and the last node of a node's level."""
    level = features.level_of(node)
    first = sum(features.levels[:level])
    return first, first + features.levels[level] - 1


# ------------------------------------------------------------------------------------------ labels


def purities(features: Features) -> Mapping[int, Purity]:
    """Return the label purity of each node's strongest examples, one per document.

    Base rates are those among all windows of labelled documents. Nodes with fewer than two such
    examples have none, nor has any where the store knew no labels.
    """
    counts = features.meta["labels"]
    known = dict(features.query("SELECT number, label FROM document"))
    found: dict[int, dict[int, str]] = defaultdict(dict)
    for node, position, documents in features.query(
        "SELECT latent, position, documents FROM example JOIN window ON number = window"
        " WHERE grp = 0 ORDER BY latent, rank"
    ):
        document = document_at(documents, position)
        if document in known:
            found[node].setdefault(document, known[document])
    scored = {node: label_purity(list(mine.values()), counts) for node, mine in found.items()}
    return {node: purity for node, purity in scored.items() if purity is not None}
