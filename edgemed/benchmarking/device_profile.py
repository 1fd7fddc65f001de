"""Measures this machine as a device: bandwidth by threads, dense products by precision, the cost of
one call, memory left for an engine.

A data sheet says what silicon could do, and a virtual machine or a power mode halves it; a plan for
your own board should rest on numbers from that board. Only numpy is needed; what another runtime
adds (ONNX Runtime: integer products, torch: the GPU) is measured where it is installed and named as
skipped where not.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.artifacts import store
from edgemed.artifacts.json_files import write_text
from edgemed.console import say, track
from edgemed.errors import EdgemedError, install_command, need
from edgemed.hardware.device import GIB, gpu_clock, machine, read_bandwidth
from edgemed.onnx.ort_dialect import WIDE_SUMS

# A prompt of 128 tokens through a matrix of a model of one to three billion parameters.
ROWS = 128
SIZE = 2048
GROUP = 128
# Graphs of one operator each, for ONNX Runtime: written by bench/make_probes.py, because a device
# need not have the onnx package.
PROBES = Path(__file__).parent / "probes"
# The operator in the graph of each precision; int4 is of ONNX Runtime itself.
OPERATORS = {"fp32": "MatMul", "fp16": "MatMul", "int8": "MatMulInteger", "int4": "MatMulNBits"}
# Seconds spent on each product, on each number of threads, on the call and on the GPU: about two
# minutes in all, or a few seconds.
LONG = 6.0
SHORT = 0.4


def measure(quick: bool = False, threads: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Measure for about two minutes (a few seconds when `quick`): (values of a device file, what
    was skipped and why). threads: default physical cores.

    Memory in GiB, bandwidth in 10^9 bytes/s, products in 10^12 operations/s (two per multiply-add),
    the best of the rounds that fit.
    """
    import psutil

    facts = machine()
    seconds = SHORT if quick else LONG
    cores = threads or facts["physical_cores"]
    skipped: list[str] = []
    counts = sorted({1, *(n for n in (2, 4, 8, 16) if n < cores), cores})
    usable = psutil.virtual_memory().available
    load = psutil.getloadavg()[0]
    if load > 0.3 * cores:
        # The measurement's own threads are not in it yet: the average of the last minute is of what
        # ran before.
        say(
            f"the machine is busy (load average {load:.1f} on {facts['physical_cores']} cores):"
            " what is measured now is too slow; close what else runs"
        )
    bandwidth = {
        n: read_bandwidth(n, rounds=5 if quick else 40) for n in track(counts, "bandwidth")
    }
    products: dict[str, float] = {}
    for name, run in track(list(_products(cores, skipped)), "products"):
        products[name] = round(2 * ROWS * SIZE * SIZE / best(run, seconds) / 1e12, 4)
    values = {
        "title": (
            f"{facts['cpu']}, measured" if not facts["device"] else f"{facts['device']}, measured"
        ),
        "memory_gb": round(facts["memory_bytes"] / GIB, 2),
        "usable_gb": round(usable / GIB, 2),
        "memory": "as the operating system reports it",
        "shared_memory": True,
        "achievable_gb_s": round(max(bandwidth.values()), 2),
        "bandwidth_note": (
            "GB/s by threads: " + ", ".join(f"{n}: {value:.1f}" for n, value in bandwidth.items())
        ),
        "cpu": f"{facts['cpu']}, {cores} cores, {' '.join(facts['flags'])}".rstrip(", "),
        "achieved": products,
        "compute_note": (
            f"Products of {ROWS} rows with a {SIZE} x {SIZE} matrix on {cores} threads; int4 is"
            " weight-only with int8 activations"
        ),
        "launch_us": round(best(_call(), seconds) * 1e6, 3),
    }
    values |= gpu_values(seconds, skipped)
    versions = ", ".join(
        f"{name} {version}"
        for name, version in store.versions().items()
        if name in ("edgemed", "numpy", "onnxruntime", "torch")
    )
    source = (
        "measured on the machine itself,"
        f" {time.strftime('%Y-%m-%d', time.gmtime())}{' (quick)' if quick else ''}, load average"
        f" {load:.1f}, {facts['os']}, {versions}"
    )
    parts = {
        "memory": ("memory_gb",),
        "bandwidth": ("achievable_gb_s",),
        "compute": ("achieved", "launch_us"),
    }
    return values | {"source": dict.fromkeys(parts, source)}, skipped


