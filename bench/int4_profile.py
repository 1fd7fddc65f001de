"""Where the time of int4 decoding goes, whether the kernel or memory limits it, and which setting
helps.

Three parts, each beside the read bandwidth of the same minute: `profile` (onnxruntime's own times
per operator), `kernel` (one MatMulNBits whose weights stay in the cache, against the same from
memory) and `settings` (each against the default, in turns). Every record says how many cores other
processes used meanwhile; a round they disturbed is repeated. Run: python bench/int4_profile.py
ENGINE
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from records import paired_ratio, save, spread

from edgemed.engines.engine import Engine, open_engine
from edgemed.hardware.device import last_level_cache, read_bandwidth
from edgemed.onnx import ort_session
from edgemed.onnx.decoder_graph import Graph, Precision
from edgemed.quantization.grids import Ints
from edgemed.targets import onnx as target

PROMPT = 128
WARM = 4
DISTURBED = 0.1
TRIES = 4
# (bits, block, accuracy_level): what engines may hold
KERNELS = [
    (4, 32, 4),
    (4, 64, 4),
    (4, 128, 4),
    (8, 32, 4),
    (4, 32, 1),
    (4, 64, 1),
    (4, 128, 1),
    (8, 32, 1),
]
SETTINGS: dict[str, dict[str, str]] = {
    "4 KB pages": {},
    "threads do not spin": {"session.intra_op.allow_spinning": "0"},
    "dynamic_block_base 2": {"session.dynamic_block_base": "2"},
    "dynamic_block_base 4": {"session.dynamic_block_base": "4"},
    "denormals are zero": {"session.set_denormal_as_zero": "1"},
    "second thread tied to core 2": {"session.intra_op_thread_affinities": "2"},
    "weights outside the arena": {"session.use_device_allocator_for_initializers": "1"},
    "lookup-table kernel": {"mlas.use_lut_gemm": "1"},
}


# --- how quiet the machine is


def elsewhere() -> float:
    """CPU seconds that everything but this process has used since boot."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf(
        "SC_CLK_TCK"
    ) - time.process_time()


