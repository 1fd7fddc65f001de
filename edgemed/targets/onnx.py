"""The ONNX Runtime target: a decoder built with ONNX Runtime's contrib operators, run with a KV
cache that is never copied.

GroupQueryAttention reads and writes one shared buffer per layer in place and MatMulNBits keeps 4-
and 8-bit weights packed; both were measured fastest for one-sequence decoding
(bench/attention_ops.py, bench/accuracy_level.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgemed.data.text_sets import card_names
from edgemed.errors import EdgemedError, need
from edgemed.models import lora
from edgemed.onnx import lora_files
from edgemed.onnx.decoder_graph import w8a8_refused
from edgemed.onnx.ort_dialect import OrtDialect
from edgemed.onnx.ort_session import OrtSession
from edgemed.onnx.vision_encoder import TOLERANCES, OnnxVisionEncoder
from edgemed.quantization.grids import Ints, labelled, named

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine
    from edgemed.models.weights import CanonicalWeights

# Largest logit error against the float32 source, for precisions that must be exact.
FP32_TOLERANCE = {"fp32": 1e-3}
# The package that runs these engines, and the extra that installs it.
RUNTIME = ("onnxruntime", "onnx")


@dataclass(frozen=True)
class Params:
    """precision: 'auto' carries a quantized checkpoint's integers and is fp32 otherwise; int8/int4
    round other matrices to nearest. w8a8: int8 with one scale per output (a smoothquant
    checkpoint's, or rounded to nearest), and every token's activations rounded to 8 bits when they
    are read: for long prompts.

    group: inputs per scale where edgemed does that rounding. accuracy_level: 4 computes with int8
    activations, 1 with float32. context: tokens of the KV cache (default the model's). kv: its
    format; 'auto' is that of the activations, int8 a quarter of float32's bytes, with a fixed scale
    per channel measured on `samples` windows of `length` tokens of `calibration`, a text set's name
    or file. tower: precision of a vision tower and projector (w8a8 rounds activations too: by far
    the fastest, and somewhat less exact than int8); min_pixels, max_pixels: to which images are
    resized (default the model's). adapters: LoRA adapters that travel along unmerged, {name: PEFT
    directory}; a session uses one of them or none. provider: where ONNX Runtime runs it; cuda keeps
    activations in float16, which is all its attention there takes (never run on a GPU yet).
    """

    precision: Literal["auto", "fp32", "fp16", "int8", "int4", "w8a8"] = "auto"
    group: Literal[32, 64, 128] = 128
    accuracy_level: Literal[1, 4] = 4
    context: int | None = None
    kv: Literal["auto", "int8"] = "auto"
    calibration: str | None = None
    samples: int = 32
    length: int = 256
    tower: Literal["fp32", "fp16", "int8", "w8a8"] = "fp32"
    min_pixels: int | None = None
    max_pixels: int | None = None
    adapters: dict[str, str] | None = None
    provider: Literal["cpu", "cuda"] = "cpu"


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
    found = lora.inputs(params.adapters)
    if params.calibration:
        from edgemed.data.image_sets import calibration_digests

        found |= calibration_digests(params.calibration)
    return found


def bits_of(weights: CanonicalWeights, params: Params) -> int | None:
    """Bits of the layer matrices, the most where a checkpoint mixes them; None for floats."""
    if params.precision == "auto":
        return max((bits for bits, _ in weights.packings()), default=None)
    return {"int8": 8, "int4": 4, "w8a8": 8}.get(params.precision)


def supports(weights: CanonicalWeights, params: Params) -> str | None:
    """Why this model cannot become this engine, or None. Raises EdgemedError for an adapter that
    does not belong to it.
    """
    d = weights.decoder
    bits = bits_of(weights, params)
    stored = weights.packings()
    if bits and params.precision != "auto" and stored and {b for b, _ in stored} != {bits}:
        return (
            f"the checkpoint holds {named(stored)} integers and precision {params.precision} asks"
            f" for {bits}; use precision auto"
        )
    if params.precision == "w8a8" and (reason := w8a8_refused(weights)):
        return reason
    if uneven := [group for _, group in stored if group != -1 and group % 16]:
        return (
            f"MatMulNBits needs groups that are a multiple of 16, this checkpoint has {uneven[0]}"
        )
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
    if (
        bits
        and params.precision != "w8a8"
        and not stored
        and (d.hidden % params.group or d.ffn % params.group)
    ):
        return (
            f"group {params.group} does not divide rows of {d.hidden} and {d.ffn}; choose group 32"
            " or 64"
        )
    lora.read_loras(weights, params.adapters)
    return None


def build(weights: CanonicalWeights, out: Path, params: Params) -> dict[str, Any]:
    """Write model.onnx (+ .data); returns the facts for engine.json and the manifest."""
    from edgemed.onnx.decoder_graph import Precision, build_decoder
    from edgemed.onnx.vision_graph import TOWERS, build_vision

    if weights.decoder.experts and weights.decoder.experts.density:
        # ONNX Runtime has no product with a sparse matrix on CPUs
        weights = type(weights)(weights.checkpoint, weights.fold, sum_experts=True)
    bits = bits_of(weights, params)
    floats = "float16" if params.precision == "fp16" or params.provider == "cuda" else "float32"
    seen = {}
    if weights.vision:
        seen = {"tower_bytes": build_vision(weights, out, OrtDialect(), **TOWERS[params.tower])}
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
    own = factors[weights.checkpoint.adapter.name] if weights.checkpoint.adapter else 0
    origin = "gptq checkpoint" if weights.quantization else "rounded to nearest"
    label = (
        labelled(weights.packings() or {(bits, params.group)})
        if bits
        else {"float32": "fp32", "float16": "fp16"}[floats]
    )
    label = "w8a8" if precision.integers else label
    return {
        "precision": label,
        "context": context,
        "bytes_per_token": graph.layer_bytes + own,
        "attention": "GroupQueryAttention, shared buffer",
        "kv_cache": {
            "type": cached,
            "bytes": weights.decoder.cache_elements(context) * np.dtype(cached).itemsize,
        },
        **seen,
        **(
            {"integers": origin, "output_matrix": "int8 of 32 (Q8_0 grid)", "embedding": "float16"}
            if bits
            else {}
        ),
    }


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
            weights, params.calibration, params.samples, min(params.length, weights.decoder.context)
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
        found = _product(
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
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
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
