"""Writes docs/config.md, the list of every configuration key: `python docs/make_config.py`."""

import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from saelab.circuit_runs.config import FeaturesConfig, SupervisedRunConfig
from saelab.circuit_runs.heads import HeadsRun
from saelab.config import Config
from saelab.dictionaries import REGISTRY, config_class
from saelab.members import MemberTraining
from saelab.run_config import RunConfig

PAGE = Path(__file__).parent / "config.md"

_HEAD = """# Configuration

What `saelab run CONFIG` takes: a YAML file of these keys; at the end what `saelab circuits` takes.
On the command line `key.sub=value` sets one, `dictionaries.0.k=64` one of a list. A key that is not
here is refused, and the nearest is named.

This page is made from the code by `python docs/make_config.py`.
"""


def page() -> str:
    """Return the page: one table per section, from the docstrings under the fields."""
    parts = [_HEAD, *_sections("", RunConfig)]
    for name in sorted(REGISTRY):
        parts.append(
            _section(f"dictionaries: type {name}", config_class(name), leave_out=("d_in",))
        )
    title = "dictionaries: keys of every type"
    parts.append(_section(title, MemberTraining))
    for command, config in (
        ("heads", HeadsRun), ("features", FeaturesConfig), ("supervised", SupervisedRunConfig),
    ):  # fmt: skip
        parts += _sections(f"circuits {command}", config)
    return "\n".join(parts)


def _sections(path: str, model: type[Config]) -> list[str]:
    """Return the table of a configuration, then those of the configurations inside it."""
    parts = [_section(path or "The whole file", model)]
    for key, field in model.model_fields.items():
        kinds = _inner(field.annotation)
        for inner in kinds:
            title = f"{path}.{key}".lstrip(".")
            if len(kinds) > 1:
                kind = typing.get_args(inner.model_fields["kind"].annotation)
                title += f": kind {', '.join(kind)}"
            parts += _sections(title, inner)
    return parts


def _section(title: str, model: type[Config], leave_out: tuple[str, ...] = ()) -> str:
    lines = [f"## {title}", "", (model.__doc__ or "").strip(), ""]
    lines += ["| key | values | default | |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        if key not in leave_out:
            cells = (f"`{key}`", _values(field.annotation), _default(field), _text(field))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _inner(annotation: Any) -> list[type[Config]]:
    """Return the configurations that a key may hold, through unions and annotations."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if typing.get_origin(annotation) in (list, tuple, dict):
        return []
    return [inner for choice in typing.get_args(annotation) for inner in _inner(choice)]


_WORDS = {int: "integer", float: "number", str: "text", bool: "true, false", Path: "path"}


def _values(annotation: Any) -> str:
    """Return what a key may hold, in the words of YAML."""
    origin, choices = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Annotated:
        return _values(choices[0])
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in choices)
    if origin in (types.UnionType, typing.Union):
        return ", ".join(dict.fromkeys(map(_values, choices)))
    if origin in (list, tuple):
        return f"list of {_values(choices[0])}"
    if _inner(annotation) or origin is dict:
        return "section"
    return _WORDS.get(annotation, "any")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return "as below"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`".replace("\n", "\\n")


def _text(field: FieldInfo) -> str:
    return re.sub(r"\s+", " ", field.description or "").replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
