"""The ONNX Runtime target: a decoder built with ONNX Runtime's contrib operators, run with a KV
cache that is never copied.

GroupQueryAttention reads and writes one shared buffer per layer in place and MatMulNBits keeps 4-
and 8-bit weights packed; both were measured fastest for one-sequence decoding
(bench/attention_ops.py, bench/accuracy_level.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from edgemed.data.text_sets import card_names
from edgemed.errors import EdgemedError, need
from edgemed.models import lora
from edgemed.models.parameter_count import SPARE, sizes
from edgemed.onnx import lora_files
from edgemed.onnx.decoder_graph import w8a8_refused
from edgemed.onnx.ort_dialect import OrtDialect
from edgemed.onnx.ort_session import OrtSession
from edgemed.onnx.vision_encoder import TOLERANCES, OnnxVisionEncoder
from edgemed.params import Doc, Range
from edgemed.planning import choices
from edgemed.planning.choices import Choice, Size
from edgemed.planning.roofline import Storage
from edgemed.quantization.grids import (
    Ints,
    dense_packings,
    group_refused,
    packings_label,
    widths_label,
)

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine
    from edgemed.hardware.device import Device
    from edgemed.models.weights import CanonicalWeights

# Largest logit error against the float32 source, for precisions that must be exact.
FP32_TOLERANCE = {"fp32": 1e-3}
# The package that runs these engines, and the extra that installs it.
RUNTIME = ("onnxruntime", "onnx")
TITLE = "ONNX Runtime"
# Distribution -> extra; distribution -> others of the same package (the build for GPUs is installed
# instead of the plain one).
PACKAGES = {"onnx": "build", "onnxruntime": "onnx"}
PACKAGES_INSTEAD = {"onnxruntime": ("onnxruntime-gpu",)}
# What a quantize step with a budget may choose from, (bits, group): what has kernels here.
BUDGET_CHOICES = ((2, 32), (4, 128), (4, 64), (4, 32), (8, 128))

# For the planner: see docs/add-a-target.md.
TABLE_ORDER = 2
ACTIVATION_BYTES = 4
BUILDS_ON_DEVICE = False
# Precisions of a vision tower that are planned -> bytes per weight while it runs. ONNX Runtime
# widens float16 to float32 on a CPU, so that it saves nothing there.
PLANNED_TOWERS = {"fp32": 4.0, "int8": 1.0}
KV_FORMATS: dict[str, tuple[float, dict[str, Any]]] = {
    "fp32": (4.0, {}),
    "int8": (1.0, {"kv": "int8", "calibration": "pubmedqa-abstracts"}),
}
CHOICES = (
    Choice("onnx", "fp32", {"precision": "fp32"}, Storage(32, 32, "fp32"), kv=KV_FORMATS),
    Choice(
        "onnx",
        "int8",
        {"precision": "int8"},
        Storage(8.25, 9, "weight_only"),
        bits=8,
        kv=KV_FORMATS,
    ),
    Choice(
        "onnx",
        "int4",
        {"precision": "int4"},
        Storage(4.25, 9, "weight_only"),
        bits=4,
        kv=KV_FORMATS,
    ),
)


@dataclass(frozen=True)
class Params:
    """Parameters of the target onnx. Every field says what it is for."""

    precision: Annotated[
        Literal["auto", "fp32", "fp16", "int8", "int4", "w8a8"],
        Doc(
            "'auto' carries a quantized checkpoint's integers and is fp32 otherwise. int8 and int4"
            " quantize other matrices to nearest. w8a8: int8 with one scale per output (a"
            " smoothquant checkpoint's, or to nearest), and every token's activations quantized to"
            " 8 bits when they are read: for long prompts."
        ),
    ] = "auto"
    group: Annotated[
        Literal[32, 64, 128] | None,
        Doc(
            "Inputs per scale where edgemed itself quantizes. Where none is given, the largest of"
            " 128, 64 and 32 that divides a matrix' rows."
        ),
    ] = None
    accuracy_level: Annotated[
        Literal[1, 4], Doc("4 computes with int8 activations, 1 with float32.")
    ] = 4
    context: Annotated[
        int | None, Range(1), Doc("Tokens of the KV cache. Where none is given, the model's.")
    ] = None
    kv: Annotated[
        Literal["auto", "int8"],
        Doc(
            "Format of the KV cache. 'auto' is that of the activations. int8 takes a quarter of"
            " float32's bytes, with a fixed scale per channel measured on `calibration`."
        ),
    ] = "auto"
    calibration: Annotated[
        str | None,
        Doc("Text set (name or file) on which the scales of an int8 cache are measured."),
    ] = None
    samples: Annotated[int, Range(1), Doc("Sequences of the calibration text.")] = 32
    length: Annotated[int, Range(1), Doc("Tokens of each of these sequences.")] = 256
    tower: Annotated[
        Literal["fp32", "fp16", "int8", "w8a8"],
        Doc(
            "Precision of a vision tower and projector. w8a8 quantizes activations too: by far the"
            " fastest, and somewhat less exact than int8."
        ),
    ] = "fp32"
    min_pixels: Annotated[
        int | None, Range(1), Doc("Pixels that a smaller image is enlarged to. None: the model's.")
    ] = None
    max_pixels: Annotated[
        int | None, Range(1), Doc("Pixels that a larger image is reduced to. None: the model's.")
    ] = None
    adapters: Annotated[
        dict[str, str] | None,
        Doc(
            "LoRA adapters that travel along unmerged: name -> PEFT directory. A session uses one"
            " of them or none."
        ),
    ] = None
    provider: Annotated[
        Literal["cpu", "cuda"],
        Doc(
            "Where ONNX Runtime runs the engine. cuda keeps activations in float16, which is all"
            " its attention there takes (never run on a GPU yet)."
        ),
    ] = "cpu"


def label(params: Params) -> str:
    """A short engine name."""
    return "onnx" if params.precision == "auto" else f"onnx-{params.precision}"


def inputs(params: Params) -> dict[str, str]:
    """sha256 of every file that params name: the adapters', and the text that the cache's scales
    are measured on. Raises EdgemedError where one is missing.
    """
    if params.kv == "int8" and params.calibration is None:
        raise EdgemedError(
            "target onnx: an int8 cache needs text to measure its scales on",
            f"Give calibration: one of {', '.join(card_names())}, or a .jsonl file",
        )
    digests = lora.inputs(params.adapters)
    if params.calibration:
        from edgemed.data.image_sets import calibration_digests

        digests |= calibration_digests(params.calibration)
    return digests


def bits_of(weights: CanonicalWeights, params: Params) -> int | None:
    """Bits of the layer matrices, the most where a checkpoint mixes them; None for floats."""
    if params.precision == "auto":
        return max((bits for bits, _ in weights.packings()), default=None)
    return {"int8": 8, "int4": 4, "w8a8": 8}.get(params.precision)


def supports(weights: CanonicalWeights, params: Params) -> str | None:
    """Why this model cannot become this engine, or None. Raises EdgemedError for an adapter that
    does not belong to it.
    """
    for check in (_integers_refused, _options_refused, _shapes_refused):
        if reason := check(weights, params):
            return reason
    lora.read_loras(weights, params.adapters)
    return None


def _integers_refused(weights: CanonicalWeights, params: Params) -> str | None:
    """Why the integers that a checkpoint holds, or the ones asked for, cannot be had."""
    bits = bits_of(weights, params)
    stored = weights.packings()
    if bits and params.precision != "auto" and stored and {b for b, _ in stored} != {bits}:
        return (
            f"the checkpoint holds {widths_label(stored)} integers and precision"
            f" {params.precision} asks for {bits}; use precision auto"
        )
    if params.precision == "w8a8" and (reason := w8a8_refused(weights)):
        return reason
    uneven = [group for _, group in stored if group != -1 and group % 16]
    if uneven:
        return (
            f"MatMulNBits needs groups that are a multiple of 16, this checkpoint has {uneven[0]}"
        )
    return None


def _options_refused(weights: CanonicalWeights, params: Params) -> str | None:
    """Why these parameters do not go together, whatever the model."""
    if params.provider == "cuda" and params.precision == "w8a8":
        return "products of integers were only ever run on the CPU; leave provider cuda out"
    if params.provider == "cuda" and params.precision == "fp32":
        return (
            "ONNX Runtime's attention on CUDA takes float16, not float32; use precision fp16, int8"
            " or int4"
        )
    if params.kv == "int8" and (params.provider == "cuda" or params.precision == "fp16"):
        return (
            "an int8 cache was only ever run on the CPU, beside float32 activations; leave kv, or"
            " precision fp16 and provider cuda out"
        )
    if params.calibration and params.kv != "int8":
        return (
            "calibration text is read for an int8 cache only; give kv: int8, or leave"
            " calibration out"
        )
    if params.samples < 1 or params.length < 1:
        return "samples and length of the calibration text must be at least 1"
    return None


def _shapes_refused(weights: CanonicalWeights, params: Params) -> str | None:
    """Why ONNX Runtime's operators cannot take matrices and heads of these sizes."""
    d = weights.decoder
    if d.head_dim % 8:
        return (
            "GroupQueryAttention needs a head size that is a multiple of 8, this model has"
            f" {d.head_dim}"
        )
    if len(d.rope_frequencies) % 8:
        return (
            "GroupQueryAttention rotates a multiple of 16 elements of each head, this model"
            f" {2 * len(d.rope_frequencies)}"
        )
    if d.hidden % 32:
        return f"hidden size {d.hidden} is not a multiple of 32"
    if params.context and params.context > d.context:
        return f"context {params.context} is longer than the model's {d.context}"
    grouped = bits_of(weights, params) and params.precision != "w8a8" and not weights.packings()
    return group_refused(weights, params.group) if grouped else None


