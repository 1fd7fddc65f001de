"""ONNX Runtime's own operators for the graphs we write: the fastest measured for one sequence, and
the only ones that keep 4- and 8-bit weights packed.

A module of its own because engines of several targets run their vision towers on ONNX Runtime,
whatever runtime the text decoder has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgemed.onnx.decoder_graph import activated, linear, low_rank, one_mlp, shares
from edgemed.quantization.grids import Ints

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemed.models.architecture import DecoderConfig, VisionConfig
    from edgemed.models.weights import CanonicalWeights
    from edgemed.onnx.decoder_graph import Graph

MS = "com.microsoft"
ROPE = ("rope.cos", "rope.sin")
# For every session with products of 8-bit integers: on x86 CPUs without VNNI their sums overflow,
# and with this they take a slower way that does not.
WIDE_SUMS = ("session.x64quantprecision", "1")


class OrtDialect:
    """ONNX Runtime's operators: GroupQueryAttention, MatMulNBits, SkipLayerNormalization, FastGelu
    (domain com.microsoft).

    kv: (key scale, value scale) of each layer, float32 [1, kv_heads, 1, head_dim], where the cache
    is int8; None where it has the activations' format.
    """

    opset = 20
    chosen_only = True
    domains: ClassVar[dict[str, int]] = {MS: 1}
    widths = (2, 4, 8)

    def __init__(self, kv: Sequence[tuple[np.ndarray, np.ndarray]] | None = None):
        self.kv = kv

    def inputs(self, graph: Graph, d: DecoderConfig) -> None:
        int32 = graph.onnx.TensorProto.INT32
        graph.value("inputs", "last_index", int32, [1])  # index of the newest position: total - 1
        graph.value("inputs", "total", int32, [1])
        shape = [1, d.kv_heads, "context", d.head_dim]
        cached = graph.onnx.TensorProto.INT8 if self.kv else graph.float_type
        for n in range(d.layers):
            for part in ("key", "value"):
                graph.value("inputs", f"past.{n}.{part}", cached, shape)
                graph.value("outputs", f"present.{n}.{part}", cached, shape)
        if d.positions == "rope":
            # Rows are filled by the session, so that what a position means (one number, or three
            # for an image) is not the graph's business.
            for table in ROPE:
                graph.value("inputs", table, graph.float_type, ["context", len(d.rope_frequencies)])

    def residual_norm(
        self,
        graph: Graph,
        d: DecoderConfig,
        name: str,
        x: str,
        add: str | None,
        weight: str,
        bias: str | None,
    ) -> tuple[str, str]:
        """(x + add, norm(x + add)); one fused node where there is something to add."""
        rms = d.norm == "rmsnorm"
        scale = [weight] if bias is None else [weight, bias]
        if add is None:
            return x, graph.node(
                "SimplifiedLayerNormalization" if rms else "LayerNormalization",
                [x, *scale],
                name,
                epsilon=d.norm_eps,
                axis=-1,
            )
        outputs = [name, "", "", f"{name}.sum"]
        graph.node(
            "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization",
            [x, add, *scale],
            name,
            outputs,
            MS,
            epsilon=d.norm_eps,
        )
        return f"{name}.sum", name

    def attention(self, graph: Graph, d: DecoderConfig, layer: int, qkv: str) -> str:
        past = [f"past.{layer}.key", f"past.{layer}.value"]
        name = f"layers.{layer}.attention"
        outputs = [name, f"present.{layer}.key", f"present.{layer}.value"]
        inputs = [
            qkv,
            "",
            "",
            *past,
            "last_index",
            "total",
            *(ROPE if d.positions == "rope" else ()),
        ]
        rounding = {}
        if self.kv:
            # k_scale and v_scale are the operator's inputs 12 and 13
            inputs += [""] * (12 - len(inputs))
            inputs += [
                graph.constant(f"{name}.{part}_scale", scale)
                for part, scale in zip(("key", "value"), self.kv[layer], strict=True)
            ]
            rounding = {
                "k_quant_type": "PER_CHANNEL",
                "v_quant_type": "PER_CHANNEL",
                "kv_cache_bit_width": 8,
            }
        return graph.node(
            "GroupQueryAttention",
            inputs,
            name,
            outputs,
            MS,
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            scale=d.score_scale[layer],
            do_rotary=int(d.positions == "rope"),
            **rounding,
        )

    def tower_attention(self, graph: Graph, v: VisionConfig, name: str, qkv: str) -> str:
        """qkv [patches, 3 * width] -> [patches, width]; every patch sees every other."""
        axis = graph.constant(f"{name}.axis", np.array([0]))
        parts = []
        graph.node(
            "Split",
            [graph.node("Unsqueeze", [qkv, axis], f"{name}.one")],
            f"{name}.split",
            [f"{name}.{p}" for p in "qkv"],
            axis=-1,
            num_outputs=3,
        )
        for part in "qkv":
            parts.append(f"{name}.{part}")
            if part != "v" and v.frequencies:
                parts[-1] = self.turned(graph, v, f"{name}.{part}")
        y = graph.node(
            "MultiHeadAttention", parts, f"{name}.attention", domain=MS, num_heads=v.heads
        )
        return graph.node("Squeeze", [y, axis], f"{name}.flat")

    def turned(self, graph: Graph, v: VisionConfig, x: str) -> str:
        """x [1, patches, width] with rotary angles; row i of cos and sin is patch i's."""
        if "patch.index" not in graph.named:
            graph.named.add("patch.index")
            count = graph.node("Shape", ["cos"], "patch.count", start=0, end=1)
            first, step = (
                graph.constant(f"patch.{what}", np.array(value))
                for what, value in (("first", 0), ("step", 1))
            )
            rows = graph.node(
                "Range", [first, graph.node("Squeeze", [count], "patch.number"), step], "patch.rows"
            )
            graph.node(
                "Unsqueeze", [rows, graph.constant("patch.axis", np.array([0]))], "patch.index"
            )
            for table in ("cos", "sin"):
                if graph.precision.floats != "float32":
                    graph.node("Cast", [table], f"{table}.cast", to=graph.float_type)
        tables = [
            table if graph.precision.floats == "float32" else f"{table}.cast"
            for table in ("cos", "sin")
        ]
        return graph.node(
            "RotaryEmbedding",
            [x, "patch.index", *tables],
            f"{x}.turned",
            domain=MS,
            num_heads=v.heads,
            interleaved=0,
        )

    def activation(self, graph: Graph, d: DecoderConfig, name: str, x: str) -> str:
        if d.activation == "silu":
            return graph.node("QuickGelu", [x], name, domain=MS, alpha=1.0)  # x * sigmoid(alpha x)
        return graph.node(
            "FastGelu" if d.activation == "gelu_tanh" else "Gelu", [x], name, domain=MS
        )

    def experts(
        self, graph: Graph, weights: CanonicalWeights, n: int, x: str, gates: str, chosen: str
    ) -> str:
        """For each expert the rows of the tokens that chose it are gathered, computed, and added to
        their places; of no rows a product reads no weight.

        At one token as fast as the other forms that compute only chosen experts, on prompts a tenth
        faster than QMoE (bench/moe_forms.py, docs/experts.md).
        """
        d = weights.decoder
        name = f"layers.{n}"
        node = graph.node
        rows = node(
            "Reshape", [x, graph.constant(f"{name}.flat", np.array([-1, d.hidden]))], f"{name}.rows"
        )
        y = node(
            "Mul",
            [rows, graph.constant(f"{name}.nothing", np.zeros(1, graph.precision.floats))],
            f"{name}.none",
        )
        for at, place, gate in self.chosen(graph, d, n, gates, chosen):
            made = one_mlp(graph, self, weights, at, node("GatherND", [rows, place], f"{at}.taken"))
            y = self.added(graph, y, place, node("Mul", [made, gate], f"{at}.made"), at)
        return node(
            "Unsqueeze", [y, graph.constant(f"{name}.batch", np.array([0]))], f"{name}.experts"
        )

    def chosen(
        self, graph: Graph, d: DecoderConfig, n: int, gates: str, chosen: str
    ) -> Iterator[tuple[str, str, str]]:
        """(name, places int64 [rows, 1] of the tokens that chose it, their gates [rows, 1]) of each
        expert of layer n.
        """
        name = f"layers.{n}"
        node = graph.node
        tokens = graph.constant(f"{name}.tokens", np.array([-1]))
        for expert, share in enumerate(shares(graph, d, n, gates, chosen)):
            at = f"{name}.experts.{expert}"
            gate = node("Reshape", [share, tokens], f"{at}.gates")
            place = node(
                "Transpose", [node("NonZero", [gate], f"{at}.index")], f"{at}.place", perm=[1, 0]
            )
            weight = node(
                "Unsqueeze",
                [node("GatherND", [gate, place], f"{at}.gate_rows"), tokens],
                f"{at}.weight_rows",
            )
            yield at, place, graph.cast(weight, "float32", graph.precision.floats, f"{at}.cast")

    def added(self, graph: Graph, y: str, place: str, rows: str, name: str) -> str:
        """y with rows added at their places."""
        # ScatterND can add by itself, but not in float16.
        return graph.node(
            "ScatterND",
            [
                y,
                place,
                graph.node(
                    "Add",
                    [graph.node("GatherND", [y, place], f"{name}.before"), rows],
                    f"{name}.after",
                ),
            ],
            f"{name}.sum",
        )

    def based(
        self, graph: Graph, weights: CanonicalWeights, n: int, x: str, gates: str, chosen: str
    ) -> str:
        """Experts that share a matrix (decoder.based): it is multiplied once, before and after; of
        the differences, those that were chosen.
        """
        d = weights.decoder
        name = f"layers.{n}"
        node = graph.node
        rows = node(
            "Reshape", [x, graph.constant(f"{name}.flat", np.array([-1, d.hidden]))], f"{name}.rows"
        )
        common = linear(graph, self, weights, f"{name}.base.up", rows)
        zero = graph.constant(f"{name}.nothing", np.zeros(1, graph.precision.floats))
        y = node("Mul", [rows, zero], f"{name}.none")
        ends = [
            graph.constant(f"{name}.{end}", np.array([value]))
            for end, value in (("first", 0), ("ffn", d.ffn), ("width", 1))
        ]
        mixed = node(
            "Mul", [node("Slice", [common, *ends], f"{name}.narrow"), zero], f"{name}.empty"
        )
        graph.share = d.experts.active / d.experts.count
        for at, place, gate in self.chosen(graph, d, n, gates, chosen):
            up = low_rank(
                graph, self, weights, f"{at}.up", node("GatherND", [rows, place], f"{at}.taken")
            )
            inner = activated(
                graph,
                self,
                d,
                at,
                node("Add", [node("GatherND", [common, place], f"{at}.common"), up], f"{at}.up"),
            )
            down = low_rank(graph, self, weights, f"{at}.down", inner)
            mixed = self.added(
                graph, mixed, place, node("Mul", [inner, gate], f"{at}.shared_part"), f"{at}.mixed"
            )
            y = self.added(
                graph, y, place, node("Mul", [down, gate], f"{at}.own_part"), f"{at}.own"
            )
        graph.share = 1.0
        y = node(
            "Add", [y, linear(graph, self, weights, f"{name}.base.down", mixed)], f"{name}.rows_out"
        )
        return node(
            "Unsqueeze", [y, graph.constant(f"{name}.batch", np.array([0]))], f"{name}.experts"
        )

    def quantized(
        self, graph: Graph, name: str, x: str, ints: Ints, bias: np.ndarray | None
    ) -> str:
        out, inp = ints.q.shape
        blocks = ints.q.reshape(out, inp // ints.block, ints.block)
        packed = _bytes(blocks, ints.bits)
        inputs = [
            x,
            graph.constant(f"{name}.q", packed),
            graph.constant(f"{name}.scales", ints.scales.astype(graph.precision.floats)),
        ]
        inputs += [
            graph.constant(f"{name}.zeros", _bytes(ints.zeros, ints.bits))
            if ints.zeros is not None
            else "",
            "",
        ]
        if bias is not None:
            inputs += [graph.constant(f"{name}.bias", bias)]
        while not inputs[-1]:
            inputs.pop()
        return graph.node(
            "MatMulNBits",
            inputs,
            name,
            domain=MS,
            K=inp,
            N=out,
            bits=ints.bits,
            block_size=ints.block,
            accuracy_level=graph.precision.accuracy_level,
        )

    def w8a8(
        self,
        graph: Graph,
        name: str,
        x: str,
        ints: Ints,
        bias: np.ndarray | None,
        largest: float | None,
    ) -> str:
        """x [1, T, in] times an int8 matrix with one scale per output, x rounded token by token
        when it is read; what calibration said of x is not needed.
        """
        axis = graph.constant(f"{name}.batch_axis", np.array([0]))
        q = (ints.q.astype(np.int16) - 128).astype(np.int8)
        rows = self._row_by_row(
            graph,
            f"{name}.row",
            graph.node("Squeeze", [x, axis], f"{name}.rows"),
            q,
            ints.scales[:, 0],
            bias,
            128,
        )
        return graph.node("Unsqueeze", [rows, axis], name)

    def integers(
        self,
        graph: Graph,
        name: str,
        x: str,
        weight: np.ndarray,
        bias: np.ndarray | None,
        zero: int,
    ) -> str:
        """x [rows, in] W^T + b with both rounded to 8 bits: W by rows to -127..127, x row by row
        when it is read (known as W8A8, dynamic per token).

        zero: the integer for 0 in x, whose range 0..255 it divides.
        """
        scale = np.maximum(np.abs(weight).max(1), 1e-12) / 127
        return self._row_by_row(
            graph, name, x, np.rint(weight / scale[:, None]).astype(np.int8), scale, bias, zero
        )

    def _row_by_row(
        self,
        graph: Graph,
        name: str,
        x: str,
        q: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray | None,
        zero: int,
    ) -> str:
        """x [rows, in], rounded row by row, times q int8 [out, in] * scale [out].

        CPUs have units for products of integers (AMX, VNNI, dot product), which pay where many rows
        are read at once, as those of an image; int8 weights in blocks are no faster there than
        float32.
        """
        node = graph.node
        constant = graph.constant
        axis = constant(f"{name}.axis", np.array([1]))
        least = constant(f"{name}.least", np.array(1e-12, np.float32))
        ends = [
            node(
                "Mul",
                [
                    node(op, [x, axis], f"{name}.{end}", keepdims=0),
                    constant(f"{name}.per_{end}", np.array(share, np.float32)),
                ],
                f"{name}.scale_{end}",
            )
            for op, end, share in (
                ("ReduceMax", "high", 1 / (255 - zero)),
                ("ReduceMin", "low", -1 / zero),
            )
        ]
        step = node("Max", [*ends, least], f"{name}.step")
        zeros = constant(f"{name}.zero", np.array(zero, np.uint8))
        rows = node("Expand", [zeros, node("Shape", [step], f"{name}.rows")], f"{name}.row_zeros")
        rounded = node("QuantizeLinear", [x, step, rows], f"{name}.rounded", axis=0)
        # This operator takes one step for all rows; theirs is multiplied in afterwards.
        scales = [
            constant(f"{name}.one", np.array(1, np.float32)),
            constant(f"{name}.scales", scale.astype(np.float32)),
        ]
        given = [rounded, constant(f"{name}.q", q.T), *scales, zeros]
        y = node(
            "Mul",
            [
                node("MatMulIntegerToFloat", given, f"{name}.integers", domain=MS),
                node("Unsqueeze", [step, axis], f"{name}.steps"),
            ],
            f"{name}.product",
        )
        return (
            node("Add", [y, constant(f"{name}.bias", bias.astype(np.float32))], name)
            if bias is not None
            else y
        )


def _bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers uint8 [.., n] in bytes, the first in the lowest bits; the last byte is filled up
    with zeros.
    """
    per = 8 // bits
    filled = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per)])
    return np.bitwise_or.reduce([filled[..., i::per] << bits * i for i in range(per)])
