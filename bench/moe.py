"""MoE-TinyMed's true dimensions on StableLM 2 (3.2 B parameters) and on Phi-2 (5.6 B), random
weights: speed and memory only.

Export, opening and memory are taken in processes of their own; decoding takes turns with the dense
base model on the same runtime, because what counts is the share of the memory bandwidth that a
mixture reaches of the one a dense model reaches: bytes that one token needs times tokens per
second. Run: python bench/moe.py --cache DIR --build   once, then: python bench/moe.py --cache DIR
[--rows stablelm-onnx,...]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from records import paired_ratio, save, spread

from edgemed.hardware import process_memory

CONTEXT = 1024
PROMPT = 64
NEW = 64
ONNX = ("onnx", {"precision": "int4", "group": 128, "tower": "int8", "context": CONTEXT})
GGUF = ("llamacpp", {"type": "q4_k_m", "context": CONTEXT})
DENSE = {"stablelm": "stablelm-2-1.6b", "phi": "phi-2"}
MIXTURE = {"stablelm": "moe-tinymed", "phi": "moe-tinymed-phi"}
ROWS = {f"{base}-{target[0]}": (base, target) for base in DENSE for target in (ONNX, GGUF)}


def params(model: str, target: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        name: value
        for name, value in target[1].items()
        if name != "tower" or model in MIXTURE.values()
    }


def resident() -> dict[str, int]:
    """Bytes of this process in memory: all, and of those private ones and pages of files."""
    lines = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "RssFile")}


def export_worker(pipe: Any, model: str, target: tuple[str, dict[str, Any]], cache: Path) -> None:
    from edgemed.pipeline.runner import random_engine

    started = time.perf_counter()
    path = random_engine(model, target[0], params(model, target), cache)
    pipe.send(
        {
            "path": str(path),
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": process_memory.peak_memory(),
        }
    )


def memory_worker(pipe: Any, path: str, threads: int, side: int) -> None:
    """Opening, 64 tokens of text, and a question about an image."""
    from PIL import Image

    from edgemed.artifacts import store
    from edgemed.engines.engine import open_engine

    engine = open_engine(path)
    found = {"before": resident()}
    started = time.perf_counter()
    session = engine.open(threads)
    found |= {"open_seconds": time.perf_counter() - started, "opened": resident()}
    ids = np.random.default_rng(0).integers(0, engine.vocab - 1, PROMPT + NEW).tolist()
    session.prefill(ids[:1])
    for token in ids[1 : 1 + NEW]:
        session.step(token)
    found |= {"after 64 tokens": resident(), "text_peak_bytes": process_memory.peak_memory()}
    session.rewind(0)
    session.prefill(ids[:PROMPT])
    found["prompt_peak_bytes"] = process_memory.peak_memory()
    if engine.vision:
        vision_encoder = engine.open_vision(threads)
        picture = Image.fromarray(
            np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
        )
        session.rewind(0)
        started = time.perf_counter()
        tokens, pictures = vision_encoder.see(
            [vision_encoder.v.token, *(n + (n >= vision_encoder.v.token) for n in ids[:32])],
            [picture],
        )
        session.prefill(tokens, pictures=pictures)
        found |= {
            "image_first_token_seconds": time.perf_counter() - started,
            "image_tokens": len(tokens),
            "with an image": resident(),
        }
    found |= {
        "peak_memory_bytes": process_memory.peak_memory(),
        "file_bytes": store.size_of(store.read_manifest(engine.path)),
        "bytes_per_token": engine.bytes_per_token,
    }
    pipe.send(found)


def decode_worker(pipe: Any, path: str, threads: int) -> None:
    """Seconds of NEW steps behind a prompt, whenever asked."""
    from edgemed.engines.engine import open_engine

    engine = open_engine(path)
    session = engine.open(threads)
    ids = np.random.default_rng(0).integers(0, engine.vocab - 1, PROMPT + NEW).tolist()
    while pipe.recv():
        session.rewind(0)
        started = time.perf_counter()
        session.prefill(ids[:PROMPT])
        read = time.perf_counter()
        for token in ids[PROMPT:]:
            session.step(token)
        pipe.send((read - started, time.perf_counter() - read))
    pipe.send(engine.bytes_per_token)


def made(name: str, target: str, cache: Path) -> str:
    """The engine --build left in the cache; the checkpoint it was made from may be gone."""
    found = list(cache.glob(f"{name}-{target}-*"))
    if len(found) != 1:
        sys.exit(
            f"{cache} holds {len(found)} engines {name}-{target}-*, one is needed: run --build"
        )
    return str(found[0])


def apart(worker: Any, *arguments: Any) -> Any:
    """What one worker sends, from a process of its own."""
    pipe, child = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=worker, args=(child, *arguments))
    process.start()
    child.close()
    found = pipe.recv()
    process.join()
    return found


def turns(
    paths: dict[str, str], rounds: int, threads: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """({name: seconds of prefill and decode per round}, {name: bytes per token}) of engines that
    take turns; one round before is not counted.
    """
    context = get_context("spawn")
    pipes = {}
    for name, path in paths.items():
        pipes[name], child = context.Pipe()
        context.Process(target=decode_worker, args=(child, path, threads), daemon=True).start()
    times: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in paths
    }
    for number in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            for part, seconds in zip(("prefill", "decode"), pipe.recv(), strict=True):
                if number:
                    times[name][part] += [seconds]
            time.sleep(0.3)  # threads of the last runtime stop spinning
    moved = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        moved[name] = pipe.recv()
    return times, moved


def measure(row: str, args: argparse.Namespace) -> None:
    base, target = ROWS[row]
    paths = {name: made(name, target[0], args.cache) for name in (MIXTURE[base], DENSE[base])}
    memory = apart(memory_worker, paths[MIXTURE[base]], args.threads, args.image)
    times, moved = turns(paths, args.rounds, args.threads)
    speed = {
        name: [moved[name] * NEW / seconds / 1e9 for seconds in t["decode"]]
        for name, t in times.items()
    }
    save(
        "moe",
        {
            "row": row,
            "models": list(paths),
            "target": target[0],
            "params": target[1],
            "random_weights": True,
            "threads": args.threads,
            "prompt": PROMPT,
            "new": NEW,
            "image": args.image,
            "load_average": os.getloadavg(),
            "bytes_per_token": moved,
            "memory": memory,
            "decode_tokens_per_s": {
                name: NEW / spread(t["decode"])["median"] for name, t in times.items()
            },
            "weight_gb_per_s": {name: spread(v) for name, v in speed.items()},
            "decode_bytes_over_dense": paired_ratio(speed[MIXTURE[base]], speed[DENSE[base]]),
            "times": {
                name: {part: spread(v) for part, v in t.items()} for name, t in times.items()
            },
        },
        args.out,
    )


def build(row: str, args: argparse.Namespace) -> None:
    from edgemed.pipeline.runner import open_model

    base, target = ROWS[row]
    for model in (MIXTURE[base], DENSE[base]):
        open_model(f"random:{model}", args.cache)
        found = apart(export_worker, model, target, args.cache)
        save(
            "moe_export",
            {
                "model": model,
                "target": target[0],
                "params": params(model, target),
                "random_weights": True,
                "load_average": os.getloadavg(),
                **{k: v for k, v in found.items() if k != "path"},
            },
            args.out,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("runs/moe"))
    parser.add_argument(
        "--build",
        action="store_true",
        help="only export, and say how long and with how much memory",
    )
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--image", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, help="results file, default bench/results/<machine>.jsonl"
    )
    args = parser.parse_args()
    if unknown := [row for row in args.rows.split(",") if row not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    for row in args.rows.split(","):
        (build if args.build else measure)(row, args)


if __name__ == "__main__":
    main()
