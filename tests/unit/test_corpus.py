"""The corpus: texts of every source become windows whose tokens know where they came from."""

import bz2
import gzip
import hashlib
import json
import logging
import random
import zipfile
from types import SimpleNamespace

import pytest
from letters import Letters, as_lines, read, texts

from saelab.errors import AssetError, ConfigError, CorpusError
from saelab.harvest import corpus as corpora
from saelab.harvest.corpus import CorpusConfig
from saelab.types import is_heldout


@pytest.fixture
def lines(tmp_path):
    return as_lines(tmp_path / "texts.txt", texts(40))


# ------------------------------------------------------------------------------- windows and spans


def test_windows_have_exactly_the_asked_positions(lines):
    windows, report = read(source=lines, tokens=777)
    assert sum(map(len, windows)) == report.tokens == 777
    assert report.windows == len(windows)
    assert max(map(len, windows)) == 16


def test_spans_give_back_the_text_and_a_window_never_spans_two_documents(lines):
    windows, _ = read(source=lines)
    documents = {d.number: d for w in windows for d in w.begins}
    for window in windows:
        assert len(window.document.unique()) == 1
        text = documents[int(window.document[0])].text
        spans = zip(window.char_start.tolist(), window.char_end.tolist(), strict=True)
        assert [text[a:b] for a, b in spans] == [chr(i) for i in window.ids]
    assert list(documents) == list(range(len(documents)))


def test_short_tails_are_dropped_and_counted(tmp_path):
    source = as_lines(tmp_path / "a.txt", ["a" * 20, "b" * 21, "c" * 3, "d" * 16])
    windows, report = read(source=source, tokens=16 + 16 + 5 + 16)
    assert [len(w) for w in windows] == [16, 16, 5, 16]
    assert (report.dropped_tails, report.dropped_tokens) == (2, 7)
    assert [d.text[0] for w in windows for d in w.begins] == ["a", "b", "d"]
    assert report.documents == 3


def test_duplicates_and_empty_documents_are_left_out_and_counted(tmp_path):
    rows = texts(6)
    source = as_lines(tmp_path / "a.txt", [rows[0], "", rows[1], rows[0], "  ", rows[2]])
    windows, report = read(source=source, tokens=75)
    assert (report.duplicates, report.empty, report.documents) == (1, 2, 3)
    assert [d.text for w in windows for d in w.begins] == rows[:3]


def test_the_split_is_the_texts_hash_and_stable_under_reordering(tmp_path):
    rows = texts(60)
    first, _ = read(source=as_lines(tmp_path / "a.txt", rows), tokens=2800)
    second, _ = read(source=as_lines(tmp_path / "b.txt", rows[::-1]), tokens=2800)

    def split(windows):
        return {d.text: d.heldout for w in windows for d in w.begins}

    both = split(first).keys() & split(second).keys()
    assert len(both) > 20
    for text in both:
        wanted = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 < 0.3
        assert split(first)[text] == split(second)[text] == wanted
    assert {True, False} == set(split(first).values())


def test_shuffling_is_seeded_and_keeps_every_document(lines):
    def order(seed):
        windows, _ = read(source=lines, shuffle=seed)
        return [d.text for w in windows for d in w.begins]

    assert order(1) == order(1)
    assert order(1) != order(2) != order(None)
    everything = [d.text for w in read(source=lines, tokens=1800, shuffle=1)[0] for d in w.begins]
    assert len(set(everything)) == len(everything)


# ----------------------------------------------------------------------------------------- packing


def test_concat_joins_documents_of_one_split_with_eos_between(tmp_path):
    source = as_lines(tmp_path / "a.txt", texts(60))
    windows, _ = read(Letters(eos_id=7), source=source, packing="concat", tokens=2500)
    documents = {d.number: d for w in windows for d in w.begins}
    assert any(len(w.document.unique()) > 1 for w in windows)
    for window in windows:
        assert {documents[int(n)].heldout for n in window.document} == {window.heldout}
        ends = window.ids == 7
        length = [len(documents[int(n)].text) for n in window.document[ends]]
        assert window.char_start[ends].tolist() == window.char_end[ends].tolist() == length
    groups = {}
    for window in windows:
        groups.setdefault(documents[int(window.document[0])].group, []).append(len(window))
    assert all(sum(sizes) >= 4 * 16 - 5 for sizes in list(groups.values())[:-2])
    for window in windows:
        assert len({documents[int(n)].group for n in window.document}) == 1