def measured(out: Path | None, quick: bool) -> dict[str, Any]:
    """Measure, and write a device file where `out` is given; the result for a person: the values,
    where they went and what was skipped.
    """
    if out:
        check_out(out)
    values, skipped = measure(quick)
    if out:
        write_device(values, out)
    return {
        **values,
        "source": values["source"]["bandwidth"],
        "skipped": skipped,
        "file": str(out) if out else None,
    }


def check_out(out: Path) -> None:
    """Raises EdgemedError where a device file cannot go to `out`: before two minutes are spent."""
    if out.suffix != ".yaml":
        raise EdgemedError(
            f"{out} does not end in .yaml",
            "A device file does, so that its name is not taken for a known device's",
        )
    if out.exists():
        raise EdgemedError(f"{out} is there already", "Give another name, or delete it first")
    if not out.parent.is_dir():
        raise EdgemedError(f"{out.parent} is no directory", "Make it first")


def write_device(values: dict[str, Any], out: Path) -> None:
    """Write a device file that read_device accepts."""
    import yaml

    text = (
        "# Written by edgemed doctor --measure. Use it as: edgemed plan MODEL --device "
        + out.name
        + "\n"
    )
    write_text(out, text + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=200))


def best(run: Callable[[], Any], seconds: float) -> float:
    """Shortest time of one call of `run`, of at least three after one warm-up and as many as fit
    into `seconds`.
    """
    run()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


@dataclass(frozen=True)
class Probe:
    """A probe graph, ready to be timed: one call is one product. It keeps the weights, because the
    session reads them where they lie.
    """

    session: Any
    weights: dict[str, Any]
    x: np.ndarray

    def __call__(self) -> np.ndarray:
        """The product of `x` with the weights."""
        return self.session.run(None, {"x": self.x})[0]


