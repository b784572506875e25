"""Concept trees and neurons as HTML: nodes and numbers in, text out."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from saelab.features.relations import NeuronUse, TreeNode
from saelab.metrics.purity import Purity
from saelab_app.components import numbers
from saelab_app.components.pieces import badge, bar
from saelab_app.components.text import chips

Link = Callable[[int], str]
"""Gives the escaped address of a node's page."""
ALSO = 4
"""Other concepts of a node that are named."""


def outline(roots: Sequence[TreeNode], purities: Mapping[int, Purity], link: Link) -> str:
    """Return the trees as nested lists, closed at first; every number leads to the node's page."""
    return f'<div class="sl-tree">{"".join(_branch(root, purities, link) for root in roots)}</div>'


def _branch(node: TreeNode, purities: Mapping[int, Purity], link: Link) -> str:
    line = _line(node, purities.get(node.id), link)
    if not node.children:
        return f'<div class="leaf">{line}</div>'
    below = "".join(_branch(child, purities, link) for child in node.children)
    return f"<details><summary>{line}</summary>{below}</details>"


def _line(node: TreeNode, purity: Purity | None, link: Link) -> str:
    weight = "" if node.weight is None else f"<small>{node.weight:.2f}</small>"
    below = f"<small>{node.n_leaves} below</small>" if node.children else ""
    found = "" if purity is None else label(purity)
    also = " ".join(f'<a href="{link(other.id)}">{other.id}</a>' for other in node.also[:ALSO])
    also = f"<small>also in {also}</small>" if also else ""
    return f'<a href="{link(node.id)}">{node.id}</a>{weight}{chips(node.gist)}{below}{found}{also}'


def label(purity: Purity) -> str:
    """Return the label of a node's strongest examples; tinted from twice its base rate on."""
    about = (
        f"{purity.hits} of {purity.n} strongest examples; base rate {numbers.percent(purity.base)};"
        f" chosen on as many others; p = {purity.p_value:.2g}"
    )
    kind = "live" if purity.lift >= 2 else ""
    return " " + badge(f"{purity.label} {numbers.percent(purity.share)}", kind, about)


def neurons(uses: Sequence[NeuronUse]) -> str:
    """Return a direction's neurons with their weights, and how many others use each."""
    most = max((abs(use.weight) for use in uses), default=0.0) or 1.0
    rows = "".join(
        f"<tr><td>{use.neuron}</td>"
        f'<td class="bar">{bar(abs(use.weight) / most, "" if use.weight > 0 else "neg")}</td>'
        f'<td class="num">{use.weight:.2f}</td><td class="num">{escape(_others(use))}</td></tr>'
        for use in uses
    )
    return f'<table class="sl-bars">{rows}</table>'


def _others(use: NeuronUse) -> str:
    return f"+ {use.users - 1}" if use.users > 1 else "alone"
