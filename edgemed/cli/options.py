"""Options that several verbs share, and how options and --set become parameters.

One place, so that the same option has the same name, type and help on every verb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(
        help=(
            "Model directory in Hugging Face layout, hub id, or random:NAME (true dimensions,"
            " random weights)."
        )
    ),
]
EngineDir = Annotated[Path, typer.Argument(help="Engine directory made by export or run.")]
Out = Annotated[Path, typer.Option(help="Directory to make; must not hold anything else.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Parameter as key=value; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
AcceptUndecided = Annotated[
    bool,
    typer.Option("--accept-undecided", help="Exit 0 although the gate is undecided (otherwise 3)."),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help=(
            "One of the engine's adapters, or 'base' for none; default: none, unless its checkpoint"
            " brought one."
        )
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: physical cores.")]


def settings(sets: list[str] | None, **named: Any) -> dict[str, Any]:
    """Parameters from options (those given) and --set key=value."""
    from edgemed.params import parse_set

    values = {key: value for key, value in named.items() if value is not None}
    for text in sets or []:
        keys, value = parse_set(text)
        values[".".join(keys)] = value
    return values
