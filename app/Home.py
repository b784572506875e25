"""The app's entry: page settings, style and navigation."""

import streamlit as st

from saelab_app import state
from saelab_app.components.style import CSS

st.set_page_config(page_title="saelab", page_icon="◈", layout="wide")
st.html(CSS)
page = st.navigation(
    [
        st.Page("pages/runs.py", title="Runs", icon=":material/grid_view:", url_path="runs", default=True),
        st.Page("pages/feature.py", title="Feature", icon=":material/radar:", url_path="feature"),
        st.Page("pages/text.py", title="Try your text", icon=":material/edit_note:", url_path="text"),
    ]
)  # fmt: skip
with st.sidebar:
    st.html(f'<div class="sl-foot">saelab<br><span>{state.shown_folder()}</span></div>')
page.run()
