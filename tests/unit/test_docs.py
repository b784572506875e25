"""The documents agree with the code: links resolve, pages exist, marked examples run."""

import ast
import re
import runpy
from pathlib import Path

import pytest

from saelab import errors
from saelab.catalogue import CATALOGUE
from saelab.config import parse_yaml
from saelab.dictionaries import REGISTRY
from saelab.run_config import RunConfig
from saelab.store.format import COLUMNS
from saelab.types import Mask

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]*)\)")
RUN = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.DOTALL)


def headings(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_internal_link_resolves(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(prose):
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if fragment:
            assert fragment in map(anchor, headings(there)), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_dictionary_type_has_its_page(name):
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    for section in ("## Equations", "## When it fails", "**Paper.**"):
        assert section in text


def test_every_error_class_has_its_section_and_no_section_lacks_a_class():
    tree = ast.parse(Path(errors.__file__).read_text())
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    sections = set(headings(ROOT / "docs" / "errors.md")) - {"Errors"}
    assert sections == classes


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_example_marked_as_runnable_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in RUN.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), {})


def test_the_index_links_to_every_page_of_the_docs():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(index.read_text())}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {index} <= linked


def test_the_page_of_the_configuration_is_what_the_code_says():
    page = runpy.run_path(str(ROOT / "docs" / "make_config.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text() == page, "run python docs/make_config.py"
    for key in ("sample_by", "aux_weight", "lr", "pursuit_rows"):
        assert f"| `{key}` |" in page


def test_the_configurations_on_the_page_of_the_store_are_valid():
    text = (ROOT / "docs" / "store.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert RunConfig.parse(parse_yaml(example)).store is not None


def test_every_named_asset_stands_on_the_page_of_licences():
    text = (ROOT / "docs" / "assets.md").read_text()
    assert [name for name in CATALOGUE if f"| `{name}` |" not in text] == []


def test_the_page_of_the_store_lists_every_mask_bit_and_every_column():
    text = (ROOT / "docs" / "store.md").read_text()
    rows = [f"| {int(reason)} | {reason.name} |" for reason in Mask]
    assert [row for row in rows if row not in text] == []
    assert [name for name in COLUMNS if f"`{name}`" not in text] == []
