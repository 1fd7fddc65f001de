"""The command line: thin verbs over the same functions the Python API offers.

Everything heavy is imported inside the verb that needs it, so that --help answers at once;
what a person or the machine can cause becomes one line (see process.py), and any other exception is
a bug and keeps its traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from edgemed.cli import (
    calibration,
    experts,
    harness,
    planning,
    process,
    proof,
    provenance,
    reading,
    recipes,
    speed,
)
from edgemed.cli.options import (
    AcceptUndecided,
    Adapter,
    Check,
    EngineDir,
    Frame,
    Json,
    Model,
    Out,
    Sets,
    Target,
    Threads,
    Version,
    recipe_names,
    settings,
)
from edgemed.cli.parameters import Verb
from edgemed.console import paragraph, show
from edgemed.errors import EdgemedError, extras_named
from edgemed.params import Range

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command line. arguments: without the program's name; None for the process' own.

    Raises SystemExit with the command's exit code.
    """
    if arguments is None:
        process.prepare()
    with process.faults_as_lines(), extras_named():
        app(arguments, prog_name="edgemed")


@app.callback()
def root(version: Version = False) -> None:
    """Tiny medical language models on small devices: merge, quantize, compile, and prove it did not
    get worse.
    """


app.command(cls=Verb)(planning.doctor)
app.command(cls=Verb)(planning.inspect)
app.command(cls=Verb)(planning.plan)
app.command(cls=Verb)(reading.witness)
app.command(cls=Verb)(experts.experts)


@app.command(cls=Verb)
def run(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe file, or the name of a shipped recipe.", autocompletion=recipe_names
        ),
    ],
    sets: Sets = None,
    work: Annotated[
        Path | None, typer.Option(help="Where artifacts and the report go; default: runs/RECIPE.")
    ] = None,
    accept_undecided: AcceptUndecided = False,
    json_: Json = False,
) -> None:
    """Run a whole recipe; finished steps are reused, an interrupted run goes on."""
    from edgemed.documents.gate import GateVerdict
    from edgemed.documents.witness import WitnessResult
    from edgemed.pipeline.recipe import read_recipe
    from edgemed.pipeline.runner import run as run_recipe

    work = work or Path("runs") / Path(recipe).stem
    report = run_recipe(read_recipe(recipe, sets or ()), work)
    document = json.loads((work / "report.json").read_text(encoding="utf-8"))
    if json_:
        show(document, True)
    else:
        show([summary(engine) for engine in document["engines"]], False)
        if document.get("witness"):
            result = WitnessResult.from_json(document["witness"], "the witness")
            typer.echo(f"witness: {result.line}")
        for line in conclusions(document):
            paragraph(line)
        typer.echo(f"report: {report}")
    verified = [engine["verify"] for engine in document["engines"] if engine["verify"]]
    if not all(result["passed"] for result in verified):
        sys.exit(1)
    gate = GateVerdict.from_json(document["gate"], "the gate") if document["gate"] else None
    proof.exit_with_verdict(gate, accept_undecided)


def conclusions(document: dict[str, Any]) -> list[str]:
    """What the report's first screen says: the engine to ship, and what stands against the
    numbers.
    """
    from edgemed.reporting.view_model import Run, view

    page = view([Run(document)])
    return [*page["warnings"], f"engine to ship: {page['ship'].sentence}"]


def summary(engine: dict[str, Any]) -> dict[str, Any]:
    """One engine of a report document as a person reads it."""
    from edgemed.documents.evaluation import task_title

    values = {record["name"]: record["value"] for record in engine["records"]}
    row = {
        "engine": engine["name"],
        "precision": engine["precision"],
        "MB": round(engine["bytes"] / 1e6, 1),
    }
    if engine["verify"]:
        row |= {
            "verified": engine["verify"]["passed"],
            "top-1": round(engine["verify"]["top1"], 4),
            "mean KL": round(engine["verify"]["mean_kl"], 5),
        }
    if "decode_tokens_per_second" in values:
        row["tok/s"] = round(values["decode_tokens_per_second"], 1)
    # Of several strategies on a task the first stays.
    row |= {
        task_title(result["task"], None, result.get("file")): round(result["accuracy"], 4)
        for result in engine["evals"][::-1]
    }
    if engine["gate"]:
        row["not worse"] = engine["gate"]["verdict"]
    return row


@app.command(name="import", cls=Verb)
def import_(
    file: Annotated[Path, typer.Argument(help="GGUF file of a whole text model.")],
    out: Out,
    json_: Json = False,
) -> None:
    """Make a checkpoint of a GGUF file, and check it against llama.cpp's own reading of the
    file.
    """
    from edgemed.api import import_gguf
    from edgemed.artifacts import store

    manifest = store.read_manifest(import_gguf(file, out))
    show({"checkpoint": str(out), **manifest["notes"]}, json_)


