"""Every registry entry obeys every law; a new type needs no line here."""

import pytest
from dictionary_laws import LAWS, round_trip_law

from saelab.dictionaries import REGISTRY


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_type_obeys_the_law(name, law):
    law(name)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_type_is_loaded_as_it_was_saved(name, tmp_path):
    round_trip_law(name, tmp_path)
