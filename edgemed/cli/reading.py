"""The verb that asks how a checkpoint is read: edgemed's reading beside that of the library its
authors used.

It stands apart from the other proofs, because it says something about a checkpoint and needs no
engine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgemed.cli.options import Json
from edgemed.console import show


def witness(
    model: Annotated[
        str,
        typer.Argument(help="Model directory in Hugging Face layout, hub id, or GGUF file."),
    ],
    memory: Annotated[
        str | None,
        typer.Option(
            help=(
                "Memory it may take, such as 16GB; with more, scores of a larger model are compared"
                " with all layers. Default: 4 GiB, or half of what is free."
            )
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Read a checkpoint with edgemed and with transformers, and compare: weights, scores, token
    ids, chat, stop tokens, images. Every export does it by itself.
    """
    show_witness(model, memory, json_)


def show_witness(model: str | Path, memory: str | None, as_json: bool) -> None:
    """Print what the witness says of a checkpoint, and end with exit code 1 where anything
    differs.
    """
    from edgemed import units
    from edgemed.api import witness as ask
    from edgemed.verification.witness.witness import table

    result = ask(str(model), units.size(memory, "--memory") if memory else None)
    if as_json:
        show(result.to_json() | {"passed": result.passed, "line": result.line}, True)
    else:
        show(table(result), False)
        for exception in result.exceptions:
            typer.echo(f"not held against it: {exception}")
        typer.echo(f"witness: {result.line}")
    sys.exit(0 if result.passed else 1)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a GGUF file, or a directory with a checkpoint and no engine."""
    from edgemed.models.checkpoint import is_gguf

    if is_gguf(path):
        return True
    return (path / "config.json").is_file() and not (path / "engine.json").is_file()
