"""The TensorRT target: plain ONNX with its precision written into the graph, checked against what
the chosen TensorRT parses.

TensorRT compiles for the GPU it runs on, so what travels is the ONNX and `edgemed build ENGINE` on
the device finishes it. Until then the engine is unbuilt: the same graph runs on ONNX Runtime for
parity, and nothing is measured. None of this has run on TensorRT yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgemed.engines.engine import pixels_of
from edgemed.errors import EdgemedError
from edgemed.models.parameter_count import sizes
from edgemed.onnx.decoder_graph import w8a8_refused
from edgemed.onnx.vision_encoder import TOLERANCES, OnnxVisionEncoder, VisionGraphs
from edgemed.params import Doc, Range
from edgemed.planning import choices
from edgemed.planning.choices import Choice, Size
from edgemed.planning.roofline import Storage
from edgemed.quantization.grids import (
    dense_packings,
    group_refused,
    packings_label,
    widths_label,
)

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine
    from edgemed.hardware.device import Device
    from edgemed.inference.session import Session
    from edgemed.models.architecture import VisionConfig
    from edgemed.models.weights import CanonicalWeights

# Largest logit error against the float32 source, for precisions that must be exact.
FP32_TOLERANCE = {"fp32": 1e-3}
# The package that runs these engines, and the extra that installs it (on a Jetson it comes with
# JetPack).
RUNTIME = ("tensorrt", "tensorrt")
TITLE = "TensorRT"
# Distribution -> extra; distribution -> others of the same package.
PACKAGES = {"tensorrt": "tensorrt"}
PACKAGES_INSTEAD: dict[str, tuple[str, ...]] = {}
# What a quantize step with a budget may choose from, (bits, group): what has kernels here.
BUDGET_CHOICES = ((4, 128), (4, 64), (4, 32), (8, -1))

# For the planner: see docs/add-a-target.md.
TABLE_ORDER = 1
ACTIVATION_BYTES = 2
BUILDS_ON_DEVICE = True
# Precisions of a vision tower that are planned -> bytes per weight while it runs.
PLANNED_TOWERS = {"fp16": 2.0, "int8": 1.0}
# TensorRT holds the weights three times while it compiles (parser, plan, engine), and may use this
# much to try kernels: a rule of thumb.
WORKSPACE = 1e9
KV_FORMATS: dict[str, tuple[float, dict[str, Any]]] = {"fp16": (2.0, {})}
# Bits per weight of the layer matrices, without the scales of int4.
LAYER_BITS = {"fp16": 16.0, "int8": 8.0, "int4": 4.0}
CHOICES = (
    Choice(
        "tensorrt",
        "fp16",
        {"precision": "fp16"},
        Storage(16, 16, "fp16"),
        arithmetic="fp16",
        kv=KV_FORMATS,
    ),
    Choice(
        "tensorrt",
        "int8",
        {"precision": "int8"},
        Storage(8, 16, "weight_only"),
        arithmetic="fp16",
        bits=8,
        kv=KV_FORMATS,
    ),
    Choice(
        "tensorrt",
        "int4",
        {"precision": "int4"},
        Storage(4.125, 16, "weight_only"),
        arithmetic="fp16",
        bits=4,
        kv=KV_FORMATS,
    ),
)
# TensorRT versions that have a profile, besides 11 and later.
PROFILE_OF: dict[tuple[int, ...], str] = {(10, 3): "jetpack6", (10, 16): "jetpack7"}
# Where engines go -> the parser table they are checked against.
PROFILES = {"jetpack6": "10.3", "jetpack7": "10.16", "trt11": "11"}
# bytes of attention scores beyond which a vision tower is refused: a quarter of a 64 GB Jetson
SCORES = 16 * 10**9
FLOATS: dict[str, Literal["float32", "float16", "bfloat16"]] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}


@dataclass(frozen=True)
class Params:
    """Parameters of the target tensorrt. Every field says what it is for."""

    profile: Annotated[
        Literal["jetpack6", "jetpack7", "trt11"],
        Doc("Where the engine goes: jetpack6 (TensorRT 10.3), jetpack7 (10.16) or trt11."),
    ] = "jetpack6"
    precision: Annotated[
        Literal["auto", "fp32", "fp16", "bf16", "int8", "int4", "w8a8"],
        Doc(
            "'auto' carries a quantized checkpoint's integers and is fp16 otherwise. int4 quantizes"
            " other matrices to nearest in groups of `group`, int8 with one scale per output. w8a8:"
            " a smoothquant checkpoint's int8 weights, and activations quantized to int8 with the"
            " scales that checkpoint holds."
        ),
    ] = "auto"
    group: Annotated[
        Literal[32, 64, 128] | None,
        Doc(
            "Inputs per scale of int4. Where none is given, the largest of 128, 64 and 32 that"
            " divides a matrix' rows."
        ),
    ] = None
    activations: Annotated[
        Literal["fp16", "bf16", "fp32"], Doc("Format of the activations beside integers.")
    ] = "fp16"
    context: Annotated[
        int | None, Range(1), Doc("Tokens of the KV cache. Where none is given, the model's.")
    ] = None
    prefill: Annotated[
        int, Range(1), Doc("Tokens per run at most; longer prompts go in parts.")
    ] = 512
    workspace_mb: Annotated[
        int, Range(1), Doc("Memory TensorRT may use to try kernels, in 10^6 bytes.")
    ] = 1024
    runtime: Annotated[Literal["tensorrt", "rtx"], Doc("'rtx' builds with TensorRT for RTX.")] = (
        "tensorrt"
    )
    experts: Annotated[
        Literal["chosen", "all"],
        Doc(
            "'chosen' passes over the experts of a mixture that no token chose, by conditionals,"
            " which no CUDA graph can hold. 'all' computes all of them."
        ),
    ] = "chosen"
    tower: Annotated[
        Literal["fp16", "fp32", "bf16", "int8"],
        Doc("Precision of a vision tower and projector."),
    ] = "fp16"
    adapters: Annotated[
        dict[str, str] | None, Doc("Not taken: TensorRT engines carry merged weights only.")
    ] = None
    min_pixels: Annotated[
        int | None, Range(1), Doc("Pixels that a smaller image is enlarged to. None: the model's.")
    ] = None
    max_pixels: Annotated[
        int | None, Range(1), Doc("Pixels that a larger image is reduced to. None: the model's.")
    ] = None


def label(params: Params) -> str:
    """A short engine name."""
    return "tensorrt" if params.precision == "auto" else f"tensorrt-{params.precision}"


def inputs(params: Params) -> dict[str, str]:
    """No files besides the checkpoint's."""
    return {}


