from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from saelab import config
from saelab.config import Config
from saelab.errors import ConfigError


class Inner(Config):
    width: int = Field(default=3, gt=0)
    kind: Literal["a", "b"] = "a"


class Outer(Config):
    name: str
    inner: Inner | None = None
    items: list[Inner] = []


@pytest.mark.parametrize(
    ("text", "value"),
    [("8e-4", 8e-4), ("1e6", 1_000_000), ("2E+3", 2000), ("400_000", 400_000), ("1.5e3", 1500),
     (".5e1", 5), ("-1e-2", -0.01), ("1e6x", "1e6x"), ("0.1", 0.1)],
)  # fmt: skip
def test_numbers_with_exponents_are_numbers(text, value):
    parsed = config.parse_yaml(f"a: {text}")["a"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(ConfigError, match="'a' stands twice"):
        config.parse_yaml("a: 1\na: 2")


def test_malformed_yaml_is_one_clear_error():
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.parse_yaml("a: [1,")


def test_overrides_reach_nested_keys_and_list_items():
    data = {"name": "x", "items": [{"width": 1}], "inner": None}
    changed = config.apply_overrides(data, ["items.0.width=1e3", "inner.kind=b"])
    assert changed == {"name": "x", "items": [{"width": 1000}], "inner": {"kind": "b"}}
    assert data["items"][0]["width"] == 1


@pytest.mark.parametrize("bad", ["width", "=3", "items.7.width=1", "name.sub=1"])
def test_overrides_that_cannot_be_applied_are_refused(bad):
    with pytest.raises(ConfigError, match="override"):
        config.apply_overrides({"name": "x", "items": []}, [bad])


def test_an_unknown_key_names_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"unknown key 'inner.widht'; did you mean 'width'"):
        Outer.parse({"name": "x", "inner": {"widht": 3}})
    with pytest.raises(ConfigError, match=r"unknown key 'items.0.knd'; did you mean 'kind'"):
        Outer.parse({"name": "x", "items": [{"knd": "a"}]})


def test_wrong_values_say_what_was_wanted_and_what_came():
    with pytest.raises(ConfigError, match=r"inner.width: .*greater than 0, but -1 came"):
        Outer.parse({"name": "x", "inner": {"width": -1}})
    with pytest.raises(ConfigError, match="name: this key is required"):
        Outer.parse({})


def test_every_fault_is_listed_at_once():
    with pytest.raises(ConfigError) as error:
        Outer.parse({"inner": {"width": -1, "knd": "a"}})
    assert len(str(error.value).splitlines()) == 3


def test_first_difference_names_the_path():
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert config.first_difference(old, {"a": {"b": 1, "c": 5}, "d": 3}) == "a.c: 2 → 5"
    assert config.first_difference(old, old) is None


def test_digest_does_not_depend_on_key_order():
    assert config.digest({"a": 1, "b": 2}) == config.digest({"b": 2, "a": 1})


def test_a_missing_or_binary_file_is_one_clear_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read"):
        config.load_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load_yaml(tmp_path / "bad.yaml")