@app.command(cls=Verb)
def merge(
    model: Model,
    out: Out,
    adapter: str | None = None,
    alpha: float = 1.0,
    experts: str | None = None,
    calibration: str | None = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Merge a PEFT adapter into its base model, and check that the answers are the adapter's; or
    experts into one MLP each layer.
    """
    step(
        "merge",
        model,
        out,
        settings(sets, adapter=adapter, alpha=alpha, experts=experts, calibration=calibration),
        json_,
    )


@app.command(cls=Verb)
def quantize(
    model: Model,
    out: Out,
    method: str = "gptq",
    bits: int = 4,
    group: int | None = None,
    calibration: str | None = None,
    budget: str | None = None,
    max_memory: str | None = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Quantize the matrices of a checkpoint, alike or mixed within a budget, in the AutoGPTQ
    checkpoint layout, or in bitsandbytes'.
    """
    step(
        "quantize",
        model,
        out,
        settings(
            sets,
            method=method,
            bits=bits,
            group=group,
            calibration=calibration,
            budget=budget,
            max_memory=max_memory,
        ),
        json_,
    )


@app.command(cls=Verb)
def distill(
    model: Model,
    out: Out,
    calibration: Annotated[str, typer.Option()],
    steps: Annotated[int, typer.Option()],
    rate: Annotated[float, typer.Option()],
    teacher: str | None = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers of MODEL the student keeps: a count, or indices as 0,2,4."),
    ] = None,
    target_params: str | None = None,
    loss: str = "forward_kl",
    mode: str = "logits",
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Distill a teacher into a smaller student; a killed run goes on when the same command is given
    again.
    """
    try:
        chosen = [int(layer) for layer in layers.split(",")] if layers else None
    except ValueError:
        raise EdgemedError(
            f"--layers {layers} is neither a count nor indices",
            "For example --layers 3, or --layers 0,2,4",
        ) from None
    student = {"layers": chosen, "target_params": target_params}
    step(
        "distill",
        model,
        out,
        settings(
            sets,
            calibration=calibration,
            steps=steps,
            rate=rate,
            teacher=teacher,
            loss=loss,
            mode=mode,
            **student,
        ),
        json_,
    )


def step(name: str, model: str, out: Path, values: dict[str, Any], as_json: bool) -> None:
    """Run one step on a model and show what its manifest says."""
    from edgemed import params, plugins
    from edgemed.artifacts import store
    from edgemed.pipeline.recipe import Stage
    from edgemed.pipeline.runner import open_model, run_step

    stage = Stage(name, params.build(plugins.load("steps", name).Params, values, name))
    artifact = run_step(stage, open_model(model, out.parent), out.parent, out)
    manifest = store.read_manifest(artifact.path)
    keys = ("stage", "params", "notes", "wall_seconds", "peak_memory_bytes")
    show({key: manifest[key] for key in keys}, as_json)


@app.command(cls=Verb)
def export(
    model: Annotated[
        str | None, typer.Argument(help="Model directory, hub id or random:NAME.")
    ] = None,
    target: Target = "onnx",
    out: Annotated[Path, typer.Option(help="Engine directory to make.")] = Path("engine"),
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="True dimensions of this model with random weights, for latency and memory only."
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            help=(
                "Text set whose validation split gives the reference answers that travel along;"
                " 'none' leaves them out."
            )
        ),
    ] = "pubmedqa-abstracts",
    source: Annotated[
        str | None,
        typer.Option(
            help="Float checkpoint to take reference answers from; default: MODEL itself."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="PEFT LoRA that travels along unmerged, as NAME=DIRECTORY; may be repeated."
        ),
    ] = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Compile a checkpoint to one engine directory that travels to the device."""
    from edgemed.api import export as export_engine
    from edgemed.artifacts import store
    from edgemed.console import say
    from edgemed.verification.witness.witness import line_of

    if (model is None) == (random_weights is None):
        raise EdgemedError(
            "give either MODEL or --random-weights NAME",
            "For example: edgemed export ./BioMedLM --target onnx --out engine",
        )
    values = settings(sets, adapters=adapters_of(adapter or []))
    engine = export_engine(
        model or f"random:{random_weights}",
        target,
        out,
        prompts=None if prompts == "none" else prompts,
        source=source,
        **values,
    )
    notes = store.open_manifest(engine.path).notes
    # A tensor that could not have the type asked for is said aloud: the engine is larger than its
    # name says.
    tensors_by_change: dict[str, list[str]] = {}
    for name, change in notes.get("fallbacks", {}).items():
        tensors_by_change.setdefault(change, []).append(name)
    for change, tensors in sorted(tensors_by_change.items()):
        say(f"{change}: {', '.join(tensors)}")
    result = {
        "engine": str(engine.path),
        "target": engine.target,
        "precision": engine.precision,
        "random_weights": engine.random_weights,
    }
    if line := line_of(notes):
        result["witness"] = line
    if engine.emulation:
        result["unbuilt"] = f"on the device run: edgemed build {engine.path}"
    show(result, json_)


def adapters_of(pairs: list[str]) -> dict[str, str] | None:
    """Name -> directory, from NAME=DIRECTORY. Raises EdgemedError for another form."""
    adapters = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(adapters) < len(pairs):
        raise EdgemedError(
            f"--adapter {', '.join(pairs)}: each must be NAME=DIRECTORY, and no name given twice",
            "For example --adapter sections=recipes/quickstart/adapter",
        )
    return adapters or None


@app.command(cls=Verb)
def build(
    engine: EngineDir,
    workspace_mb: Annotated[
        int | None,
        typer.Option(
            help="Memory TensorRT may use to try kernels, in 10^6 bytes; default: the engine's.",
        ),
        Range(1, 1_000_000),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure it afterwards.")
    ] = True,
    json_: Json = False,
) -> None:
    """On the device: compile an exported engine for this GPU, then verify and measure it."""
    from edgemed.api import build as build_engine

    result = build_engine(engine, workspace_mb, measure)
    verified = result.verify
    if json_:
        show(result.to_json(), True)
    else:
        plan = result.plan
        show(
            {
                **plan["params"],
                **plan["notes"],
                "verified": None if verified is None else verified.passed,
            },
            False,
        )
        show(
            [
                {
                    "what": entry.name,
                    "value": f"{entry.value:.4g}",
                    "unit": entry.unit,
                    "n": entry.n,
                    "prompt": entry.how.get("prompt", ""),
                }
                for entry in result.records
            ],
            False,
        )
    sys.exit(0 if verified is None or verified.passed else 1)


app.command(cls=Verb)(proof.verify)
app.command(cls=Verb)(speed.bench)
app.command(name="eval", cls=Verb)(proof.eval_)
app.command(
    name="lm-eval",
    options_metavar="ARGUMENTS...",
    context_settings=harness.HANDED_OVER,
)(harness.lm_eval)
app.command(cls=Verb)(proof.ttt)
app.command(cls=Verb)(proof.report)


@app.command(cls=Verb)
def generate(
    engine: EngineDir,
    prompt: Annotated[str, typer.Option(help="Text to continue, or question about the images.")],
    image: Annotated[
        list[str] | None, typer.Option(help="PNG, JPEG, TIFF or DICOM file; may be repeated.")
    ] = None,
    frame: Frame = None,
    template: Annotated[
        str | None,
        typer.Option(
            help=(
                "chat, reasoning, none, or one of the model's named chat templates; default: chat"
                " with images, none without."
            )
        ),
    ] = None,
    chat_: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn: --template chat.")
    ] = False,
    special_tokens: Annotated[
        bool,
        typer.Option(
            help="Put the tokens around the prompt that the model's tokenizer puts around a text."
        ),
    ] = True,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    adapter: Adapter = None,
    seed: int = 0,
    threads: Threads = None,
    check: Check = False,
    json_: Json = False,
) -> None:
    """Continue a text or answer about images, offline, printing words as they come."""
    from edgemed.api import PromptForm, stream
    from edgemed.engines.engine import open_engine
    from edgemed.inference.decoding import Sampling

    if check:
        open_engine(engine, check=True)
    if chat_ and template not in (None, "chat"):
        raise EdgemedError(f"--chat and --template {template} differ", "Give one of them")
    words = stream(
        engine,
        prompt,
        Sampling(
            temperature,
            top_k,
            top_p,
            seed,
            max_tokens,
        ),
        threads,
        image or (),
        PromptForm("chat" if chat_ else template, special_tokens, frame),
        adapter,
    )
    if json_:
        show({"prompt": prompt, "text": "".join(words)}, True)
        return
    for word in words:
        typer.echo(word, nl=False)
        sys.stdout.flush()
    typer.echo("")