def bits_of(weights: CanonicalWeights, params: Params) -> int | None:
    """Bits of the layer matrices, the fewest where a checkpoint mixes them; None for floats."""
    if params.precision == "auto":
        return min((max(4, bits) for bits, _ in weights.packings()), default=None)
    return {"int8": 8, "int4": 4, "w8a8": 8}.get(params.precision)


def supports(weights: CanonicalWeights, params: Params) -> str | None:
    """Why this model cannot become this engine, or None."""
    for check in (_adapters_refused, _sizes_refused, _integers_refused):
        if reason := check(weights, params):
            return reason
    return None


def _adapters_refused(weights: CanonicalWeights, params: Params) -> str | None:
    if params.adapters:
        return (
            "TensorRT engines cannot switch adapters; merge the adapter first (edgemed merge), and"
            " export the result"
        )
    if weights.checkpoint.adapter:
        return (
            "TensorRT engines carry no adapters, and this checkpoint is used with one beside its"
            " integers; start from the quantize step (from: quantize)"
        )
    return None


def _sizes_refused(weights: CanonicalWeights, params: Params) -> str | None:
    """Why a context or image of this size cannot be had."""
    d = weights.decoder
    if params.context is not None and not 1 <= params.context <= d.context:
        return f"context {params.context} is not between 1 and the model's {d.context}"
    if params.prefill < 1 or params.workspace_mb < 1:
        return "prefill and workspace_mb must be above 0"
    if weights.vision:
        return images_refused(limited_vision(weights, params), params.context or d.context)
    return None


