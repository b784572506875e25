"""`saelab circuits`: which parts of a model carry a task."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from saelab.errors import TaskError

app = typer.Typer(no_args_is_help=True, help="Which heads and features carry a task.")


def _console() -> Console:
    """Return where tables go: not folded at 80 columns when that is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


@app.command()
def tasks(
    model: Annotated[str, typer.Argument(help="A named asset, hub:org/name, a folder, or toy.")],
    pairs: Annotated[int, typer.Option(min=2, help="Prompts of each task.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Print how well a model does each task."""
    from saelab.circuit_runs import api as circuits_api
    from saelab.circuit_runs import report as circuits_report
    from saelab.circuits.tasks import TASKS
    from saelab.models import resolve_device

    loaded = circuits_api.load_model(model, dtype, resolve_device(device))
    scores = circuits_api.task_scores(loaded, list(TASKS), pairs=pairs, seed=seed)
    _console().print(circuits_report.ability_table(scores))


@app.command()
def heads(
    config: Annotated[Path, typer.Argument(help="A YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value …")] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for another run's lock.")] = 0.0,
) -> None:
    """Score heads by discrete codes, and hold the scores against patching."""
    from saelab.circuit_runs import heads as circuits_run
    from saelab.circuit_runs import report as circuits_report

    settings = circuits_run.load_heads(config, overrides or [])
    console = _console()
    for step in circuits_run.Heads(settings, wait=wait).execute():
        console.print(f"{step.status} {step.path}")
        if step.stage == "effects":
            console.print(f"  {circuits_report.effects_line(step.path)}")
        else:
            console.print(circuits_report.heads_tables(step.path))
    for control, again in circuits_run.controls(settings):
        title = f"control, {control}: {again.tasks[0]}"
        try:
            steps = circuits_run.Heads(again, wait=wait).execute()
        except TaskError as error:
            console.print(f"{title}: refused: {error}")
        else:
            console.print(title)
            console.print(circuits_report.heads_tables(steps[-1].path))


@app.command()
def features(
    config: Annotated[Path, typer.Argument(help="A YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value …")] = None,
    top: Annotated[int, typer.Option(help="Nodes to list.")] = 15,
    wait: Annotated[float, typer.Option(help="Seconds to wait for another run's lock.")] = 0.0,
) -> None:
    """Find the latents and errors that carry a task, how faithful they are, and their graph."""
    from saelab.circuit_runs import config as circuits_config
    from saelab.circuit_runs import features as circuits_features
    from saelab.circuit_runs import report as circuits_report

    settings = circuits_config.load_features(config, overrides or [])
    made = circuits_features.features(settings, wait=wait)
    graph = circuits_features.open_circuit(made).graph
    _console().print(circuits_report.circuit_tables(made, graph, top))
    _console().print(f"\nBrowse it:  saelab app {settings.out}")


@app.command()
def supervised(
    config: Annotated[Path, typer.Argument(help="A YAML file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value …")] = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for another run's lock.")] = 0.0,
) -> None:
    """Hold dictionaries against what labels see: reconstructions, sparse edits, F1."""
    from saelab.circuit_runs import config as circuits_config
    from saelab.circuit_runs import report as circuits_report
    from saelab.circuit_runs import supervised as circuits_supervised

    settings = circuits_config.load_supervised(config, overrides or [])
    made = circuits_supervised.supervised(settings, wait=wait)
    _console().print(circuits_report.supervised_table(made))
    _console().print(str(made))
