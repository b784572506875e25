"""What pages share: the run's folder, open files, the live model, the choices in the URL."""

import html
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import streamlit as st

from saelab.features.read import Features
from saelab_app import library
from saelab_app.library import Entry

DIRECTORY = "SAELAB_APP_DIR"


def folder() -> Path:
    """Return the run's folder: the environment's, else the first argument, else the current one."""
    given = os.environ.get(DIRECTORY) or (sys.argv[1] if len(sys.argv) > 1 else ".")
    return Path(given)


@st.cache_data(ttl=3, show_spinner=False)
def _entries(path: str) -> list[Entry]:
    return library.entries(Path(path))


def entries() -> list[Entry]:
    """Return the run's dictionaries; looked up again after a few seconds."""
    return _entries(str(folder()))


@st.cache_resource(show_spinner=False, max_entries=16)
def features(path: Path) -> Features:
    """Return an open feature index."""
    return Features(path)


@st.cache_resource(show_spinner="Loading the language model …", max_entries=2)
def model(source: str, dtype: str) -> Any:
    """Return a live language model, shared by all sessions."""
    from saelab import api

    return api.load_model(source, dtype=dtype)


@st.cache_resource(show_spinner=False, max_entries=8)
def dictionary(path: Path) -> Any:
    """Return a loaded dictionary."""
    from saelab import api

    return api.load(path)


# ----------------------------------------------------------------------------- choices in the URL


def chosen(name: str, default: str) -> str:
    """Return a choice: the URL's, else the one made before on another page."""
    kept = f"chosen {name}"
    value = st.query_params.get(name) or st.session_state.get(kept) or default
    st.session_state[kept] = value
    return value


def choose(name: str, value: str) -> None:
    """Make a choice and put it into the URL."""
    st.session_state[f"chosen {name}"] = value
    st.query_params[name] = value


def pick_entry(candidates: list[Entry]) -> Entry:
    """Draw the box that chooses a dictionary; return the chosen one."""
    ids = [entry.id for entry in candidates]
    current = chosen("dictionary", ids[0])
    if current not in ids:
        current = ids[0]
    st.session_state["pick dictionary"] = current
    st.selectbox(
        "Dictionary", ids, key="pick dictionary",
        on_change=lambda: choose("dictionary", st.session_state["pick dictionary"]),
    )  # fmt: skip
    choose("dictionary", current)
    return candidates[ids.index(current)]


def link(page: str, **query: str) -> str:
    """Return the escaped address of a page with choices, for links inside HTML blocks."""
    return html.escape(f"{page}?{urlencode(query)}")
