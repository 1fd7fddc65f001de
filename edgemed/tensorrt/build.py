"""Compiles an exported engine with TensorRT, on the device whose GPU it will run on.

Written against the documented Python API of TensorRT 10.3 to 11.4 and kept thin, because it has
never run on TensorRT: whatever can be decided before the export (operators, types, shapes) is
decided there, and what is left here is one parse and one build for each graph.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.console import say
from edgemed.errors import EdgemedError, need
from edgemed.hardware.cuda_driver import Cuda
from edgemed.tensorrt.dialect import BLOCK, rows_offered
from edgemed.tensorrt.parser_check import graph_bytes, read_table
from edgemed.vision.preprocessing import most_features, vision_of

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine
    from edgemed.models.architecture import VisionConfig

VISION_GRAPHS = ("tower", "projector")
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
EVERY = 64  # tokens whose scores come back at once; [EVERY, vocabulary] float32 is what this costs
USUAL = 448**2  # pixels of the image a tower's plan is tuned for, within the engine's own limits
# bytes an attention score of a vision tower takes for a moment: in float32, and its weight in two
# formats
SCORE = 8
# what CUDA and TensorRT's libraries hold in a process: an assumption, not a measurement
CONTEXT = 400 << 20


def tensorrt(runtime: str) -> Any:
    """The Python module of TensorRT or of TensorRT for RTX. Raises EdgemedError where it is not
    installed.
    """
    try:
        return need(MODULES[runtime], "tensorrt")
    except EdgemedError as error:
        fix = (
            "pip install tensorrt-rtx"
            if runtime == "rtx"
            else (
                "On a Jetson it comes with JetPack (sudo apt install nvidia-jetpack; use the"
                " system's Python or a venv with --system-site-packages); elsewhere: pip install"
                " 'edgemed[tensorrt]'"
            )
        )
        raise EdgemedError(error.problem, fix) from None


def identity(runtime: str, table: str | None) -> dict[str, Any]:
    """What a plan is tied to: runtime, TensorRT version, GPU and compute capability of this
    machine.

    table: the parser table the engine was checked against. Raises EdgemedError where TensorRT,
    driver or GPU is missing, or another TensorRT is here.
    """
    trt = tensorrt(runtime)
    if table and runtime == "tensorrt" and not read_table(table).holds(trt.__version__):
        parser = read_table(table)
        raise EdgemedError(
            f"TensorRT {trt.__version__} is installed, and this engine was checked for"
            f" {parser.since} up to, not including, {parser.until}",
            "Export it again for this TensorRT: --set profile=jetpack6 (10.3), jetpack7 (10.16) or"
            " trt11",
        )
    cuda = Cuda()
    try:
        return {
            "runtime": runtime,
            "tensorrt": trt.__version__,
            "gpu": cuda.name(),
            "compute_capability": cuda.capability(),
        }
    finally:
        cuda.close()


def compile_plan(
    engine: Engine, out: Path, table: str, workspace_mb: int | None = None
) -> dict[str, Any]:
    """Compile every graph of the engine into out/NAME.plan; returns facts for the manifest, sizes
    in bytes.

    Raises EdgemedError where memory is too small (before anything is built), the GPU lacks the
    precision, or TensorRT refuses the graph.
    """
    params = engine.params
    trt = tensorrt(params["runtime"])
    workspace = (workspace_mb or params["workspace_mb"]) * 10**6
    cuda = Cuda()
    try:
        facts = {
            "driver_cuda": cuda.driver(),
            "shared_memory": cuda.shared(),
            "parser_table": table,
        }
        for name in graphs(engine):
            check_precision(precision_of(engine, name), cuda.capability())
            check_memory(engine, name, cuda, workspace)
        say(f"tensorrt {trt.__version__}: compiling for {cuda.name()}; this takes minutes")
        memory = MemorySampler(cuda)
        seconds = {}
        timings = out.parent / f"timing-{trt.__version__}-{cuda.capability()}.cache"
        with memory:
            for name in graphs(engine):
                started = time.perf_counter()
                # TensorRT hands out its own memory; written from there, no second copy is made.
                with open(out / f"{name}.plan", "wb") as handle:
                    handle.write(serialized(trt, engine, name, workspace, timings, out))
                seconds[name] = round(time.perf_counter() - started, 3)
    finally:
        cuda.close()
    facts |= {
        "build_seconds": round(sum(seconds.values()), 3),
        "peak_gpu_memory_bytes": memory.peak,
        "gpu_memory_sampled": "every 50 ms, other programs included",
    }
    if len(seconds) > 1:
        facts["seconds_by_graph"] = seconds
    return facts


def graphs(engine: Engine) -> tuple[str, ...]:
    """Names of the engine's graphs: NAME.onnx as it travels, NAME.plan as it is built."""
    return ("model", *VISION_GRAPHS) if engine.vision else ("model",)


def precision_of(engine: Engine, name: str) -> str:
    return engine.precision if name == "model" else engine.params["tower"]


def check_precision(precision: str, capability: str) -> None:
    """Raise EdgemedError where the GPU has no arithmetic for the engine's precision."""
    if "bf16" in precision and tuple(map(int, capability.split("."))) < (8, 0):
        raise EdgemedError(
            f"this GPU (compute capability {capability}) has no bfloat16, which came with 8.0"
            " (Ampere)",
            "Export with fp16 instead of bf16",
        )


