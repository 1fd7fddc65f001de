"""The verbs that prove something about an engine: parity, speed and memory, accuracy with its
verdict, and the report of it all.

They stand apart from main.py, which puts them on the same command line. They are what the others
exist for, and grow with every measurement.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgemed.cli.options import (
    AcceptUndecided,
    Adapter,
    EngineDir,
    Frame,
    Json,
    Limit,
    Sets,
    Threads,
    settings,
    task_names,
)
from edgemed.cli.provenance import signed as check_signature
from edgemed.cli.reading import is_checkpoint, show_witness
from edgemed.console import plain_text, show
from edgemed.errors import EdgemedError
from edgemed.params import Range

if TYPE_CHECKING:
    from edgemed.documents.evaluation import EvalResult
    from edgemed.documents.gate import ComparisonRow, GateVerdict
    from edgemed.documents.verify import Stage, VerifyResult


def verify(
    engine: Annotated[
        Path | None,
        typer.Argument(help="Engine directory; a checkpoint is handed to edgemed witness."),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="Only re-check every file of this artifact against its manifest."),
    ] = None,
    max_kl: float = 0.05,
    min_top1: float = 0.9,
    record: Annotated[
        bool | None,
        typer.Option(
            "--record/--no-record",
            help=(
                "Put the result into the engine's manifest, for its report; default: yes, unless"
                " the engine is signed."
            ),
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help=(
                "The signer's public.pem: first check the signature, and name every file changed"
                " since."
            )
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help=(
                "Only this one of the engine's adapters ('base': none); default: the engine as it"
                " is used where none is named, and every other adapter."
            )
        ),
    ] = None,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Compare an engine with the float32 source's answers it carries; or, with --manifest, re-check
    every byte of an artifact.
    """
    from edgemed.artifacts import store
    from edgemed.engines.engine import open_engine
    from edgemed.verification.parity import Limits, with_adapters
    from edgemed.verification.parity import verify as verify_engine

    if engine is not None and is_checkpoint(engine):
        show_witness(engine, None, json_)
    directory = engine or manifest
    if directory is None or (engine and manifest):
        raise EdgemedError(
            "give either ENGINE or --manifest DIR",
            "For example: edgemed verify runs/quickstart/engines/onnx-int4",
        )
    signed = check_signature(directory, key, json_)
    if engine is None:
        problems = store.check_manifest(directory)
        show(
            {
                "artifact": str(directory),
                "files": len(store.open_manifest(directory).files),
                **signed,
                "intact": not problems,
                "problems": problems,
            },
            json_,
        )
        sys.exit(1 if problems else 0)
    if record and adapter:
        raise EdgemedError(
            "the manifest holds the verification of the engine as it is used",
            "Leave --record or --adapter out",
        )
    opened = open_engine(engine, check=True)
    limits = Limits(max_kl, min_top1)
    result = verify_engine(opened, opened.reference(adapter), limits, threads, adapter)
    result = result if adapter else with_adapters(opened, result, limits, threads)
    if not adapter:
        keep_verification(engine, result, record)
    if json_:
        show(result.to_json() | signed, True)
    else:
        show_parity(result, signed)
        for unmerged in (result.adapters or {}).values():
            show_parity(unmerged, {})
    sys.exit(0 if result.passed else 1)


def keep_verification(engine: Path, result: VerifyResult, record: bool | None) -> None:
    """Put a result into the engine's manifest. record: None where nobody said; a signed engine and
    one that cannot be written to then stay as they are.
    """
    from edgemed.console import say
    from edgemed.provenance.record import is_signed, record_verification

    if record is False or (record is None and is_signed(engine)):
        return
    try:
        record_verification(engine, result.to_json())
    except EdgemedError as error:
        if record:
            raise
        say(plain_text(f"the result is not kept in the engine: {error}"))


def show_parity(result: VerifyResult, signed: Mapping[str, Any]) -> None:
    """One engine, or one with an adapter, as a person reads it: a table of the whole and one of the
    stages. signed: what the signature says.
    """
    summary = replace(result, stages=None, adapters=None)
    show(summary.to_json() | dict(signed), False)
    show([stage_row(row) for row in result.stages or ()], False)


