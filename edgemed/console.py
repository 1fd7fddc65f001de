"""Progress and messages for people, on standard error, so that standard output stays clean for results and --json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T] | Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar where standard error is a terminal, silently otherwise."""
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    yield from bar(items, description=label, total=total, console=console, transient=True, disable=not console.is_terminal)


def say(text: str) -> None:
    """One line about what is happening, on standard error."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
