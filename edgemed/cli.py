"""The command line: thin verbs over the same functions the Python API offers.

Everything heavy is imported inside the verb that needs it, so that --help answers at once; EdgemedError becomes one line and exit
code 1, any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgemed import cli_provenance
from edgemed.console import show
from edgemed.errors import EdgemedError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Tiny medical language models on small devices: merge, quantize, compile, and prove it did not get worse.",
)

Model = Annotated[str, typer.Argument(help="Model directory in Hugging Face layout, hub id, or random:NAME (true dimensions, random weights).")]
EngineDir = Annotated[Path, typer.Argument(help="Engine directory made by export or run.")]
Out = Annotated[Path, typer.Option(help="Directory to make; must not hold anything else.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Parameter as key=value; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
AcceptUndecided = Annotated[bool, typer.Option("--accept-undecided", help="Exit 0 although the gate is undecided (otherwise 3).")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: physical cores.")]


def settings(sets: list[str] | None, **named: Any) -> dict[str, Any]:
    """Parameters from options (those given) and --set key=value."""
    from edgemed.params import parse_set

    values = {key: value for key, value in named.items() if value is not None}
    for text in sets or []:
        keys, value = parse_set(text)
        values[".".join(keys)] = value
    return values


def main() -> None:
    try:
        app()
    except EdgemedError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except SystemExit as end:
        # typer turns Ctrl-C into exit code 130 without a word.
        if end.code == 130:
            typer.echo("interrupted; finished steps are kept, run the same command again to go on", err=True)
        raise


@app.command()
def doctor(json_: Json = False) -> None:
    """Look at this machine: CPU, memory, GPUs, runtimes and their self-checks; what is missing and the command that adds it."""
    from dataclasses import asdict

    from edgemed.doctor import examine

    show([asdict(finding) for finding in examine()], json_)


@app.command()
def inspect(model: Model, json_: Json = False) -> None:
    """Family, parameters, memory per precision, and which targets are possible and why not."""
    from edgemed.plan import inspect

    show(inspect(model), json_)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped recipe.")],
    sets: Sets = None,
    work: Annotated[Path | None, typer.Option(help="Where artifacts and the report go; default: runs/RECIPE.")] = None,
    accept_undecided: AcceptUndecided = False,
    json_: Json = False,
) -> None:
    """Run a whole recipe; finished steps are reused, an interrupted run goes on."""
    from edgemed.recipe import read_recipe
    from edgemed.run import run as run_recipe

    work = work or Path("runs") / Path(recipe).stem
    report = run_recipe(read_recipe(recipe, sets or ()), work)
    document = json.loads((work / "report.json").read_text(encoding="utf-8"))
    if json_:
        show(document, True)
    else:
        show([summary(engine) for engine in document["engines"]], False)
        typer.echo(f"report: {report}")
    if any(engine["verify"] and not engine["verify"]["passed"] for engine in document["engines"]):
        sys.exit(1)
    leave(document["gate"], accept_undecided)


def summary(engine: dict[str, Any]) -> dict[str, Any]:
    values = {record["name"]: record["value"] for record in engine["records"]}
    row = {"engine": engine["name"], "precision": engine["precision"], "MB": round(engine["bytes"] / 1e6, 1)}
    if engine["verify"]:
        row |= {"verified": engine["verify"]["passed"], "top-1": round(engine["verify"]["top1"], 4), "mean KL": round(engine["verify"]["mean_kl"], 5)}
    row |= {label: round(values[name], 1) for name, label in (("decode_tokens_per_second", "tok/s"),) if name in values}
    row |= {result["task"]: round(result["accuracy"], 4) for result in engine["evals"][::-1]}  # of several strategies, the first stays
    return row | ({"not worse": engine["gate"]["verdict"]} if engine["gate"] else {})


@app.command()
def merge(model: Model, adapter: Annotated[str, typer.Option(help="PEFT adapter directory.")], out: Out,
          alpha: Annotated[float, typer.Option(help="1 merges fully, 0 leaves the base.")] = 1.0, sets: Sets = None, json_: Json = False) -> None:
    """Merge a PEFT adapter into its base model, and check that the answers are the adapter's."""
    step("merge", model, out, settings(sets, adapter=adapter, alpha=alpha), json_)


@app.command()
def quantize(model: Model, out: Out, method: Annotated[str, typer.Option(help="gptq or rtn.")] = "gptq", bits: Annotated[int, typer.Option(help="4 or 8.")] = 4,
             group: Annotated[int, typer.Option(help="Weights per scale: 32, 64, 128 or -1 (whole row).")] = 128,
             calibration: Annotated[str | None, typer.Option(help="Card name, .jsonl or .txt file; gptq needs one.")] = None, sets: Sets = None, json_: Json = False) -> None:
    """Quantize the matrices of a checkpoint to 4 or 8 bits, in the AutoGPTQ checkpoint layout."""
    step("quantize", model, out, settings(sets, method=method, bits=bits, group=group, calibration=calibration), json_)