def stage_row(row: Stage) -> dict[str, Any]:
    """One stage as a person reads it."""
    return {
        "stage": row.stage,
        "parity": "passed" if row.passed else "failed",
        "error": f"{row.error:.2e}",
        "limit": f"{row.limit:.2g}",
        "how": row.how,
    }


def eval_(
    engine: EngineDir,
    task: Annotated[
        list[str],
        typer.Option(
            autocompletion=task_names,
            help=(
                "Task as NAME, NAME/LANGUAGE or NAME/PART, or NAME:FILE.jsonl for your own rows;"
                " may be repeated."
            ),
        ),
    ],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Prompt strategy: zero-shot, random-3, nearest-3/cot, self-consistency-5, ...; may"
                " be repeated, the first is judged."
            )
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Float checkpoint the engine was made from, evaluated too (needs edgemed[build])."
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help=(
                "What the engine is compared with: the directory of another engine, such as the one"
                " in service, or a file of the source's results, written with --out."
            )
        ),
    ] = None,
    margin: float | None = None,
    alpha: float = 0.05,
    scoring: str = "sum",
    limit: Limit = None,
    frame: Frame = None,
    accept_undecided: AcceptUndecided = False,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help=(
                "Put the results and the verdict into the engine's manifest; sign it again"
                " afterwards."
            ),
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the whole result, every item included, to this JSON file."),
    ] = None,
    adapter: Adapter = None,
    threads: Threads = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Accuracy of the engine that ships; with --source or --against, paired with its float
    checkpoint, and with --margin judged.
    """
    from edgemed import params
    from edgemed.api import evaluate_tasks
    from edgemed.evaluation.spec import EvalSpec

    values = settings(
        sets,
        tasks=task,
        strategies=strategy,
        limit=limit,
        frame=frame,
        margin=margin,
        alpha=alpha,
        scoring=scoring,
    )
    if margin is not None and not (source or against):
        raise EdgemedError(
            "a verdict needs the source's answers, or those of another engine",
            "Give --source MODEL, --against FILE or --against ENGINE",
        )
    if record and adapter:
        raise EdgemedError(
            "the manifest holds results of the engine's base only",
            "Give --out FILE instead of --record, or leave --adapter out",
        )
    if record and against and against.is_dir():
        raise EdgemedError(
            "the manifest holds comparisons with the engine's own source only",
            "Give --out FILE instead of --record",
        )
    spec = params.build(EvalSpec, values, "eval")
    document = evaluate_tasks(engine, spec, source, against, threads, adapter)
    if record:
        from edgemed.engines.engine import open_engine
        from edgemed.evaluation.evaluate import part_of
        from edgemed.provenance.record import record as write_record

        gate = part_of(document.gate, open_engine(engine).name)
        results = [result.to_json() for result in document.engine]
        sources = [result.to_json() for result in document.source]
        write_record(engine, results, gate.to_json() if gate else None, sources)
    if out:
        from edgemed.artifacts.store import write_json

        write_json(out, document.to_json())
    if json_:
        show(document.to_json(), True)
    else:
        show_results((*document.source, *document.engine))
        if document.gate:
            show([verdict_row(row) for row in document.gate.comparisons], False)
            if against and against.is_dir():
                typer.echo(replacement(document.gate.verdict, against))
    exit_with_verdict(document.gate, accept_undecided)


def show_results(results: Iterable[EvalResult]) -> None:
    """The results as a table, and a second one of the metrics that a task has besides accuracy."""
    rows = []
    metrics = []
    for result in results:
        rows.append(result_row(result))
        for name, score in (result.scores or {}).items():
            metrics.append(
                {
                    "task": result.title,
                    "model": result.model,
                    "metric": name,
                    "value": score.value,
                    "n": score.n,
                }
            )
    show(rows, False)
    if metrics:
        show(metrics, False)


def ttt(
    model: Annotated[
        str, typer.Argument(help="Float checkpoint of a language model; engines cannot learn.")
    ],
    task: Annotated[str, typer.Option(help="Multiple-choice text task, as in edgemed eval.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Texts to learn from: a card or .jsonl file; default: the task's solved examples."
        ),
    ] = None,
    k: Annotated[
        int, typer.Option(help="Nearest texts to learn from, a step on each."), Range(1, 10_000)
    ] = 1,
    rate: Annotated[
        float, typer.Option(help="AdamW's learning rate."), Range(above=0, high=10)
    ] = 1e-3,
    limit: Limit = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write both results, every item included, to this JSON file."),
    ] = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Test-time training: answer each question after a LoRA step on the texts nearest to it, put
    back afterwards, against the plain answers.
    """
    from edgemed import params
    from edgemed.artifacts import store
    from edgemed.evaluation.task import questions
    from edgemed.evaluation.test_time_training import AdaptationSettings, compare_adapted
    from edgemed.models.checkpoint import open_checkpoint

    comparison = compare_adapted(
        open_checkpoint(model),
        questions(task, limit),
        params.build(AdaptationSettings, settings(sets, text=text, k=k, rate=rate), "ttt"),
    )
    if out:
        store.write_json(out, comparison.to_json())
    if json_:
        show(comparison.to_json(), True)
        return
    paired = comparison.paired
    rows = [
        result_row(comparison.plain),
        result_row(replace(comparison.trained, paired=paired)),
    ]
    show(rows, False)
    difference = paired.difference.value
    low, high = paired.difference.interval
    typer.echo(
        f"difference {difference:+.4f} (95 % {low:+.4f} to {high:+.4f}, McNemar p"
        f" {paired.mcnemar_p:.3g}), {comparison.times:.1f} times the seconds of a plain"
        " answer"
    )


