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
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.artifacts import store
from edgemed.console import say, track
from edgemed.errors import EdgemedError, need
from edgemed.hardware.device import GIB, gpu_clock, machine, read_bandwidth
from edgemed.onnx.ort_dialect import WIDE_SUMS

# A prompt of 128 tokens through a matrix of a model of one to three billion parameters.
ROWS = 128
SIZE = 2048
GROUP = 128
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
    said = (
        "measured on the machine itself,"
        f" {time.strftime('%Y-%m-%d', time.gmtime())}{' (quick)' if quick else ''}, load average"
        f" {load:.1f}, {facts['os']}, {versions}"
    )
    parts = {
        "memory": ("memory_gb",),
        "bandwidth": ("achievable_gb_s",),
        "compute": ("achieved", "launch_us"),
    }
    return values | {"source": dict.fromkeys(parts, said)}, skipped


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
    out.write_text(
        text + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=200),
        encoding="utf-8",
    )


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


def _call() -> Callable[[], Any]:
    """The cheapest call a runtime can make: one product of two numbers."""
    if importlib.util.find_spec("onnxruntime") is None:
        x = np.ones((1, 1), np.float32)
        return lambda: x @ x
    return _session("MatMul", np.ones((1, 1), np.float32), {"b": np.ones((1, 1), np.float32)}, 1)


def _products(threads: int, skipped: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(precision, one product of ROWS x SIZE x SIZE): float32 always, the others through ONNX
    Runtime.
    """
    random = np.random.default_rng(0)
    x = random.random((ROWS, SIZE), np.float32)
    w = random.random((SIZE, SIZE), np.float32)
    if importlib.util.find_spec("onnxruntime") is None:
        skipped.append(
            "int8, fp16 and int4 products: onnxruntime is not installed (pip install"
            " 'edgemed[onnx]')"
        )
        # Blocks of columns, one per thread: how many threads numpy's own BLAS starts was decided
        # when it was loaded.
        pool = ThreadPoolExecutor(threads)
        blocks = np.array_split(w, threads, axis=1)
        yield "fp32", lambda: list(pool.map(lambda block: x @ np.ascontiguousarray(block), blocks))
        return
    integers = random.integers(0, 255, (SIZE, SIZE), np.uint8)
    packed = integers[:, : SIZE // 2].reshape(SIZE, SIZE // GROUP, GROUP // 2)
    choices: dict[str, tuple[str, np.ndarray, dict[str, np.ndarray], dict[str, int]]] = {
        "fp32": ("MatMul", x, {"b": w}, {}),
        "fp16": ("MatMul", x.astype(np.float16), {"b": w.astype(np.float16)}, {}),
        "int8": ("MatMulInteger", integers[:ROWS], {"b": integers.view(np.int8)}, {}),
        "int4": (
            "MatMulNBits",
            x,
            {"b": packed, "scales": np.ones((SIZE, SIZE // GROUP), np.float32)},
            {"K": SIZE, "N": SIZE, "bits": 4, "block_size": GROUP, "accuracy_level": 4},
        ),
    }
    for name, (op, given, constants, attributes) in choices.items():
        try:
            yield name, _session(op, given, constants, threads, attributes)
        except need("onnxruntime", "onnx").capi.onnxruntime_pybind11_state.NotImplemented:
            skipped.append(f"{name} products: ONNX Runtime has no {op} of this type on this CPU")


def _session(
    op: str,
    x: np.ndarray,
    constants: dict[str, np.ndarray],
    threads: int,
    attributes: dict[str, int] | None = None,
) -> Callable[[], Any]:
    ort = need("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry(*WIDE_SUMS)  # as the engines have it
    session = ort.InferenceSession(
        one_operator(op, x, constants, attributes or {}),
        options,
        providers=["CPUExecutionProvider"],
    )
    session.run(None, {"x": x})
    return lambda: session.run(None, {"x": x})


# ONNX's numbers of element types (TensorProto.DataType).
ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "float16": 10}


def one_operator(
    op: str, x: np.ndarray, constants: dict[str, np.ndarray], attributes: dict[str, int]
) -> bytes:
    """An ONNX model of one operator: input 'x', the constants, output 'y'. Written by hand, because
    a device need not have the onnx package.

    Field numbers are those of onnx.proto3: ModelProto 1 ir_version, 7 graph, 8 opset_import;
    GraphProto 1 node, 2 name, 5 initializer, 11 input, 12 output; NodeProto 1 input, 2 output, 4
    op_type, 5 attribute, 7 domain; AttributeProto 1 name, 3 i, 20 type (2: an integer).
    """
    domain = "com.microsoft" if op == "MatMulNBits" else ""
    result = "int32" if op == "MatMulInteger" else x.dtype.name
    node = (
        b"".join(_field(1, name.encode()) for name in ("x", *constants))
        + _field(2, b"y")
        + _field(4, op.encode())
        + _field(7, domain.encode())
    )
    node += b"".join(
        _field(5, _field(1, name.encode()) + _number(3, value) + _number(20, 2))
        for name, value in attributes.items()
    )
    tensors = b"".join(
        _field(
            5,
            b"".join(_number(1, size) for size in array.shape)
            + _number(2, ONNX_TYPES[array.dtype.name])
            + _field(8, name.encode())
            + _field(9, array.tobytes()),
        )
        for name, array in constants.items()
    )
    graph = (
        _field(1, node)
        + _field(2, b"measure")
        + tensors
        + _field(11, _value("x", x.dtype.name))
        + _field(12, _value("y", result))
    )
    opsets = b"".join(
        _field(8, (_field(1, name) if name else b"") + _number(2, version))
        for name, version in ((b"", 17), (b"com.microsoft", 1))
    )
    return _number(1, 8) + _field(7, graph) + opsets


def _value(name: str, dtype: str) -> bytes:
    # ValueInfoProto: 1 name, 2 type; TypeProto: 1 tensor_type; its 1 elem_type, 2 shape;
    # TensorShapeProto: 1 dim, here two of any size.
    return _field(1, name.encode()) + _field(
        2, _field(1, _number(1, ONNX_TYPES[dtype]) + _field(2, 2 * _field(1, b"")))
    )


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + struct.pack("B", value)


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
