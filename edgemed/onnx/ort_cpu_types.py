"""Graphs in types that ONNX Runtime's CPU kernels lack, computed in wider ones.

bfloat16 and float16 graphs are for other devices; here they only have to be checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError, need
from edgemed.onnx.ort_dialect import WIDE_SUMS


def started(file: Path, wide: bool, threads: int | None, integers: bool = False) -> Any:
    """An ONNX Runtime session over a graph. wide: it holds bfloat16; integers: products of 8-bit
    integers. Raises EdgemedError where it cannot be loaded.
    """
    ort = need("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # ONNX Runtime fuses DequantizeLinear + MatMul and would quantize activations to int8, which
    # TensorRT does not.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if integers:
        options.add_session_config_entry(*WIDE_SUMS)
    try:
        return ort.InferenceSession(
            widened(file) if wide else str(file), options, providers=["CPUExecutionProvider"]
        )
    except EdgemedError:
        raise
    except Exception as error:
        # onnxruntime raises a dozen unrelated exception types for a model it cannot load
        raise EdgemedError(
            f"onnxruntime {ort.__version__} cannot load {file}: {str(error).splitlines()[0]}",
            "Export the engine again",
        ) from error


def widened(file: Path) -> bytes:
    """The same graph with bfloat16 widened to float32, which ONNX Runtime's CPU kernels lack:
    weights keep their bfloat16 values, activations are not rounded.

    Raises EdgemedError where the graph is too large for one in-memory model (2 GB in float32).
    """
    onnx = need("onnx", "build")
    model = onnx.load(str(file))
    narrow = onnx.TensorProto.BFLOAT16
    wide = onnx.TensorProto.FLOAT
    for graph in nested(onnx, model.graph):
        for tensor in graph.initializer:
            if tensor.data_type == narrow:
                values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == narrow:
                value.type.tensor_type.elem_type = wide
        for node in graph.node:
            if node.op_type == "Cast":
                _widen_cast(node, narrow, wide)
    if model.ByteSize() >= 1 << 31:
        raise EdgemedError(
            f"{file}: too large to widen from bfloat16 to float32 in memory, and ONNX Runtime's CPU"
            " has no bfloat16",
            "Check parity with precision=fp16, or on the device after edgemed build",
        )
    return model.SerializeToString()


def _widen_cast(node: Any, narrow: int, wide: int) -> None:
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == narrow:
            attribute.i = wide


def nested(onnx: Any, graph: Any) -> Iterator[Any]:
    """A graph and every graph inside it, which the ways of an If are."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nested(onnx, attribute.g)
