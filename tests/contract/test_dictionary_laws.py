"""Every registry entry obeys every law; a new type needs no line here."""

import inspect

import pytest
from dictionary_laws import ready
from typing_extensions import get_protocol_members

from saelab import laws
from saelab.dictionaries import REGISTRY
from saelab.edits.latents import Editable
from saelab.errors import ConfigError
from saelab.features.origins import KeepsRows
from saelab.laws import LAWS
from saelab.protocols import Dictionary


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_type_obeys_the_law(name, law):
    law(lambda: ready(name))


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_protocols_see_a_type_as_python_3_12_looks_at_it(name):
    dictionary = ready(name)
    keeps_rows = [KeepsRows] if hasattr(dictionary, "rows") else []
    for protocol in [Dictionary, Editable, *keeps_rows]:
        assert isinstance(dictionary, protocol)
        for member in get_protocol_members(protocol):
            inspect.getattr_static(dictionary, member)


def test_broken_laws_are_named_with_what_was_seen():
    def unwell():
        d = laws.ready("topk")
        d.l0_bound = 1
        return d

    found = laws.broken(unwell)
    assert found.keys() == {"budget_law"}
    assert found["budget_law"].endswith("latents of 1")
    assert laws.broken(lambda: laws.ready("topk")) == {}


def test_a_type_that_raises_breaks_the_law_that_asked():
    def no_codes(x):
        raise ZeroDivisionError("no codes")

    def unwell():
        d = laws.ready("relu")
        d.encode = no_codes
        return d

    assert laws.broken(unwell)["rows_law"] == "ZeroDivisionError: no codes"


def test_a_solved_type_is_not_made_without_a_store():
    with pytest.raises(ConfigError, match="semi_nmf is found by iterations over a store"):
        laws.ready("semi_nmf")