def build(weights: CanonicalWeights, out: Path, params: Params) -> dict[str, Any]:
    """Write model.onnx (+ .data); returns the facts for engine.json and the manifest."""
    from edgemed.onnx.decoder_graph import Precision, build_decoder
    from edgemed.onnx.vision_graph import TOWERS, build_vision

    if weights.decoder.experts and weights.decoder.experts.density:
        # ONNX Runtime has no product with a sparse matrix on CPUs
        weights = type(weights)(weights.checkpoint, weights.fold, sum_experts=True)
    bits = bits_of(weights, params)
    floats = "float16" if params.precision == "fp16" or params.provider == "cuda" else "float32"
    vision_notes = {}
    if weights.vision:
        dialect = OrtDialect()
        vision_notes["tower_bytes"] = build_vision(weights, out, dialect, **TOWERS[params.tower])
    precision = Precision(
        floats,
        bits,
        params.group,
        params.accuracy_level,
        small_tables=bits is not None,
        integers=params.precision == "w8a8",
    )
    context = params.context or weights.decoder.context
    cached = "int8" if params.kv == "int8" else floats
    loras = lora.read_loras(weights, params.adapters)
    dialect = OrtDialect(_kv_scales(weights, params) if params.kv == "int8" else None)
    graph = build_decoder(
        weights, out, precision, dialect, frozenset(part for one in loras for part in one.factors)
    )
    factors = {one.name: lora_files.write(out, one, floats) for one in loras}
    adapter = weights.checkpoint.adapter
    adapter_bytes = factors[adapter.name] if adapter else 0
    if precision.integers:
        label = "w8a8"
    elif bits:
        label = packings_label(weights.packings() or dense_packings(weights, bits, params.group))
    else:
        label = {"float32": "fp32", "float16": "fp16"}[floats]
    notes: dict[str, Any] = {
        "precision": label,
        "context": context,
        "bytes_per_token": graph.layer_bytes + adapter_bytes,
        "attention": "GroupQueryAttention, shared buffer",
        "kv_cache": {
            "type": cached,
            "bytes": weights.decoder.cache_elements(context) * np.dtype(cached).itemsize,
        },
        **vision_notes,
    }
    if bits:
        notes["integers"] = "gptq checkpoint" if weights.quantization else "rounded to nearest"
        notes["output_matrix"] = "int8 of 32 (Q8_0 grid)"
        notes["embedding"] = "float16"
    return notes