def open_probe(name: str, x: np.ndarray, weights: dict[str, np.ndarray], threads: int) -> Probe:
    """The shipped graph `name` on ONNX Runtime's CPU kernels, with these values as its weights.

    The weights are constants of the graph, as an engine's are: a runtime reorders constants once,
    before the first call. bench/make_probes.py writes the graphs and says their shapes and element
    types. Raises ONNX Runtime's NotImplemented where it has no such kernel on this CPU.
    """
    ort = need("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry(*WIDE_SUMS)  # as the engines have it
    values = {
        weight: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for weight, array in weights.items()
    }
    options.add_external_initializers(list(values), list(values.values()))
    session = ort.InferenceSession(
        str(PROBES / f"{name}.onnx"),
        options,
        providers=["CPUExecutionProvider"],
    )
    probe = Probe(session, values, x)
    probe()
    return probe


def _call() -> Callable[[], Any]:
    """The cheapest call a runtime can make: one product of two numbers."""
    one = np.ones((1, 1), np.float32)
    if importlib.util.find_spec("onnxruntime") is None:
        return lambda: one @ one
    return open_probe("call", one, {"b": one}, 1)


def _products(threads: int, skipped: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(precision, one product of ROWS x SIZE x SIZE): float32 always, the others through ONNX
    Runtime.
    """
    random = np.random.default_rng(0)
    x = random.random((ROWS, SIZE), np.float32)
    w = random.random((SIZE, SIZE), np.float32)
    if importlib.util.find_spec("onnxruntime") is None:
        skipped.append(
            "int8, fp16 and int4 products: onnxruntime is not installed (edgemed[onnx]:"
            f" {install_command('onnx')})"
        )
        # Blocks of columns, one per thread: how many threads numpy's own BLAS starts was decided
        # when it was loaded.
        pool = ThreadPoolExecutor(threads)
        blocks = np.array_split(w, threads, axis=1)
        yield "fp32", lambda: list(pool.map(lambda block: x @ np.ascontiguousarray(block), blocks))
        return
    integers = random.integers(0, 255, (SIZE, SIZE), np.uint8)
    packed = integers[:, : SIZE // 2].reshape(SIZE, SIZE // GROUP, GROUP // 2)
    scales = np.ones((SIZE, SIZE // GROUP), np.float32)
    operands: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]] = {
        "fp32": (x, {"b": w}),
        "fp16": (x.astype(np.float16), {"b": w.astype(np.float16)}),
        "int8": (integers[:ROWS], {"b": integers.view(np.int8)}),
        "int4": (x, {"b": packed, "scales": scales}),
    }
    for name, (rows, weights) in operands.items():
        try:
            yield name, open_probe(name, rows, weights, threads)
        except need("onnxruntime", "onnx").capi.onnxruntime_pybind11_state.NotImplemented:
            skipped.append(
                f"{name} products: ONNX Runtime has no {OPERATORS[name]} of this type on this CPU"
            )


def gpu_values(seconds: float, skipped: list[str]) -> dict[str, Any]:
    """What torch and CUDA measure on the first GPU: read bandwidth, dense products, kernel launch,
    free memory; nothing where there is none.
    """
    if importlib.util.find_spec("torch") is None:
        skipped.append(
            "the GPU: torch is not installed" if machine()["gpus"] else "the GPU: none found"
        )
        return {}
    torch = need("torch", "build")
    if not torch.cuda.is_available():
        skipped.append(
            "the GPU: this torch has no CUDA" if machine()["gpus"] else "the GPU: none found"
        )
        return {}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    shared = bool(getattr(properties, "is_integrated", 0))
    say(f"measuring {properties.name}")
    buffer = torch.ones(min(free // 4, 1 << 30) // 4, device="cuda")
    read = buffer.nbytes / gpu_best(torch, buffer.sum, seconds) / 1e9
    del buffer
    size = 4096
    products = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        a = torch.randn(size, size, device="cuda").to(dtype)
        products[name] = round(
            2 * size**3 / gpu_best(torch, functools.partial(operator.matmul, a, a), seconds) / 1e12,
            3,
        )
    a = torch.randint(-8, 8, (size, size), device="cuda", dtype=torch.int8)
    if properties.major >= 8:
        products["int8"] = round(
            2 * size**3 / gpu_best(torch, lambda: torch._int_mm(a, a.T), seconds) / 1e12, 3
        )
    one = torch.ones(1, device="cuda")
    return {
        "title": f"{properties.name}, measured",
        "memory_gb": round(total / GIB, 2),
        "usable_gb": round(free / GIB, 2),
        "shared_memory": shared,
        "memory": "as CUDA reports it",
        "achievable_gb_s": round(read, 1),
        "bandwidth_note": "GB/s of a sum over 1 GiB",
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "achieved": products,
        "compute_note": f"Products of two {size} x {size} matrices by torch",
        "launch_us": round(gpu_best(torch, lambda: one.add_(1), seconds) * 1e6, 3),
        "gpu_mhz": round(getattr(properties, "clock_rate", 0) / 1000) or gpu_clock(),
    }


def gpu_best(torch: Any, run: Callable[[], Any], seconds: float) -> float:
    """Shortest time per call of `run` in batches of 20 kernels, waiting for the GPU around each
    batch.
    """

    def batch() -> None:
        for _ in range(20):
            run()
        torch.cuda.synchronize()

    return best(batch, seconds) / 20
