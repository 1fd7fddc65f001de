"""Progress, messages and tables for people.

Progress goes to standard error and only to a terminal, so that standard output stays clean for
results and --json.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
# Of a table too wide for the terminal, so many columns at most are repeated.
MOST_KEYS = 3


def track(items: Sequence[T] | Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar where standard error is a terminal, silently otherwise."""
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    yield from bar(
        items,
        description=label,
        total=total,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def plain_text(value: object) -> str:
    """A name or path as `say` prints it unchanged: square brackets in it are no markup."""
    from rich.markup import escape

    return escape(str(value))


def say(text: str) -> None:
    """One line about what is happening, on standard error. Markup of rich is allowed."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


@functools.cache
def say_once(text: str) -> None:
    """The same, and nothing where this was said before."""
    say(text)


def show(value: object, as_json: bool) -> None:
    """Print a result on standard output: JSON for programs, 'key: value' lines or a table for
    people.
    """
    if as_json:
        print(json_text(value))
    else:
        table(value)


def json_text(value: object) -> str:
    """JSON that standard output can hold: signs that its encoding lacks are written as escapes."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=1)
    return text


def paragraph(text: str) -> None:
    """A sentence for a person on standard output, folded to the terminal's width."""
    from rich.console import Console

    Console(highlight=False).print(text, markup=False)


def table(value: object) -> None:
    """Print a result for a person on standard output: a list of mappings as a table, a mapping as
    lines, mappings in it as tables.
    """
    from rich.console import Console

    console = Console(highlight=False)
    if isinstance(value, list) and value:
        for part in fitting(value, console.width):
            console.print(_grid(part))
    elif isinstance(value, dict):
        width = max(len(str(key)) for key in value)
        for key, item in value.items():
            if _is_table(item):
                console.print(str(key), markup=False)
                rows = [{"": name, **row} for name, row in item.items()]
                for part in fitting(rows, console.width):
                    console.print(_grid(part))
            else:
                console.print(f"{key!s:<{width}}  {_text(item)}", soft_wrap=True, markup=False)


def _is_table(item: object) -> bool:
    return (
        isinstance(item, dict)
        and bool(item)
        and all(isinstance(row, dict) for row in item.values())
    )


def fitting(rows: list[dict[str, object]], width: int) -> list[list[dict[str, object]]]:
    """Rows as one table where it fits into `width` letters, else as several: each repeats the
    columns that tell the rows apart, so that no cell has to be folded.
    """
    columns = columns_of(rows)
    widths = {
        name: max(len(str(name)), *(len(_text(row.get(name))) for row in rows)) + 2
        for name in columns
    }
    if sum(widths.values()) - 2 <= width:
        return [rows]
    keys = 1
    while keys < len(columns) - 1 and keys < MOST_KEYS:
        seen = {tuple(_text(row.get(name)) for name in columns[:keys]) for row in rows}
        if len(seen) == len(rows):
            break
        keys += 1
    free = width + 2 - sum(widths[name] for name in columns[:keys])
    blocks: list[list[str]] = []
    used = free + 1
    for name in columns[keys:]:
        if not blocks or used + widths[name] > free:
            blocks.append([])
            used = 0
        blocks[-1].append(name)
        used += widths[name]
    return [
        [{name: row.get(name) for name in (*columns[:keys], *block)} for row in rows]
        for block in blocks
    ]


def columns_of(rows: list[dict[str, object]]) -> list[str]:
    """Every column that any of the rows has, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def wide(rows: Sequence[dict[str, object]]) -> list[str]:
    """Rows as lines of aligned text, as wide as they need to be: for tables whose cells must not be
    folded. Numbers stand to the right.
    """
    if not rows:
        return []
    columns = []
    for name in rows[0]:
        cells = [name, *(_text(row.get(name)) for row in rows)]
        width = max(map(len, cells))
        if any(isinstance(row.get(name), (int, float)) for row in rows):
            columns.append([cell.rjust(width) for cell in cells])
        else:
            columns.append([cell.ljust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _grid(rows: list[dict[str, object]]) -> object:
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, header_style="bold", pad_edge=False)
    columns = columns_of(rows)
    for column in columns:
        grid.add_column(Text(str(column)), overflow="fold")
    for row in rows:
        # Text, because a cell such as edgemed[onnx] would otherwise be read as markup.
        grid.add_row(*(Text(_text(row.get(column))) for column in columns))
    return grid


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_text(item) for item in value) or "-"
    return "-" if value is None else str(value)