def step(name: str, model: str, out: Path, values: dict[str, Any], as_json: bool) -> None:
    from edgemed import params, plugins, store
    from edgemed.recipe import Stage
    from edgemed.run import open_model, run_step

    stage = Stage(name, params.build(plugins.load("steps", name).Params, values, name))
    done = run_step(stage, open_model(model, out.parent), out.parent, out)
    manifest = store.read_manifest(done.path)
    show({key: manifest[key] for key in ("stage", "params", "notes", "wall_seconds", "peak_memory_bytes")}, as_json)


@app.command()
def export(
    model: Annotated[str | None, typer.Argument(help="Model directory, hub id or random:NAME.")] = None,
    target: Annotated[str, typer.Option(help="onnx, llamacpp or tensorrt.")] = "onnx",
    out: Annotated[Path, typer.Option(help="Engine directory to make.")] = Path("engine"),
    random_weights: Annotated[str | None, typer.Option(help="True dimensions of this model with random weights, for latency and memory only.")] = None,
    prompts: Annotated[str, typer.Option(help="Held-out texts for the reference answers that travel along; 'none' leaves them out.")] = "pubmedqa-abstracts",
    source: Annotated[str | None, typer.Option(help="Float checkpoint to take reference answers from; default: MODEL itself.")] = None,
    sets: Sets = None, json_: Json = False,
) -> None:
    """Compile a checkpoint to one engine directory that travels to the device."""
    from edgemed import store
    from edgemed.api import export as export_engine
    from edgemed.console import say

    if (model is None) == (random_weights is None):
        raise EdgemedError("give either MODEL or --random-weights NAME", "For example: edgemed export ./BioMedLM --target onnx --out engine")
    engine = export_engine(model or f"random:{random_weights}", target, out, prompts=None if prompts == "none" else prompts, source=source, **settings(sets))
    notes = store.read_manifest(engine.path)["notes"]
    # A tensor that could not have the type asked for is said aloud: the engine is larger than its name says.
    for change in sorted(set(notes.get("fallbacks", {}).values())):
        say(f"{change}: {', '.join(name for name, found in notes['fallbacks'].items() if found == change)}")
    shown = {"engine": str(engine.path), "target": engine.target, "precision": engine.precision, "random_weights": engine.random_weights}
    show(shown | ({"unbuilt": f"on the device run: edgemed build {engine.path}"} if engine.stand_in else {}), json_)


@app.command()
def build(
    engine: EngineDir,
    workspace_mb: Annotated[int | None, typer.Option(help="Memory TensorRT may use to try kernels, in 10^6 bytes; default: the engine's.")] = None,
    measure: Annotated[bool, typer.Option("--bench/--no-bench", help="Measure it afterwards.")] = True,
    json_: Json = False,
) -> None:
    """On the device: compile an exported engine for this GPU, then verify and measure it."""
    from edgemed.api import build as build_engine

    found = build_engine(engine, workspace_mb, measure)
    if json_:
        show(found, True)
    else:
        plan, verified = found["plan"], found["verify"]
        show({**plan["params"], **plan["notes"], "verified": None if verified is None else verified["passed"]}, False)
        show([{"what": r["name"], "value": f"{r['value']:.4g}", "unit": r["unit"], "n": r["n"], "prompt": r["how"].get("prompt", "")} for r in found["records"]], False)
    sys.exit(0 if found["verify"] is None or found["verify"]["passed"] else 1)


@app.command()
def verify(
    engine: Annotated[Path | None, typer.Argument(help="Engine directory.")] = None,
    manifest: Annotated[Path | None, typer.Option(help="Only re-check every file of this artifact against its manifest.")] = None,
    max_kl: Annotated[float, typer.Option(help="Limit on the mean KL divergence from the source, nats.")] = 0.05,
    min_top1: Annotated[float, typer.Option(help="Limit on top-1 agreement with the source.")] = 0.9,
    key: Annotated[Path | None, typer.Option(help="The signer's public.pem: first check the signature, and name every file changed since.")] = None,
    threads: Threads = None, json_: Json = False,
) -> None:
    """Compare an engine with the float32 source's answers it carries; or, with --manifest, re-check every byte of an artifact."""
    from edgemed import store
    from edgemed.engine import open_engine
    from edgemed.verify import Limits
    from edgemed.verify import verify as verify_engine

    if (engine is None) == (manifest is None):
        raise EdgemedError("give either ENGINE or --manifest DIR", "For example: edgemed verify runs/quickstart/engines/onnx-int4")
    signed = cli_provenance.signed(engine or manifest, key, json_)
    if manifest is not None:
        problems = store.check_manifest(manifest)
        show({"artifact": str(manifest), "files": len(store.read_manifest(manifest)["files"]), **signed, "intact": not problems, "problems": problems}, json_)
        sys.exit(1 if problems else 0)
    opened = open_engine(engine, check=True)
    result = verify_engine(opened, opened.reference(), Limits(max_kl, min_top1), threads)
    show(result | signed, json_)
    sys.exit(0 if result["passed"] else 1)


