"""Writes a vision tower and its projector as two ONNX graphs of their own, so that each can be
checked, replaced and run by itself.

Like the text decoder they are written node by node from the family's values. One image is read at a
time, hence no mask, any number of patches, and features that can be kept and used again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from edgemed.console import track
from edgemed.onnx.decoder_graph import Graph, Precision, linear

if TYPE_CHECKING:
    from edgemed.models.architecture import VisionConfig
    from edgemed.models.weights import CanonicalWeights
    from edgemed.onnx.decoder_graph import Dialect

TOWER = "tower.onnx"
PROJECTOR = "projector.onnx"
ANGLES = ("cos", "sin")
# Integers 0..255 for a row of activations: 0 in the middle, or near the end behind GELU, which goes
# no lower than -0.17.
MIDDLE = 128
ACTIVATED = 16
# precision of a tower -> what build_vision takes
TOWERS: dict[str, dict[str, Any]] = {
    "fp32": {"floats": "float32", "bits": None},
    "fp16": {"floats": "float16", "bits": None},
    "int8": {"floats": "float32", "bits": 8},
    "w8a8": {"floats": "float32", "bits": 8, "integers": True},
}


class VisionDialect(Protocol):
    """What a runtime wants besides the decoder's nodes."""

    def tower_attention(self, graph: Graph, v: VisionConfig, name: str, qkv: str) -> str: ...


def build_vision(
    weights: CanonicalWeights,
    out: Path,
    dialect: Dialect,
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
    v: VisionConfig = weights.vision
    precision = Precision(
        floats,
        bits,
        group,
        stream=stream,
        integers=integers,
    )
    return _tower(weights, v, Graph(out, precision, TOWER), dialect) + _projector(
        weights, v, Graph(out, precision, PROJECTOR), dialect
    )


def _tower(weights: CanonicalWeights, v: VisionConfig, graph: Graph, dialect: Dialect) -> int:
    onnx = graph.onnx.TensorProto
    graph.value("inputs", "pixels", onnx.FLOAT, ["patches", v.patch_size])
    if v.frequencies:
        for name in ANGLES:
            graph.value("inputs", name, onnx.FLOAT, ["patches", 2 * len(v.frequencies)])
    # Patches have rows of no round length and are read once an image: their matrix stays in floats.
    x = linear(
        graph,
        dialect,
        weights,
        "vision.patch",
        graph.cast("pixels", "float32", graph.precision.floats, "pixels.cast"),
        exact=True,
    )
    x = graph.cast(x, graph.precision.floats, graph.stream, "vision.patch.stream")
    if not v.frequencies:
        first = graph.floats(
            "vision.class", weights.table("vision.class").reshape(1, -1), stream=True
        )
        x = graph.node("Concat", [first, x], "vision.with_class", axis=0)
        x = graph.node(
            "Add",
            [x, graph.floats("vision.positions", weights.table("vision.positions"), stream=True)],
            "vision.placed",
        )
    x = _norm(graph, weights, v, "vision.pre_norm", x) if v.pre_norm else x
    for n in track(range(v.layers), "vision tower"):
        name = f"vision.layers.{n}"
        y = dialect.tower_attention(
            graph,
            v,
            name,
            _linear(
                graph,
                dialect,
                weights,
                f"{name}.qkv",
                _read(graph, weights, v, f"{name}.attn_norm", x),
            ),
        )
        x = _sum(graph, x, _linear(graph, dialect, weights, f"{name}.o", y), f"{name}.attended")
        y = _linear(
            graph, dialect, weights, f"{name}.up", _read(graph, weights, v, f"{name}.mlp_norm", x)
        )
        x = _sum(
            graph,
            x,
            _linear(
                graph,
                dialect,
                weights,
                f"{name}.down",
                _activated(graph, v, y, f"{name}.act"),
                ACTIVATED,
            ),
            f"{name}.sum",
        )
    if not v.frequencies:
        start, end, axis = (
            graph.constant(f"vision.{name}", np.array([value]))
            for name, value in (("first_patch", 1), ("last_patch", 1 << 30), ("patch_axis", 0))
        )
        x = graph.node("Slice", [x, start, end, axis], "vision.patches")
    graph.node("Cast", [x], "tower", to=onnx.FLOAT)
    graph.value("outputs", "tower", onnx.FLOAT, ["patches", v.width])
    graph.save("tower", dialect)
    return graph.layer_bytes


def _projector(weights: CanonicalWeights, v: VisionConfig, graph: Graph, dialect: Dialect) -> int:
    onnx = graph.onnx.TensorProto
    graph.value("inputs", "tower", onnx.FLOAT, ["patches", v.width])
    x = graph.cast("tower", "float32", graph.stream, "tower.cast")
    x = _norm(graph, weights, v, "vision.projector.norm", x) if v.projector_norm else x
    x = graph.cast(x, graph.stream, graph.precision.floats, "tower.read")
    if v.merge > 1:
        x = graph.node(
            "Reshape",
            [x, graph.constant("vision.merged", np.array([-1, v.width * v.merge**2]))],
            "vision.folded",
        )
    x = graph.node(
        "Gelu",
        [_linear(graph, dialect, weights, "vision.projector.first", x)],
        "vision.projector.act",
    )
    x = _linear(graph, dialect, weights, "vision.projector.second", x, ACTIVATED)
    graph.node("Cast", [x], "features", to=onnx.FLOAT)
    graph.value("outputs", "features", onnx.FLOAT, ["features", weights.decoder.hidden])
    graph.save("projector", dialect)
    return graph.layer_bytes


def _linear(
    graph: Graph, dialect: Dialect, weights: CanonicalWeights, name: str, x: str, zero: int = MIDDLE
) -> str:
    if not graph.precision.integers:
        return linear(graph, dialect, weights, name, x)
    matrix = weights.matrix(name)
    return dialect.integers(
        graph,
        name,
        x,
        matrix.dense().numpy(),
        None if matrix.bias is None else matrix.bias.numpy(),
        zero,
    )


def _norm(graph: Graph, weights: CanonicalWeights, v: VisionConfig, name: str, x: str) -> str:
    """The norm of x, both in the stream's format."""
    scale = [
        graph.floats(f"{name}.{part}", tensor, stream=True)
        for part, tensor in zip(("weight", "bias"), weights.norm(name), strict=True)
    ]
    return graph.node("LayerNormalization", [x, *scale], name, epsilon=v.norm_eps, axis=-1)


def _read(graph: Graph, weights: CanonicalWeights, v: VisionConfig, name: str, x: str) -> str:
    """The same in the format of the activations, as a matrix reads it."""
    return graph.cast(
        _norm(graph, weights, v, name, x), graph.stream, graph.precision.floats, f"{name}.read"
    )


def _sum(graph: Graph, x: str, branch: str, name: str) -> str:
    return graph.node(
        "Add", [x, graph.cast(branch, graph.precision.floats, graph.stream, f"{name}.branch")], name
    )


def _activated(graph: Graph, v: VisionConfig, x: str, name: str) -> str:
    if v.activation == "gelu":
        return graph.node("Gelu", [x], name)
    scaled = graph.node(
        "Mul",
        [x, graph.constant(f"{name}.alpha", np.array(1.702).astype(graph.precision.floats))],
        f"{name}.scaled",
    )
    return graph.node("Mul", [x, graph.node("Sigmoid", [scaled], f"{name}.gate")], name)
