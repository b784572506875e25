"""Every notebook runs at toy size and shows something; one of them also through Jupyter."""

import runpy
from pathlib import Path

import pytest

from saelab import dictionaries

ROOT = Path(__file__).parents[2]
RUN = runpy.run_path(str(ROOT / "notebooks" / "run.py"))
NOTEBOOKS = RUN["notebooks"]()
THROUGH_JUPYTER = "01_tour"

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _at_toy_size(tmp_path, tmp_path_factory, monkeypatch):
    """An empty folder; a registry of types that may be added to; artifacts of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUN["SWITCH"], "toy")
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path_factory.getbasetemp() / "notebooks-cache"))
    monkeypatch.setattr(dictionaries, "REGISTRY", dict(dictionaries.REGISTRY))


def test_notebooks_are_found_and_numbered_apart():
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert len(NOTEBOOKS) >= 5
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_at_toy_size_and_shows_a_figure_and_a_table(path, tmp_path):
    pytest.importorskip("plotly")
    shown = RUN["in_python"](path)
    kinds = [type(value).__name__ for value in shown]
    assert "Figure" in kinds
    assert {"DataFrame", "Html"} & set(kinds)
    assert all(value.data for value in shown if type(value).__name__ == "Figure")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_notebook_runs_through_jupyter_and_keeps_what_its_cells_show(tmp_path):
    pytest.importorskip("nbclient")
    nbformat, path = pytest.importorskip("nbformat"), ROOT / "notebooks" / f"{THROUGH_JUPYTER}.py"
    pytest.importorskip("ipykernel")
    executed = RUN["in_jupyter"](path, tmp_path)
    cells = nbformat.read(executed, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(code) == len(list(RUN["code_cells"](path)))
    assert all(cell.execution_count for cell in code)
    kinds = {kind for cell in code for output in cell.outputs for kind in output.get("data", {})}
    assert {"application/vnd.plotly.v1+json", "text/html"} <= kinds
    assert "sl-text" in executed.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_title_and_has_one_switch(path):
    text = path.read_text(encoding="utf-8")
    first = text[text.index("# %%") :].splitlines()
    assert first[0] == "# %% [markdown]"
    assert first[1].startswith("# # ")
    assert text.count(f'os.environ.get("{RUN["SWITCH"]}", "toy")') == 1
    assert text.count("os.environ") == 1
    assert "saelab_app" not in text


def test_a_cell_that_fails_is_named_with_its_line(tmp_path):
    path = tmp_path / "00_bad.py"
    path.write_text("# %%\nx = 1\n\n# %% [markdown]\n# text\n\n# %%\nx / 0\n")
    with pytest.raises(ZeroDivisionError) as raised:
        RUN["in_python"](path)
    assert raised.traceback[-1].lineno + 1 == 8
    path.write_text("# %%\nx = 1\nx + 1\n# %%\nx = 3\n# %%\nNone\n")
    assert RUN["in_python"](path) == [2]
