"""Assets come from paths, wheels and the hub; verified, once, and never half-written."""

import hashlib
import io
import tarfile
import threading
import zipfile

import pytest

from saelab import assets, wheels
from saelab.errors import AssetError

TEXT = b"one line of text\n" * 100
MEMBER = "tiny_texts/data/lines.txt"
SOURCE = f"pypi:tiny-texts==1.0#{MEMBER}"
PARTS = {f"tiny_texts/data/long.txt.part0{i}": bytes([65 + i]) * 200_000 for i in range(3)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with one wheel, which pip takes for the whole world."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_texts-1.0.dist-info"
    files = {
        MEMBER: TEXT,
        **PARTS,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / "tiny_texts-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in (files | {f"{info}/RECORD": record.encode()}).items():
            wheel.writestr(name, data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def pin(monkeypatch, sha256: str) -> None:
    asset = assets.Asset(
        "tiny", "text", SOURCE, sha256, len(TEXT), 2000, "package MIT", "a hundred equal lines"
    )
    monkeypatch.setitem(assets.CATALOGUE, "tiny", asset)


def kept(cache) -> list[str]:
    """Names of whatever content the cache holds, locks aside."""
    return [p.name for p in cache.rglob("*") if p.is_file() and not p.name.startswith(".")]


def test_a_file_of_a_wheel_is_fetched_once_and_then_used_offline(cache, index):
    found = assets.resolve(SOURCE)
    assert found.path.read_bytes() == TEXT
    assert found.sha256 == hashlib.sha256(TEXT).hexdigest() == assets.identity(SOURCE)
    assert found.path.is_relative_to(cache)
    assert sorted(kept(cache)) == ["lines.txt", "lines.txt.json"]
    next(index.iterdir()).unlink()
    assert assets.resolve(SOURCE) == found


def test_a_named_asset_is_verified_and_its_identity_needs_no_fetch(cache, index, monkeypatch):
    sha256 = hashlib.sha256(TEXT).hexdigest()
    pin(monkeypatch, sha256)
    assert assets.identity("tiny") == sha256
    assert assets.cached("tiny") is None
    assert assets.resolve("tiny").name == "tiny"
    assert assets.cached("tiny") == assets.resolve("tiny").path
    states = {asset.name: state for asset, state in assets.verify()}
    assert states["tiny"] == "ok"
    assert states["smollm2-135m"] == "not fetched"
    assets.resolve("tiny").path.write_bytes(b"altered")
    assert {a.name: s for a, s in assets.verify()}["tiny"] == "altered"
    assert assets.cached("tiny").read_bytes() == b"altered"


@pytest.mark.parametrize("altered", [b"short", b"X" + TEXT[1:]])
def test_an_altered_file_is_fetched_again(cache, index, altered):
    path = assets.resolve(SOURCE).path
    path.write_bytes(altered)
    assert assets.resolve(SOURCE).path.read_bytes() == TEXT
    path.write_bytes(altered)
    next(index.iterdir()).unlink()
    with pytest.raises(AssetError, match="was altered there"):
        assets.resolve(SOURCE)
    assert path.read_bytes() == altered


def test_an_unknown_name_gets_the_names_of_its_kind_and_toy():
    with pytest.raises(AssetError) as model:
        assets.resolve("zzz", "model")
    assert "known: 'toy', 'smollm2-135m', 'gemma3-270m'. Other forms:" in str(model.value)
    with pytest.raises(AssetError) as text:
        assets.resolve("zzz", "text")
    assert "smollm2" not in str(text.value)
    assert "'20newsgroups'" in str(text.value)
    with pytest.raises(AssetError, match="did you mean 'toy'"):
        assets.resolve("toyy")
    with pytest.raises(AssetError, match="built in"):
        assets.resolve("toy")


def test_a_wrong_checksum_keeps_nothing(cache, index, monkeypatch):
    pin(monkeypatch, "0" * 64)
    with pytest.raises(AssetError, match=r"should have sha256 0000.*Nothing was kept"):
        assets.resolve("tiny")
    assert kept(cache) == []


def pin_parts(monkeypatch, sources: list[str]) -> bytes:
    whole = b"".join(PARTS.values())
    sha256, first = hashlib.sha256(whole).hexdigest(), sources[0]
    asset = assets.Asset(
        "long", "text", first, sha256, len(whole), 9000, "package MIT", "three parts",
        tuple(sources[1:]),
    )  # fmt: skip
    monkeypatch.setitem(assets.CATALOGUE, "long", asset)
    return whole


def test_the_parts_of_an_asset_are_joined_in_their_order_and_kept_as_one_file(
    cache, index, monkeypatch
):
    whole = pin_parts(monkeypatch, [f"pypi:tiny-texts==1.0#{member}" for member in PARTS])
    found = assets.resolve("long")
    assert found.path.read_bytes() == whole
    assert found.path.name == "long.txt"
    assert sorted(kept(cache)) == ["long.txt", "long.txt.json"]
    next(index.iterdir()).unlink()
    assert assets.resolve("long") == found
    assert {a.name: s for a, s in assets.verify()}["long"] == "ok"


def test_parts_in_another_order_are_refused_and_not_kept(cache, index, monkeypatch):
    pin_parts(monkeypatch, [f"pypi:tiny-texts==1.0#{member}" for member in [*PARTS][::-1]])
    with pytest.raises(AssetError, match="Nothing was kept"):
        assets.resolve("long")
    assert kept(cache) == []


def test_without_network_the_error_says_what_to_run_where_there_is(cache, index):
    source = "pypi:other-texts==2.0#a.txt"
    with pytest.raises(AssetError, match=r"saelab assets fetch pypi:other-texts==2.0#a.txt"):
        assets.resolve(source)
    assert kept(cache) == []


def test_a_file_that_the_wheel_lacks_is_refused_with_the_nearest_ones(cache, index):
    with pytest.raises(AssetError, match=r"did you mean 'tiny_texts/data/lines.txt'"):
        assets.resolve(SOURCE.replace("lines", "liness"))
    assert kept(cache) == []


def test_two_fetches_at_once_download_once(cache, index, monkeypatch):
    downloads, results = [], []
    download = wheels.download
    monkeypatch.setattr(wheels, "download", lambda *a: downloads.append(1) or download(*a))
    work = [
        threading.Thread(target=lambda: results.append(assets.resolve(SOURCE))) for _ in range(3)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(downloads) == 1
    assert len(set(results)) == 1


def test_files_that_are_joined_lie_under_a_name_of_their_kind(cache, index, monkeypatch):
    sha256 = hashlib.sha256(TEXT + TEXT).hexdigest()
    asset = assets.Asset(
        "twice", "text", SOURCE, sha256, 2 * len(TEXT), 4000, "package MIT", "twice", (SOURCE,)
    )
    monkeypatch.setitem(assets.CATALOGUE, "twice", asset)
    found = assets.resolve("twice").path
    assert (found.name, found.read_bytes()) == ("lines-and-1-more.txt", TEXT + TEXT)


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """An index of one project, whose only file is an sdist that must not be run."""
    project = tmp_path / "pages" / "tiny-texts"
    project.mkdir(parents=True)
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        info = tarfile.TarInfo("texts/lines.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT))
    with zipfile.ZipFile(project / "tiny_texts-1.0.zip", "w") as sdist:
        sdist.writestr("tiny-texts-1.0/setup.py", "raise SystemExit('run')")
        sdist.writestr("tiny-texts-1.0/more/texts.tar.gz", inner.getvalue())
        sdist.writestr("tiny-texts-1.0/lines.txt", TEXT)
    links = '<a href="tiny_texts-1.1.zip">no</a><a href="tiny_texts-1.0.zip#sha256=00">yes</a>'
    (project / "index.html").write_text(links)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "pages").as_uri())
    return project


@pytest.mark.parametrize("member", ["lines.txt", "more/texts.tar.gz!texts/lines.txt"])
def test_a_file_of_an_sdist_comes_out_of_the_archive_alone(cache, pages, member):
    found = assets.resolve(f"pypi:tiny-texts==1.0#tiny-texts-1.0/{member}")
    assert found.path.read_bytes() == TEXT
    assert sorted(kept(cache)) == ["lines.txt", "lines.txt.json"]


def test_an_sdist_that_the_index_or_a_file_that_the_sdist_lacks_is_refused(cache, pages):
    with pytest.raises(AssetError, match=r"did you mean 'texts/lines.txt'"):
        assets.resolve("pypi:tiny-texts==1.0#tiny-texts-1.0/more/texts.tar.gz!texts/line.txt")
    with pytest.raises(AssetError, match=r"lists no source archive of tiny-texts==2.0"):
        assets.resolve("pypi:tiny-texts==2.0#tiny-texts-2.0/lines.txt")
    (pages / "index.html").unlink()
    with pytest.raises(AssetError, match="gave no source archive"):
        assets.resolve("pypi:tiny-texts==1.0#tiny-texts-1.0/lines.txt")
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("news-article", "did you mean 'news-articles'"),
        ("no/such/folder", "neither a named asset nor a file"),
        ("pypi:name-without-version#file", "pypi:NAME==VERSION#"),
        ("pypi:name==1.0#../../etc/passwd", "pypi:NAME==VERSION#"),
        ("pypi:name==1.0", "pypi:NAME==VERSION#"),
        ("hub:a/b/c", "hub:org/name"),
    ],
)
def test_sources_of_no_known_form_are_refused(source, message):
    with pytest.raises(AssetError, match=message):
        assets.resolve(source)


def test_files_and_folders_are_identified_by_content(cache, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(TEXT)
    assert assets.identity(str(file)) == hashlib.sha256(TEXT).hexdigest()
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a.txt").write_bytes(TEXT)
    same = assets.identity(str(tmp_path / "one"))
    assert assets.identity(str(tmp_path / "two")) == same
    (tmp_path / "two" / ".cache").write_bytes(b"hidden files do not count")
    assert assets.identity(str(tmp_path / "two")) == same
    (tmp_path / "two" / "sub" / "a.txt").rename(tmp_path / "two" / "b.txt")
    assert assets.identity(str(tmp_path / "two")) != same
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssetError, match="empty folder"):
        assets.identity(str(tmp_path / "empty"))


def test_large_files_are_hashed_again_only_when_they_changed(cache, tmp_path, monkeypatch):
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(assets._SMALL))
    hashed = []
    hash_file = assets.hash_file
    monkeypatch.setattr(assets, "hash_file", lambda p: hashed.append(p) or hash_file(p))
    first = assets.hash_of(file)
    assert assets.hash_of(file) == first
    assert len(hashed) == 1
    file.write_bytes(bytes(assets._SMALL) + b"1")
    assert assets.hash_of(file) != first
    for record in (cache / "hashes").iterdir():
        record.write_text("torn {")
    assert assets.hash_of(file) == hash_file(file)


def test_a_hub_model_comes_from_the_hubs_cache_and_is_known_by_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert assets.resolve("hub:org/tiny").path == snapshot
    assert assets.resolve("hub:org/tiny").name == "tiny"
    assert assets.identity("hub:org/tiny") == f"hub:org/tiny@{commit}"
    with pytest.raises(AssetError, match=r"saelab assets fetch hub:org/other"):
        assets.resolve("hub:org/other")


def test_every_named_asset_says_where_it_comes_from():
    for name, asset in assets.CATALOGUE.items():
        assert asset.name == name
        assert len(asset.sha256) == 64
        assert asset.licence.startswith("package ")
        assert assets.parse_source(name).asset is asset
