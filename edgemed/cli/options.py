"""Options that several verbs share, and how options and --set become parameters.

One place, so that the same option has the same name, type and help on every verb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgemed import plugins
from edgemed.params import Range

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


def target_names(incomplete: str) -> list[str]:
    """For shell completion, as the functions below."""
    return [name for name in plugins.names("targets") if name.startswith(incomplete)]


def device_names(incomplete: str) -> list[str]:
    return [name for name in plugins.names("devices") if name.startswith(incomplete)]


def task_names(incomplete: str) -> list[str]:
    return [name for name in plugins.names("tasks") if name.startswith(incomplete)]


def recipe_names(incomplete: str) -> list[str]:
    files = sorted(plugins.shared("recipes").glob(f"{incomplete}*.yaml"))
    return [file.stem for file in files]


Target = Annotated[
    str,
    typer.Option(
        help=f"One of {', '.join(plugins.names('targets'))}.",
        autocompletion=target_names,
    ),
]


def print_version(wanted: bool) -> None:
    """Print the installed version and end, before a verb is looked for."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"edgemed {version('edgemed')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version",
        callback=print_version,
        is_eager=True,
        help="Print edgemed's version and exit.",
    ),
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
Check = Annotated[
    bool,
    typer.Option(
        "--check/--trust-cache",
        help=(
            "Read every byte of the engine; or believe the hash remembered for a file of more than"
            " 16 MB whose inode, size and times have not changed since it was last read."
        ),
    ),
]
# Numbers whose range stands at no parameter class. `Verb` checks them, and the help shows them.
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; default: physical cores; at most four for each core."),
    Range(1, 512),
]
Frame = Annotated[
    int | None,
    typer.Option(help="Which frame, from 0, of image files that have several."),
    Range(0, 1_000_000),
]
Limit = Annotated[int | None, typer.Option(help="Only the first questions of each task."), Range(1)]


def settings(sets: list[str] | None, **named: Any) -> dict[str, Any]:
    """Parameters from options (those given) and --set key=value."""
    from edgemed.documents.yaml_files import parse_set

    values = {key: value for key, value in named.items() if value is not None}
    for text in sets or []:
        keys, value = parse_set(text)
        values[".".join(keys)] = value
    return values
