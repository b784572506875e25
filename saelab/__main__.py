"""`python -m saelab` is the `saelab` command."""

from saelab.cli import main

main()
