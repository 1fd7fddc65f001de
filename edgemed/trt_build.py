"""Compiles an exported engine with TensorRT, on the device whose GPU it will run on.

Written against the documented Python API of TensorRT 10.3 to 11.4 and kept thin, because it has never run on TensorRT: whatever can be
decided before the export (operators, types, shapes) is decided there, and what is left here is one parse and one build.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.console import say
from edgemed.cuda import Cuda
from edgemed.errors import EdgemedError, need
from edgemed.trt_dialect import BLOCK, rows_offered
from edgemed.trt_parser import read_table

if TYPE_CHECKING:
    from edgemed.engine import Engine

MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
EVERY = 64  # tokens whose scores come back at once; [EVERY, vocabulary] float32 is what this costs
CONTEXT = 400 << 20  # what CUDA and TensorRT's libraries hold in a process: an assumption, not a measurement


def tensorrt(runtime: str) -> Any:
    """The Python module of TensorRT or of TensorRT for RTX. Raises EdgemedError where it is not installed."""
    try:
        return need(MODULES[runtime], "tensorrt")
    except EdgemedError as error:
        fix = "pip install tensorrt-rtx" if runtime == "rtx" else (
            "On a Jetson it comes with JetPack (sudo apt install nvidia-jetpack; use the system's Python or a venv with --system-site-packages); elsewhere: pip install 'edgemed[tensorrt]'"
        )
        raise EdgemedError(error.problem, fix) from None


def identity(runtime: str, table: str | None) -> dict[str, Any]:
    """What a plan is tied to: runtime, TensorRT version, GPU and compute capability of this machine.

    table: the parser table the engine was checked against. Raises EdgemedError where TensorRT, driver or GPU is missing, or another TensorRT is here.
    """
    trt = tensorrt(runtime)
    if table and runtime == "tensorrt" and not read_table(table).holds(trt.__version__):
        known = read_table(table)
        raise EdgemedError(
            f"TensorRT {trt.__version__} is installed, and this engine was checked for {known.since} up to, not including, {known.until}",
            "Export it again for this TensorRT: --set profile=jetpack6 (10.3), jetpack7 (10.16) or trt11",
        )
    cuda = Cuda()
    try:
        return {"runtime": runtime, "tensorrt": trt.__version__, "gpu": cuda.name(), "compute_capability": cuda.capability()}
    finally:
        cuda.close()


def compile_plan(engine: Engine, out: Path, table: str, workspace_mb: int | None = None) -> dict[str, Any]:
    """Compile model.onnx into out/model.plan; returns facts for the manifest, sizes in bytes.

    Raises EdgemedError where memory is too small (before anything is built), the GPU lacks the precision, or TensorRT refuses the graph.
    """
    params = engine.params
    trt, workspace = tensorrt(params["runtime"]), (workspace_mb or params["workspace_mb"]) * 10**6
    cuda = Cuda()
    try:
        facts = {"driver_cuda": cuda.driver(), "shared_memory": cuda.shared(), "parser_table": table}
        check_precision(engine.precision, cuda.capability())
        check_memory(engine, cuda, workspace)
        say(f"tensorrt {trt.__version__}: compiling for {cuda.name()}; this takes minutes")
        watch, started = Watch(cuda), time.perf_counter()
        with watch:
            plan = serialized(trt, engine, workspace, out.parent / f"timing-{trt.__version__}-{cuda.capability()}.cache")
        seconds = round(time.perf_counter() - started, 3)
        # TensorRT hands out its own memory; written from there, no second copy is made.
        with open(out / "model.plan", "wb") as handle:
            handle.write(plan)
    finally:
        cuda.close()
    return facts | {"build_seconds": seconds, "peak_gpu_memory_bytes": watch.peak, "gpu_memory_sampled": "every 50 ms, other programs included"}


def check_precision(precision: str, capability: str) -> None:
    """Raise EdgemedError where the GPU has no arithmetic for the engine's precision."""
    if "bf16" in precision and tuple(map(int, capability.split("."))) < (8, 0):
        raise EdgemedError(f"this GPU (compute capability {capability}) has no bfloat16, which came with 8.0 (Ampere)", "Export with fp16 instead of bf16")


def check_memory(engine: Engine, cuda: Cuda, workspace: int) -> None:
    """Raise EdgemedError before the driver would, saying by how much memory falls short (rule of thumb of trt_parser.estimate)."""
    import psutil

    weights = sum(part.stat().st_size for part in engine.path.glob("model.onnx*"))
    on_gpu, on_host = weights + workspace + CONTEXT, 2 * weights
    pools = [("memory", on_gpu + on_host, cuda.free())] if cuda.shared() else [
        ("GPU memory", on_gpu, cuda.free()), ("host memory", on_host, int(psutil.virtual_memory().available))]
    for name, needed, free in pools:
        if needed > free:
            raise EdgemedError(
                f"building needs about {needed / 1e6:.0f} MB of {name} and {free / 1e6:.0f} MB are free: {(needed - free) / 1e6:.0f} MB too little",
                "Close other programs, lower --workspace-mb, or export a smaller precision",
            )


class Watch:
    """Samples the memory in use while something runs: `peak` is the most seen, in bytes above the start."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.peak, self.over = cuda, 0, threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        self.cuda.enter()
        while not self.over.wait(0.05):
            self.peak = max(self.peak, self.before - self.cuda.free())

    def __enter__(self) -> None:
        self.before = self.cuda.free()
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def serialized(trt: Any, engine: Engine, workspace: int, timings: Path) -> Any:
    """Parse and build; returns TensorRT's host memory holding the plan. `timings`: kernel timings of earlier builds, read and written."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # Required on 10.x; 11.x knows no other and ignores the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(engine.path / "model.onnx")):
        said = "; ".join(parser.get_error(n).desc() for n in range(min(parser.num_errors, 3)))
        raise EdgemedError(f"TensorRT {trt.__version__} does not parse {engine.path / 'model.onnx'}: {said}", "Please report this: the export's check should have found it")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if "fp32" in engine.precision:
        config.clear_flag(trt.BuilderFlag.TF32)  # it would round float32 products to 10 bits
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    inputs = [network.get_input(n) for n in range(network.num_inputs)]
    for sizes in profiles(engine):
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            profile.set_shape(tensor.name, *(shape_of(tensor.name, tuple(tensor.shape), *size) for size in sizes))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EdgemedError(f"TensorRT {trt.__version__} could not build {engine.path}; its messages stand above", "If it ran out of memory, lower --workspace-mb")
    timings.write_bytes(config.get_timing_cache().serialize())
    return plan


def profiles(engine: Engine) -> list[tuple[tuple[int, int, int], ...]]:
    """Two optimisation profiles, prefill and decode, each (min, opt, max) of (new tokens, cache rows offered, scores wanted)."""
    rows, prefill = rows_offered(engine.context), min(engine.params["prefill"], engine.context)
    middle = max(BLOCK, rows // 2 // BLOCK * BLOCK)
    return [((1, BLOCK, 1), (prefill, BLOCK, 1), (prefill, rows, min(EVERY, prefill))), ((1, BLOCK, 1), (1, middle, 1), (1, rows, 1))]


def shape_of(name: str, declared: tuple[int, ...], new: int, past: int, selected: int) -> tuple[int, ...]:
    """The shape of a graph input (PlainDialect's names) for one run."""
    fixed = {"tokens": (1, new), "positions": (1, new), "select": (selected,), "slots": (past,)}
    return fixed.get(name) or (1, past, *declared[2:])
