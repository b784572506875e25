"""YAML ⇄ frozen pydantic models, dotted overrides, and errors that name the nearest known key."""

import hashlib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from saelab.errors import ConfigError, nearest


class Config(BaseModel):
    """Base of every configuration: frozen, no unknown keys, one docstring under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Validate plain data. Raises ConfigError listing every fault with its dotted path."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error)) from None

    def plain(self) -> dict[str, Any]:
        """Return the resolved configuration as JSON-ready data."""
        return self.model_dump(mode="json")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 8e-4, 1e6 and 400_000 are numbers and a key may stand only once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _no_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"key {key!r} stands twice (line {node.start_mark.line + 1})")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def parse_yaml(text: str, origin: str = "configuration") -> Any:
    """Parse YAML text. Raises ConfigError with the line where it is malformed."""
    try:
        return _whole_floats(yaml.load(text, Loader=_Loader))  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from None


def _whole_floats(value: Any) -> Any:
    """Turn 1e6 into 1000000, so that counts may be written with an exponent."""
    if isinstance(value, dict):
        return {key: _whole_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_floats(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def load_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply `key.sub=value` overrides."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the configuration {path} is not UTF-8 text") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} should hold a mapping of keys, but holds {type(data).__name__}")
    return apply_overrides(data, overrides)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `data` with each `key.sub=value` set; list items by number (`a.0.k=64`)."""
    data = json.loads(json.dumps(data))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {override!r} should look like key.sub=value")
        _set(data, path.split("."), parse_yaml(text, f"override {override!r}"), override)
    return data


def _set(node: Any, path: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(
                    f"override {override!r}: {key!r} should be a number below {len(node)}, "
                    f"since {'.'.join(path[:depth])} is a list"
                )
            slot: Any = int(key)
        elif isinstance(node, dict):
            slot = key
        else:
            raise ConfigError(
                f"override {override!r}: {'.'.join(path[:depth])} is {node!r} and has no keys"
            )
        if last:
            node[slot] = value
        elif isinstance(node, dict) and node.get(slot) is None:
            node[slot] = {}
        node = node[slot]


def canonical_json(data: Any) -> str:
    """Return the one JSON text that stands for `data`: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: Any) -> str:
    """Return the sha256 of the canonical JSON of `data`, as hex."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Name the first field in which two plain configurations differ, as `path: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}" if path else key
            found = first_difference(old.get(key), new.get(key), inner)
            if found:
                return found
        return None
    return None if old == new else f"{path}: {old!r} → {new!r}"


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(map(str, _path(cls, item["loc"])))
        if item["type"] == "extra_forbidden":
            known = _fields_at(cls, item["loc"][:-1])
            hint = nearest(str(item["loc"][-1]), known) if known else ""
            lines.append(f"unknown key {where!r}; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: this key is required")
        else:
            came = "" if isinstance(item["input"], dict) else f", but {item['input']!r} came"
            message = item["msg"].removeprefix("Value error, ").replace("tuple", "list")
            prefix = f"{where}: " if where else ""
            lines.append(f"{prefix}{message[:1].lower()}{message[1:]}{came}")
    return "\n".join(lines)


def _path(model: Any, loc: tuple[int | str, ...]) -> list[int | str]:
    """Return an error's location without the tags by which a union's member was chosen."""
    path: list[int | str] = []
    for step in loc[:-1]:
        found = [m.model_fields[step] for m in _models_in(model) if step in m.model_fields]
        if found or isinstance(step, int) or not _models_in(model):
            path.append(step)
            model = found[0].annotation if found else model
    return [*path, *loc[-1:]]


def _fields_at(model: Any, loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that lies at an error's location."""
    for step in loc:
        if isinstance(step, int):
            continue
        models = _models_in(model)
        found = [m.model_fields[step].annotation for m in models if step in m.model_fields]
        if not models:
            return []
        model = found[0] if found else model
    return sorted({name for m in _models_in(model) for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is None and not isinstance(annotation, types.UnionType):
        return []
    return [m for arg in typing.get_args(annotation) for m in _models_in(arg)]
