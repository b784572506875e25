"""Sources: tables, archives, folders, data sets and the hub give texts with their labels."""

import bz2
import hashlib
import json
import zipfile
from types import SimpleNamespace

import pytest
from letters import as_lines, read, texts

from saelab.errors import CorpusError
from saelab.harvest import corpus as corpora
from saelab.harvest import newsgroups, rated
from saelab.harvest.corpus import CorpusConfig
from saelab.harvest.newsgroups import thread_of
from saelab.harvest.sources import Request, records
from saelab.types import is_heldout


def found(source, tokens=60, **fields):
    windows, _ = read(source=str(source), tokens=tokens, min_tail=1, **fields)
    return [(d.text, d.label) for w in windows for d in w.begins]


ROWS = ["first text, with a comma " + "x" * 20, 'second "quoted" text\nof two lines ' + "y" * 20]


def test_tables_are_read_plain_packed_and_zipped(tmp_path):
    import csv

    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["n", "text", "kind"], [0, ROWS[0], "k"], [1, ROWS[1], "l"]])
    wanted = [(ROWS[0], "k"), (ROWS[1], "l")]
    assert found(path, label_field="kind") == wanted
    (tmp_path / "b.csv.bz2").write_bytes(bz2.compress(path.read_bytes()))
    assert found(tmp_path / "b.csv.bz2", label_field="kind") == wanted
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.write(path, "inner/a.csv")
    assert found(tmp_path / "c.zip", label_field="kind") == wanted


def test_orange_tables_have_two_more_header_lines(tmp_path):
    path = tmp_path / "a.tab"
    path.write_text(
        "Category\tText\nd\tstring\nclass\t\n\nsci\t" + "a" * 30 + "\nrec\t" + "b" * 30 + "\n"
    )
    assert found(path, label_field="Category") == [("a" * 30, "sci"), ("b" * 30, "rec")]


def test_rated_sentences_have_a_sentiment_where_it_is_clear(tmp_path, monkeypatch):
    path = tmp_path / "rated.txt"
    lines = ['1\t2.25\tSuch a "good" film,  truly.', "2\t-0.5\tMeh.", "3\t-3\tBad, bad. "]
    lines.append("4\t2\tTwo files1\t2\tjoined.")
    path.write_text("".join(f"{line}\r\n" for line in lines))
    monkeypatch.setattr(rated, "SOURCES", frozenset([str(path)]))
    request = Request(str(path), "train", None, "sentiment", "line", streaming=True)
    assert [(r.text, r.label) for r in records(request)] == [
        ('Such a "good" film,  truly.', "positive"),
        ("Bad, bad.", "negative"),
    ]


def test_posts_under_one_subject_are_one_thread(tmp_path, monkeypatch):
    subject = "re clipper chip in article apr bu edu anna writes no"
    assert thread_of(subject) == thread_of("clipper chip announced") == "clipper chip"
    assert thread_of("re re royals in article x writes hello") == "royals"
    assert thread_of("one") == "one"
    assert thread_of("re") == "re"
    path = tmp_path / "posts.tab"
    posts = [subject, "clipper chip announced", "re royals in article x writes hello"]
    head = "Category\tText\nd\tstring\nclass\tmeta\n"
    path.write_text(head + "".join(f"a\t{post}\n" for post in posts))
    monkeypatch.setattr(newsgroups, "SOURCES", frozenset([str(path)]))
    request = Request(str(path), "train", None, "Category", "file", False, "thread")
    assert [r.group for r in records(request)] == ["clipper chip", "clipper chip", "royals"]
    assert {r.label for r in records(request)} == {"a"}
    monkeypatch.undo()
    with pytest.raises(CorpusError, match="has no column 'thread'"):
        list(records(request))


@pytest.mark.parametrize("name", ["films.csv", "films.jsonl"])
def test_texts_about_one_film_are_held_out_together(tmp_path, name):
    rows = [(f"{n:03d}" + "x" * 17, f"film {n % 9}") for n in range(45)]
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("text,film\n" + "".join(f"{text},{film}\n" for text, film in rows))
    else:
        path.write_text("".join(json.dumps({"text": t, "film": f}) + "\n" for t, f in rows))
    wanted = {text: is_heldout(hashlib.sha256(f.encode()).hexdigest(), 0.3) for text, f in rows}
    windows, _ = read(source=str(path), tokens=900, context=20, split_field="film")
    assert {d.text: d.heldout for w in windows for d in w.begins} == wanted
    hashes = {f"film {n}": hashlib.sha256(f"film {n}".encode()).hexdigest() for n in range(9)}
    film = dict(rows)
    assert all(d.split_hash == hashes[film[d.text]] for w in windows for d in w.begins)
    assert 0 < sum(wanted.values()) < 45
    with pytest.raises(CorpusError, match="has no column 'movie'"):
        read(source=str(path), tokens=900, split_field="movie")


