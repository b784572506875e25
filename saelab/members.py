"""The members of a run: what `dictionaries:` lists and `grid:` spans, each with a name of its own.

A grid is a mapping in which a list is an axis. It stands for every combination of one value per
axis, with each type taking the keys that it has:

    {type: [topk, relu], d_sae: 4096, k: [16, 32], target_l0: 32, seed: [0, 1]}

is two seeds of topk at k 16, two at k 32, and two of relu.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from saelab.config import Config
from saelab.dictionaries import config_class
from saelab.errors import ConfigError, nearest

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
_BASE = ("type", "d_sae", "k", "target_l0")
"""Fields that a member without a name is called after."""


class MemberTraining(Config):
    """The keys of a member that are not its type's own."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; by default 2e-3 · √(4608 / d_sae)."""
    seed: int = Field(default=0, ge=0)
    """Initialisation and sampling."""
    tokens: int | None = Field(default=None, gt=0)
    """Rows of the stream that it sees, its schedules as long; by default all of `train.tokens`."""
    site: str | None = None
    """Which site of the store; may be left out when there is one."""
    init: str | None = None
    """A finished dictionary to continue from."""
    name: str | None = Field(default=None, pattern=NAME)
    """What to call it; by default type, width and k, and in a grid its place on each other axis."""


_OWN = tuple(MemberTraining.model_fields)


@dataclass(frozen=True)
class Member:
    """One dictionary to train: its type's own fields, and those of its training."""

    name: str
    fields: dict[str, Any]
    lr: float | None
    seed: int
    tokens: int | None
    site: str | None
    init: str | None
    where: str = field(default="", compare=False)
    """Where in the configuration it stands, for messages."""

    @property
    def content(self) -> "Member":
        """The same, whatever it is called."""
        return replace(self, name="")


@dataclass(frozen=True)
class _Entry:
    """A member as it is written, before it is checked."""

    where: str
    data: dict[str, Any]
    in_grid: bool = False
    axes: tuple[str, ...] = ()
    """Keys that its grid varies."""


def expand(
    listed: Sequence[dict[str, Any]], grids: dict[str, Any] | Sequence[dict[str, Any]]
) -> list[Member]:
    """Return every member, those of the list first, named apart; what grids share stands once.

    Raises ConfigError for a bad entry, naming it, and for two entries of the list that are equal.
    """
    entries = [_Entry(f"dictionaries.{i}", dict(entry)) for i, entry in enumerate(listed)]
    if isinstance(grids, dict):
        entries += _points(grids, "grid") if grids else ()
    else:
        for number, grid in enumerate(grids):
            entries += _points(grid, f"grid.{number}")
    members: list[Member] = []
    for entry in entries:
        member = _parse(entry)
        same = [m for m in members if m.content == member.content]
        if not same:
            members.append(_named_apart(member, entry, members))
        elif not entry.in_grid:
            raise ConfigError(f"{same[0].where} and {entry.where} are the same; drop one")
    return members


# ---------------------------------------------------------------------------------------- one entry


def _parse(entry: _Entry) -> Member:
    """Check an entry's keys and values. Raises ConfigError naming the entry and the nearest key."""
    where, data = entry.where, entry.data
    if not isinstance(data.get("type"), str):
        raise ConfigError(f"{where}.type: this key is required, and names a type")
    fields = {k: v for k, v in data.items() if k not in _OWN}
    try:
        own = config_class(data["type"]).parse({"d_in": 2**30, **fields})
        training = MemberTraining.parse({k: data[k] for k in _OWN if k in data})
        if training.lr is not None and not own.has_lr:
            raise ConfigError(f"lr: {data['type']} takes no gradient steps; drop the key")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    name = training.name or _default_name(data, entry.axes)
    return Member(
        name, fields, training.lr, training.seed, training.tokens, training.site, training.init,
        where,
    )  # fmt: skip


def _default_name(data: dict[str, Any], axes: Sequence[str]) -> str:
    """Return type, width and k, then the value on each other axis: `topk-4096-32-seed1`."""
    base = [str(data[key]) for key in _BASE if key in data]
    return "-".join([*base, *(_labelled(key, data[key]) for key in axes if key not in _BASE)])


def _labelled(key: str, value: Any) -> str:
    """Return a field for a name: `lr0.001`, `seed1`; of a site its place, `10.resid_post`."""
    if key == "site":
        return _clean(str(value).replace("blocks.", "").replace("hook_", ""))
    if isinstance(value, list):
        value = "_".join(map(str, value))
    return key + _clean(str(value))


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")


def _named_apart(member: Member, entry: _Entry, earlier: Sequence[Member]) -> Member:
    """Return the member under a name that no earlier one has; a name that was given stays."""
    taken = {other.name: other for other in earlier}
    if member.name not in taken:
        return member
    other = taken[member.name]
    if "name" in entry.data:
        raise ConfigError(f"{other.where} and {entry.where} are both called {member.name!r}")
    mine, theirs = _flat(member), _flat(other)
    differing = [k for k in mine if mine[k] != theirs.get(k) and k not in (*entry.axes, *_BASE)]
    name = "-".join([member.name, *(_labelled(key, mine[key]) for key in differing)])
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    free = next(n for n in itertools.chain([name], numbered) if n not in taken)
    return replace(member, name=free)


def _flat(member: Member) -> dict[str, Any]:
    own = {key: getattr(member, key) for key in ("lr", "seed", "tokens", "site", "init")}
    return {k: v for k, v in own.items() if v is not None} | member.fields


# ------------------------------------------------------------------------------------------ grids


def _points(grid: Any, where: str) -> Iterator[_Entry]:
    """Yield a grid's members: by type in the order given, the last key varying fastest."""
    if not isinstance(grid, dict):
        raise ConfigError(f"{where}: a grid is a mapping of keys to values or lists, not {grid!r}")
    if "name" in grid:
        raise ConfigError(f"{where}.name: a grid calls its members after their place; drop the key")
    for key, value in grid.items():
        if value == []:
            raise ConfigError(f"{where}.{key}: this list is empty; give at least one value")
    if not all(isinstance(name, str) for name in _values(grid.get("type"))):
        raise ConfigError(f"{where}.type: this key is required, and names a type or a list of them")
    known = {name: _known(name, where) for name in _values(grid["type"])}
    everything = sorted(set().union(*known.values()))
    for key in grid:
        if key not in everything:
            raise ConfigError(f"unknown key '{where}.{key}'; {nearest(key, everything)}")
    axes = tuple(key for key, value in grid.items() if isinstance(value, list))
    for name in known:
        mine = {key: value for key, value in grid.items() if key in known[name]} | {"type": name}
        for values in itertools.product(*map(_values, mine.values())):
            data = dict(zip(mine, values, strict=True))
            place = ", ".join(f"{key} {data[key]}" for key in axes if key in data)
            at = f"{where} ({place})" if place else where
            yield _Entry(at, data, in_grid=True, axes=tuple(key for key in axes if key in data))


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _known(type_name: str, where: str) -> set[str]:
    """Return the keys that a member of this type may have."""
    try:
        kind = config_class(type_name)
    except ConfigError as error:
        raise ConfigError(f"{where}.type: {error}") from None
    unused = {"d_in", "name"} if kind.has_lr else {"d_in", "name", "lr"}
    return (set(kind.model_fields) | set(_OWN)) - unused