def test_whole_packs_documents_without_cutting_those_that_fit(tmp_path):
    source = as_lines(tmp_path / "a.txt", [f"{i}aaaa" for i in range(20)] + ["b" * 40])
    model = Letters(bos_id=3, adds_bos=True)
    windows, _ = read(model, source=source, packing="whole", tokens=120, min_tail=1, holdout=0)
    assert max(map(len, windows)) <= 16
    assert max(len(w.document.unique()) for w in windows) == 2
    homes = {}
    for window in windows:
        for number in window.document.unique().tolist():
            homes.setdefault(number, []).append(window)
    documents = {d.number: d for w in windows for d in w.begins}
    for number, document in list(documents.items())[:-1]:
        if len(document.text) <= 15:
            (window,) = homes[number]
            assert document.text in "".join(chr(i) for i in window.ids)


def test_documents_number_in_order_of_their_first_window(tmp_path):
    source = as_lines(tmp_path / "a.txt", texts(60))
    for packing in ("document", "concat", "whole"):
        windows, _ = read(source=source, packing=packing, tokens=1500)
        numbers = [d.number for w in windows for d in w.begins]
        assert numbers == list(range(len(numbers)))
        seen = set()
        for window in windows:
            seen |= {d.number for d in window.begins}
            assert set(window.document.tolist()) <= seen


# --------------------------------------------------------------------------------------------- BOS


def test_bos_zero_is_a_bos_like_any_other(lines):
    windows, _ = read(Letters(bos_id=0, adds_bos=True), source=lines)
    for window in windows:
        assert window.ids[0] == 0
        assert window.char_start[0] == window.char_end[0] == window.char_start[1]
    assert max(map(len, windows)) == 16


def test_bos_can_be_forced_and_refused(lines):
    model = Letters(bos_id=0, adds_bos=True)
    assert all(w.ids[0] != 0 for w in read(model, source=lines, bos="never")[0])
    quiet = Letters(bos_id=9)
    assert all(w.ids[0] != 9 for w in read(quiet, source=lines)[0])
    assert all(w.ids[0] == 9 for w in read(quiet, source=lines, bos="always")[0])


def test_a_tokenizer_without_bos_eos_or_pad_works_in_every_packing(lines):
    for packing in ("document", "concat", "whole"):
        windows, _ = read(Letters(), source=lines, packing=packing)
        assert all((w.ids > 9).all() for w in windows)
    with pytest.raises(ConfigError, match="no BOS token"):
        read(Letters(), source=lines, bos="always")


# ------------------------------------------------------------------------------------------ faults


def test_too_little_text_says_how_much_there_is(tmp_path):
    source = as_lines(tmp_path / "a.txt", ["a" * 20, "b" * 21])
    with pytest.raises(CorpusError, match=r"holds 37 tokens.*38 were asked.*at most 37"):
        read(source=source, tokens=38)


def test_a_context_longer_than_the_models_is_refused(lines):
    with pytest.raises(ConfigError, match="at most 64"):
        read(source=lines, context=65)


def test_what_is_not_utf8_is_named_with_line_and_offset(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good line\nbad \xe9 line\n")
    with pytest.raises(
        CorpusError, match=r"bad\.txt is not UTF-8: byte 0xe9 in line 2 \(offset 14\)"
    ):
        read(source=str(path))
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(CorpusError, match=r"bad\.jsonl is not UTF-8.*line 2"):
        read(source=str(path))


def test_half_a_surrogate_pair_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + '\n{"text": "\\ud800 oh"}\n')
    with pytest.raises(CorpusError, match=r"record|cannot be read"):
        read(source=str(path), tokens=5)


def test_missing_columns_and_sources_name_the_nearest(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("title,body\nx,y\n")
    with pytest.raises(CorpusError, match=r"no column 'text'.*title, body"):
        read(source=str(path))
    with pytest.raises(CorpusError, match="no column 'bodi'; did you mean 'body'"):
        read(source=str(path), text_field="bodi")
    with pytest.raises(AssetError, match="news-articles"):
        read(source="news-article")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(CorpusError, match="is empty"):
        read(source=str(path))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"should hold \.txt"):
        read(source=str(tmp_path / "a.png"))


