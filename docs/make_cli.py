"""Writes docs/cli.md from the --help of every verb: python docs/make_cli.py

A reference that is written by hand is wrong after the next change; a test compares this one with
what the command line says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"

HEAD = """# Command line

Written by `make docs` from `--help`; a test keeps it current. All parameters of steps, targets and recipe sections: [parameters.md](parameters.md).
Every verb exits with 0 when all is well, with 1 and one line starting with `error: ` when there is something you can put right, and with 2 when the command line itself is wrong. `edgemed eval` and `edgemed run` exit with 3 when the gate is undecided.
Results go to standard output, progress to standard error. `edgemed --install-completion` makes the shell complete verbs, options and the names of targets, tasks, devices and recipes.
"""


def help_of(*arguments: str) -> str:
    # Fixed width and no colour, so that the page does not depend on the terminal.
    environment = {
        **os.environ,
        "COLUMNS": "120",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "PYTHONHASHSEED": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "edgemed", *arguments, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def verbs(*above: str) -> list[str]:
    """The verbs below one, none where it has none."""
    _, _, commands = help_of(*above).partition("Commands:")
    return re.findall(r"^  (\w[\w-]*)", commands, re.MULTILINE)


def page() -> str:
    parts = [HEAD, "```text", help_of(), "```"]
    for verb in verbs():
        parts += ["", f"## edgemed {verb}", "", "```text", help_of(verb), "```"]
        for below in verbs(verb):
            parts += ["", f"### edgemed {verb} {below}", "", "```text", help_of(verb, below), "```"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
