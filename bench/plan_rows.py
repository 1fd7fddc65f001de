"""Speeds of engines of several sizes and precisions on this CPU, for the planner's CPU part: each
row holds the bandwidth of its own rounds.

Random weights at true dimensions (BioMedLM, GPT-2 XL, GPT-2 medium), one process per engine. The
machine's own products are measured first, as `edgemed doctor --measure` does. With one thread the
CPU time of the process is measured, which a busy machine does not lengthen by making the process
wait; with more it is wall time, and the machine must be quiet. Run: python bench/plan_rows.py
--work DIR [--checkpoint DIR]
"""

from __future__ import annotations

import argparse
import os
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from records import save, spread

GPT2 = {
    "model_type": "gpt2",
    "n_positions": 1024,
    "vocab_size": 50257,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 50256,
}
MODELS: dict[str, Any] = {
    "biomedlm": "biomedlm",
    "gpt2-xl": {**GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "gpt2-medium": {**GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
}
ENGINES = [
    ("onnx", {"precision": "int4"}),
    ("onnx", {"precision": "int8"}),
    ("onnx", {"precision": "fp32"}),
    ("llamacpp", {"type": "q4_k_m"}),
    ("llamacpp", {"type": "q8_0"}),
    ("llamacpp", {"type": "f16"}),
]
PROMPT = 128
NEW = 24


def read_alone() -> float:
    """Read bandwidth of one thread in 10^9 bytes/s of its CPU time, best of 20 reads of a buffer
    far larger than the caches.
    """
    import numpy as np

    buffer = np.ones(1 << 26, np.int64)
    times = []
    for _ in range(20):
        started = time.process_time()
        np.bitwise_or.reduce(buffer)
        times.append(time.process_time() - started)
    return buffer.nbytes / min(times) / 1e9


def worker(pipe: Any, path: str, threads: int, rounds: int) -> None:
    """Send {'prefill_ms', 'decode_tok_s', 'bandwidth_gb_s', 'peak_memory_bytes', 'bytes_per_token'}
    of one engine.
    """
    import numpy as np

    from edgemed.engines.engine import open_engine
    from edgemed.hardware import process_memory
    from edgemed.hardware.device import read_bandwidth

    engine = open_engine(path)
    session = engine.open(threads)
    tokens = np.random.default_rng(0).integers(0, engine.vocab, PROMPT).tolist()
    clock = time.process_time if threads == 1 else time.perf_counter
    found: dict[str, list[float]] = {"prefill_ms": [], "decode_tok_s": [], "bandwidth_gb_s": []}
    session.step(int(session.prefill(tokens)[0].argmax()))
    peak = process_memory.peak_memory()  # before the buffer of the bandwidth measurement
    for round_number in range(rounds + 1):
        bandwidth = read_alone() if threads == 1 else read_bandwidth(threads, 10)
        session.rewind(0)
        started = clock()
        token = int(session.prefill(tokens)[0].argmax())
        marks = [clock()]
        for _ in range(NEW):
            token = int(session.step(token).argmax())
            marks.append(clock())
        if round_number:
            found["prefill_ms"].append(1e3 * (marks[0] - started))
            found["decode_tok_s"].append(NEW / (marks[-1] - marks[0]))
            found["bandwidth_gb_s"].append(bandwidth)
    pipe.send(
        {name: spread(values) for name, values in found.items()}
        | {"peak_memory_bytes": peak, "bytes_per_token": engine.bytes_per_token}
    )
    session.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/plan-rows"))
    parser.add_argument(
        "--checkpoint", type=Path, help="a BioMedLM-sized random checkpoint that is there already"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    args = parser.parse_args()
    from edgemed import plugins
    from edgemed.benchmarking.device_profile import measure
    from edgemed.engines.engine import export
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.random_weights import make_random

    values, _ = measure(threads=max(args.threads))
    save("plan_device", {"threads": max(args.threads), "values": values})
    for name in args.models:
        given = args.checkpoint if name == "biomedlm" else None
        checkpoint = (
            open_checkpoint(given) if given else make_random(MODELS[name], args.work / name)
        )
        for target, params in ENGINES:
            if name == "biomedlm" and params.get("precision") == "fp32":
                continue  # 10 GB
            module = plugins.load("targets", target)
            out = args.work / f"{name}-{target}-{next(iter(params.values()))}"
            export(checkpoint, target, module.Params(**params), out)
            for threads in args.threads:
                context = get_context("spawn")
                pipe, child = context.Pipe()
                process = context.Process(
                    target=worker, args=(child, str(out), threads, args.rounds)
                )
                process.start()
                found = pipe.recv()
                process.join()
                how = {
                    "clock": "cpu" if threads == 1 else "wall",
                    "load_average": os.getloadavg()[0],
                    "threads": threads,
                    "prompt": PROMPT,
                    "new": NEW,
                }
                save(
                    "plan_rows",
                    {
                        "model": name,
                        "target": target,
                        "params": params,
                        "random_weights": True,
                        **how,
                        **found,
                    },
                )


if __name__ == "__main__":
    main()
