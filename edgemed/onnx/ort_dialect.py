"""ONNX Runtime's own operators for the graphs we write: the fastest measured for one sequence, and
the only ones that keep 4- and 8-bit weights packed.

It is a module of its own because engines of several targets run their vision towers on ONNX
Runtime, whatever runtime the text decoder has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgemed.onnx.decoder_graph import activated, linear, low_rank, one_mlp, shares
from edgemed.quantization.grids import Ints

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemed.models.architecture import DecoderConfig, VisionConfig
    from edgemed.models.weights import CanonicalWeights
    from edgemed.onnx.decoder_graph import Graph

MS = "com.microsoft"
# The integer for 0 where a row of activations becomes integers 0..255.
MIDDLE = 128
ROPE = ("rope.cos", "rope.sin")
# For every session with products of 8-bit integers: on x86 CPUs without VNNI their sums overflow,
# and with this they take a slower way that does not.
WIDE_SUMS = ("session.x64quantprecision", "1")


class OrtDialect:
    """ONNX Runtime's operators: GroupQueryAttention, MatMulNBits, SkipLayerNormalization, FastGelu
    (domain com.microsoft). See Dialect, SharedBaseDialect and VisionDialect.

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
        shape: list[int | str] = [1, d.kv_heads, "context", d.head_dim]
        cached = graph.onnx.TensorProto.INT8 if self.kv else graph.float_type
        for n in range(d.layers):
            for part in ("key", "value"):
                graph.value("inputs", f"past.{n}.{part}", cached, shape)
                graph.value("outputs", f"present.{n}.{part}", cached, shape)
        if d.positions == "rope":
            # The session fills the rows. What a position means (one number, or three for an image)
            # is not the graph's business.
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
        name = f"layers.{layer}.attention"
        outputs = [name, f"present.{layer}.key", f"present.{layer}.value"]
        # query, key and value in one tensor: the operator's inputs 1 and 2 stay empty
        inputs = [qkv, "", "", f"past.{layer}.key", f"past.{layer}.value", "last_index", "total"]
        if d.positions == "rope":
            inputs += ROPE
        quantized_cache: dict[str, Any] = {}
        if self.kv:
            # k_scale and v_scale are the operator's inputs 12 and 13
            inputs += [""] * (12 - len(inputs))
            key_scale, value_scale = self.kv[layer]
            inputs.append(graph.constant(f"{name}.key_scale", key_scale))
            inputs.append(graph.constant(f"{name}.value_scale", value_scale))
            quantized_cache = {
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
            **quantized_cache,
        )

    def tower_attention(self, graph: Graph, v: VisionConfig, name: str, qkv: str) -> str:
        """qkv [patches, 3 * width] -> [patches, width]; every patch sees every other."""
        # The operator wants a batch axis in front.
        axis = graph.constant(f"{name}.axis", np.array([0]))
        batch = graph.node("Unsqueeze", [qkv, axis], f"{name}.one")
        q = f"{name}.q"
        k = f"{name}.k"
        value = f"{name}.v"
        graph.node("Split", [batch], f"{name}.split", [q, k, value], axis=-1, num_outputs=3)
        if v.frequencies:
            q = self._rotated(graph, v, q)
            k = self._rotated(graph, v, k)
        y = graph.node(
            "MultiHeadAttention", [q, k, value], f"{name}.attention", domain=MS, num_heads=v.heads
        )
        return graph.node("Squeeze", [y, axis], f"{name}.flat")

    def _rotated(self, graph: Graph, v: VisionConfig, x: str) -> str:
        """x [1, patches, width] with rotary angles; row i of cos and sin is patch i's."""
        if "patch.index" not in graph.named:
            graph.named.add("patch.index")
            self._add_patch_index(graph)
        suffix = "" if graph.precision.floats == "float32" else ".cast"
        return graph.node(
            "RotaryEmbedding",
            [x, "patch.index", f"cos{suffix}", f"sin{suffix}"],
            f"{x}.turned",
            domain=MS,
            num_heads=v.heads,
            interleaved=0,
        )

    def _add_patch_index(self, graph: Graph) -> None:
        """patch.index int64 [1, patches], 0, 1, 2 and so on; cos and sin in the graph's format."""
        count = graph.node("Shape", ["cos"], "patch.count", start=0, end=1)
        first = graph.constant("patch.first", np.array(0))
        step = graph.constant("patch.step", np.array(1))
        number = graph.node("Squeeze", [count], "patch.number")
        rows = graph.node("Range", [first, number, step], "patch.rows")
        axis = graph.constant("patch.axis", np.array([0]))
        graph.node("Unsqueeze", [rows, axis], "patch.index")
        if graph.precision.floats != "float32":
            for table in ("cos", "sin"):
                graph.node("Cast", [table], f"{table}.cast", to=graph.float_type)

    def activation(self, graph: Graph, d: DecoderConfig, name: str, x: str) -> str:
        if d.activation == "silu":
            return graph.node("QuickGelu", [x], name, domain=MS, alpha=1.0)  # x * sigmoid(alpha x)
        gelu = "FastGelu" if d.activation == "gelu_tanh" else "Gelu"
        return graph.node(gelu, [x], name, domain=MS)

    def experts(
        self, graph: Graph, weights: CanonicalWeights, n: int, x: str, gates: str, chosen: str
    ) -> str:
        """For each expert the rows of the tokens that chose it are gathered, computed, and added to
        their places; of no rows a product reads no weight.

        At one token as fast as the other forms that compute only chosen experts, on prompts a tenth
        faster than QMoE (bench/moe_forms.py, docs/experts.md).
        """
        name = f"layers.{n}"
        node = graph.node
        rows = self._rows(graph, weights.decoder, name, x)
        nothing = graph.constant(f"{name}.nothing", np.zeros(1, graph.precision.floats))
        y = node("Mul", [rows, nothing], f"{name}.none")
        for at, place, gate in self.chosen(graph, weights.decoder, n, gates, chosen):
            taken = node("GatherND", [rows, place], f"{at}.taken")
            output = one_mlp(graph, self, weights, at, taken)
            y = self.added(graph, y, place, node("Mul", [output, gate], f"{at}.made"), at)
        return self._with_batch_axis(graph, name, y)

    def _rows(self, graph: Graph, d: DecoderConfig, name: str, x: str) -> str:
        """x [1, T, hidden] -> [T, hidden]."""
        shape = graph.constant(f"{name}.flat", np.array([-1, d.hidden]))
        return graph.node("Reshape", [x, shape], f"{name}.rows")

    def _with_batch_axis(self, graph: Graph, name: str, y: str) -> str:
        """y [T, hidden] -> [1, T, hidden]."""
        axis = graph.constant(f"{name}.batch", np.array([0]))
        return graph.node("Unsqueeze", [y, axis], f"{name}.experts")

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
            # NonZero gives [1, rows]: the tokens whose gate for this expert is not 0.
            index = node("NonZero", [gate], f"{at}.index")
            place = node("Transpose", [index], f"{at}.place", perm=[1, 0])
            gate_rows = node("GatherND", [gate, place], f"{at}.gate_rows")
            weight = node("Unsqueeze", [gate_rows, tokens], f"{at}.weight_rows")
            yield at, place, graph.cast(weight, "float32", graph.precision.floats, f"{at}.cast")

    def added(self, graph: Graph, y: str, place: str, rows: str, name: str) -> str:
        """y with rows added at their places."""
        # ScatterND can add by itself, but not in float16.
        before = graph.node("GatherND", [y, place], f"{name}.before")
        after = graph.node("Add", [before, rows], f"{name}.after")
        return graph.node("ScatterND", [y, place, after], f"{name}.sum")

    def shared_base_experts(
        self, graph: Graph, weights: CanonicalWeights, n: int, x: str, gates: str, chosen: str
    ) -> str:
        """Experts that share a matrix: it is multiplied once, before and after the activation; of
        the differences, only those of chosen experts are.
        """
        d = weights.decoder
        name = f"layers.{n}"
        node = graph.node
        rows = self._rows(graph, d, name, x)
        common = linear(graph, self, weights, f"{name}.base.up", rows)
        zero = graph.constant(f"{name}.nothing", np.zeros(1, graph.precision.floats))
        # y [T, hidden]: what differences of 'down' give. mixed [T, ffn]: what the shared 'down'
        # reads, each expert's activations times its gate. Both begin as zeros.
        y = node("Mul", [rows, zero], f"{name}.none")
        first = graph.constant(f"{name}.first", np.array([0]))
        ffn = graph.constant(f"{name}.ffn", np.array([d.ffn]))
        width = graph.constant(f"{name}.width", np.array([1]))
        narrow = node("Slice", [common, first, ffn, width], f"{name}.narrow")
        mixed = node("Mul", [narrow, zero], f"{name}.empty")
        graph.share = d.mixture.active / d.mixture.count
        for at, place, gate in self.chosen(graph, d, n, gates, chosen):
            taken = node("GatherND", [rows, place], f"{at}.taken")
            difference = low_rank(graph, self, weights, f"{at}.up", taken)
            common_rows = node("GatherND", [common, place], f"{at}.common")
            up = node("Add", [common_rows, difference], f"{at}.up")
            inner = activated(graph, self, d, at, up)
            down = low_rank(graph, self, weights, f"{at}.down", inner)
            shared_part = node("Mul", [inner, gate], f"{at}.shared_part")
            mixed = self.added(graph, mixed, place, shared_part, f"{at}.mixed")
            own_part = node("Mul", [down, gate], f"{at}.own_part")
            y = self.added(graph, y, place, own_part, f"{at}.own")
        graph.share = 1.0
        shared = linear(graph, self, weights, f"{name}.base.down", mixed)
        y = node("Add", [y, shared], f"{name}.rows_out")
        return self._with_batch_axis(graph, name, y)

    def quantized(
        self, graph: Graph, name: str, x: str, ints: Ints, bias: np.ndarray | None
    ) -> str:
        """x times a matrix of 2, 4 or 8 bits in blocks along the inputs, plus bias."""
        out, inp = ints.q.shape
        blocks = ints.q.reshape(out, inp // ints.block, ints.block)
        packed = graph.constant(f"{name}.q", _bytes(blocks, ints.bits))
        scales = graph.constant(f"{name}.scales", ints.scales.astype(graph.precision.floats))
        zeros = ""
        if ints.zeros is not None:
            zeros = graph.constant(f"{name}.zeros", _bytes(ints.zeros, ints.bits))
        # The operator's input 4, the order of the groups, stays empty.
        inputs = [x, packed, scales, zeros, ""]
        if bias is not None:
            inputs.append(graph.constant(f"{name}.bias", bias))
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
        """x [1, T, in] times an int8 matrix with one scale per output, x quantized token by token
        when it is read, so no calibrated range of x is needed.
        """
        axis = graph.constant(f"{name}.batch_axis", np.array([0]))
        # Stored with 128 for zero; the operator takes signed bytes.
        q = (ints.q.astype(np.int16) - 128).astype(np.int8)
        x_rows = graph.node("Squeeze", [x, axis], f"{name}.rows")
        y_rows = self._row_by_row(
            graph, f"{name}.row", x_rows, q, ints.scales[:, 0], bias, zero=MIDDLE
        )
        return graph.node("Unsqueeze", [y_rows, axis], name)

    def integers(
        self,
        graph: Graph,
        name: str,
        x: str,
        weight: np.ndarray,
        bias: np.ndarray | None,
        zero: int,
    ) -> str:
        """x [rows, in] W^T + b with both quantized to 8 bits: W by rows to -127..127, x row by row
        when it is read (known as W8A8, dynamic per token).

        zero: the integer for 0 in x, whose range 0..255 it divides.
        """
        scale = np.maximum(np.abs(weight).max(1), 1e-12) / 127
        q = np.rint(weight / scale[:, None]).astype(np.int8)
        return self._row_by_row(graph, name, x, q, scale, bias, zero)

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
        """x [rows, in], quantized row by row, times q int8 [out, in] * scale [out].

        CPUs have units for products of integers (AMX, VNNI, dot product), which pay where many rows
        are read at once, as those of an image; int8 weights in blocks are no faster there than
        float32.
        """
        node = graph.node
        constant = graph.constant
        axis = constant(f"{name}.axis", np.array([1]))
        smallest = constant(f"{name}.least", np.array(1e-12, np.float32))
        # A row's step is the larger of two: its largest value must fit above `zero`, and its
        # smallest below.
        high = node("ReduceMax", [x, axis], f"{name}.high", keepdims=0)
        per_high = constant(f"{name}.per_high", np.array(1 / (255 - zero), np.float32))
        step_high = node("Mul", [high, per_high], f"{name}.scale_high")
        low = node("ReduceMin", [x, axis], f"{name}.low", keepdims=0)
        per_low = constant(f"{name}.per_low", np.array(-1 / zero, np.float32))
        step_low = node("Mul", [low, per_low], f"{name}.scale_low")
        step = node("Max", [step_high, step_low, smallest], f"{name}.step")
        zeros = constant(f"{name}.zero", np.array(zero, np.uint8))
        row_count = node("Shape", [step], f"{name}.rows")
        row_zeros = node("Expand", [zeros, row_count], f"{name}.row_zeros")
        integers = node("QuantizeLinear", [x, step, row_zeros], f"{name}.rounded", axis=0)
        # This operator takes one step for all rows; theirs is multiplied in afterwards.
        one = constant(f"{name}.one", np.array(1, np.float32))
        scales = constant(f"{name}.scales", scale.astype(np.float32))
        weight = constant(f"{name}.q", q.T)
        product = node(
            "MatMulIntegerToFloat",
            [integers, weight, one, scales, zeros],
            f"{name}.integers",
            domain=MS,
        )
        steps = node("Unsqueeze", [step, axis], f"{name}.steps")
        y = node("Mul", [product, steps], f"{name}.product")
        if bias is None:
            return y
        return node("Add", [y, constant(f"{name}.bias", bias.astype(np.float32))], name)


def _bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers uint8 [.., n] in bytes, the first in the lowest bits; the last byte is filled up
    with zeros.
    """
    per_byte = 8 // bits
    missing = -values.shape[-1] % per_byte
    no_padding = [(0, 0)] * (values.ndim - 1)
    filled = np.pad(values, [*no_padding, (0, missing)])
    # Every per_byte-th value has the same place in its byte.
    shifted = [filled[..., i::per_byte] << bits * i for i in range(per_byte)]
    return np.bitwise_or.reduce(shifted)
