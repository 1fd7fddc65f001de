"""Writes a vision tower and its projector as two ONNX graphs of their own, so that each can be
checked, replaced and run by itself.

Like the text decoder they are written node by node from the family's values. One image is read at a
time, hence no mask, any number of patches, and features that can be kept and used again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from edgemed.console import track
from edgemed.onnx.decoder_graph import Dialect, Graph, Precision, linear
from edgemed.onnx.ort_dialect import MIDDLE

if TYPE_CHECKING:
    from edgemed.models.architecture import VisionConfig
    from edgemed.models.weights import CanonicalWeights

TOWER = "tower.onnx"
PROJECTOR = "projector.onnx"
ANGLES = ("cos", "sin")
# The integer for 0 behind GELU, which goes no lower than -0.17; elsewhere it is MIDDLE.
ACTIVATED = 16
# precision of a tower -> what build_vision takes
TOWERS: dict[str, dict[str, Any]] = {
    "fp32": {"floats": "float32", "bits": None},
    "fp16": {"floats": "float16", "bits": None},
    "int8": {"floats": "float32", "bits": 8},
    "w8a8": {"floats": "float32", "bits": 8, "integers": True},
}


class VisionDialect(Dialect, Protocol):
    """What a runtime wants of a vision tower besides the decoder's nodes."""

    def tower_attention(self, graph: Graph, v: VisionConfig, name: str, qkv: str) -> str: ...


@runtime_checkable
class IntegerDialect(Protocol):
    """A dialect with products of 8-bit integers whose activations are quantized when they are
    read.
    """

    def integers(
        self,
        graph: Graph,
        name: str,
        x: str,
        weight: np.ndarray,
        bias: np.ndarray | None,
        zero: int,
    ) -> str: ...


def build_vision(
    weights: CanonicalWeights,
    out: Path,
    dialect: VisionDialect,
    floats: Literal["float32", "float16", "bfloat16"],
    bits: int | None,
    group: int = 32,
    stream: str = "",
    integers: bool = False,
) -> int:
    """Write tower.onnx and projector.onnx with their data files into `out`; returns their weight
    bytes.

    Inputs: pixels float32 [patches, numbers of a patch], and with rotary positions cos and sin
    float32 [patches, pairs of a head]; between them tower [patches, width]; output features float32
    [features, hidden]. bits: 8 for int8 matrices with a scale for `group` inputs (-1: for a row);
    stream: format of the residual stream and the norms, '' for floats; integers: matrices and
    activations by rows, so that products are of integers (OrtDialect.integers).
    """
    v = weights.require_vision()
    precision = Precision(
        floats,
        bits,
        group,
        stream=stream,
        integers=integers,
    )
    tower_bytes = _tower(weights, v, Graph(out, precision, TOWER), dialect)
    projector_bytes = _projector(weights, v, Graph(out, precision, PROJECTOR), dialect)
    return tower_bytes + projector_bytes


def _tower(weights: CanonicalWeights, v: VisionConfig, graph: Graph, dialect: VisionDialect) -> int:
    onnx = graph.onnx.TensorProto
    graph.value("inputs", "pixels", onnx.FLOAT, ["patches", v.patch_size])
    if v.frequencies:
        for name in ANGLES:
            graph.value("inputs", name, onnx.FLOAT, ["patches", 2 * len(v.frequencies)])
    # The length of a patch's row suits no block, and patches are read once an image: their matrix
    # stays in floats.
    pixels = graph.cast("pixels", "float32", graph.precision.floats, "pixels.cast")
    x = linear(graph, dialect, weights, "vision.patch", pixels, exact=True)
    x = graph.cast(x, graph.precision.floats, graph.stream, "vision.patch.stream")
    if not v.frequencies:
        class_row = weights.table("vision.class").reshape(1, -1)
        first = graph.floats("vision.class", class_row, stream=True)
        x = graph.node("Concat", [first, x], "vision.with_class", axis=0)
        table = graph.floats("vision.positions", weights.table("vision.positions"), stream=True)
        x = graph.node("Add", [x, table], "vision.placed")
    if v.pre_norm:
        x = _norm(graph, weights, v, "vision.pre_norm", x)
    for n in track(range(v.layers), "vision tower"):
        x = _tower_layer(graph, dialect, weights, v, f"vision.layers.{n}", x)
    if not v.frequencies:
        # The class token stands in front; the projector reads the patches alone.
        start = graph.constant("vision.first_patch", np.array([1]))
        end = graph.constant("vision.last_patch", np.array([1 << 30]))
        axis = graph.constant("vision.patch_axis", np.array([0]))
        x = graph.node("Slice", [x, start, end, axis], "vision.patches")
    graph.node("Cast", [x], "tower", to=onnx.FLOAT)
    graph.value("outputs", "tower", onnx.FLOAT, ["patches", v.width])
    graph.save("tower", dialect)
    return graph.layer_bytes


