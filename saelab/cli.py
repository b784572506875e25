"""The `saelab` command: one verb per stage, and the ones that look at what was made."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from saelab.circuit_runs import cli as circuits_cli
from saelab.errors import SaelabError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Train, score and browse dictionaries of a language model's activations.",
)  # fmt: skip
assets_app = typer.Typer(no_args_is_help=True, help="Named models and texts.")
cache_app = typer.Typer(no_args_is_help=True, help="Stores shared between runs.")
store_app = typer.Typer(no_args_is_help=True, help="Stores from your own arrays.")
app.add_typer(assets_app, name="assets")
app.add_typer(cache_app, name="cache")
app.add_typer(store_app, name="store")
app.add_typer(circuits_cli.app, name="circuits")

_WIDE = None if sys.stdout.isatty() else 160
"""Tables are not folded at 80 columns when the output goes to a file."""
console = Console(width=_WIDE)
MOST_SCORECARDS = 3
"""Scorecards that a run prints one by one; of more it prints how they rank."""

Config = Annotated[Path, typer.Argument(help="A YAML file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value …")]
Folder = Annotated[Path, typer.Argument(help="A run's `out` folder.")]
By = Annotated[
    str | None, typer.Option(help="Metric that ranks; fvu, or r2 where there is only that.")
]
Wait = Annotated[float, typer.Option(help="Seconds to wait for another run's lock.")]


def main() -> None:
    """Run the command line; a user's error is one message on stderr and exit code 2."""
    handler = RichHandler(
        console=Console(stderr=True, width=_WIDE), show_path=False, show_time=False
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("saelab").setLevel(logging.INFO)
    try:
        app(standalone_mode=False)
    except SaelabError as error:
        _fail(str(error), 2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or ''}: {error.strerror or error}", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; run the same command to go on", 130)


def _fail(message: str, code: int) -> NoReturn:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {_escape(message)}")
    sys.exit(code)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _version(wanted: bool) -> None:
    if wanted:
        from saelab import __version__

        console.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# ----------------------------------------------------------------------------------------- stages


def _run(config: Path, overrides: list[str] | None, until: Any, wait: float) -> None:
    from saelab import pipeline

    loaded = pipeline.load_config(config, overrides or [])
    made = pipeline.Run(loaded, wait=wait)
    steps = made.execute(until)
    _print_steps(steps)
    _print_scores([step.path for step in steps if step.stage == "results"], loaded.out)
    if any(step.stage == "features" for step in steps):
        console.print(f"\nBrowse it:  saelab app {loaded.out}")
    made.raise_diverged()


def _print_scores(results: list[Path], out: Path) -> None:
    """Print each scorecard, or, of more members than a screen shows, how they rank."""
    from saelab import leaderboard, report

    console.print()
    if len(results) > MOST_SCORECARDS:
        console.print(leaderboard.summary(leaderboard.scored(out), None))
        console.print(f"Every scorecard:  saelab report {out}")
        return
    for path in results:
        console.print(report.scorecard(path))
        console.print()


def _print_steps(steps: list[Any]) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in ("stage", "status", "artifact", "why"):
        table.add_column(column, overflow="fold")
    for step in steps:
        table.add_row(step.stage, step.status, str(step.path), _escape(step.reason))
    console.print(table)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option(help="Only say what would run, and why.")] = False,
    wait: Wait = 0.0,
) -> None:
    """Make everything that a configuration describes and that is not there yet."""
    if explain:
        from saelab import pipeline

        _print_steps(pipeline.explain(pipeline.load_config(config, overrides or [])))
        return
    _run(config, overrides, "index", wait)


@app.command()
def harvest(config: Config, overrides: Overrides = None, wait: Wait = 0.0) -> None:
    """Run up to the store of activations."""
    _run(config, overrides, "harvest", wait)


@app.command()
def train(config: Config, overrides: Overrides = None, wait: Wait = 0.0) -> None:
    """Run up to the trained dictionaries."""
    _run(config, overrides, "train", wait)


@app.command()
def evaluate(config: Config, overrides: Overrides = None, wait: Wait = 0.0) -> None:
    """Run up to the scorecards."""
    _run(config, overrides, "evaluate", wait)


@app.command()
def index(config: Config, overrides: Overrides = None, wait: Wait = 0.0) -> None:
    """Run up to the feature index that the app reads."""
    _run(config, overrides, "index", wait)


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """Say what a run will take: tokens, disk, memory and time per stage, from a short probe."""
    from saelab import pipeline, planning

    console.print(planning.plan(pipeline.load_config(config, overrides or [])))


# ---------------------------------------------------------------------------------------- looking


@app.command(name="app")
def open_app(
    directory: Folder,
    port: Annotated[int, typer.Option(help="Port on localhost.")] = 8501,
    headless: Annotated[bool, typer.Option(help="Do not open a browser window.")] = False,
) -> None:
    """Browse a run's dictionaries and their features."""
    try:
        import saelab_app
    except ImportError:
        raise SaelabError("the app needs streamlit: pip install 'saelab[app]'") from None
    if not directory.is_dir():
        raise SaelabError(f"{directory} is no folder; give a run's `out`, for example runs/demo")
    sys.exit(saelab_app.launch(directory, port=port, headless=headless))


