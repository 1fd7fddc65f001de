"""Writes the probe graphs that `edgemed doctor --measure` times: one ONNX operator each.

A probe names its weights and their shapes, and holds no values: the device profile makes them on
the device. So a device needs ONNX Runtime alone, and the wheel carries a few hundred bytes. Run:
python bench/make_probes.py
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, helper

from edgemed.benchmarking.device_profile import GROUP, PROBES, SIZE

FLOAT = TensorProto.FLOAT
HALF = TensorProto.FLOAT16
# Of the ONNX standard and of ONNX Runtime's own operators; the least that any engine asks for.
OPSETS = {"": 17, "com.microsoft": 1}
IR_VERSION = 8


@dataclass(frozen=True)
class Probe:
    """One operator: y = op(x, *weights). x, y: element types of two-dimensional tensors of any
    size. weights: name -> (element type, shape).
    """

    op: str
    x: int
    y: int
    weights: dict[str, tuple[int, tuple[int, ...]]]
    domain: str = ""
    attributes: dict[str, int] = field(default_factory=dict)


SQUARE = (SIZE, SIZE)
GROUPS = SIZE // GROUP
GRAPHS = {
    # One product of two numbers: what starting a call costs.
    "call": Probe("MatMul", FLOAT, FLOAT, {"b": (FLOAT, (1, 1))}),
    "fp32": Probe("MatMul", FLOAT, FLOAT, {"b": (FLOAT, SQUARE)}),
    "fp16": Probe("MatMul", HALF, HALF, {"b": (HALF, SQUARE)}),
    "int8": Probe(
        "MatMulInteger", TensorProto.UINT8, TensorProto.INT32, {"b": (TensorProto.INT8, SQUARE)}
    ),
    "int4": Probe(
        "MatMulNBits",
        FLOAT,
        FLOAT,
        {
            "b": (TensorProto.UINT8, (SIZE, GROUPS, GROUP // 2)),
            "scales": (FLOAT, (SIZE, GROUPS)),
        },
        domain="com.microsoft",
        attributes={"K": SIZE, "N": SIZE, "bits": 4, "block_size": GROUP, "accuracy_level": 4},
    ),
}


def weight(name: str, dtype: int, shape: tuple[int, ...]) -> TensorProto:
    """A weight without values. It claims to lie in another file, which nobody reads: the values are
    handed to the session under its name.
    """
    tensor = TensorProto(
        name=name,
        data_type=dtype,
        dims=shape,
        data_location=TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value="handed-to-the-session")
    return tensor


def graph(probe: Probe) -> onnx.ModelProto:
    """The ONNX model of one probe."""
    node = helper.make_node(
        probe.op,
        ["x", *probe.weights],
        ["y"],
        domain=probe.domain,
        **probe.attributes,
    )
    any_size = [None, None]
    return helper.make_model(
        helper.make_graph(
            [node],
            "measure",
            [helper.make_tensor_value_info("x", probe.x, any_size)],
            [helper.make_tensor_value_info("y", probe.y, any_size)],
            [weight(name, *described) for name, described in probe.weights.items()],
        ),
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid(*opset) for opset in OPSETS.items()],
    )


def main() -> None:
    PROBES.mkdir(exist_ok=True)
    for name, probe in GRAPHS.items():
        (PROBES / f"{name}.onnx").write_bytes(graph(probe).SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