def _tower_layer(
    graph: Graph,
    dialect: VisionDialect,
    weights: CanonicalWeights,
    v: VisionConfig,
    name: str,
    x: str,
) -> str:
    """x [patches, width] behind one layer."""
    read = _read(graph, weights, v, f"{name}.attn_norm", x)
    qkv = _linear(graph, dialect, weights, f"{name}.qkv", read)
    mixed = dialect.tower_attention(graph, v, name, qkv)
    attended = _linear(graph, dialect, weights, f"{name}.o", mixed)
    x = _sum(graph, x, attended, f"{name}.attended")
    read = _read(graph, weights, v, f"{name}.mlp_norm", x)
    up = _linear(graph, dialect, weights, f"{name}.up", read)
    inner = _activated(graph, v, up, f"{name}.act")
    down = _linear(graph, dialect, weights, f"{name}.down", inner, ACTIVATED)
    return _sum(graph, x, down, f"{name}.sum")


def _projector(
    weights: CanonicalWeights, v: VisionConfig, graph: Graph, dialect: VisionDialect
) -> int:
    onnx = graph.onnx.TensorProto
    graph.value("inputs", "tower", onnx.FLOAT, ["patches", v.width])
    x = graph.cast("tower", "float32", graph.stream, "tower.cast")
    if v.projector_norm:
        x = _norm(graph, weights, v, "vision.projector.norm", x)
    x = graph.cast(x, graph.stream, graph.precision.floats, "tower.read")
    if v.merge > 1:
        # Patches that are merged lie behind each other, so a longer row holds them.
        shape = graph.constant("vision.merged", np.array([-1, v.width * v.merge**2]))
        x = graph.node("Reshape", [x, shape], "vision.folded")
    first = _linear(graph, dialect, weights, "vision.projector.first", x)
    x = graph.node("Gelu", [first], "vision.projector.act")
    x = _linear(graph, dialect, weights, "vision.projector.second", x, ACTIVATED)
    graph.node("Cast", [x], "features", to=onnx.FLOAT)
    graph.value("outputs", "features", onnx.FLOAT, ["features", weights.decoder.hidden])
    graph.save("projector", dialect)
    return graph.layer_bytes


def _linear(
    graph: Graph,
    dialect: VisionDialect,
    weights: CanonicalWeights,
    name: str,
    x: str,
    zero: int = MIDDLE,
) -> str:
    if not graph.precision.integers:
        return linear(graph, dialect, weights, name, x)
    if not isinstance(dialect, IntegerDialect):
        raise ValueError("this dialect has no products of integers for a vision tower")
    matrix = weights.matrix(name)
    bias = None if matrix.bias is None else matrix.bias.numpy()
    return dialect.integers(graph, name, x, matrix.dense().numpy(), bias, zero)


def _norm(graph: Graph, weights: CanonicalWeights, v: VisionConfig, name: str, x: str) -> str:
    """The norm of x, both in the stream's format."""
    weight, bias = weights.norm(name)
    if bias is None:
        raise ValueError(f"{name} of a vision tower has no bias")
    scale = graph.floats(f"{name}.weight", weight, stream=True)
    shift = graph.floats(f"{name}.bias", bias, stream=True)
    return graph.node("LayerNormalization", [x, scale, shift], name, epsilon=v.norm_eps, axis=-1)


def _read(graph: Graph, weights: CanonicalWeights, v: VisionConfig, name: str, x: str) -> str:
    """The same in the format of the activations, as a matrix reads it."""
    y = _norm(graph, weights, v, name, x)
    return graph.cast(y, graph.stream, graph.precision.floats, f"{name}.read")


def _sum(graph: Graph, x: str, branch: str, name: str) -> str:
    """x plus a branch, in the stream's format."""
    branch = graph.cast(branch, graph.precision.floats, graph.stream, f"{name}.branch")
    return graph.node("Add", [x, branch], name)


def _activated(graph: Graph, v: VisionConfig, x: str, name: str) -> str:
    if v.activation == "gelu":
        return graph.node("Gelu", [x], name)
    # quick_gelu: x * sigmoid(1.702 x)
    alpha = graph.constant(f"{name}.alpha", np.array(1.702).astype(graph.precision.floats))
    scaled = graph.node("Mul", [x, alpha], f"{name}.scaled")
    gate = graph.node("Sigmoid", [scaled], f"{name}.gate")
    return graph.node("Mul", [x, gate], name)