def _kv_scales(weights: CanonicalWeights, params: Params) -> list[tuple[np.ndarray, np.ndarray]]:
    from edgemed.quantization.kv_cache_scales import kv_scales

    if weights.checkpoint.random_weights:
        # Such a model is measured for speed and has no tokenizer: any tokens do.
        return kv_scales(
            weights,
            np.random.default_rng(0)
            .integers(0, weights.decoder.vocab, (1, min(32, params.length)))
            .tolist(),
        )
    from edgemed.data.image_text_windows import calibration_samples

    return kv_scales(
        weights,
        calibration_samples(
            weights,
            params.calibration or "",
            params.samples,
            min(params.length, weights.decoder.context),
        ),
    )


def open(engine: Engine, threads: int | None) -> OrtSession:
    """The decoder as a Session."""
    return OrtSession(engine, threads)


def open_vision(engine: Engine, threads: int | None) -> OnnxVisionEncoder:
    """The vision encoder. Raises EdgemedError where the model reads text only."""
    return OnnxVisionEncoder(engine, threads)


def vision_tolerance(engine: Engine) -> tuple[str, float]:
    """The precision of an engine's tower and projector, and the limit on their relative error."""
    precision = engine.params["tower"]
    return precision, TOLERANCES[precision]


def engine_bytes(weights: CanonicalWeights, precision: str) -> Size:
    """The size of an engine of this precision: fp32, or int8 and int4 with the output matrix in
    int8 and the embedding in float16 (see choices.integer_bits).
    """
    parts = {name: part for name, part in sizes(weights).items() if not name.startswith("vision.")}
    tower = 4 * choices.vision_parameters(weights)
    tied = choices.tied_head(weights)
    if precision == "fp32":
        stored = sum(weight + bias for _, weight, bias in parts.values()) + tied
        return Size(4 * stored, 32, 32, tower=tower)
    bits = int(precision.removeprefix("int"))
    group = choices.group_of(weights)
    total = sum(choices.integer_bits(name, part, bits, group) for name, part in parts.items())
    # A tied output matrix is held once more, at int8 with a float32 scale per 32: 9 bits.
    return Size(
        round(total / 8) + tied * 9 // 8,
        layer_bits=bits + 32 / group,
        head_bits=9,
        tower=tower,
    )


