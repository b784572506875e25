"""Starting the app: the one place that knows Streamlit's command line."""

import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).with_name("Home.py")

_OPTIONS = {
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "server.fileWatcherType": "none",
    "server.showEmailPrompt": "false",
    "theme.light.primaryColor": "#0f766e",
    "theme.light.backgroundColor": "#ffffff",
    "theme.light.secondaryBackgroundColor": "#f4f6f8",
    "theme.light.textColor": "#1f2733",
    "theme.dark.primaryColor": "#14998c",
    "theme.dark.backgroundColor": "#12161c",
    "theme.dark.secondaryBackgroundColor": "#1a2028",
    "theme.dark.textColor": "#e4e8ee",
    "theme.baseRadius": "0.45rem",
}


def command(
    directory: Path, *, port: int = 8501, host: str = "localhost", headless: bool = False
) -> list[str]:
    """Return the command line that serves a run's folder."""
    options = _OPTIONS | {
        "server.address": host,
        "server.port": str(port),
        "server.headless": str(headless).lower(),
    }
    flags = [f"--{key}={value}" for key, value in options.items()]
    return [
        sys.executable, "-m", "streamlit", "run", str(HOME), *flags, "--", str(directory.resolve()),
    ]  # fmt: skip


def launch(
    directory: Path, port: int = 8501, host: str = "localhost", headless: bool = False
) -> int:
    """Serve a run's folder until interrupted; return the exit code."""
    try:
        return subprocess.call(command(directory, port=port, host=host, headless=headless))  # noqa: S603
    except KeyboardInterrupt:
        return 0