@app.command()
def bench(
    engine: Annotated[Path | None, typer.Argument(help="Engine directory.")] = None,
    random_weights: Annotated[str | None, typer.Option(help="Make and bench an engine of these true dimensions with random weights.")] = None,
    target: Annotated[str, typer.Option(help="With --random-weights: the target.")] = "onnx",
    prompt: Annotated[list[int] | None, typer.Option(help="Prompt length in tokens; may be repeated.")] = None,
    generate: Annotated[int, typer.Option(help="New tokens per round.")] = 64,
    runs: Annotated[int, typer.Option(help="Counted rounds after one warm-up.")] = 5,
    threads: Threads = None,
    work: Annotated[Path, typer.Option(help="With --random-weights: where checkpoint and engine are kept.")] = Path("runs/random"),
    sets: Sets = None, json_: Json = False,
) -> None:
    """Measure load time, first token, prefill, step latency, decoding speed, memory and the bandwidth ceiling."""
    from edgemed import store
    from edgemed.bench import bench as bench_engine
    from edgemed.engine import open_engine
    from edgemed.recipe import BenchSpec

    if (engine is None) == (random_weights is None):
        raise EdgemedError("give either ENGINE or --random-weights NAME", "For example: edgemed bench --random-weights biomedlm --target onnx --set precision=int4")
    if random_weights:
        from edgemed.run import random_engine

        engine = random_engine(random_weights, target, settings(sets), work)
    opened = open_engine(engine, check=True)
    store.reset_peak_memory()
    records = bench_engine(opened, BenchSpec(tuple(prompt or (32, 128)), generate, runs, threads))
    store.append_records(engine, records)
    if json_:
        show(records, True)
        return
    if opened.random_weights:
        typer.echo("random weights: these numbers say something about latency and memory only")
    show([{"what": r["name"], "value": f"{r['value']:.4g}", "unit": r["unit"], "n": r["n"], "prompt": r["how"].get("prompt", "")} for r in records], False)


@app.command(name="eval")
def eval_(
    engine: EngineDir,
    task: Annotated[list[str], typer.Option(help="Task as NAME, NAME/LANGUAGE or NAME/PART, or NAME:FILE.jsonl for your own rows; may be repeated.")],
    strategy: Annotated[list[str] | None, typer.Option(help="Prompt strategy: zero-shot, random-3, nearest-3/cot, self-consistency-5, ...; may be repeated, the first is judged.")] = None,
    source: Annotated[str | None, typer.Option(help="Float checkpoint the engine was made from, evaluated too (needs edgemed[build]).")] = None,
    against: Annotated[Path | None, typer.Option(help="File of the source's results, written with --out where the source was evaluated.")] = None,
    margin: Annotated[float | None, typer.Option(help="Largest loss of accuracy that counts as not worse, e.g. 0.02; gives a verdict.")] = None,
    alpha: Annotated[float, typer.Option(help="How often a worse engine may pass.")] = 0.05,
    scoring: Annotated[str, typer.Option(help="sum, normalised or generated.")] = "sum",
    limit: Annotated[int | None, typer.Option(help="Only the first rows.")] = None,
    accept_undecided: AcceptUndecided = False,
    out: Annotated[Path | None, typer.Option(help="Write the whole result, every item included, to this JSON file.")] = None,
    threads: Threads = None, sets: Sets = None, json_: Json = False,
) -> None:
    """Accuracy of the engine that ships; with --source or --against, paired with its float checkpoint, and with --margin judged."""
    from edgemed import params
    from edgemed.api import evaluate_tasks
    from edgemed.recipe import EvalSpec

    values = settings(sets, tasks=task, strategies=strategy, limit=limit, margin=margin, alpha=alpha, scoring=scoring)
    if margin is not None and not (source or against):
        raise EdgemedError("a verdict needs the source's answers", "Give --source MODEL or --against FILE")
    found = evaluate_tasks(engine, params.build(EvalSpec, values, "eval"), source, against, threads)
    if out:
        from edgemed.store import write_json

        write_json(out, found)
    if json_:
        show(found, True)
    else:
        results = (*found["source"], *found["engine"])
        show([result_row(result) for result in results], False)
        # Metrics of a task's own differ from task to task: a line each.
        if own := [{"task": r["task"], "model": r["model"], "metric": name, "value": s["value"], "n": s["n"]} for r in results for name, s in r["scores"].items()]:
            show(own, False)
        if found["gate"]:
            show([verdict_row(row) for row in found["gate"]["comparisons"]], False)
    leave(found["gate"], accept_undecided)


