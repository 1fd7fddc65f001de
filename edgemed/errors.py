"""The one exception a user is meant to read, and the one way to ask for an optional package.

Everything a person can put right raises EdgemedError with what, where and what to do; the command
line prints it as one line and exits with code 1. Any other exception is a bug in edgemed and keeps
its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType

# Packages that build-only modules import at their top, and the extra that brings each.
EXTRAS = {
    **dict.fromkeys(
        ("torch", "transformers", "peft", "safetensors", "onnx", "gguf", "accelerate"), "build"
    ),
    "huggingface_hub": "build",
}


LONGEST_PART = 1200


class EdgemedError(Exception):
    """A problem a person can put right. `fix` is the sentence that says how."""

    def __init__(self, problem: str, fix: str = ""):
        self.problem = one_line(problem)
        self.fix = one_line(fix)
        super().__init__(f"{self.problem}. {self.fix}" if fix else self.problem)


def one_line(text: str) -> str:
    """A text that fits into one printable line. What ends a line, moves the cursor, turns the
    direction of writing or cannot be encoded is escaped, and the middle of a very long text is left
    out.
    """
    if not text.isprintable():
        text = "".join(
            sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
        )
    if len(text) <= LONGEST_PART:
        return text
    return f"{text[: LONGEST_PART // 2]} ... {text[-LONGEST_PART // 2 :]}"


def nearest(name: str, choices: Iterable[str]) -> str:
    """'Did you mean X? Known: a, b, c' for a mistyped name."""
    names = sorted(choices)
    close = difflib.get_close_matches(name[:LONGEST_PART], names, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(names) or 'none'}"


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises EdgemedError where the package itself is absent. An error inside an installed package is
    not hidden.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise missing(module, extra) from None


def missing(module: str, extra: str) -> EdgemedError:
    """The error that names an absent package and the extra that brings it."""
    return EdgemedError(
        f"this needs the package '{module}', which is not installed",
        f"Install it with: pip install 'edgemed[{extra}]'",
    )


@contextlib.contextmanager
def extras_named() -> Iterator[None]:
    """Turn the absence of a build package into the error that names its extra; also a decorator.

    Build-only modules import torch and the like at their top, so the error arises where one of
    them is first imported. It is caught where plug-ins, the API and the command line are entered.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in EXTRAS:
            raise
        raise missing(module, EXTRAS[module]) from None