def quiet(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """(result, cores others used, attempts): repeated while others used more than a tenth of a
    core, at most TRIES times; the quietest counts.
    """
    attempts: list[tuple[float, Any]] = []
    while len(attempts) < TRIES and (not attempts or attempts[-1][0] > DISTURBED):
        time.sleep(0.3)  # threads of another session stop spinning
        others = elsewhere()
        started = time.perf_counter()
        result = work()
        attempts.append(
            (max(0.0, (elsewhere() - others) / (time.perf_counter() - started)), result)
        )
    others, result = min(attempts, key=lambda attempt: attempt[0])
    return result, others, len(attempts)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a process of its own: memory that an earlier session freed keeps the size
    of its pages.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def huge_bytes() -> int:
    """Bytes of this process that lie in huge pages."""
    return (
        int(re.search(r"AnonHugePages: *(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
        << 10
    )


# --- sessions


@contextlib.contextmanager
def opened(
    engine: Engine, threads: int, settings: dict[str, str], huge: bool = True, profile: str = ""
) -> Iterator[ort_session.OrtSession]:
    """The target's own session with other settings of onnxruntime, or without huge pages."""
    make = ort.InferenceSession
    collapse = ort_session._use_huge_pages

    def changed(path: str, options: ort.SessionOptions, **rest: Any) -> ort.InferenceSession:
        for name, value in settings.items():
            options.add_session_config_entry(name, value)
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        return make(path, options, **rest)

    ort.InferenceSession = changed
    if not huge:
        ort_session._use_huge_pages = lambda: None
    try:
        session = engine.open(threads)
    finally:
        ort.InferenceSession = make
        ort_session._use_huge_pages = collapse
    yield session
    session.close()


def steps(session: ort_session.OrtSession, new: int) -> list[float]:
    """Seconds of each of `new` greedy steps after a prompt, which is read only the first time."""
    if session.position < PROMPT:
        session.prefill([i * 37 % session.width for i in range(PROMPT)])
    session.rewind(PROMPT)
    token = 0
    found = []
    for _ in range(WARM + new):
        started = time.perf_counter()
        token = int(session.step(token).argmax())
        found.append(time.perf_counter() - started)
    return found[WARM:]


# --- part 1


def sizes(engine: Engine) -> dict[str, tuple[str, int]]:
    """node name -> (what it is, bytes of weights it reads) of every node of the graph."""
    found = {}
    for node in onnx.load(engine.path / "model.onnx", load_external_data=False).graph.node:
        a = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            name = f"MatMulNBits {a['K']} -> {a['N']}, int{a['bits']} of {a['block_size']}"
            found[node.name] = (
                name,
                a["N"] * a["K"] * a["bits"] // 8 + a["N"] * (a["K"] // a["block_size"]) * 4,
            )
        else:
            found[node.name] = node.op_type, 0
    return found


def profile(engine: Engine, threads: int, new: int, huge: bool) -> dict[str, Any]:
    """Milliseconds per token by kind of operator, from onnxruntime's profiler; what the step took
    besides is 'between operators'.
    """
    known = sizes(engine)
    with (
        tempfile.TemporaryDirectory() as folder,
        opened(engine, threads, {}, huge, f"{folder}/profile") as session,
    ):
        steps(session, 1)
        tries: list[int] = []
        (times, attempt), others, attempts = quiet(
            lambda: (steps(session, new), tries.append(0) or len(tries))
        )
        in_huge = huge_bytes()
        events = json.loads(Path(session.session.end_profiling()).read_text())
        runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    # The prompt and a first step came before; each attempt ends with `new` steps that count.
    last = 1 + WARM + 1 + attempt * (WARM + new)
    bounds = runs[last - new : last]
    taken = collections.Counter()
    waited = collections.Counter()
    read = collections.Counter()
    for event in events:
        if (
            event.get("cat") != "Node"
            or not event["name"].endswith("_kernel_time")
            or not bounds[0][0] <= event["ts"] <= bounds[-1][1]
        ):
            continue
        kind, size = known.get(
            event["name"].removesuffix("_kernel_time"), (event["args"]["op_name"], 0)
        )
        taken[kind] += event["dur"] / 1e3 / new
        read[kind] += size / new
        waited[kind] += main_thread_waits(event) / 1e3 / new
    step = sum(end - start for start, end in bounds) / 1e3 / new
    rows = {
        kind: {
            "ms": ms,
            "share": ms / step,
            **({"gb_s": read[kind] / ms / 1e6, "bytes": round(read[kind])} if read[kind] else {}),
            "waiting_for_threads_ms": waited[kind],
        }
        for kind, ms in taken.most_common()
    }
    return {
        "step_ms": step,
        "between_operators_ms": step - sum(taken.values()),
        "python_step_ms": statistics.mean(times) * 1e3,
        "operators": rows,
        "cores_used_by_others": others,
        "attempts": attempts,
        "bytes_in_huge_pages": in_huge,
    }


def main_thread_waits(event: dict[str, Any]) -> float:
    """Microseconds the main thread stood still inside an operator until the other threads were
    done, as onnxruntime counts them.
    """
    stats = event["args"].get("thread_scheduling_stats") or {}
    if isinstance(stats, str):
        stats = json.loads(stats)
    return float(stats.get("main_thread", {}).get("Wait", 0))


# --- part 2


def products(
    folder: Path, kernel: tuple[int, int, int], rows: int, columns: int, count: int, same: bool
) -> int:
    """Write a graph of `count` products with inputs of their own, of the same weights or of
    different ones; returns the bytes read in one run.
    """
    bits, block, level = kernel
    random = np.random.default_rng(0)
    q = random.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scales = random.random((rows, columns // block), dtype=np.float32)
    graph = Graph(folder, Precision(bits=bits, group=block, accuracy_level=level))
    dialect = target.OrtDialect()
    for i in range(count):
        if not same:
            # onnxruntime keeps equal weights only once, and then they would all be in the cache.
            q[0] = random.integers(0, 1 << bits, columns)
        graph.value("inputs", f"x{i}", graph.float_type, [1, columns])
        graph.value("outputs", f"y{i}", graph.float_type, [1, rows])
        dialect.quantized(graph, f"y{i}", f"x{i}", Ints(q, scales, bits, block), None)
    graph.save("products", dialect)
    return count * (rows * columns * bits // 8 + rows * (columns // block) * 4)


def speed(folder: Path, size: int, threads: int, huge: bool) -> dict[str, float]:
    """Weight bytes per second (10^9) of a graph of products: the median run of one quiet second."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    if huge:
        ort_session._use_huge_pages()
    binding = session.io_binding()
    for given in session.get_inputs():
        binding.bind_cpu_input(given.name, np.ones(given.shape, np.float32))
    for output in session.get_outputs():
        binding.bind_output(output.name)

    def second() -> list[float]:
        found = []
        end = time.perf_counter() + 1
        while len(found) < 2 or time.perf_counter() < end:
            started = time.perf_counter()
            session.run_with_iobinding(binding)
            found.append(time.perf_counter() - started)
        return found

    times, others, _ = quiet(second)
    return {
        "gb_s": size / statistics.median(times) / 1e9,
        "cores_used_by_others": others,
        "bytes_in_huge_pages": huge_bytes(),
    }


def kernels(columns: int, rows: int, folder: Path) -> list[dict[str, Any]]:
    """Every kind of product with 1 and 2 threads: weights in the second-level cache, and from
    memory with pages of 4 KB and of 2 MB.
    """
    found = []
    for kernel in KERNELS:
        bits, block, level = kernel
        line: dict[str, Any] = {
            "bits": bits,
            "block": block,
            "accuracy_level": level,
            "bytes_per_weight": bits / 8 + 4 / block,
        }
        for threads in (1, 2):
            with tempfile.TemporaryDirectory(dir=folder) as inside:
                # 0.7 MB for every core, sixteen times over.
                size = products(Path(inside), kernel, threads * 2048 // bits, columns, 16, True)
                line[f"cache, {threads} threads"] = apart(speed, Path(inside), size, threads, False)
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            # More than the last-level cache holds, read once through, as the weights of a model
            # are.
            count = -(-max(512 << 20, last_level_cache() * 5 // 4) // (rows * columns * bits // 8))
            size = products(Path(inside), kernel, rows, columns, count, False)
            for threads in (1, 2):
                for pages in ("4 KB", "2 MB"):
                    line[f"memory, {pages} pages, {threads} threads"] = apart(
                        speed, Path(inside), size, threads, pages == "2 MB"
                    )
        print(json.dumps(line), flush=True)
        found.append(line)
    return found


# --- part 3


def compared(
    engine: Engine, other: Engine, name: str, threads: int, rounds: int, new: int
) -> dict[str, Any]:
    """Speed of one setting over the default, round by round in turns."""
    times: dict[str, list[float]] = {"default": [], "changed": []}
    noise = []
    attempts = 0
    marks = [(time.perf_counter(), huge_bytes())]
    with opened(engine, threads, {}) as base:
        marks.append((time.perf_counter(), huge_bytes()))
        with opened(other, threads, SETTINGS.get(name, {}), name != "4 KB pages") as session:
            marks.append((time.perf_counter(), huge_bytes()))
            for _ in range(rounds):
                for label, one in (("default", base), ("changed", session)):
                    result, used, tried = quiet(lambda one=one: steps(one, new))
                    times[label].append(statistics.median(result))
                    noise.append(used)
                    attempts += tried
    opening = {
        label: {"seconds": b[0] - a[0], "bytes_in_huge_pages": b[1] - a[1]}
        for label, a, b in zip(times, marks, marks[1:], strict=False)
    }
    return {
        "setting": name,
        "options": SETTINGS.get(name, {}),
        "speed_over_default": paired_ratio(times["default"], times["changed"]),
        "opening": opening,
        "tok_s": {label: spread([1 / t for t in values]) for label, values in times.items()},
        "cores_used_by_others": spread(noise),
        "attempts": attempts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", help="an int4 ONNX engine of true dimensions")
    parser.add_argument(
        "--part", choices=["profile", "kernel", "settings"], action="append", help="default: all"
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        help="another engine to compare under settings, e.g. of another group",
    )
    parser.add_argument("--setting", action="append", help="only these settings; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=24)
    args = parser.parse_args()
    engine = open_engine(args.engine)
    common = {
        "engine": engine.name,
        "precision": engine.precision,
        "random_weights": engine.random_weights,
        "bytes_per_token": engine.bytes_per_token,
    }
    for part in args.part or ["profile", "kernel", "settings"]:
        bandwidth = {threads: [apart(read_bandwidth, threads, 5)] for threads in (1, 2)}
        if part == "profile":
            facts: dict[str, Any] = {"unit": "ms per token"}
            for threads in (args.threads, 1):
                for pages in ("2 MB", "4 KB"):
                    facts[f"{threads} threads, {pages} pages"] = apart(
                        profile, engine, threads, args.new, pages == "2 MB"
                    )
        elif part == "kernel":
            facts = {
                "unit": "10^9 bytes/s of weights",
                "shape": [2560, 10240],
                "kernels": kernels(2560, 10240, engine.path.parent),
            }
        else:
            plans = dict.fromkeys(SETTINGS, engine) | {
                f"engine {Path(path).name}": open_engine(path) for path in args.against
            }
            found = []
            for name in args.setting or plans:
                found.append(
                    apart(compared, engine, plans[name], name, args.threads, args.rounds, args.new)
                )
                print(json.dumps(found[-1]), flush=True)
            facts = {
                "unit": "tok/s, median step of a round",
                "threads": args.threads,
                "settings": found,
            }
        for threads, values in bandwidth.items():
            values.append(apart(read_bandwidth, threads, 5))
        save(f"int4_{part}", common | {"bandwidth_gb_s_before_after": bandwidth} | facts)


if __name__ == "__main__":
    main()
