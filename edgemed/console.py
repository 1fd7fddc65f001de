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


def table(value: object) -> None:
    """Print a result for a person on standard output: a list of mappings as a table, a mapping as lines."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if isinstance(value, list) and value:
        grid = Table(box=None, header_style="bold", pad_edge=False)
        for column in value[0]:
            grid.add_column(str(column), overflow="fold")
        for row in value:
            grid.add_row(*(_text(row.get(column)) for column in value[0]))
        console.print(grid)
    elif isinstance(value, dict):
        width = max(len(str(key)) for key in value)
        for key, item in value.items():
            console.print(f"{str(key):<{width}}  {_text(item)}", soft_wrap=True, markup=False)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_text(item) for item in value) or "-"
    return "-" if value is None else str(value)
