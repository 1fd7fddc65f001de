"""The verb that measures speed and memory of an engine.

It stands apart from proof.py because it must load little: the process that it runs in is what is
measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgemed.cli.options import Json, Sets, Threads, settings, target_names
from edgemed.console import paragraph, show
from edgemed.errors import EdgemedError


def bench(
    engine: Annotated[Path | None, typer.Argument(help="Engine directory.")] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(help="Make and bench an engine of these true dimensions with random weights."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="With --random-weights: the target, whose parameters --set then takes.",
            autocompletion=target_names,
        ),
    ] = "onnx",
    prompt: Annotated[
        list[int] | None, typer.Option(help="Prompt length in tokens; may be repeated.")
    ] = None,
    generate: int = 64,
    runs: int = 5,
    image: int = 448,
    threads: Threads = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help=(
                "'threads': speeds by number of threads instead, and by group of cores where cores"
                " differ; --runs rounds in turns."
            )
        ),
    ] = None,
    wait: Annotated[
        str, typer.Option(help="How idle threads wait: auto, active (spin) or passive (sleep).")
    ] = "auto",
    wait_quiet: Annotated[
        float | None,
        typer.Option(
            help=(
                "Wait until the machine does nothing else, so many seconds at most (300 where none"
                " are given); default: measure at once, and say where it was busy."
            )
        ),
    ] = None,
    work: Annotated[
        Path, typer.Option(help="With --random-weights: where checkpoint and engine are kept.")
    ] = Path("runs/random"),
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Measure load time, first token, prefill, step latency, decoding speed, memory, energy and the
    bandwidth ceiling.
    """
    from edgemed.benchmarking.spec import BenchSpec

    if random_weights and engine is None:
        from edgemed.pipeline.runner import random_engine

        engine = random_engine(random_weights, target, settings(sets), work)
    elif random_weights or engine is None:
        raise EdgemedError(
            "give either ENGINE or --random-weights NAME",
            "For example: edgemed bench --random-weights biomedlm --target onnx --set"
            " precision=int4",
        )
    plan = BenchSpec(
        tuple(prompt or (32, 128)),
        generate,
        runs,
        threads,
        image,
        wait_quiet,
    )
    if sweep:
        from edgemed.benchmarking.thread_sweep import shown, why_no_best
        from edgemed.benchmarking.thread_sweep import sweep as sweep_engine

        rows = sweep_engine(sweep, engine, plan, wait)
        show(rows if json_ else [shown(row) for row in rows], json_)
        if not json_ and (reason := why_no_best(rows)):
            typer.echo(reason)
    elif random_weights or wait != "auto":
        from edgemed.benchmarking.thread_sweep import bench_afresh

        bench_afresh(engine, plan, wait, json_)
    else:
        bench_here(engine, plan, json_)


def bench_here(engine: Path, plan: Any, as_json: bool) -> None:
    from edgemed.artifacts.records import append_records
    from edgemed.benchmarking.bench import bench as bench_engine
    from edgemed.benchmarking.machine_state import sentences
    from edgemed.engines.engine import open_engine
    from edgemed.hardware import process_memory

    opened = open_engine(engine, check=True)
    process_memory.reset_peak_memory()
    records = bench_engine(opened, plan)
    append_records(engine, records)
    if as_json:
        show([record.to_json() for record in records], True)
        return
    if opened.random_weights:
        typer.echo("random weights: these numbers say something about latency and memory only")
    state = records[0].state
    lines = sentences(state) if state else []
    # Before the numbers, which are wrong then.
    for line in lines[:1] if state and state.busy else ():
        paragraph(line)
    show(
        [
            {
                "what": record.name,
                "value": f"{record.value:.4g}",
                "unit": record.unit,
                "n": record.n,
                "prompt": prompt_of(record.how),
            }
            for record in records
        ],
        False,
    )
    for line in lines[1:] if state and state.busy else lines:
        paragraph(line)


def prompt_of(how: Mapping[str, Any]) -> Any:
    """What was asked, for a table: tokens of the prompt, or the image and its tokens."""
    if "image" in how:
        return f"{how['tokens']} with an image of {how['image']} x {how['image']}"
    return how.get("prompt", "")
