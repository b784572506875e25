"""Rows by the place of the text at which they end: known spans, one tokenizer, other texts."""

import hashlib

import pytest
import torch

from saelab import artifacts, dictionaries
from saelab.errors import ArtifactError
from saelab.evals.alignment import align, place_keys
from saelab.evals.similarity import atom_keys, jaccard
from saelab.store import StoreWriter, open_store
from saelab.types import Document, Shard, TokenTable

SITE = "blocks.0.hook_resid_post"
TEXTS = ("the cat sat", "a dog 😀 ran")
WORDS = [[(0, 3), (3, 7), (7, 11)], [(0, 1), (1, 5), (5, 7), (7, 11)]]
HALVES = [
    [(0, 0), (0, 2), (2, 3), (3, 5), (5, 7), (7, 11)],
    [(0, 0), (0, 1), (1, 3), (3, 5), (5, 6), (6, 7), (6, 7), (6, 7), (7, 9), (9, 11)],
]
"""Begins with BOS, cuts words in two, and writes the face as three tokens of one character."""


def make_store(out, texts, spans, *, masked=(), name="s"):
    rows = [(d, place, *span) for d, some in enumerate(spans) for place, span in enumerate(some)]
    document, position, start, end = (torch.tensor(column) for column in zip(*rows, strict=True))
    n = len(rows)
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    mask = torch.zeros(n, dtype=torch.uint8)
    mask[list(masked)] = 4
    table = TokenTable(
        torch.arange(n).int(), document, position.int(), document, start.int(), end.int()
    )
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    documents = tuple(Document(i, hashes[i], False, text) for i, text in enumerate(texts))
    shard = Shard({SITE: x}, {SITE: mask}, table, torch.zeros(n, dtype=torch.bool), documents)
    with artifacts.open_draft(out, "store", name, "a" * 64) as draft:
        with StoreWriter(draft, {SITE: 4}, "float32") as writer:
            writer.append(shard)
            facts = writer.finish(median_norm={SITE: 1.0})
        draft.finish(stage="store", name=name, inputs={}, parents=[], facts=facts)
    return open_store(artifacts.artifact_path(out, "store", name, "a" * 64))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("words"), TEXTS, WORDS)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("halves"), TEXTS, HALVES)


def test_rows_of_two_tokenizers_align_where_both_end_a_token(words, halves):
    found = align([words, halves], [SITE, SITE])
    assert found.rows.tolist() == [[0, 1, 2, 3, 4, 5, 6], [2, 4, 5, 7, 9, 13, 15]]
    assert found.documents.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert found.n_shared == 2
    spans = [store.table(rows).char_end for store, rows in zip([words, halves], found.rows,
             strict=True)]  # fmt: skip
    assert torch.equal(*spans)
    back = align([halves, words], [SITE, SITE])
    assert back.rows.tolist() == found.rows.flip(0).tolist()


def test_of_a_character_in_several_tokens_only_the_last_has_a_place(halves):
    found = align([halves, halves], [SITE, SITE])
    assert found.rows[0].tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 14, 15]


def test_with_one_tokenizer_all_rows_align_whatever_the_order_of_the_documents(tmp_path, words):
    turned = make_store(tmp_path, TEXTS[::-1], WORDS[::-1])
    found = align([words, turned], [SITE, SITE])
    assert found.rows.tolist() == [[0, 1, 2, 3, 4, 5, 6], [4, 5, 6, 0, 1, 2, 3]]
    assert found.hashes == tuple(words.document(i).hash for i in range(2))


def test_a_row_that_one_mask_leaves_out_is_left_out_of_all(tmp_path, words):
    masked = make_store(tmp_path, TEXTS, WORDS, masked=(0, 3))
    assert masked.kept_rows(SITE).tolist() == [1, 2, 4, 5, 6]
    assert align([words, masked], [SITE, SITE]).rows.tolist() == [[1, 2, 4, 5, 6]] * 2
    assert align([words, words, masked], [SITE] * 3).rows.tolist() == [[1, 2, 4, 5, 6]] * 3


