"""The one exception a user is meant to read, and the one way to ask for an optional package.

Everything a person can put right raises EdgemedError with what, where and what to do; the command
line prints it as one line and exits with code 1. Any other exception is a bug in edgemed and keeps
its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

# Packages that build-only modules import at their top, and the extra that brings each.
EXTRAS = {
    **dict.fromkeys(
        ("torch", "transformers", "peft", "safetensors", "onnx", "gguf", "accelerate"), "build"
    ),
    "huggingface_hub": "build",
}


LONGEST_PART = 1200


# Stands between a number and its unit.
NO_BREAK_SPACE = "\u00a0"


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
            sign
            if sign.isprintable() or sign == NO_BREAK_SPACE
            else sign.encode("unicode_escape").decode()
            for sign in text
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


def missing(module: str, extra: str) -> MissingPackages:
    """The error that names an absent package and the extra that brings it."""
    return MissingPackages({module: extra})


class MissingPackages(EdgemedError):
    """Optional packages that are not installed. modules: module -> the extra that brings it."""

    def __init__(self, modules: Mapping[str, str]):
        self.modules = dict(modules)
        names = ", ".join(f"'{module}'" for module in self.modules)
        extras = tuple(dict.fromkeys(self.modules.values()))
        what = f"package {names}, which is" if len(modules) == 1 else f"packages {names}, which are"
        super().__init__(
            f"this needs the {what} not installed",
            f"Install edgemed[{','.join(extras)}]: {install_command(*extras)}",
        )

    def joined(self, others: Mapping[str, str]) -> MissingPackages:
        """The same error with further packages."""
        return MissingPackages(self.modules | dict(others))


def install_command(*extras: str) -> str:
    """The command that adds extras to this installation. No index has edgemed, so it names the
    clone or the wheel that edgemed came from.
    """
    wanted = f"[{','.join(extras)}]"
    clone = Path(__file__).resolve().parent.parent
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e '{clone}{wanted}'"
    return f"pip install '{_wheel()}{wanted}'"


def _wheel() -> str:
    # pip notes where a distribution came from (PEP 610).
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError, ValueError, TypeError, KeyError):
        distribution = metadata.distribution("edgemed")
        url = json.loads(distribution.read_text("direct_url.json") or "{}")["url"]
        if url.startswith("file://"):
            return unquote(url.removeprefix("file://"))
    return "/path/to/edgemed-VERSION-py3-none-any.whl"


def is_installed(module: str) -> bool:
    """Whether a module could be imported; nothing is."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return module in sys.modules


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
