"""Options that several verbs share, and how a result is printed.

They lie apart from the verbs so that these can be spread over files: one option has one name and one help text everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Model directory in Hugging Face layout, hub id, or random:NAME (true dimensions, random weights).")]
EngineDir = Annotated[Path, typer.Argument(help="Engine directory made by export or run.")]
Out = Annotated[Path, typer.Option(help="Directory to make; must not hold anything else.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Parameter as key=value; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
AcceptUndecided = Annotated[bool, typer.Option("--accept-undecided", help="Exit 0 although the gate is undecided (otherwise 3).")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: physical cores.")]


def show(value: Any, as_json: bool) -> None:
    """Print a result: JSON for programs, 'key: value' lines or a table for people."""
    if as_json:
        typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
        return
    from edgemed.console import table

    table(value)


def settings(sets: list[str] | None, **named: Any) -> dict[str, Any]:
    """Parameters from options (those given) and --set key=value."""
    from edgemed.params import parse_set

    values = {key: value for key, value in named.items() if value is not None}
    for text in sets or []:
        keys, value = parse_set(text)
        values[".".join(keys)] = value
    return values
