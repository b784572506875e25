"""What flows between the nodes of a circuit, without passing another site of it.

The edge from node u to node v of a later site is the part of u's effect that goes through v, and
through no site between them:

    edge(u → v) = (∂m/∂v) · (∂v/∂u) · (u_clean − u_corrupted)

Every site is cut: what continues from it is a leaf of its own, and gradients stop there. So one
forward pass gives all edges, with one backward pass per target node. ∂v/∂u is taken with the
support of v's code held fixed. Edges into the metric end at `None`.

∂m/∂v is the gradient that v's own effect was found with: in effects of method `integrated` a mean
over a line; ∂v/∂u, and the gradient of edges into the metric, are those of the clean prompt. So a
node's edges into all that comes after it (`outflow`) sum to its effect where all gradients are the
clean ones (`attribution`), or constant. With `integrated` effects they do not: each site's line is
its own. How far they are apart is for every graph to say (`graph.Graph.mismatch`).

Marks et al. 2024, arXiv 2403.19647, section 3.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.circuits.attribution import Parts, Passage, differences, split
from saelab.circuits.bases import Directions, in_forward_order
from saelab.circuits.contrast import OUTSIDE, Contrast, by_slot
from saelab.circuits.nodes import Place
from saelab.errors import ConfigError, ResourceError
from saelab.protocols import Edit, LanguageModel

_CODES = 6
"""Dense codes of a batch that are held at once."""
_ACTIVATIONS = 40
"""Floats per position and width of the model that a block keeps for the backward pass (SwiGLU
blocks with fp32 attention; an upper estimate)."""


def edges(
    model: LanguageModel,
    contrast: Contrast,
    dictionaries: Mapping[str, Directions],
    nodes: Sequence[Place],
    between: Mapping[str, Passage],
    *,
    batch: int = 16,
    memory_gb: float | None = None,
) -> Float[Tensor, "nodes targets"]:
    """Return the edge from each node to each node and, in the last column, to the metric.

    `between` holds the prompts' `attribution.passages`. Averaged over prompts; float64; 0 where the
    target is not later. Time: one backward pass per batch and target. Raises ResourceError, with
    the number of nodes that fits, before anything is computed if `memory_gb` would be exceeded.
    """
    dictionaries = in_forward_order(model, dictionaries)
    _check_places(contrast, dictionaries, nodes)
    check_budget(model, contrast, dictionaries, len(nodes), batch=batch, gb=memory_gb)
    found = torch.zeros(len(nodes), len(nodes) + 1, dtype=torch.float64)
    for rows in torch.arange(len(contrast)).split(batch):
        own = {site: passage.rows(rows, model.device) for site, passage in between.items()}
        found += _Cut(contrast.select(rows), dictionaries, nodes, own).edges(model)
    return found / len(contrast)


def _check_places(
    contrast: Contrast, dictionaries: Mapping[str, Directions], nodes: Sequence[Place]
) -> None:
    """Raise ConfigError if a node is at no site, slot or latent of these dictionaries."""
    for node in nodes:
        dictionary = dictionaries.get(node.site)
        fits = (
            dictionary is not None
            and 0 <= node.column <= dictionary.d_sae
            and 0 <= node.slot < contrast.n_slots
        )
        if not fits:
            raise ConfigError(
                f"there is no node {tuple(node)}: it needs a site among {', '.join(dictionaries)}, "
                f"a slot below {contrast.n_slots}, and a latent of that site's dictionary"
            )


def outflow(
    model: LanguageModel,
    contrast: Contrast,
    dictionaries: Mapping[str, Directions],
    nodes: Sequence[Place],
    between: Mapping[str, Passage],
    *,
    batch: int = 16,
) -> Float[Tensor, " nodes"]:
    """Return the sum of each node's edges into all nodes of later sites, and into the metric.

    Averaged over prompts; float64. The node's effect, where all gradients are the clean ones. Time:
    one backward pass per batch and site.
    """
    dictionaries = in_forward_order(model, dictionaries)
    _check_places(contrast, dictionaries, nodes)
    found = torch.zeros(len(nodes), dtype=torch.float64)
    for rows in torch.arange(len(contrast)).split(batch):
        own = {site: passage.rows(rows, model.device) for site, passage in between.items()}
        found += _Cut(contrast.select(rows), dictionaries, nodes, own).outflow(model)
    return found / len(contrast)


class _Cut:
    """One batch with every site cut."""

    def __init__(
        self,
        chunk: Contrast,
        dictionaries: Mapping[str, Directions],
        nodes: Sequence[Place],
        between: Mapping[str, Passage],
    ) -> None:
        self.chunk, self.dictionaries, self.nodes = chunk, dictionaries, nodes
        self.gradient = {site: passage.gradient for site, passage in between.items()}
        self.lost = {site: differences(d, between[site]) for site, d in dictionaries.items()}
        self.own = {
            site: [i for i, node in enumerate(nodes) if node.site == site] for site in dictionaries
        }
        self.reached: dict[str, Tensor] = {}
        """What arrives at each site, as a function of the leaves before it."""
        self.leaves: dict[str, Tensor] = {}

    def edges(self, model: LanguageModel) -> Float[Tensor, "nodes targets"]:
        """Run the batch, and go back from every target while the graph is alive."""
        table = torch.zeros(len(self.nodes), len(self.nodes) + 1, dtype=torch.float64)

        def fill(metric: Tensor) -> None:
            table[:, -1] = self._into(metric, list(self.dictionaries))
            for target, own in self.own.items():
                self._fill(table, target, own)

        self._run(model, fill)
        return table

    def outflow(self, model: LanguageModel) -> Float[Tensor, " nodes"]:
        """Run the batch, and go back from every site as a whole: x is all its nodes together."""
        total = torch.zeros(len(self.nodes), dtype=torch.float64)

        def add(metric: Tensor) -> None:
            total.add_(self._into(metric, list(self.dictionaries)))
            for target, x in self.reached.items():
                inside = (self.chunk.slots != OUTSIDE)[..., None].to(x)
                whole = (self.gradient[target].to(x) * inside * x).sum()
                total.add_(self._into(whole, self._before(target)))

        self._run(model, add)
        return total

    def _run(self, model: LanguageModel, look: Callable[[Tensor], None]) -> None:
        """Run the cut model; `look` is shown the metric while the graph is alive."""

        def objective(logits: Tensor) -> Tensor:
            metric = self.chunk.measure(logits).sum()
            look(metric)
            return metric

        cuts = {site: self._cut(site) for site in self.dictionaries}
        model.grad_at(self.chunk.clean, [list(cuts)[-1]], objective, cuts)

    def _before(self, target: str) -> list[str]:
        """Return the sites before one."""
        sites = list(self.dictionaries)
        return sites[: sites.index(target)]

    def _cut(self, site: str) -> Edit:
        inside = (self.chunk.slots != OUTSIDE)[..., None]

        def cut(x: Float[Tensor, "n pos d"]) -> Float[Tensor, "n pos d"]:
            self.reached[site] = x
            leaf = self.leaves[site] = x.detach().requires_grad_()
            return torch.where(inside.to(x.device), leaf, x)

        return cut

    def _fill(self, table: Tensor, target: str, own: Sequence[int]) -> None:
        """Fill the columns of a site's nodes."""
        before = self._before(target)
        x = self.reached[target]
        if not own or not before or not x.requires_grad:
            return
        parts = split(self.dictionaries[target], x)
        for i in own:
            table[:, i] = self._into(self._value(parts, self.nodes[i]), before)

    def _value(self, parts: Parts, node: Place) -> Float[Tensor, ""]:
        """Return a target, weighed by what the metric makes of it: (∂m/∂v) · v."""
        dictionary, here = self.dictionaries[node.site], self.chunk.slots == node.slot
        g = self.gradient[node.site].to(parts.f) * here[..., None].to(parts.f)
        if node.column == dictionary.d_sae:
            return (g * parts.error).sum()
        weight = g @ dictionary.W_dec[node.column].detach()
        return (weight * parts.f[..., node.column]).sum()

    def _into(self, value: Float[Tensor, ""], sites: Sequence[str]) -> Float[Tensor, " nodes"]:
        """Return what each node of some earlier sites sends into a value."""
        column = torch.zeros(len(self.nodes), dtype=torch.float64)
        sites = [site for site in sites if self.own[site]]
        if not sites or not value.requires_grad:
            return column
        grads = torch.autograd.grad(
            value, [self.leaves[s] for s in sites], retain_graph=True, allow_unused=True
        )
        for site, g in zip(sites, grads, strict=True):
            if g is not None:
                column[self.own[site]] = self._sent(site, g)
        return column

    @torch.no_grad()
    def _sent(self, site: str, g: Float[Tensor, "n pos d"]) -> Float[Tensor, " own"]:
        """Return what the changes of a site's nodes make of a gradient at the site."""
        dictionary, lost = self.dictionaries[site], self.lost[site]
        columns = [self.nodes[i].column for i in self.own[site]]
        latents = sorted({c for c in columns if c < dictionary.d_sae})
        g = g.to(lost.f)
        sent = lost.f[..., latents] * (g @ dictionary.W_dec[latents].T)
        error = (lost.error * g).sum(-1, keepdim=True)
        both = by_slot(torch.cat([sent, error], -1), self.chunk.slots, self.chunk.n_slots).sum(0)
        place = {latent: j for j, latent in enumerate(latents)} | {dictionary.d_sae: len(latents)}
        slots = torch.tensor([self.nodes[i].slot for i in self.own[site]])
        at = torch.tensor([place[c] for c in columns])
        return both.double().cpu()[slots, at]


