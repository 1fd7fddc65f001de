"""Experts as a shared matrix and differences against the same experts in int4: bytes, answers, and
speed of decoding.

The model is the quickstart's mixture of experts, the task its own (cells, 234 questions), paired
item by item with the float32 source; ONNX Runtime on a CPU, one thread. All engines are open at
once and decode in turns, so that a ratio of one round compares the same moment. What was made is
kept in DIR and not made again. A checkpoint made elsewhere (bench/distill_experts.py) comes in by
name. Run: python bench/shared_delta.py --work DIR [--also distilled=CHECKPOINT]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from records import paired_ratio, save, spread

from edgemed import plugins
from edgemed.engines.engine import export, open_engine
from edgemed.evaluation.evaluate import SOURCE
from edgemed.evaluation.opened_model import evaluate_opened, open_source, start_engine
from edgemed.evaluation.paired_statistics import paired
from edgemed.evaluation.spec import EvalSpec
from edgemed.evaluation.task import questions
from edgemed.models.checkpoint import open_checkpoint
from edgemed.params import build

MODEL = Path(__file__).parents[1] / "recipes" / "quickstart-moe" / "model"
TEXT = {"calibration": "medquad-answers", "samples": 16, "length": 256}
INT4 = {
    "method": "gptq",
    "bits": 4,
    "group": 32,
    "calibration": "medquad-answers",
    "samples": 64,
    "length": 256,
}
INT8 = {"method": "rtn", "bits": 8, "group": 32}
# name -> (merge, quantize), None where there is no such step
ARMS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "source, int4": (None, INT4),
    "source, 2 bit": (None, INT4 | {"bits": 2}),
    **{f"rank {r}": ({"rank": r, **TEXT}, None) for r in (64, 128)},
    **{f"rank {r}, int4": ({"rank": r, **TEXT}, INT4) for r in (32, 64, 96, 128)},
    "rank 64, no calibration": ({"rank": 64}, None),
    "rank 64, usage": ({"rank": 64, "weights": "usage", **TEXT}, None),
    **{f"density {d}": ({"density": d, **TEXT}, None) for d in (0.1, 0.25)},
    **{
        f"dense{suffix}": ({"experts": "dense", **TEXT}, step)
        for suffix, step in (("", None), (", int8", INT8), (", int4", INT4))
    },
}
DECODED = 32
PROMPT = 32


def short(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def make(name: str, work: Path, start: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of one arm, made of `start`, and the error of each merged layer."""
    path = start
    errors: dict[str, Any] = {}
    for step, values in zip(("merge", "quantize"), ARMS[name], strict=True):
        if not values:
            continue
        if step == "merge":
            values = {"experts": "shared_delta", **values}
        module = plugins.load("steps", step)
        out = work / f"{short(name)}-{step}"
        out.mkdir()
        notes = module.run(open_checkpoint(path), out, build(module.Params, values, step))
        if step == "merge":
            errors = {layer: facts.get("error") for layer, facts in notes["layers"].items()}
        path = out
    return path, errors


def megabytes(folder: Path) -> float:
    """Size of the weight files of a checkpoint or engine."""
    return (
        sum(
            file.stat().st_size
            for file in folder.iterdir()
            if file.suffix in (".safetensors", ".data", ".onnx")
        )
        / 1e6
    )


def decode(session: Any, tokens: list[int]) -> float:
    """Tokens per second of the thread's CPU time, greedy decoding after the prompt: one thread
    computes all, and on a busy machine that is what it would do alone, but for caches.
    """
    session.rewind(0)
    row = session.prefill(tokens)[0]
    start = time.thread_time()
    for _ in range(DECODED):
        row = session.step(int(row.argmax()))
    return DECODED / (time.thread_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument(
        "--only",
        nargs="+",
        help="'source, int4' must be among them, which the others are compared with",
    )
    parser.add_argument("--also", help="NAME=CHECKPOINT: measured as it is, in int8 and in int4")
    args = parser.parse_args()
    starts: dict[str, Path] = {}
    if args.also:
        name, path = args.also.split("=")
        for suffix, step in (("", None), (", int8", INT8), (", int4", INT4)):
            ARMS[f"{name}{suffix}"] = (None, step)
            starts[f"{name}{suffix}"] = Path(path)
    if unknown := [name for name in args.only or () if name not in ("source, fp32", *ARMS)]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(('source, fp32', *ARMS))}")
    args.work.mkdir(parents=True, exist_ok=True)
    names = args.only or ["source, fp32", *ARMS]
    asked = questions("cells", None)
    settings = EvalSpec(tasks=("cells",)).settings()
    onnx = plugins.load("targets", "onnx")
    if not all((args.work / f"{short(name)}.json").is_file() for name in names):
        model = open_source(open_checkpoint(MODEL), True)
        base = evaluate_opened(model, asked, SOURCE, "source", "zero-shot", settings)
        model.close()
    for name in names:
        folder = args.work / f"{short(name)}-engine"
        kept = args.work / f"{short(name)}.json"
        if kept.is_file():
            continue
        path, errors = (
            (MODEL, {}) if name not in ARMS else make(name, args.work, starts.get(name, MODEL))
        )
        engine = export(open_checkpoint(path), "onnx", onnx.Params(), folder)
        opened = start_engine(engine, True, 1)
        found = evaluate_opened(opened, asked, name, name, "zero-shot", settings)
        opened.close()
        row = {
            "checkpoint_mb": megabytes(path),
            "engine_mb": megabytes(folder),
            "bytes_per_token": engine.bytes_per_token,
            "errors": errors,
            "accuracy": found["accuracy"],
            "interval": found["interval"],
            "paired": paired(base["items"], found["items"], None, 0.05),
        }
        kept.write_text(json.dumps(row))
        print(name, row, flush=True)
    rows = {name: json.loads((args.work / f"{short(name)}.json").read_text()) for name in names}
    sessions = {name: open_engine(args.work / f"{short(name)}-engine").open(1) for name in names}
    tokens = [int(t) for t in np.random.default_rng(0).integers(5, 4000, PROMPT)]
    speeds: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(args.rounds + 1):
        for name, session in sessions.items():
            speed = decode(session, tokens)
            if turn:
                speeds[name] += [speed]  # the first round warms up
    for name, found in speeds.items():
        rows[name] |= {
            "tokens_per_second": spread(found),
            "against_int4": paired_ratio(found, speeds["source, int4"]),
        }
    save(
        "shared_delta",
        {"rows": rows, "threads": 1, "decoded": DECODED, "clock": "CPU time of the thread"},
    )


if __name__ == "__main__":
    main()