def result_row(result: dict[str, Any]) -> dict[str, Any]:
    """One result as a person reads it."""
    low, high = result["interval"]
    row = {"task": result["task"] + " (synthetic)" * result["synthetic"], "model": result["model"], "strategy": result["strategy"], "n": result["n"], "accuracy": f"{result['accuracy']:.4f}"}
    row |= {"95 %": f"{low:.3f}-{high:.3f}", "majority": round(result["majority"], 4), "cut": result["truncated"], "s/question": result["seconds_per_question"]}
    paired = result["paired"]
    return row | {"lost": paired["only_source"] if paired else None, "gained": paired["only_engine"] if paired else None}


def verdict_row(row: dict[str, Any]) -> dict[str, Any]:
    """One comparison of the gate as a person reads it."""
    low, high = row["interval"]
    need = {"more items": row["items_needed"]} if row["verdict"] == "undecided" else {}
    return {"engine": row["engine"], "task": row["task"], "verdict": row["verdict"], "difference": f"{row['difference']:+.4f}", "95 %": f"{low:+.3f} to {high:+.3f}", "p": row["p_holm"], **need}


def leave(gate: dict[str, Any] | None, accept_undecided: bool) -> None:
    """End with the gate's exit code: 1 failed, 3 undecided."""
    if not gate or gate["verdict"] == "pass":
        return
    if gate["verdict"] == "fail":
        sys.exit(1)
    if not accept_undecided:
        typer.echo("undecided: too few items to say that an engine is not worse; --accept-undecided lets this pass", err=True)
        sys.exit(3)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Directories of finished runs, or of engines with their records.")],
    out: Annotated[Path | None, typer.Option(help="Page to write, FILE.html; default: report.html in the run, or compare.html.")] = None,
    json_: Json = False,
) -> None:
    """Render the report of one run again, or compare several runs and engines on one page; Markdown and JSON lie beside it."""
    from edgemed.compare import comparison, read_runs, write_comparison
    from edgemed.report import write

    runs = read_runs(directories)
    alone = len(runs) == 1 and (directories[0] / "report.json").is_file()
    if json_:
        show(runs[0].document if alone else comparison(runs), True)
    elif alone and out is None:
        typer.echo(str(write(runs[0].document, directories[0])))
    else:
        typer.echo(str(write_comparison(runs, out or Path("compare.html"))))


@app.command()
def generate(
    engine: EngineDir,
    prompt: Annotated[str, typer.Option(help="Text to continue, or question about the images.")],
    image: Annotated[list[str] | None, typer.Option(help="PNG, JPEG, TIFF or DICOM file; may be repeated.")] = None,
    template: Annotated[str | None, typer.Option(help="chat, reasoning or none; default: chat with images, none without.")] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 switches it off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 switches it off.")] = 1.0,
    seed: int = 0, threads: Threads = None, json_: Json = False,
) -> None:
    """Continue a text or answer about images, offline, printing words as they come."""
    from edgemed.api import stream
    from edgemed.session import Sampling

    words = stream(engine, prompt, Sampling(temperature, top_k, top_p, seed, max_tokens), threads, image or (), template)
    if json_:
        show({"prompt": prompt, "text": "".join(words)}, True)
        return
    for word in words:
        typer.echo(word, nl=False)
        sys.stdout.flush()
    typer.echo("")


@app.command()
def chat(engine: EngineDir, max_tokens: int = 256, temperature: float = 0.0, threads: Threads = None) -> None:
    """Talk to an engine, offline; an empty line or Ctrl-D ends."""
    from edgemed.api import chat as talk
    from edgemed.session import Sampling

    talk(engine, Sampling(temperature=temperature, max_tokens=max_tokens), threads)


app.command()(cli_provenance.card)
app.command()(cli_provenance.keygen)
app.command()(cli_provenance.sign)


@app.command(name="list")
def list_(json_: Json = False) -> None:
    """Everything edgemed knows by name: families, steps, targets, tasks, devices, text sets, recipes."""
    from edgemed import plugins
    from edgemed.data import card_names

    known = {kind: plugins.names(kind) for kind in (*plugins.CODE_KINDS, "devices")}
    show(known | {"text sets": card_names(), "recipes": sorted(p.stem for p in plugins.shared("recipes").glob("*.yaml"))}, json_)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None, json_: Json = False) -> None:
    """List the shipped recipes, or print one."""
    from edgemed import plugins
    from edgemed.recipe import find_recipe

    if name:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    found = [{"recipe": p.stem, "what": p.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")} for p in sorted(plugins.shared("recipes").glob("*.yaml"))]
    show(found, json_)