def result_row(result: EvalResult) -> dict[str, Any]:
    """One result as a person reads it."""
    low, high = result.interval
    paired = result.paired
    return {
        "task": result.title + " (synthetic)" * result.synthetic,
        "model": result.model,
        "strategy": result.strategy,
        "n": result.n,
        "accuracy": f"{result.accuracy:.4f}",
        "95 %": f"{low:.3f}-{high:.3f}",
        "majority": None if result.majority is None else round(result.majority, 4),
        "cut": result.truncated,
        "s/question": result.seconds_per_question,
        "lost": paired.only_source if paired else None,
        "gained": paired.only_engine if paired else None,
    }


def verdict_row(row: ComparisonRow) -> dict[str, Any]:
    """One comparison of the gate as a person reads it."""
    low, high = row.interval
    cells: dict[str, Any] = {
        "engine": row.engine,
        "task": row.task,
        "verdict": row.verdict,
        "difference": f"{row.difference:+.4f}",
        "95 %": f"{low:+.3f} to {high:+.3f}",
        "p": row.p_holm,
    }
    if row.verdict == "undecided":
        cells["more items"] = row.items_needed
    return cells


def replacement(verdict: str, in_service: Path) -> str:
    """Whether an engine may take the place of another one, in a sentence."""
    return {
        "pass": f"ship: not worse than {in_service} within the margin",
        "fail": f"do not ship: worse than {in_service} by more than the margin",
        "undecided": f"undecided: too few items to compare with {in_service}",
    }[verdict]


def exit_with_verdict(gate: GateVerdict | None, accept_undecided: bool) -> None:
    """End with the gate's exit code: 1 failed, 3 undecided."""
    if not gate or gate.verdict == "pass":
        return
    if gate.verdict == "fail":
        sys.exit(1)
    if not accept_undecided:
        typer.echo(
            "undecided: too few items to say that an engine is not worse; --accept-undecided lets"
            " this pass",
            err=True,
        )
        sys.exit(3)


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(help="Directories of finished runs, or of engines with their records."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Page to write, FILE.html; default: report.html in the run, or compare.html."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Render the report of one run again, or compare several runs and engines on one page; Markdown
    and JSON lie beside it.
    """
    from edgemed.reporting.compare_runs import comparison, read_runs, write_comparison
    from edgemed.reporting.report import write

    runs = read_runs(directories)
    alone = len(runs) == 1 and (directories[0] / "report.json").is_file()
    if json_:
        show(runs[0].document if alone else comparison(runs), True)
    elif alone and out is None:
        typer.echo(str(write(runs[0].document, directories[0])))
    else:
        typer.echo(str(write_comparison(runs, out or Path("compare.html"))))