def _integers_refused(weights: CanonicalWeights, params: Params) -> str | None:
    """Why the integers that a checkpoint holds, or the ones asked for, cannot be had."""
    bits = bits_of(weights, params)
    stored = sorted(weights.packings())
    if not bits:
        return None
    if params.precision == "w8a8":
        missing = (
            "w8a8 needs scales of the activations from calibration, which only a checkpoint of"
            " quantize method smoothquant holds"
        )
        return w8a8_refused(weights) or (None if weights.activation_ranges else missing)
    if params.precision != "auto" and stored and {b for b, _ in stored} != {bits}:
        return (
            f"the checkpoint holds {widths_label(stored)} integers and precision"
            f" {params.precision} asks for {bits}; use precision auto"
        )
    if stored:
        return _packings_refused(weights, stored)
    return group_refused(weights, params.group) if bits == 4 else None


def _packings_refused(weights: CanonicalWeights, stored: list[tuple[int, int]]) -> str | None:
    """Why TensorRT cannot take a checkpoint's (bits, group)."""
    if not (weights.quantization or {}).get("sym", True):
        return (
            "the checkpoint is quantized asymmetrically, and TensorRT takes integers without zero"
            " points only; quantize symmetrically, or use precision fp16, which expands the"
            " integers"
        )
    for bits, group in stored:
        if bits == 8 and group != -1:
            return (
                "TensorRT takes int8 with one scale per output, this checkpoint has groups of"
                f" {group}; quantize with group -1, or use precision fp16"
            )
        if group != -1 and group % 32:
            return (
                "TensorRT's int4 blocks are a multiple of 32 here, this checkpoint has groups of"
                f" {group}; use precision fp16"
            )
    return None


def limited_vision(weights: CanonicalWeights, params: Params) -> VisionConfig:
    """The model's vision with the limits of images these parameters set."""
    v = weights.vision
    if v is None:
        raise ValueError("only a vision model has limits of images")
    return replace(v, pixels=pixels_of(v, params))


