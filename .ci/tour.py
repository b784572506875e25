"""Run the README's tour: every fenced bash block that stands right after `<!-- tour -->`.

python .ci/tour.py README.md    # in an empty folder, with the installed saelab first in PATH
"""

import re
import subprocess
import sys
from pathlib import Path

TOUR = re.compile(r"<!-- tour -->\s*\n```(?:bash|sh|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def main() -> int:
    """Run the blocks in order, in the current folder; stop at the first command that fails."""
    page = Path(sys.argv[1])
    blocks = TOUR.findall(page.read_text())
    if not blocks:
        sys.stderr.write(f"{page} should hold a bash block after <!-- tour -->, but has none\n")
        return 1
    for block in blocks:
        command = ["bash", "-euxo", "pipefail", "-c", block]
        status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode  # noqa: S603
        if status:
            sys.stderr.write(f"the tour failed with status {status}\n")
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
