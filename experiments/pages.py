"""What the console modules share: a page that is written or printed, and faults said in a line."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saelab import artifacts
from saelab.errors import SaelabError

Say = Callable[[str], Any]


def put(text: str, output: Path | None, say: Say) -> None:
    """Write a page to its file, and say so; without a file say the page itself."""
    if output is None:
        say(text)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_file(output, text.encode())
    say(f"wrote {output}\n")


def run(main: Callable[[list[str]], None]) -> None:
    """Run a module's `main` on the command line's arguments; an error of ours ends it in a line."""
    try:
        main(sys.argv[1:])
    except SaelabError as error:
        sys.exit(f"error: {error}")