def test_a_broken_zip_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK but no zip")
    with pytest.raises(CorpusError, match=r"a\.zip is not a whole zip"):
        read(source=str(tmp_path / "a.zip"))


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv.bz2", "a.zip", "a.jsonl.gz"])
def test_archives_that_are_cut_short_or_damaged_are_named(tmp_path, name):
    data = b'text\n{"text": "x"}\n' + random.Random(0).randbytes(90_000).hex().encode()
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.csv", data)
        whole = path.read_bytes()
        broken = [whole[:200] + b"\xff" * 400 + whole[600:], b"PK" + whole[:-40]]
    else:
        whole = (gzip if name.endswith("gz") else bz2).compress(data)
        broken = [whole[:-30], whole[: len(whole) // 2], b"junk" + whole]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"a\.(csv|zip|jsonl)"):
            read(source=str(path))


def test_a_table_with_lone_carriage_returns_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\ngood\nbad\rline\n")
    with pytest.raises(CorpusError, match=r"a\.csv, line 3 .*LF or CR LF"):
        read(source=str(path))


def test_malformed_json_lines_are_reported_once(tmp_path, capfd, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": oops\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl cannot be read"):
        read(source=str(path))
    assert capfd.readouterr().err == ""
    assert caplog.text == ""
    assert logging.getLogger("datasets").getEffectiveLevel() < logging.CRITICAL


def test_records_without_a_text_are_empty_documents(tmp_path):
    rows = [{"text": None, "n": 0}, {"text": "a" * 40, "n": 1}, {"text": None, "n": 2}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    windows, report = read(source=str(path), tokens=40)
    assert (len(windows), report.empty) == (3, 2)
    with pytest.raises(CorpusError, match="column 'n' should hold text, but holds int"):
        read(source=str(path), text_field="n")
    rows = [{"body": None, "n": 0}, {"body": "a" * 40, "n": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read(source=str(path), tokens=40)[0]) == 3


@pytest.mark.parametrize("tokens", [60, 2000])
def test_one_big_text_file_is_refused_with_the_way_to_cut_it(tmp_path, tokens):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(texts(50)))
    config = CorpusConfig(source=str(path), tokens=tokens, context=16, min_tail=5)
    wanted = (
        r"book\.txt gives documents: 1, and none .*held out.*corpus\.sample_by.*corpus\.holdout"
    )
    with pytest.raises(CorpusError, match=wanted):
        assert corpora.surely_enough(config) or corpora.survey(config, Letters())
    cut = config.model_copy(update={"sample_by": "paragraph", "tokens": 1000})
    assert corpora.surely_enough(cut) or corpora.survey(cut, Letters()).heldout_documents > 0
    whole = config.model_copy(update={"holdout": 0.0})
    assert corpora.surely_enough(whole) or corpora.survey(whole, Letters()).documents == 1


def test_a_corpus_that_is_held_out_altogether_is_refused(tmp_path):
    source = as_lines(tmp_path / "a.txt", texts(3))
    config = CorpusConfig(source=source, tokens=60, context=16, holdout=0.999999, sample_by="line")
    with pytest.raises(CorpusError, match=r"documents: \d+, and all of them are held out"):
        corpora.survey(config, Letters())


def test_many_characters_are_not_enough_while_the_split_is_open(tmp_path):
    rows = [
        row for row in texts(200) if not is_heldout(hashlib.sha256(row.encode()).hexdigest(), 0.3)
    ]
    source = as_lines(tmp_path / "a.txt", rows)
    config = CorpusConfig(source=source, tokens=100, context=16, holdout=0.3, sample_by="line")
    assert not corpora.surely_enough(config)
    assert corpora.surely_enough(config.model_copy(update={"holdout": 0.0}))


def test_a_survey_counts_without_a_model_run(lines):
    report = corpora.survey(
        CorpusConfig(source=lines, tokens=500, context=16, sample_by="line"), Letters()
    )
    assert report.tokens == 500
    assert SimpleNamespace(**corpora.report_facts(report)).documents == report.documents
