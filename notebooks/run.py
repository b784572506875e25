"""Runs the notebooks: `make notebooks` through Jupyter, the tests also cell by cell in Python.

    python notebooks/run.py                      # all of them, at full size, into build/notebooks/
    python notebooks/run.py --size toy 03 05     # those whose names begin so, at toy size

A notebook is a file `NN_name.py` beside this one, in jupytext's percent format. It

- begins with a `# %% [markdown]` cell whose first line is its title, `# # Title`;
- takes its size from one line, `SIZE = os.environ.get("SAELAB_NOTEBOOK_SIZE", "toy")`. At `toy` it
  takes at most 20 s on two cores and downloads nothing: the models `toy` and `handwired:induction`,
  the corpus `toy`. At `full` it takes minutes on two cores: SmolLM2-135M and the named texts;
- is run in a folder of its own and writes below `runs/` there only (`out=runs/…`); it may find what
  an earlier notebook has made, but needs none;
- shows what there is to see as the last expression of a cell (a Plotly figure, a pandas table, a
  block of `saelab.show`) or by printing (`rich.print` for saelab's tables). No magics, no
  `display`, nothing of IPython: each cell is plain Python;
- imports saelab, and from elsewhere torch, pandas and Plotly: nothing of the app or of the tests.

`tests/e2e/test_notebooks.py` finds it by its name, runs it at toy size and wants at least one
figure of it, and one table or block of HTML.
"""

import argparse
import ast
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "build" / "notebooks"
SIZES = ("toy", "full")
SWITCH = "SAELAB_NOTEBOOK_SIZE"
_CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)


def notebooks() -> list[Path]:
    """Return all notebooks, in the order of their numbers."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def code_cells(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each code cell with the number of lines above it."""
    text = path.read_text(encoding="utf-8")
    heads = list(_CELL.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    for head, end in zip(heads, ends, strict=True):
        if "[markdown]" not in head[1]:
            yield text[: head.end()].count("\n"), text[head.end() : end]


def in_python(path: Path) -> list[Any]:
    """Run a notebook here, cell by cell; return what its cells show, in order."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for above, code in code_cells(path):
        cell = ast.parse("\n" * above + code, str(path))
        last = cell.body.pop() if cell.body and isinstance(cell.body[-1], ast.Expr) else None
        exec(compile(cell, str(path), "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), str(path), "eval"), names))
    return [value for value in shown if value is not None]


def in_jupyter(path: Path, folder: Path) -> Path:
    """Run a notebook in a Jupyter kernel whose folder this is; write it there with its outputs."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook = jupytext.read(path)
    executed = folder / f"{path.stem}.ipynb"
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    try:
        client.execute()
    finally:  # what ran before an error is there to be looked at
        nbformat.write(notebook, executed)
    return executed


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description="Run the notebooks through Jupyter.")
    parser.add_argument("names", nargs="*", help="How the names begin; by default all.")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, default=OUT, help="Folder of the executed copies.")
    given = parser.parse_args()
    chosen = [p for p in notebooks() if not given.names or p.name.startswith(tuple(given.names))]
    if not chosen:
        parser.error(
            f"no notebook begins with {given.names}; there are {[p.name for p in notebooks()]}"
        )
    os.environ[SWITCH] = given.size
    given.out.mkdir(parents=True, exist_ok=True)
    for path in chosen:
        began = time.perf_counter()
        executed = in_jupyter(path, given.out.resolve())
        print(f"{executed}  {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