def test_the_key_of_a_corpus_knows_what_splits_it_only_where_something_does(tmp_path):
    path = as_lines(tmp_path / "a.txt", ["some text"])
    plain = corpora.identity(CorpusConfig.parse({"source": path, "tokens": 9}))
    split = corpora.identity(
        CorpusConfig.parse({"source": path, "tokens": 9, "split_field": "film"})
    )
    assert "split_field" not in plain
    assert split == plain | {"split_field": "film", "keeps": "split_hash"}


def test_a_folder_or_pattern_of_texts_is_one_document_per_file(tmp_path):
    for name, text in zip("ba", ROWS, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    wanted = [(ROWS[1], None), (ROWS[0], None)]
    assert found(tmp_path, sample_by="file") == wanted
    assert found(tmp_path / "*.txt", sample_by="file") == wanted


def test_a_text_file_can_be_cut_into_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\nparagraph\n\n\nanother one\n")
    assert found(path, 26, sample_by="paragraph") == [
        ("one\nparagraph\n", None),
        ("another one\n", None),
    ]


def test_json_lines_and_parquet_are_read_through_datasets(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": text, "n": n} for n, text in enumerate(ROWS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    wanted = [(ROWS[0], 0), (ROWS[1], 1)]
    assert found(tmp_path / "a.jsonl", label_field="n") == wanted
    assert found(tmp_path / "a.parquet", label_field="n") == wanted
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(CorpusError, match=r"a\.parquet cannot be read"):
        found(tmp_path / "a.parquet")


def test_the_identity_follows_content_and_fields_but_not_streaming(tmp_path):
    source = as_lines(tmp_path / "a.txt", texts(3))
    config = CorpusConfig(source=source, tokens=10)
    one = corpora.identity(config)
    assert corpora.identity(config.model_copy(update={"streaming": True})) == one
    assert corpora.identity(config.model_copy(update={"context": 64})) != one
    as_lines(tmp_path / "a.txt", texts(4))
    assert corpora.identity(config)["checksum"] != one["checksum"]


def test_hub_names_may_carry_a_configuration_and_a_commit(monkeypatch):
    from saelab.harvest import sources

    asked = {}

    def load(builder, **arguments):
        asked.update(arguments, builder=builder)
        return [{"text": "a" * 20, "id": "x"}, {"text": "b" * 20, "id": "y"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    windows, _ = read(source="hub:org/data:small@abc", tokens=30, split="validation")
    assert asked == {
        "builder": "org/data", "name": "small", "revision": "abc", "split": "validation",
        "streaming": False,
    }  # fmt: skip
    assert len(windows) == 2
    assert sources.checksum("hub:org/data:small@abc") == "hub:org/data:small@abc"


def test_a_hub_that_cannot_be_reached_says_how_to_pin(monkeypatch, tmp_path):
    from saelab.harvest import sources

    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path))

    def fail(self, name):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    with pytest.raises(CorpusError, match="pin it: hub:org/data@COMMIT"):
        sources.checksum("hub:org/data")


def test_the_hubs_commit_is_remembered_for_use_without_network(monkeypatch, tmp_path):
    import httpx

    from saelab.harvest import sources

    def fail(self, name):
        raise httpx.ConnectError("no network")

    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    answer = SimpleNamespace(sha="c0ffee")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: answer)
    online = sources.checksum("hub:org/data:small")
    assert online == "hub:org/data:small@c0ffee"
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    assert sources.checksum("hub:org/data:small") == online
    with pytest.raises(CorpusError, match=r"no network.*pin it"):
        sources.checksum("hub:org/other")
    (tmp_path / "cache" / "hub.json").write_text("torn {")
    with pytest.raises(CorpusError, match="pin it"):
        sources.checksum("hub:org/data")


def test_a_data_set_that_cannot_be_downloaded_is_one_error(monkeypatch):
    import httpx

    def fail(builder, **arguments):
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(CorpusError, match="hub:org/data cannot be read: no route to host"):
        read(source="hub:org/data")