@app.command(name="list")
def list_artifacts(directory: Folder) -> None:
    """List every finished artifact of a run."""
    from saelab import report

    console.print(report.listing(directory))


@app.command()
def compare(
    paths: Annotated[list[Path], typer.Argument(help="Dictionaries' folders, or a run's `out`.")],
    by: By = None,
) -> None:
    """Say which dictionary is best, and by how much; of two also how they were made."""
    from saelab import leaderboard

    console.print(leaderboard.compare(paths, by))


@app.command()
def lineage(path: Annotated[Path, typer.Argument(help="Any artifact's folder.")]) -> None:
    """Print what an artifact was made from, back to the text."""
    from saelab import report

    console.print(report.lineage(path))


@app.command(name="report")
def write_report(
    directory: Folder,
    output: Annotated[Path | None, typer.Option(help="Write Markdown here.")] = None,
    by: By = None,
) -> None:
    """Print the members of a run by rank and every scorecard, or write them as Markdown."""
    from saelab import artifacts, leaderboard, report

    results = [path for path, _ in artifacts.find_all(directory, "results")]
    if not results:
        raise SaelabError(f"{directory} holds no results; `saelab evaluate CONFIG` makes some")
    members = leaderboard.scored(directory)
    leaderboard.metric_of(members, by)
    ranked = len(members) > 1
    if output is not None:
        boards = [leaderboard.markdown(members, by)] if ranked else []
        text = "\n".join([*boards, *map(report.markdown, results)])
        output.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_file(output, text.encode())
        console.print(f"wrote {output}")
        return
    if ranked:
        console.print(leaderboard.summary(members, by))
    for path in results:
        console.print(report.scorecard(path))
        console.print()


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="A named asset, hub:org/name, a folder, or toy.")],
) -> None:
    """List a model's sites with their widths."""
    from saelab import api

    loaded = api.load_model(model, dtype="float32", device="cpu")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in ("site", "width", "kind"):
        table.add_column(column, justify="right" if column == "width" else "left")
    for site in loaded.sites():
        table.add_row(site.name, str(site.width), site.kind)
    console.print(table)


@app.command()
def doctor() -> None:
    """Check this machine: versions, extras, device, disk, cached assets."""
    from saelab import doctor

    console.print(doctor.doctor())


# ------------------------------------------------------------------------- assets, cache and arrays


@assets_app.command("list")
def assets_list() -> None:
    """List the named assets, their licences and whether they are cached."""
    from saelab import assets
    from saelab.report import human_bytes

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in ("name", "size", "cached", "licence", "what"):
        table.add_column(column, overflow="fold")
    for asset in assets.CATALOGUE.values():
        cached = "yes" if assets.cached(asset.name) else "no"
        table.add_row(asset.name, human_bytes(asset.size), cached, asset.licence, asset.description)
    console.print(table)


@assets_app.command("fetch")
def assets_fetch(name: Annotated[str, typer.Argument(help="A named asset or a source.")]) -> None:
    """Download an asset into the cache and check it."""
    from saelab import assets

    console.print(str(assets.resolve(name).path))


@assets_app.command("verify")
def assets_verify() -> None:
    """Compare every cached asset with its pinned checksum."""
    from saelab import assets

    states = [(asset.name, state) for asset, state in assets.verify()]
    for name, state in states:
        console.print(f"{name}: {state}")
    altered = [name for name, state in states if state == "altered"]
    if altered:
        raise SaelabError(f"altered: {', '.join(altered)}; `saelab assets fetch NAME` mends it")


@cache_app.command("list")
def cache_list() -> None:
    """List the shared stores."""
    from saelab import report, stages

    console.print(report.listing(stages.shared_stores()))


@cache_app.command("rm")
def cache_rm(key: Annotated[str, typer.Argument(help="The start of a store's key.")]) -> None:
    """Remove a shared store; runs that need it harvest again."""
    from saelab import stages

    console.print(f"removed {stages.remove_shared_store(key)}")


@store_app.command("from-npy")
def store_from_npy(
    array: Annotated[Path, typer.Argument(help="An .npy file of shape [rows, width].")],
    out: Annotated[Path, typer.Option(help="Folder that receives store/<name>-<key>.")],
    name: Annotated[str, typer.Option(help="What to call the store.")] = "arrays",
    site: Annotated[str, typer.Option(help="What to call the site.")] = "x",
    gradient: Annotated[
        Path | None, typer.Option(help="An .npy of a loss's gradients, [rows, width].")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option(help="An .npy of document ids, one per row.")
    ] = None,
    masked: Annotated[
        Path | None, typer.Option(help="An .npy, not zero for rows to leave out.")
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.1,
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
) -> None:
    """Make a store from your own array, without any language model."""
    from saelab import api

    path = api.store_from_arrays(
        {site: array}, out, name=name, gradients={} if gradient is None else {site: gradient},
        documents=documents, masked=masked, holdout=holdout, dtype=dtype,
    )  # fmt: skip
    console.print(str(path))
