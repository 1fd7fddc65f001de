"""The one exception a user is meant to read, and the one way to ask for an optional package.

Everything a person can put right raises EdgemedError with what, where and what to do; the command
line prints it as one line and exits with code 1. Any other exception is a bug in edgemed and keeps
its traceback.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class EdgemedError(Exception):
    """A problem a person can put right. `fix` is the sentence that says how."""

    def __init__(self, problem: str, fix: str = ""):
        self.problem = problem
        self.fix = fix
        super().__init__(f"{problem}. {fix}" if fix else problem)


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean X? Known: a, b, c' for a mistyped name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(known) or 'none'}"


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises EdgemedError where the package itself is absent; an error inside an installed package is
    not hidden.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise EdgemedError(
            f"this needs the package '{module}', which is not installed",
            f"Install it with: pip install 'edgemed[{extra}]'",
        ) from None