def check_memory(engine: Engine, name: str, cuda: Cuda, workspace: int) -> None:
    """Raise EdgemedError before the driver would, saying by how much memory falls short (rule of
    thumb of trt_parser.estimate).
    """
    import psutil

    weights = graph_bytes(engine.path, name)
    scores = score_bytes(vision_of(engine.vision), engine.context) if name == "tower" else 0
    on_gpu = weights + workspace + scores + CONTEXT
    on_host = 2 * weights
    pools = (
        [("memory", on_gpu + on_host, cuda.free())]
        if cuda.shared()
        else [
            ("GPU memory", on_gpu, cuda.free()),
            ("host memory", on_host, int(psutil.virtual_memory().available)),
        ]
    )
    for pool, needed, free in pools:
        if needed > free:
            raise EdgemedError(
                f"building {name}.onnx needs about {needed / 1e6:.0f} MB of {pool} and"
                f" {free / 1e6:.0f} MB are free: {(needed - free) / 1e6:.0f} MB too little",
                "Close other programs, lower --workspace-mb, or export "
                + ("with fewer max_pixels" if scores > weights else "a smaller precision"),
            )


class MemorySampler:
    """Samples the memory in use while something runs: `peak` is the most seen, in bytes above the
    start.
    """

    def __init__(self, cuda: Cuda):
        self.cuda = cuda
        self.peak = 0
        self.over = threading.Event()
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


def serialized(
    trt: Any, engine: Engine, name: str, workspace: int, timings: Path, work: Path
) -> Any:
    """Parse and build one graph; returns TensorRT's host memory holding the plan.

    timings: kernel timings of earlier builds, read, and replaced as a whole by way of `work`, the
    unfinished artifact's directory.
    """
    file = engine.path / f"{name}.onnx"
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # Required on 10.x; 11.x knows no other and ignores the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        first = range(min(parser.num_errors, 3))
        reasons = "; ".join(parser.get_error(n).desc() for n in first)
        raise EdgemedError(
            f"TensorRT {trt.__version__} does not parse {file}: {reasons}",
            "Please report this: the export's check should have found it",
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if "fp32" in precision_of(engine, name):
        config.clear_flag(trt.BuilderFlag.TF32)  # it would round float32 products to 10 bits
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    inputs = [network.get_input(n) for n in range(network.num_inputs)]
    for sizes in profiles(engine, name):
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            profile.set_shape(
                tensor.name, *(shape_of(tensor.name, tuple(tensor.shape), size) for size in sizes)
            )
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EdgemedError(
            f"TensorRT {trt.__version__} could not build {file}; its messages stand above",
            "If it ran out of memory, lower --workspace-mb",
        )
    fresh = work / timings.name
    fresh.write_bytes(config.get_timing_cache().serialize())
    os.replace(fresh, timings)
    return plan


Sizes = dict[str, int]  # of the axes that differ from run to run, by the names below
AXES: dict[str, tuple[str | None, ...]] = {
    "tokens": (None, "new"),
    "positions": (None, "new"),
    "rope_positions": (None, "new"),
    "feature_rows": (None, "new"),
    "features": ("features", None),
    "select": ("selected",),
    "slots": ("past",),
    **dict.fromkeys(("pixels", "cos", "sin", "tower"), ("patches", None)),
}


def profiles(engine: Engine, name: str) -> list[tuple[Sizes, Sizes, Sizes]]:
    """(min, opt, max) sizes of each optimisation profile of a graph: prefill and decode of the
    decoder, one of a tower or projector.
    """
    if name != "model":
        least, usual, most = patch_range(vision_of(engine.vision), engine.context)
        return [({"patches": least}, {"patches": usual}, {"patches": most})]
    rows = rows_offered(engine.context)
    prefill = min(engine.params["prefill"], engine.context)
    middle = max(BLOCK, rows // 2 // BLOCK * BLOCK)

    def sizes(new: int, past: int, selected: int, features: int) -> Sizes:
        return {"new": new, "past": past, "selected": selected, "features": features}

    # A run takes the features of its own tokens alone, so there are never more of them than tokens;
    # one size a profile, that shapes need not change.
    return [
        (
            sizes(1, BLOCK, 1, prefill),
            sizes(prefill, BLOCK, 1, prefill),
            sizes(prefill, rows, min(EVERY, prefill), prefill),
        ),
        (sizes(1, BLOCK, 1, 1), sizes(1, middle, 1, 1), sizes(1, rows, 1, 1)),
    ]


def patch_range(v: VisionConfig, context: int) -> tuple[int, int, int]:
    """(min, opt, max) patches of an image that fits the context. A narrow image may become fewer
    features than min_pixels says: one at least.
    """
    per = v.merge**2
    most = min(most_features(v), context)
    if v.size:
        return (per * most,) * 3
    usual = min(max(USUAL, v.pixels[0]), v.pixels[1]) // (v.patch * v.merge) ** 2
    return per, per * min(max(usual, 1), most), per * most


def score_bytes(v: VisionConfig, context: int) -> int:
    """Attention scores of one tower layer over the largest image, where TensorRT keeps them all: a
    rule of thumb.
    """
    return SCORE * v.heads * (patch_range(v, context)[2] + (0 if v.frequencies else 1)) ** 2


def shape_of(name: str, declared: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
    """The shape of a graph input (PlainDialect's and vision_graph's names) for one run."""
    axes = AXES.get(name, (None, "past", None, None))  # the cache
    return tuple(
        size if axis is None else sizes[axis] for size, axis in zip(declared, axes, strict=True)
    )