def inspected_sizes(weights: CanonicalWeights) -> Iterator[tuple[str, tuple[int, int]]]:
    """The rows of `edgemed inspect`: (precision, (weight bytes, KV cache bytes at the full
    context)).

    fp32, fp16: 4 or 2 bytes for everything (ONNX holds a tied output matrix once more). int8, int4
    g128: layer matrices as integers with one float32 scale per 128 inputs, tables float16, output
    matrix int8 with a float32 scale per 32, norms, biases and a vision tower float32; their cache
    is float32.
    """
    parts = {name: part for name, part in sizes(weights).items() if not name.startswith(SPARE)}
    d = weights.unfolded
    everything = sum(weight + bias for _, weight, bias in parts.values())
    yield "fp32", (4 * everything, choices.kv_cache(d, 4))
    yield "fp16", (2 * everything, choices.kv_cache(d, 2))
    tied_bytes = choices.tied_head(weights) * 9 // 8
    for bits in (8, 4):
        total = sum(choices.integer_bits(name, part, bits) for name, part in parts.items())
        size = round(total / 8) + tied_bytes
        yield f"int{bits} g{choices.group_of(weights)}", (size, choices.kv_cache(d, 4))


def unsuitable(device: Device) -> str | None:
    """Why these engines are not planned on a device, or None."""
    if device.compute_capability:
        return "ONNX engines run on the CPU, which is not planned on a device with a GPU"
    return None


def runs_on_cpu(weights: CanonicalWeights) -> str | None:
    """Why an engine of this model runs on the CPU of a device with a GPU, or None: `unsuitable`
    says it of all of them.
    """
    return None


def build_bytes(weights: CanonicalWeights, size: Size) -> float:
    """Memory of a build."""
    return choices.streamed_build_bytes(weights)


def tower_elsewhere(device: Device) -> str | None:
    """A note where the vision tower runs on another processor than the decoder, or None."""
    return None


def plan_notes(device: Device) -> list[str]:
    """What a person must know to read a plan of these engines."""
    return []


def recipe_params(device: Device) -> dict[str, Any]:
    """Parameters that a recipe for this device needs besides those of the choice."""
    return {}


def quantize_group(bits: int) -> int:
    """The group of the quantize step that a planned recipe puts before these engines."""
    return choices.GROUP


def self_check() -> str:
    """Run one quantized product through onnxruntime and compare it with numpy; returns a sentence.

    Raises EdgemedError where onnxruntime is missing or gives a wrong result on this CPU.
    """
    ort = need("onnxruntime", "onnx")
    try:
        import onnx  # noqa: F401 - the check has to write a graph, which only the build extra can
    except ModuleNotFoundError:
        return (
            f"onnxruntime {ort.__version__} imports; its arithmetic is checked by edgemed verify"
            " ENGINE"
        )
    import tempfile

    random = np.random.default_rng(0)
    q = random.integers(0, 16, (64, 256), dtype=np.uint8)
    scales = random.random((64, 2), dtype=np.float32)
    x = random.standard_normal((300, 256), dtype=np.float32)
    expected = (
        x @ ((q.reshape(64, 2, 128).astype(np.float32) - 8) * scales[..., None]).reshape(64, 256).T
    )
    with tempfile.TemporaryDirectory() as folder:
        product = _product(
            ort,
            Path(folder),
            x,
            Ints(
                q,
                scales,
                4,
                128,
            ),
        )
    error = float(np.abs(product - expected).max() / np.abs(expected).max())
    if error > 0.02:
        raise EdgemedError(
            f"onnxruntime {ort.__version__} gives wrong 4-bit products on this CPU (relative error"
            f" {error:.2g})",
            "pip install --force-reinstall onnxruntime",
        )
    return (
        f"onnxruntime {ort.__version__}: 4-bit product with int8 activations within {error:.1e} of"
        " numpy"
    )


def _product(ort: Any, folder: Path, x: np.ndarray, ints: Ints) -> np.ndarray:
    from edgemed.onnx.decoder_graph import Graph, Precision

    graph = Graph(folder, Precision(bits=ints.bits, group=ints.block))
    dialect = OrtDialect()
    graph.value("inputs", "x", graph.float_type, list(x.shape))
    graph.value("outputs", "y", graph.float_type, [len(x), len(ints.q)])
    dialect.quantized(graph, "y", "x", ints, None)
    graph.save("self-check", dialect)
    return ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]
