"""`python -m edgemed` is the same as the `edgemed` command."""

from edgemed.cli.main import main

main()
