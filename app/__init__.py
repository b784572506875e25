"""The browser app: Streamlit pages over a run's artifacts. `launch` starts it."""

from saelab_app.serve import launch

__all__ = ["launch"]
