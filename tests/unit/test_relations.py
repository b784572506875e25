"""Trees, shared neurons, origins and labels in the index, against the dense codes and weights."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from feature_fakes import TinyDictionary, TinyStore
from test_features import CONFIG, make

from saelab.features import relations
from saelab.features.nodes import Nodes
from saelab.features.read import Features
from saelab.metrics.purity import label_purity
from saelab.protocols import LabelledStore
from saelab.types import Document

SIZES = [13, 5, 2]


class Grouped(TinyDictionary):
    """Latents that are three neurons each, five concepts above them, and two above those."""

    n_levels = 3

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.config = SimpleNamespace(type="grouped", needs_neurons=True)
        self.W_dec = self.W_dec * (self.W_dec.abs() >= self.W_dec.abs().topk(3).values[:, -1:])
        above = [torch.nn.functional.normalize(torch.randn(n, 8, generator=g)) for n in SIZES[1:]]
        self._features = [self.W_dec, *above]
        shapes = pairwise(SIZES)
        self._trees = [torch.randn(shape, generator=g).relu() for shape in shapes]
        self._trees[0][3] = 0  # a latent that is part of nothing

    def features(self, level):
        return self._features[level]

    def tree(self, level):
        return self._trees[level - 1]


class Kept(TinyDictionary):
    """Latents that are rows of the tiny store; the last has no row."""

    def __init__(self, store):
        super().__init__()
        rows = store.kept.nonzero().squeeze(1)[3 : 3 + 9 * 12 : 9]
        self.rows = torch.cat([rows, torch.tensor([-1])])
        self.positions = torch.cat([rows - store.first[store.window_number[rows]], self.rows[-1:]])
        self.tokens = torch.cat([store.ids[rows], self.rows[-1:]])
        self.W_dec = torch.nn.functional.normalize(store.x[self.rows])


class LabelledTiny(TinyStore, LabelledStore):
    """Documents of three topics; some have none."""

    def __init__(self):
        super().__init__()
        self.n_documents = self.n_windows

    def document(self, number):
        label = None if number % 7 == 0 else ("home", "sea", "sky")[number % 3]
        return Document(number, f"{number}", number % 5 == 4, "text", label)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("tree"), dictionary=Grouped(), store=LabelledTiny())[0]
    opened = Features(folder)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def dense():
    """Codes of all nodes on every row: z, z T₁, z T₁ T₂; 0 on masked rows."""
    store, d = TinyStore(), Grouped()
    z = d.encode(store.x)
    z[~store.kept] = 0
    return torch.cat([z, z @ d.tree(1), z @ d.tree(1) @ d.tree(2)], 1)


# ---------------------------------------------------------------------------------------- the tree


def test_concepts_are_coded_by_what_their_children_are(grouped, dense):
    assert (grouped.levels, grouped.n_latents, grouped.n_nodes) == (SIZES, 13, 20)
    assert [grouped.level_of(node) for node in (0, 12, 13, 17, 18, 19)] == [0, 0, 1, 1, 2, 2]
    for node in range(20):
        page = grouped.latent(node)
        z = dense[:, node]
        assert page.stats.fires == int((z != 0).sum())
        if page.stats.fires:
            assert page.stats.peak == pytest.approx(float(z[z.abs().argmax()]), rel=1e-5)
            best = page.groups[0].examples[0]
            row = int(TinyStore().first[best.window]) + best.position
            assert row == int(z.abs().argmax())


def test_what_lies_below_the_types_floor_does_not_count_in_any_level(dense):
    d = Grouped()
    d.l0_floor = 0.3
    z = Nodes.of(d).encode_sparse(TinyStore().x).dense()
    kept = TinyStore().kept
    for columns in (slice(0, 13), slice(13, 18), slice(18, 20)):
        mine = dense[kept, columns]
        counted = mine.abs() >= 0.3 * mine.abs().amax(1, keepdim=True)
        torch.testing.assert_close(z[kept, columns], mine * counted)


def test_edges_are_the_trees_weights_from_both_ends(grouped):
    firsts = (0, 13, 18)
    for level in (1, 2):
        weights = Grouped().tree(level)
        for i, row in enumerate(weights):
            links = relations.parents(grouped, firsts[level - 1] + i)
            wanted = {firsts[level] + j: w for j, w in enumerate(row.tolist()) if w}
            assert {link.id: link.weight for link in links} == pytest.approx(wanted, rel=1e-5)
            assert [link.weight for link in links] == sorted(
                (link.weight for link in links), reverse=True
            )
        for j, column in enumerate(weights.T):
            links = relations.children(grouped, firsts[level] + j)
            wanted = {firsts[level - 1] + i: w for i, w in enumerate(column.tolist()) if w}
            assert {link.id: link.weight for link in links} == pytest.approx(wanted, rel=1e-5)


def test_each_node_is_drawn_once_below_the_concept_that_it_holds_most_of(grouped):
    roots = relations.forest(grouped)
    nodes = [node for root in roots for node in root.walk()]
    assert sorted(node.id for node in nodes) == list(range(20))
    above = {child.id: node.id for node in nodes for child in node.children}
    for i, row in enumerate(Grouped().tree(1)):
        assert above.get(i) == (13 + int(row.argmax()) if row.any() else None)
    for i, row in enumerate(Grouped().tree(2)):
        assert above.get(13 + i) == (18 + int(row.argmax()) if row.any() else None)
    assert [root.level for root in roots] == sorted((root.level for root in roots), reverse=True)
    assert roots[-1].id == 3
    assert sum(root.n_leaves for root in roots) == sum(not node.children for node in nodes)
    shown = next(node for node in nodes if node.also)
    everywhere = [shown.weight, *(link.weight for link in shown.also)]
    assert everywhere == [link.weight for link in relations.parents(grouped, shown.id)]


def test_neighbours_are_of_the_same_level(grouped):
    for node in range(20):
        near = {grouped.level_of(n.id) for n in grouped.latent(node).neighbours}
        assert near == {grouped.level_of(node)}


def test_concepts_do_not_count_as_latents_in_the_facts(tmp_path):
    facts = make(tmp_path, dictionary=Grouped())[1]
    assert (facts["d_sae"], facts["levels"], facts["dead"]) == (13, SIZES, 1)


# ----------------------------------------------------------------------------------------- neurons


def test_neurons_and_overlaps_are_those_of_the_sets_of_weights(grouped):
    W = Grouped().W_dec
    sets = [set(row.nonzero().squeeze(1).tolist()) for row in W]
    for latent in range(13):
        used = relations.neurons(grouped, latent)
        assert {use.neuron for use in used} == sets[latent]
        for use in used:
            assert use.weight == pytest.approx(float(W[latent, use.neuron]), rel=1e-5)
            assert use.users == sum(use.neuron in mine for mine in sets)
        sizes = [abs(use.weight) for use in used]
        assert sizes == sorted(sizes, reverse=True)
        found = relations.overlapping(grouped, latent, limit=13)
        shared = {i: len(sets[i] & sets[latent]) for i in range(13) if i != latent}
        assert {o.id: o.shared for o in found} == {i: n for i, n in shared.items() if n}
        for other in found:
            both = sets[other.id] | sets[latent]
            assert other.jaccard == pytest.approx(other.shared / len(both))
            cosine = torch.nn.functional.cosine_similarity(W[latent], W[other.id], dim=0)
            assert other.cosine == pytest.approx(float(cosine), abs=1e-4)
        assert [o.jaccard for o in found] == sorted((o.jaccard for o in found), reverse=True)
        assert relations.overlapping(grouped, latent, limit=1) == found[:1]


def test_the_matrix_of_overlaps_is_jaccards_in_the_given_order(grouped):
    sets = [set(row.nonzero().squeeze(1).tolist()) for row in Grouped().W_dec]
    order = [5, 0, 11]
    wanted = [[len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for b in order] for a in order]
    torch.testing.assert_close(
        torch.tensor(relations.overlaps(grouped, order)), torch.tensor(wanted)
    )


def test_only_so_many_neurons_are_kept(tmp_path):
    config = CONFIG.model_copy(update={"neurons": 2})
    folder, _ = make(tmp_path, dictionary=Grouped(), config=config)
    opened = Features(folder)
    assert [len(relations.neurons(opened, latent)) for latent in (0, 14)] == [2, 2]
    opened.close()


def test_a_plain_dictionary_has_no_tree_no_neurons_no_origin_and_no_labels(tmp_path):
    opened = Features(make(tmp_path)[0])
    assert opened.levels == [13]
    assert relations.forest(opened) == relations.parents(opened, 0) == []
    assert relations.neurons(opened, 0) == relations.overlapping(opened, 0) == []
    assert relations.overlaps(opened, [0, 1]) is None
    assert opened.latent(0).origin is None
    assert relations.purities(opened) == {}
    assert opened.latent(0).groups[0].examples[0].label is None
    opened.close()


# ----------------------------------------------------------------------------------------- origins


def test_a_latent_that_is_a_row_opens_on_its_place_in_the_text(tmp_path):
    store = TinyStore()
    d = Kept(store)
    z = d.encode(store.x)
    z[~store.kept] = 0
    opened = Features(make(tmp_path, dictionary=d, store=store)[0])
    for latent, row in enumerate(d.rows[:-1].tolist()):
        origin = opened.latent(latent).origin
        window = store.window("here", int(store.window_number[row]))
        assert (origin.window, origin.position) == (window.number, row - window.first_row)
        assert origin.strings == list(window.strings)
        assert origin.heldout == window.heldout
        values = z[window.first_row : window.first_row + len(window), latent]
        assert origin.strip == {p: v for p, v in enumerate(values.tolist()) if v}
        assert origin.value == float(z[row, latent])
    assert opened.latent(12).origin is None
    opened.close()


@pytest.mark.parametrize("wrong", ["tokens", "positions", "rows"])
def test_rows_of_another_store_are_no_origins(tmp_path, wrong):
    store = TinyStore()
    d = Kept(store)
    getattr(d, wrong)[4] += 1 if wrong != "rows" else store.n_rows
    opened = Features(make(tmp_path, dictionary=d, store=store)[0])
    assert all(opened.latent(latent).origin is None for latent in range(13))
    opened.close()


# ------------------------------------------------------------------------------------------ labels


def test_labels_of_documents_are_shown_and_counted(grouped):
    store = LabelledTiny()
    labels = [store.document(number).label for number in range(store.n_documents)]
    assert grouped.meta["labels"] == Counter(label for label in labels if label is not None)
    for node in range(20):
        for group in grouped.latent(node).groups:
            assert all(e.label == labels[e.document] for e in group.examples)


def test_purities_are_those_of_the_strongest_examples_with_labels(grouped):
    found = relations.purities(grouped)
    for node in range(20):
        top = [g for g in grouped.latent(node).groups if g.number == 0]
        labels = [e.label for g in top for e in g.examples if e.label is not None]
        wanted = label_purity(labels, grouped.meta["labels"])
        assert found.get(node) == wanted
    assert found
