"""Which attention operator of ONNX Runtime is fastest for one-sequence decoding? One node each,
side by side, several rounds.

The choice in targets/onnx.py (GroupQueryAttention on a shared buffer) rests on this. Run: python
bench/attention_ops.py
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from records import save, spread


def model(op: str, heads: int, size: int, layers: int) -> onnx.ModelProto:
    """`layers` attention nodes of one kind in a row, each with its own cache."""
    nodes = []
    inputs = []
    outputs = []
    floats = TensorProto.FLOAT
    hidden = heads * size

    def declare(kind: list, name: str, dtype: int, shape: list) -> str:
        kind.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    x = declare(inputs, "x", floats, [1, "new", 3 * hidden])
    if op == "GroupQueryAttention":
        extra = [declare(inputs, name, TensorProto.INT32, [1]) for name in ("last", "total")]
    for n in range(layers):
        past = [
            declare(inputs, f"past.{n}.{p}", floats, [1, heads, f"past{n}", size]) for p in "kv"
        ]
        present = [
            declare(outputs, f"present.{n}.{p}", floats, [1, heads, f"present{n}", size])
            for p in "kv"
        ]
        y = f"y{n}"
        if op == "GroupQueryAttention":
            nodes.append(
                helper.make_node(
                    op,
                    [x, "", "", *past, *extra],
                    [y, *present],
                    domain="com.microsoft",
                    num_heads=heads,
                    kv_num_heads=heads,
                )
            )
        else:
            parts = [f"{n}.{p}" for p in "qkv"]
            nodes.append(helper.make_node("Split", [x], parts, axis=-1, num_outputs=3))
            if op == "MultiHeadAttention":
                nodes.append(
                    helper.make_node(
                        op,
                        [*parts, "", "", "", *past],
                        [y, *present],
                        domain="com.microsoft",
                        num_heads=heads,
                        unidirectional=1,
                    )
                )
            else:
                nodes.append(
                    helper.make_node(
                        op,
                        [*parts, "", *past],
                        [y, *present],
                        q_num_heads=heads,
                        kv_num_heads=heads,
                        is_causal=1,
                    )
                )
    declare(outputs, y, floats, [1, "new", hidden])
    graph = helper.make_graph(nodes, op, inputs, outputs)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


def runner(op: str, heads: int, size: int, layers: int, past: int, threads: int):
    """A function that runs one decoding step with `past` tokens in the cache."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model(op, heads, size, layers).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    binding = session.io_binding()
    shared = op == "GroupQueryAttention"
    x = np.random.default_rng(0).standard_normal((1, 1, 3 * heads * size), np.float32)
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    if shared:
        binding.bind_ortvalue_input(
            "last", ort.OrtValue.ortvalue_from_numpy(np.array([past], np.int32))
        )
        binding.bind_ortvalue_input(
            "total", ort.OrtValue.ortvalue_from_numpy(np.array([past + 1], np.int32))
        )
    for value in session.get_inputs():
        if value.name.startswith("past"):
            cache = ort.OrtValue.ortvalue_from_numpy(
                np.ones((1, heads, 1024 if shared else past, size), np.float32)
            )
            binding.bind_ortvalue_input(value.name, cache)
            name = value.name.replace("past", "present")
            # The shared buffer is updated in place; the other operators make a new, longer cache at
            # every step.
            if shared:
                binding.bind_ortvalue_output(name, cache)
            else:
                binding.bind_output(name)
    binding.bind_output(session.get_outputs()[-1].name)
    return lambda: session.run_with_iobinding(binding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for past in (128, 900):
        times: dict[str, list[float]] = {}
        runners = {
            op: runner(op, 20, 128, args.layers, past, args.threads)
            for op in ("GroupQueryAttention", "MultiHeadAttention", "Attention")
        }
        for round_number in range(args.rounds + 1):
            for op, run in runners.items():
                started = time.perf_counter()
                for _ in range(args.steps):
                    run()
                if round_number:
                    times.setdefault(op, []).append(
                        (time.perf_counter() - started) / args.steps / args.layers * 1e6
                    )
        save(
            "attention_ops",
            {
                "what": "one decoding step of one attention layer, 20 heads of 128, float32",
                "unit": "us",
                "past": past,
                "threads": args.threads,
                "times": {op: spread(values) for op, values in times.items()},
            },
        )


if __name__ == "__main__":
    main()