# ------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Cost:
    """What a graph takes of memory, in bytes."""

    fixed: float
    """A batch's codes and activations, and the effects of all nodes there are."""
    n_nodes: int

    @property
    def total(self) -> float:
        """With the table of edges: three copies of n × (n + 1) float64 numbers."""
        return self.fixed + 24.0 * self.n_nodes * (self.n_nodes + 1)

    def most_nodes(self, budget: float) -> int:
        """Return how many nodes a budget has room for; 0 if not even the batch fits."""
        room = (budget - self.fixed) / 24
        return 0 if room < 0 else int(((1 + 4 * room) ** 0.5 - 1) / 2)


def cost(
    model: LanguageModel,
    contrast: Contrast,
    dictionaries: Mapping[str, Directions],
    n_nodes: int,
    *,
    batch: int,
) -> Cost:
    """Return about how much memory effects and edges take; an upper estimate."""
    positions = min(batch, len(contrast)) * contrast.clean.shape[1]
    codes = sum(_CODES * d.d_sae + 8 * d.d_in for d in dictionaries.values())
    blocks = _ACTIVATIONS * model.n_layers * model.d_model + 3 * model.d_vocab
    tables = 6 * contrast.n_slots * sum(d.d_sae + 1 for d in dictionaries.values())
    return Cost(4.0 * positions * (codes + blocks) + 8.0 * tables, n_nodes)


def check_budget(
    model: LanguageModel,
    contrast: Contrast,
    dictionaries: Mapping[str, Directions],
    n_nodes: int,
    *,
    batch: int,
    gb: float | None,
) -> None:
    """Raise ResourceError if a graph would take more than a budget in GB (None: any is fine)."""
    if gb is None:
        return
    asked = cost(model, contrast, dictionaries, n_nodes, batch=batch)
    if asked.total <= 1e9 * gb:
        return
    fits = asked.most_nodes(1e9 * gb)
    message = f"a graph of {n_nodes} nodes takes about {asked.total / 1e9:.3g} GB, but {gb:g} are "
    if fits:
        raise ResourceError(f"{message}allowed: {fits} nodes fit")
    raise ResourceError(
        f"{message}allowed, and a batch of {batch} prompts alone takes {asked.fixed / 1e9:.3g} GB: "
        "take a smaller batch"
    )