def images_refused(v: VisionConfig, context: int) -> str | None:
    """Why no image, or not the largest one, can be read, or None."""
    from edgemed.tensorrt.build import patch_range, score_bytes
    from edgemed.vision.preprocessing import most_features

    fewest = most_features(v) if v.size else -(-v.pixels[0] // (v.patch * v.merge) ** 2)
    if fewest > context:
        return (
            f"an image becomes at least {fewest} tokens, context {context} holds none; choose a"
            " longer context" + ("" if v.size else " or fewer min_pixels")
        )
    most = patch_range(v, context)[2]
    scores = score_bytes(v, context)
    if scores > SCORES:
        return (
            f"images of {v.pixels[1]} pixels make {most} patches, whose attention may take"
            f" {scores / 1e9:.0f} GB in TensorRT; choose fewer max_pixels (1003520:"
            f" {28**2 * 1280 // v.patch**2} patches)"
        )
    return None


def build(weights: CanonicalWeights, out: Path, params: Params) -> dict[str, Any]:
    """Write model.onnx (+ .data), tower and projector where the model sees, the parser check and
    the build script; returns the facts for engine.json and the manifest.

    Raises EdgemedError where the profile's TensorRT would not parse a graph.
    """
    from edgemed.onnx.decoder_graph import Precision, build_decoder
    from edgemed.tensorrt.build import VISION_GRAPHS, score_bytes
    from edgemed.tensorrt.dialect import PlainDialect, rows_offered
    from edgemed.tensorrt.parser_check import estimate

    weights = type(weights)(weights.checkpoint, weights.fold, sum_experts=True)
    d = weights.decoder
    bits = bits_of(weights, params)
    chosen = params.precision
    if bits:
        chosen = params.activations
    elif params.precision == "auto":
        chosen = "fp16"
    # Sums and norms stay float32: TensorRT 11 computes a norm in the format of its input.
    precision = Precision(
        FLOATS[chosen],
        bits,
        -1 if bits == 8 else params.group,
        stream="float32",
        integers=params.precision == "w8a8",
    )
    graph = build_decoder(weights, out, precision, PlainDialect(bits, params.experts == "chosen"))
    context = params.context or d.context
    names = ["model"]
    vision_notes = {}
    scores = 0
    if weights.vision:
        names.extend(VISION_GRAPHS)
        vision_notes["tower_bytes"] = build_vision_files(weights, out, params)
        scores = score_bytes(limited_vision(weights, params), context)
    reports = {name: parsed(out / f"{name}.onnx", params.profile) for name in names}
    cache = 2 * d.layers * rows_offered(context) * d.kv_size * (4 if chosen == "fp32" else 2)
    (out / "build.sh").write_text(SCRIPT, encoding="utf-8")
    same = "ONNX Runtime on the same graph, not TensorRT"
    notes: dict[str, Any] = {
        "precision": _precision(weights, params, chosen),
        "bytes_per_token": graph.layer_bytes,
        "context": context,
        "unbuilt": (
            same.replace("graph", "graph with bfloat16 widened to float32")
            if "bf16" in (chosen, weights.vision and params.tower)
            else same
        ),
        "parser": reports["model"],
        "expected_bytes": estimate(
            out, tuple(names), context, cache, params.workspace_mb * 10**6, scores
        ),
        "attention": "plain operators, cache read in place, new rows written behind it",
        **vision_notes,
    }
    if weights.vision:
        notes["vision_parser"] = {name: reports[name] for name in VISION_GRAPHS}
    if bits:
        notes["integers"] = "gptq checkpoint" if weights.quantization else "rounded to nearest"
        notes["output_matrix"] = chosen
        notes["embedding"] = chosen
    return notes


def _precision(weights: CanonicalWeights, params: Params, chosen: str) -> str:
    """The precision of an engine as reports name it. chosen: the format of its floats."""
    bits = bits_of(weights, params)
    if not bits:
        return chosen
    packings = weights.packings() or dense_packings(
        weights, bits, -1 if bits == 8 else params.group
    )
    if params.precision == "w8a8":
        integers = "w8a8"
    elif packings == {(8, -1)}:
        integers = "int8 per output"
    else:
        integers = packings_label(packings)
    return integers if chosen == "fp16" else f"{integers} {chosen}"


def build_vision_files(weights: CanonicalWeights, out: Path, params: Params) -> int:
    """Write tower.onnx and projector.onnx; returns their weight bytes. Sums and norms are float32,
    as in the decoder; int8 has one scale per output.
    """
    from edgemed.onnx.vision_graph import build_vision
    from edgemed.tensorrt.dialect import PlainDialect

    bits = 8 if params.tower == "int8" else None
    return build_vision(
        weights,
        out,
        PlainDialect(bits),
        FLOATS.get(params.tower, "float16"),
        bits,
        group=-1,
        stream="float32",
    )


def parsed(file: Path, profile: str) -> dict[str, Any]:
    """The parser check of one graph. Raises EdgemedError where the profile's TensorRT would not
    parse it.
    """
    from edgemed.tensorrt.parser_check import check_graph, read_table

    report = check_graph(file, read_table(PROFILES[profile]))
    if report["problems"]:
        raise EdgemedError(
            f"TensorRT {report['tensorrt']} would not parse {file.name}:"
            f" {'; '.join(report['problems'][:3])}",
            f"Choose another profile among {', '.join(PROFILES)}",
        )
    return report


SCRIPT = """#!/bin/sh
# Run on the device, with TensorRT and edgemed installed: compiles this engine for its GPU, then verifies and measures it.
exec python3 -m edgemed build "$(dirname "$0")" "$@"
"""  # noqa: E501 - a line of the script


def open(engine: Engine, threads: int | None) -> Session:
    """TensorRT where the engine is built, ONNX Runtime on the same graph where it is not."""
    if engine.emulation:
        from edgemed.tensorrt.ort_emulation import OrtEmulation

        return OrtEmulation(engine, threads)
    from edgemed.tensorrt.session import TrtSession

    return TrtSession(engine)


def open_vision(engine: Engine, threads: int | None) -> OnnxVisionEncoder:
    """The vision encoder, on TensorRT where the engine is built. Raises EdgemedError where the
    model reads text only.
    """
    if engine.emulation:
        return OnnxVisionEncoder(engine, threads)
    return OnnxVisionEncoder(engine, threads, _compiled_graphs)


def _compiled_graphs(engine: Engine, threads: int | None) -> VisionGraphs:
    from edgemed.tensorrt.vision_encoder import TensorRTVisionGraphs

    return TensorRTVisionGraphs(engine)


def vision_tolerance(engine: Engine) -> tuple[str, float]:
    """The precision of an engine's tower and projector, and the limit on their relative error."""
    precision = engine.params["tower"]
    return precision, TOLERANCES[precision]


def finish(engine: Engine, out: Path, workspace_mb: int | None = None) -> dict[str, Any]:
    """On the device: compile every graph NAME.onnx into `out`/NAME.plan; returns the facts for its
    manifest. Raises EdgemedError as trt_build.compile_plan.
    """
    from edgemed.tensorrt.build import compile_plan

    return compile_plan(engine, out, PROFILES[engine.params["profile"]], workspace_mb)


def identity(engine: Engine) -> dict[str, Any]:
    """What a plan is tied to on this machine: TensorRT version, GPU and its architecture. Raises
    EdgemedError where one is missing.
    """
    from edgemed.tensorrt.build import identity as of_machine

    return of_machine(engine.params["runtime"], PROFILES[engine.params["profile"]])


def engine_bytes(weights: CanonicalWeights, precision: str) -> Size:
    """The size of an engine of this precision.

    Embedding and output matrix are float16, and a tied one is held twice. int8 has one float32
    scale per output (not counted: under 0.1 %), int4 a float16 scale per group.
    """
    layer_bits = LAYER_BITS[precision]
    if precision == "int4":
        layer_bits += 16 / choices.group_of(weights)
    bits = 0.0
    for name, (kind, weight, bias) in sizes(weights).items():
        if name.startswith("vision."):
            continue
        if kind == "matrix" and name.startswith("layers."):
            per_weight = layer_bits
        elif kind in ("norm", "router"):
            per_weight = 32
        else:
            per_weight = 16
        bits += per_weight * weight + 32 * bias
    return Size(
        round(bits / 8) + 2 * choices.tied_head(weights),
        layer_bits=layer_bits,
        head_bits=16,
        tower=2 * choices.vision_parameters(weights),
    )


def inspected_sizes(weights: CanonicalWeights) -> Iterator[tuple[str, tuple[int, int]]]:
    """`edgemed inspect` has no rows of its own for these engines: their sizes are those of the
    other targets' precisions.
    """
    yield from ()


def unsuitable(device: Device) -> str | None:
    """Why these engines are not planned on a device, or None."""
    if not device.compute_capability:
        return "no NVIDIA GPU"
    if device.tensorrt and profile(device) is None:
        return f"TensorRT {', '.join(device.tensorrt.values())} is older than edgemed's profiles"
    return None


def profile(device: Device) -> str | None:
    """The profile for a device's newest TensorRT that has one; cards without a JetPack take the
    newest.
    """
    versions = [tuple(map(int, version.split(".")[:2])) for version in device.tensorrt.values()]
    for version in sorted(versions or [(11, 0)]):
        if version >= (10, 3):
            return PROFILE_OF.get(version) or ("trt11" if version >= (11, 0) else None)
    return None


def runs_on_cpu(weights: CanonicalWeights) -> str | None:
    """Why an engine of this model runs on the CPU of a device with a GPU, or None."""
    return None


def build_bytes(weights: CanonicalWeights, size: Size) -> float:
    """Memory while TensorRT compiles an engine."""
    return 3 * size.total + WORKSPACE


def tower_elsewhere(device: Device) -> str | None:
    """A note where the vision tower runs on another processor than the decoder, or None."""
    return None


def plan_notes(device: Device) -> list[str]:
    """What a person must know to read a plan of these engines."""
    return []


def recipe_params(device: Device) -> dict[str, Any]:
    """Parameters that a recipe for this device needs besides those of the choice."""
    return {"profile": profile(device)}


def quantize_group(bits: int) -> int:
    """The group of the quantize step that a planned recipe puts before these engines: -1 is one
    scale per output.
    """
    return -1 if bits == 8 else choices.GROUP


def self_check() -> str:
    """Driver, TensorRT and GPU where they are here, else the same graph on ONNX Runtime; a
    sentence. Raises EdgemedError where something fails.
    """
    import importlib.util

    if importlib.util.find_spec("tensorrt") is not None:
        from edgemed.tensorrt.build import identity as of_machine

        facts = of_machine("tensorrt", None)
        return (
            f"TensorRT {facts['tensorrt']} on {facts['gpu']}, compute capability"
            f" {facts['compute_capability']}"
        )
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None:
        return "TensorRT is not installed: engines stay unbuilt"
    from edgemed.tensorrt.ort_emulation import self_check as stand_in_check

    return f"TensorRT is not installed, engines stay unbuilt; {stand_in_check()}"