def test_stores_of_other_documents_are_refused_with_the_number_they_share(tmp_path, words):
    other = make_store(tmp_path, ("something", "quite other"), [[(0, 9)], [(0, 5), (5, 11)]])
    with pytest.raises(ArtifactError, match=r"share 0 documents, of 2 and 2.*Harvest them from"):
        align([words, other], [SITE, SITE])
    few = make_store(tmp_path, (*TEXTS[:1], "b", "c"), [WORDS[0], [(0, 1)], [(0, 1)]], name="few")
    assert align([words, few], [SITE, SITE]).n_shared == 1
    five = make_store(tmp_path, (TEXTS[0], *"bcde"), [WORDS[0], *[[(0, 1)]] * 4], name="five")
    with pytest.raises(ArtifactError, match="share 1 documents, of 5 and 5"):
        align([five, make_store(tmp_path, (TEXTS[0], *"fghi"), [WORDS[0], *[[(0, 1)]] * 4],
                                name="other-five")], [SITE, SITE])  # fmt: skip


def test_texts_that_share_no_token_end_are_refused_with_how_many_rows_align(tmp_path, words):
    shifted = [[(0, 2), (2, 6), (6, 10)], [(0, 4), (4, 10)]]
    odd = make_store(tmp_path, TEXTS, shifted)
    with pytest.raises(ArtifactError, match=r"of 5 rows in the 2 doc.*only 0 end at the same"):
        align([words, odd], [SITE, SITE])
    arrays = make_store(tmp_path, TEXTS, [[(0, 0)] * 3, [(0, 0)] * 4], name="arrays")
    with pytest.raises(ArtifactError, match="from arrays, which have none"):
        align([words, arrays], [SITE, SITE])


def kept(*rows):
    config = {"type": "itda", "d_in": 4, "d_sae": len(rows), "k": 1, "threshold": 0.5}
    dictionary = dictionaries.create(config)
    dictionary.rows.copy_(torch.tensor(rows))
    return dictionary


def test_with_one_tokenizer_jaccard_on_places_is_jaccard_on_rows(words):
    a, b = kept(6, 0, 2, 3), kept(2, 5, 6)
    places = [place_keys(d, words) for d in (a, b)]
    assert jaccard(*places) == jaccard(atom_keys(a), atom_keys(b)) == 2 / 5
    assert len(places[0]) == 4


def test_atoms_of_two_tokenizers_meet_where_they_end_at_one_character(words, halves):
    """Of `words` 0 and 6 stand where 2 and 15 of `halves` do; 1, 0 (BOS) and 11 stand nowhere."""
    assert jaccard(place_keys(kept(0, 6), words), place_keys(kept(15, 2), halves)) == 1
    assert jaccard(place_keys(kept(0, 6), words), place_keys(kept(15, 1), halves)) == 1 / 3
    assert place_keys(kept(0, 11, 12), halves) == set()
    hash_ = words.document(0).hash
    assert place_keys(kept(1), words) == place_keys(kept(4), halves) == {(hash_, 7)}


def test_atoms_of_disjoint_texts_never_meet(tmp_path, words):
    other = make_store(tmp_path, ("the cat ate", "a dog walks"), WORDS)
    assert jaccard(place_keys(kept(0, 1, 2), words), place_keys(kept(0, 1, 2), other)) == 0


def test_the_token_table_comes_back_by_row_number(halves):
    table = halves.table(torch.tensor([1, 8]))
    assert (table.char_start.tolist(), table.char_end.tolist()) == ([0, 1], [2, 3])
    assert (table.document.tolist(), table.position.tolist()) == ([0, 1], [1, 2])


def test_an_atom_without_a_row_is_left_out(words):
    assert place_keys(kept(-1, 2), words) == {(words.document(0).hash, 11)}
