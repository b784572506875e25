"""The app's entry: page settings, style and navigation."""

from pathlib import Path

import streamlit as st

from saelab.show import STYLE

st.set_page_config(page_title="saelab", page_icon="◈", layout="wide")
st.html(f"<style>{STYLE}</style>")
st.html(Path(__file__).parent / "components" / "style.css")
page = st.navigation(
    [
        st.Page(f"pages/{name}.py", title=title, icon=icon, url_path=name, default=name == "runs")
        for name, title, icon in (
            ("runs", "Runs", ":material/grid_view:"),
            ("feature", "Feature", ":material/radar:"),
            ("tree", "Concept tree", ":material/account_tree:"),
            ("text", "Try your text", ":material/edit_note:"),
            ("circuit", "Circuit", ":material/hub:"),
        )
    ],
    position="top",
)
page.run()
