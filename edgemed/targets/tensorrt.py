"""The TensorRT target: plain ONNX with its precision written into the graph, checked against what the chosen TensorRT parses.

TensorRT compiles for the GPU it runs on, so what travels is the ONNX and `edgemed build ENGINE` on the device finishes it. Until then the
engine is unbuilt: the same graph runs on ONNX Runtime for parity, and nothing is measured. None of this has run on TensorRT yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgemed.errors import EdgemedError
from edgemed.grid import labelled, named

if TYPE_CHECKING:
    from edgemed.engine import Engine
    from edgemed.session import Session
    from edgemed.weights import Weights

# Largest logit error against the float32 source, for precisions that must be exact.
EXACT = {"fp32": 1e-3}
# The package that runs these engines, and the extra that installs it (on a Jetson it comes with JetPack).
RUNTIME = ("tensorrt", "tensorrt")
# Where engines go -> the parser table they are checked against.
PROFILES = {"jetpack6": "10.3", "jetpack7": "10.16", "trt11": "11"}
FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Params:
    """profile: jetpack6 (TensorRT 10.3), jetpack7 (10.16) or trt11. precision: 'auto' carries a quantized checkpoint's integers and is
    fp16 otherwise; int4 rounds other matrices to nearest in groups of `group`, int8 with one scale per output.

    activations: format beside integers. context: tokens of the KV cache (default the model's). prefill: tokens per run at most; longer
    prompts go in parts. workspace_mb: memory TensorRT may use to try kernels (10^6 bytes). runtime: 'rtx' builds with TensorRT for RTX.
    """

    profile: Literal["jetpack6", "jetpack7", "trt11"] = "jetpack6"
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"] = "auto"
    group: Literal[32, 64, 128] = 128
    activations: Literal["fp16", "bf16", "fp32"] = "fp16"
    context: int | None = None
    prefill: int = 512
    workspace_mb: int = 1024
    runtime: Literal["tensorrt", "rtx"] = "tensorrt"


def label(params: Params) -> str:
    """A short engine name."""
    return "tensorrt" if params.precision == "auto" else f"tensorrt-{params.precision}"


def inputs(params: Params) -> dict[str, str]:
    """No files besides the checkpoint's."""
    return {}


def bits_of(weights: Weights, params: Params) -> int | None:
    """Bits of the layer matrices, the fewest where a checkpoint mixes them; None for floats."""
    if params.precision == "auto":
        return min((max(4, bits) for bits, _ in weights.packings()), default=None)
    return {"int8": 8, "int4": 4}.get(params.precision)


def supports(weights: Weights, params: Params) -> str | None:
    """Why this model cannot become this engine, or None."""
    d, bits, stored = weights.decoder, bits_of(weights, params), sorted(weights.packings())
    if params.context is not None and not 1 <= params.context <= d.context:
        return f"context {params.context} is not between 1 and the model's {d.context}"
    if weights.vision:
        return "vision towers and image features have not been written for TensorRT yet; use onnx or llamacpp"
    if params.prefill < 1 or params.workspace_mb < 1:
        return "prefill and workspace_mb must be above 0"
    if not bits:
        return None
    if params.precision != "auto" and stored and {b for b, _ in stored} != {bits}:
        return f"the checkpoint holds {named(stored)} integers and precision {params.precision} asks for {bits}; use precision auto"
    if not stored:
        small = bits == 4 and (d.hidden % params.group or d.ffn % params.group)
        return f"group {params.group} does not divide rows of {d.hidden} and {d.ffn}; choose group 32 or 64" if small else None
    if not weights.quantization.get("sym", True):
        return "the checkpoint is quantized asymmetrically, and TensorRT takes integers without zero points only; quantize symmetrically, or use precision fp16, which expands the integers"
    for wide, group in stored:
        if wide == 8 and group != -1:
            return f"TensorRT takes int8 with one scale per output, this checkpoint has groups of {group}; quantize with group -1, or use precision fp16"
        if group != -1 and group % 32:
            return f"TensorRT's int4 blocks are a multiple of 32 here, this checkpoint has groups of {group}; use precision fp16"
    return None


def build(weights: Weights, out: Path, params: Params) -> dict[str, Any]:
    """Write model.onnx (+ .data), the parser check and the build script; returns the facts for engine.json and the manifest.

    Raises EdgemedError where the profile's TensorRT would not parse the graph.
    """
    from edgemed.graph import Precision, build_decoder
    from edgemed.trt_dialect import PlainDialect, rows_offered
    from edgemed.trt_parser import check, estimate, read_table

    d, bits = weights.decoder, bits_of(weights, params)
    chosen = params.activations if bits else "fp16" if params.precision == "auto" else params.precision
    # Sums and norms stay float32: TensorRT 11 computes a norm in the format of its input.
    precision = Precision(FLOATS[chosen], bits, -1 if bits == 8 else params.group, stream="float32")
    graph = build_decoder(weights, out, precision, PlainDialect(bits))
    report = check(out / "model.onnx", read_table(PROFILES[params.profile]))
    if report["problems"]:
        raise EdgemedError(f"TensorRT {report['tensorrt']} would not parse this graph: {'; '.join(report['problems'][:3])}", f"Choose another profile among {', '.join(PROFILES)}")
    context = params.context or d.context
    cache = 2 * d.layers * rows_offered(context) * d.kv_size * (4 if chosen == "fp32" else 2)
    (out / "build.sh").write_text(SCRIPT, encoding="utf-8")
    packings = weights.packings() or {(bits, -1 if bits == 8 else params.group)}
    same = "ONNX Runtime on the same graph, not TensorRT"
    return {
        "precision": ("int8 per output" if packings == {(8, -1)} else labelled(packings)) + (f" {chosen}" if chosen != "fp16" else "") if bits else chosen,
        "bytes_per_token": graph.layer_bytes, "context": context,
        "unbuilt": same.replace("graph", "graph with bfloat16 widened to float32") if chosen == "bf16" else same,
        "parser": report, "expected_bytes": estimate(out / "model.onnx", context, cache, params.workspace_mb * 10**6),
        "attention": "plain operators, cache read in place, new rows written behind it",
        **({"integers": "gptq checkpoint" if weights.quantization else "rounded to nearest", "output_matrix": chosen, "embedding": chosen} if bits else {}),
    }


SCRIPT = """#!/bin/sh
# Run on the device, with TensorRT and edgemed installed: compiles this engine for its GPU, then verifies and measures it.
exec python3 -m edgemed build "$(dirname "$0")" "$@"
"""


def open(engine: Engine, threads: int | None) -> Session:
    """TensorRT where the engine is built, ONNX Runtime on the same graph where it is not."""
    if engine.stand_in:
        from edgemed.trt_stand_in import StandIn

        return StandIn(engine, threads)
    from edgemed.trt_session import TrtSession

    return TrtSession(engine)


def finish(engine: Engine, out: Path, workspace_mb: int | None = None) -> dict[str, Any]:
    """On the device: compile model.onnx into `out`/model.plan; returns the facts for its manifest. Raises EdgemedError as trt_build.compile_plan."""
    from edgemed.trt_build import compile_plan

    return compile_plan(engine, out, PROFILES[engine.params["profile"]], workspace_mb)


def identity(engine: Engine) -> dict[str, Any]:
    """What a plan is tied to on this machine: TensorRT version, GPU and its architecture. Raises EdgemedError where one is missing."""
    from edgemed.trt_build import identity as of_machine

    return of_machine(engine.params["runtime"], PROFILES[engine.params["profile"]])


def self_check() -> str:
    """Driver, TensorRT and GPU where they are here, else the same graph on ONNX Runtime; a sentence. Raises EdgemedError where something fails."""
    import importlib.util

    if importlib.util.find_spec("tensorrt") is not None:
        from edgemed.trt_build import identity as of_machine

        facts = of_machine("tensorrt", None)
        return f"TensorRT {facts['tensorrt']} on {facts['gpu']}, compute capability {facts['compute_capability']}"
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None:
        return "TensorRT is not installed: engines stay unbuilt"
    from edgemed.trt_stand_in import self_check as stand_in_check

    return f"TensorRT is not installed, engines stay unbuilt; {stand_in_check()}"
