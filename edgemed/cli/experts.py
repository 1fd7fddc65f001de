"""The verb about mixtures of experts: which of them are used for what, and what noise in choosing
them would change.

A module of its own because it runs the checkpoint and not an engine, which no other verb that asks
questions does.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgemed.cli.options import Json, Limit, Model
from edgemed.console import show
from edgemed.errors import EdgemedError
from edgemed.params import Range


def experts(
    model: Model,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task as for eval, of whose questions the tokens are counted; may be repeated."
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text set or .jsonl file to count too; may be repeated."),
    ] = None,
    limit: Limit = None,
    samples: Annotated[
        int, typer.Option(help="Sequences of each text set."), Range(1, 1_000_000)
    ] = 16,
    length: Annotated[int, typer.Option(help="Tokens per sequence."), Range(1, 1_000_000)] = 256,
    noise: Annotated[
        int,
        typer.Option(
            help=(
                "Instead: ask each task with the authors' noise in the second expert, with so many"
                " seeds, and say what changes."
            ),
        ),
        Range(0, 10_000),
    ] = 0,
    scale: Annotated[
        float, typer.Option(help="With --noise: its scale; 1 is the authors'."), Range(0)
    ] = 1.0,
    json_: Json = False,
) -> None:
    """Tokens per expert of each sparse layer, by task and language, on the float checkpoint; or
    what the authors' noise does to its answers.
    """
    from edgemed.evaluation.expert_usage import count_expert_usage, spread
    from edgemed.models.checkpoint import open_checkpoint

    if noise:
        if not task or calibration:
            raise EdgemedError(
                "--noise changes answers, so it needs --task and no --calibration",
                "For example --task cells --noise 8",
            )
        rows = [spread(open_checkpoint(model), name, noise, scale, limit) for name in task]
        show(rows if json_ else [spread_row(row) for row in rows], json_)
        return
    rows = count_expert_usage(
        open_checkpoint(model), task or [], calibration or [], limit, samples, length
    )
    show(rows if json_ else [load_row(row) for row in rows], json_)


def load_row(row: dict[str, Any]) -> dict[str, Any]:
    """One row of the load as a person reads it; %0: share of expert 0 among the choices."""
    shares = {f"%{j}": round(100 * share, 1) for j, share in enumerate(row["shares"])}
    return {
        "of": row["of"],
        "in": row["language"],
        "layer": row["layer"],
        "tokens": row["tokens"],
        **shares,
        "entropy": round(row["entropy"], 3),
        "effective": round(row["effective"], 2),
    }


def spread_row(row: dict[str, Any]) -> dict[str, Any]:
    """One task under noise as a person reads it."""
    return {
        "task": row["task"],
        "n": row["n"],
        "without noise": f"{row['accuracy']:.4f}",
        "with, mean": f"{row['mean']:.4f}",
        "least": f"{min(row['noisy']):.4f}",
        "most": f"{max(row['noisy']):.4f}",
        "deviation": row["deviation"],
        "answers changed": f"{100 * row['mean_changed']:.1f} %",
    }
