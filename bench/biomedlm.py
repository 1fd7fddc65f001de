"""BioMedLM's true dimensions (2.59 B parameters, random weights): ONNX int4 against llama.cpp
Q4_K_M and torch bf16, in one run.

Each runtime lives in a process of its own and they take turns, so that drift of a noisy machine
hits all of them; ratios are medians of round-by-round ratios. Says something about latency and
memory only. Run: python bench/biomedlm.py --work DIR
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from records import paired_ratio, save, spread

from edgemed.hardware.device import read_bandwidth

PROMPT = 128
NEW = 48


def measured(command: list[str]) -> dict[str, float]:
    """Wall seconds and peak resident bytes of a whole process."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        "wall_seconds": time.perf_counter() - started,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def engine_worker(pipe: Any, path: str, threads: int) -> None:
    """Answer 'prefill' and 'decode' with seconds, 'memory' with peak resident bytes."""
    import numpy as np

    from edgemed.engines.engine import open_engine
    from edgemed.hardware import process_memory

    engine = open_engine(path)
    session = engine.open(threads)
    tokens = np.random.default_rng(0).integers(0, engine.vocab, PROMPT).tolist()
    while (order := pipe.recv()) != "stop":
        if order == "memory":
            pipe.send(process_memory.peak_memory())
            continue
        session.rewind(0)
        started = time.perf_counter()
        token = int(session.prefill(tokens)[0].argmax())
        if order == "decode":
            started = time.perf_counter()
            for _ in range(NEW):
                token = int(session.step(token).argmax())
        pipe.send(time.perf_counter() - started)


def torch_worker(pipe: Any, path: str, threads: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    tokens = torch.randint(0, 28000, (1, PROMPT))
    while pipe.recv() != "stop":
        started = time.perf_counter()
        with torch.inference_mode():
            model(tokens, logits_to_keep=1)
        pipe.send(time.perf_counter() - started)


def turns(
    workers: dict[str, Any], orders: dict[str, str], rounds: int, threads: int
) -> dict[str, list[float]]:
    """Let the workers take turns, and measure the read bandwidth (GB/s) once a round among them;
    the first round is a warm-up.
    """
    times: dict[str, list[float]] = {name: [] for name in (*orders, "bandwidth")}
    for round_number in range(rounds + 1):
        # The bandwidth of a shared machine drifts by half: a ceiling is only worth something beside
        # the speed of the same round.
        bandwidth = read_bandwidth(threads)
        if round_number:
            times["bandwidth"].append(bandwidth)
        for name, order in orders.items():
            workers[name].send(order)
            seconds = workers[name].recv()
            if round_number:
                times[name].append(seconds)
            time.sleep(0.3)  # worker threads of the last runtime stop spinning
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/biomedlm"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    from edgemed.engines.engine import open_engine
    from edgemed.pipeline.runner import open_model

    checkpoint = open_model("random:biomedlm", args.work).path
    engines = {}
    sets = {"onnx": ["precision=int4", "group=128"], "llamacpp": ["type=q4_k_m"]}
    for target, values in sets.items():
        engines[target] = args.work / f"engine-{target}"
        command = [
            sys.executable,
            "-m",
            "edgemed",
            "export",
            str(checkpoint),
            "--target",
            target,
            "--out",
            str(engines[target]),
            "--prompts",
            "none",
        ]
        command += [part for value in values for part in ("--set", value)]
        if not engines[target].exists():
            save(
                "biomedlm_export",
                {"target": target, "params": values, "random_weights": True, **measured(command)},
            )
    context = get_context("spawn")
    workers = {}
    for name, function, path in (
        *((t, engine_worker, p) for t, p in engines.items()),
        ("torch", torch_worker, checkpoint),
    ):
        workers[name], child = context.Pipe()
        context.Process(target=function, args=(child, str(path), args.threads), daemon=True).start()
    decode = turns(workers, {"onnx": "decode", "llamacpp": "decode"}, args.rounds, args.threads)
    prefill = turns(
        workers,
        {"onnx": "prefill", "llamacpp": "prefill", "torch": "prefill"},
        args.rounds,
        args.threads,
    )
    bandwidth = decode.pop("bandwidth")
    _ = prefill.pop("bandwidth")
    memory = {}
    for name in engines:
        workers[name].send("memory")
        memory[name] = workers[name].recv()
    for pipe in workers.values():
        pipe.send("stop")
    per_token = {name: open_engine(path).bytes_per_token for name, path in engines.items()}
    speeds = {name: [NEW / seconds for seconds in times] for name, times in decode.items()}
    shares = {
        name: [
            speed * per_token[name] / 1e9 / b for speed, b in zip(values, bandwidth, strict=True)
        ]
        for name, values in speeds.items()
    }
    save(
        "biomedlm_speed",
        {
            "random_weights": True,
            "threads": args.threads,
            "prompt": PROMPT,
            "new": NEW,
            "unit": "tok/s decode, s prefill",
            "decode": {name: spread(values) for name, values in speeds.items()},
            "decode_ratio_onnx_llamacpp": paired_ratio(decode["llamacpp"], decode["onnx"]),
            "bandwidth_gb_s": spread(bandwidth),
            "bytes_per_token": per_token,
            "share_of_bandwidth": {name: spread(values) for name, values in shares.items()},
            "prefill_seconds": {name: spread(times) for name, times in prefill.items()},
            "prefill_ratio_onnx_torch": paired_ratio(prefill["onnx"], prefill["torch"]),
            "peak_memory_bytes": memory,
        },
    )


if __name__ == "__main__":
    main()