@app.command(cls=Verb)
def chat(
    engine: EngineDir,
    max_tokens: int = 256,
    temperature: float = 0.0,
    adapter: Adapter = None,
    threads: Threads = None,
    check: Check = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Answer each line with one line of JSON, for programs.")
    ] = False,
) -> None:
    """Talk to an engine, offline; an empty line or Ctrl-D ends."""
    from edgemed.api import chat as talk
    from edgemed.engines.engine import open_engine
    from edgemed.inference.decoding import Sampling

    if check:
        open_engine(engine, check=True)
    if json_:
        from edgemed.functions import chat_lines

        for line in chat_lines(engine, sys.stdin, threads, adapter, temperature, max_tokens):
            typer.echo(line)
            sys.stdout.flush()
        return
    talk(engine, Sampling(temperature=temperature, max_tokens=max_tokens), threads, adapter)


app.add_typer(calibration.app, name="calibrate")
app.command(cls=Verb)(provenance.card)
app.command(cls=Verb)(provenance.keygen)
app.command(cls=Verb)(provenance.sign)


@app.command(name="list", cls=Verb)
def list_(json_: Json = False) -> None:
    """Everything edgemed knows by name: families, steps, targets, tasks, devices, text sets,
    recipes.
    """
    from edgemed import plugins
    from edgemed.data.text_sets import card_names

    names = {kind: plugins.names(kind) for kind in (*plugins.CODE_KINDS, "devices")}
    names["text sets"] = card_names()
    names["recipes"] = recipe_names("")
    show(names, json_)


app.add_typer(recipes.app, name="recipes")
