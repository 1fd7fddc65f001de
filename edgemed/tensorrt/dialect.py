"""Plain ONNX for TensorRT: no contrib operator, integers by DequantizeLinear straight into MatMul,
precision written into every tensor.

One graph serves prefill and decode on TensorRT 10.3 to 11: the cache is read as `past` and only the
new rows come out as `present`, because no TensorRT before 10.15 can write into an input; whoever
runs the graph puts the new rows where they belong, and the cache is never copied.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.onnx.decoder_graph import one_mlp, shares, used
from edgemed.quantization.grids import Ints

if TYPE_CHECKING:
    from edgemed.models.architecture import DecoderConfig, VisionConfig
    from edgemed.models.weights import CanonicalWeights
    from edgemed.onnx.decoder_graph import Graph

# Rows of the cache are offered in whole blocks, so that decoding sees few different shapes (one
# CUDA graph each) and never an empty tensor.
BLOCK = 64
# Position of a cache row that holds nothing: no query gets that far.
NOWHERE = 1 << 30
# added to the score of a position that may not be seen; finite, so that no row can become NaN
FAR = -1e30


def rows_offered(position: int) -> int:
    """Cache rows a run at `position` gets to see: whole blocks, at least one."""
    return max(BLOCK, -(-position // BLOCK) * BLOCK)


class PlainDialect:
    """Operators of the default domain only (Dialect in graph.py, VisionDialect in vision_graph.py).

    Inputs: tokens, positions [1, new]; select [selected]; slots [past], the position each cache row
    holds; past.N.key and past.N.value [1, past, kv_heads, head_dim]; rope_positions [parts, new]
    where a rotary position has several parts: `positions` is then the place in the sequence alone,
    for the mask. Outputs: scores, and present.N.key and present.N.value [1, new, kv_heads,
    head_dim], the new rows alone. The token axis comes first in the cache, so that the first `past`
    rows of a buffer are one contiguous tensor.
    """

    domains: ClassVar[dict[str, int]] = {}
    widths = (4, 8)

    def __init__(self, bits: int | None, chosen_only: bool = True):
        """bits: the fewest that any matrix has. chosen_only: whether experts that no token chose
        are left out at run time.
        """
        self.chosen_only = chosen_only
        # INT4 tensors and block_size came with opset 21; everything else is written as opset 20,
        # the newest TensorRT 10.3 documents.
        self.opset = 21 if bits == 4 else 20

    def inputs(self, graph: Graph, d: DecoderConfig) -> None:
        graph.value("inputs", "slots", graph.onnx.TensorProto.INT64, ["past"])
        for n in range(d.layers):
            for part in ("key", "value"):
                graph.value(
                    "inputs",
                    f"past.{n}.{part}",
                    graph.float_type,
                    [1, "past", d.kv_heads, d.head_dim],
                )
                graph.value(
                    "outputs",
                    f"present.{n}.{part}",
                    graph.float_type,
                    [1, "new", d.kv_heads, d.head_dim],
                )
        self._masks(graph, d)
        if d.positions == "rope":
            self._angles(graph, d)

    def _angles(self, graph: Graph, d: DecoderConfig) -> None:
        """rope.cos and rope.sin [1, new, 1, pairs] of the new tokens' positions, computed in
        float32.
        """
        node = graph.node
        constant = graph.constant
        parts = max(d.rope_axes, default=0) + 1
        if parts > 1:
            graph.value("inputs", "rope_positions", graph.onnx.TensorProto.INT64, [parts, "new"])
        rows = node(
            "Cast",
            ["rope_positions" if parts > 1 else "positions"],
            "rope.positions",
            to=graph.onnx.TensorProto.FLOAT,
        )
        if parts > 1:
            rows = node(
                "Gather",
                [rows, constant("rope.axes", np.array(d.rope_axes, np.int64))],
                "rope.rows",
                axis=0,
            )
        counted = node("Transpose", [rows], "rope.column", perm=[1, 0])
        angles = node(
            "Mul",
            [counted, constant("rope.frequencies", np.array(d.rope_frequencies, np.float32))],
            "rope.angles",
        )
        place = constant("rope.place", np.array([0, 2], np.int64))
        for table, op in (("rope.cos", "Cos"), ("rope.sin", "Sin")):
            wide = node(
                "Unsqueeze", [node(op, [angles], f"{table}.wide"), place], f"{table}.placed"
            )
            node("Cast", [wide], table, to=graph.float_type)

    def _rotated(self, graph: Graph, d: DecoderConfig, x: str, name: str) -> str:
        """x [1, new, heads, head_dim] turned by the rotary angles, where the model has them."""
        if d.positions != "rope":
            return graph.node("Identity", [x], name)
        return self._turned(graph, x, name, len(d.rope_frequencies), d.head_dim, "rope")

    def _turned(
        self, graph: Graph, x: str, name: str, half: int, head_dim: int, angles: str
    ) -> str:
        """x [.., head_dim], whose first 2 * half elements turn by the tables `angles`.cos and
        `angles`.sin.
        """
        node = graph.node
        sizes = [half, half]
        parts = [f"{name}.first", f"{name}.second"]
        if head_dim > 2 * half:
            sizes = [*sizes, head_dim - 2 * half]
            parts = [*parts, f"{name}.rest"]
        node(
            "Split",
            [x, graph.constant(f"{name}.sizes", np.array(sizes, np.int64))],
            f"{name}.split",
            parts,
            axis=-1,
        )

        def product(part: str, table: str) -> str:
            return node("Mul", [part, f"{angles}.{table}"], f"{part}.{table}")

        a, b, *rest = parts
        turned = [
            node("Sub", [product(a, "cos"), product(b, "sin")], f"{name}.a"),
            node("Add", [product(b, "cos"), product(a, "sin")], f"{name}.b"),
        ]
        return node("Concat", [*turned, *rest], name, axis=-1)

    def _masks(self, graph: Graph, d: DecoderConfig) -> None:
        """mask [new, past + new]: 0 where a query may look, FAR where it may not; `past` as a
        number, for cutting.
        """
        node = graph.node
        constant = graph.constant
        # Positions [new, 1] of the queries against [1, past + new] of the keys.
        query = node("Transpose", ["positions"], "query_positions", perm=[1, 0])
        axis = constant("axis0", np.zeros(1, np.int64))
        slot_row = node("Unsqueeze", ["slots", axis], "slot_row")
        keys = node("Concat", [slot_row, "positions"], "key_positions", axis=1)
        visible = node("LessOrEqual", [keys, query], "visible")
        zero = constant("zero", np.zeros((), np.float32))
        far = constant("far", np.array(FAR, np.float32))
        node("Where", [visible, zero, far], "mask")
        # What every layer's attention needs for slicing its scores.
        node("Shape", ["slots"], "past_size")
        grouped = d.heads != d.kv_heads
        constant("start", np.array([0], np.int64))
        constant("end", np.array([np.iinfo(np.int64).max], np.int64))
        constant("score_axis", np.array([4 if grouped else 3], np.int64))
        if grouped:
            constant("group_axis", np.array([2], np.int64))

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
        """(x + add, norm(x + add)); sum and norm in the stream's format, the result in that of the
        activations.
        """
        floats = graph.precision.floats
        stream = graph.stream
        if add is not None:
            branch = graph.cast(add, floats, stream, f"{name}.branch")
            x = graph.node("Add", [x, branch], f"{name}.sum")
        if d.norm == "rmsnorm":
            y = self._rms(graph, d, f"{name}.norm", x, weight)
        else:
            inputs = [x, weight] if bias is None else [x, weight, bias]
            y = graph.node(
                "LayerNormalization", inputs, f"{name}.norm", epsilon=d.norm_eps, axis=-1
            )
        return x, graph.cast(y, stream, floats, name)

    def _rms(self, graph: Graph, d: DecoderConfig, name: str, x: str, weight: str) -> str:
        """x / sqrt(mean(x^2) + eps) * weight, in the stream's format; RMSNormalization is parsed
        from TensorRT 10.15 on only.
        """
        node = graph.node
        axis = graph.constant(f"{name}.axis", np.array([-1], np.int64))
        squares = node("Mul", [x, x], f"{name}.squares")
        mean = node("ReduceMean", [squares, axis], f"{name}.mean", keepdims=1)
        eps = graph.constant(f"{name}.eps", np.array(d.norm_eps, graph.stream))
        shifted = node("Add", [mean, eps], f"{name}.shifted")
        root = node("Sqrt", [shifted], f"{name}.root")
        unit = node("Div", [x, root], f"{name}.unit")
        return node("Mul", [unit, weight], name)

    def attention(self, graph: Graph, d: DecoderConfig, layer: int, qkv: str) -> str:
        """softmax(q k^T scale + mask) v over past and new rows; scores of the two parts are joined,
        keys and values never are.

        qkv [1, new, q + k + v] -> [1, new, q]. With fewer key heads than heads, the heads of one
        key form an axis of their own.
        """
        name = f"layers.{layer}.attention"
        node = graph.node
        floats = graph.precision.floats
        group = d.heads // d.kv_heads
        q = f"{name}.q"
        k = f"{name}.k"
        v = f"{name}.v"
        sizes = np.array([d.q_size, d.kv_size, d.kv_size], np.int64)
        split_sizes = graph.constant(f"{name}.sizes", sizes)
        node("Split", [qkv, split_sizes], f"{name}.split", [q, k, v], axis=-1)
        kv_shape = np.array([0, 0, d.kv_heads, d.head_dim], np.int64)
        heads = graph.constant(f"{name}.kv_shape", kv_shape)
        key_heads = node("Reshape", [k, heads], f"{name}.key_heads")
        self._rotated(graph, d, key_heads, f"present.{layer}.key")
        node("Reshape", [v, heads], f"present.{layer}.value")

        def by_head(part: str, kind: str, perm: list[int]) -> str:
            """past or present keys or values with the heads in front."""
            x = node("Transpose", [f"{part}.{layer}.{kind}"], f"{name}.{part}_{kind}", perm=perm)
            if group == 1:
                return x
            return node("Unsqueeze", [x, "group_axis"], f"{name}.{part}_{kind}_shared")

        query, residue = self._query(graph, d, layer, q)
        part_scores = []
        for part in ("past", "present"):
            # The token axis last: the product is queries by tokens.
            keys = by_head(part, "key", [0, 2, 3, 1])
            part_scores.append(node("MatMul", [query, keys], f"{name}.{part}_scores"))
        scores = node("Concat", part_scores, f"{name}.scores", axis=-1)
        scores = graph.cast(scores, floats, "float32", f"{name}.wide_scores")
        if residue != 1:
            factor = graph.constant(f"{name}.residue", np.array(residue, np.float32))
            scores = node("Mul", [scores, factor], f"{name}.scaled")
        masked = node("Add", [scores, "mask"], f"{name}.masked")
        weights = node("Softmax", [masked], f"{name}.softmax", axis=-1)
        weights = graph.cast(weights, "float32", floats, f"{name}.weights")
        mixed = []
        for part, start, end in (("past", "start", "past_size"), ("present", "past_size", "end")):
            part_weights = node(
                "Slice", [weights, start, end, "score_axis"], f"{name}.{part}_weights"
            )
            values = by_head(part, "value", [0, 2, 1, 3])
            mixed.append(node("MatMul", [part_weights, values], f"{name}.{part}_mix"))
        mix = node("Add", mixed, f"{name}.mix")
        # Back to tokens in front of heads.
        perm = [0, 2, 1, 3] if group == 1 else [0, 3, 1, 2, 4]
        rows = node("Transpose", [mix], f"{name}.rows", perm=perm)
        flat = graph.constant(f"{name}.flat", np.array([0, 0, d.q_size], np.int64))
        return node("Reshape", [rows, flat], name)

    def _query(self, graph: Graph, d: DecoderConfig, layer: int, q: str) -> tuple[str, float]:
        """q [1, new, q_size] -> [1, heads, new, head_dim] (or [1, kv_heads, group, new, head_dim])
        times a power of two; and what is left of the scale.

        A power of two is exact in every format and keeps float16 scores from overflowing; the rest
        is applied to float32 scores.
        """
        name = f"layers.{layer}.attention"
        scale = d.score_scale[layer]
        group = d.heads // d.kv_heads
        power = 2.0 ** math.floor(math.log2(scale))
        if power != 1:
            factor = np.array(power).astype(graph.precision.floats)
            q = graph.node("Mul", [q, graph.constant(f"{name}.power", factor)], f"{name}.q_scaled")
        shape = np.array([0, 0, d.heads, d.head_dim], np.int64)
        q = graph.node("Reshape", [q, graph.constant(f"{name}.q_shape", shape)], f"{name}.q_heads")
        q = self._rotated(graph, d, q, f"{name}.q_turned")
        perm = [0, 2, 1, 3]
        if group > 1:
            perm = [0, 2, 3, 1, 4]
            group_shape = np.array([0, 0, d.kv_heads, group, d.head_dim], np.int64)
            stored_shape = graph.constant(f"{name}.q_group_shape", group_shape)
            q = graph.node("Reshape", [q, stored_shape], f"{name}.q_groups")
        return graph.node("Transpose", [q], f"{name}.query", perm=perm), scale / power

    def tower_attention(self, graph: Graph, v: VisionConfig, name: str, qkv: str) -> str:
        """qkv [patches, 3 * width] -> [patches, width]; every patch sees every other. Scores and
        softmax are float32.
        """
        node = graph.node
        floats = graph.precision.floats
        head = v.width // v.heads
        sizes = graph.constant(f"{name}.sizes", np.array([v.width] * 3, np.int64))
        parts = [f"{name}.{letter}" for letter in "qkv"]
        node("Split", [qkv, sizes], f"{name}.split", parts, axis=-1)
        shape = graph.constant(f"{name}.heads", np.array([0, v.heads, head], np.int64))
        scale = head**-0.5
        by_head = {}
        # As in the decoder: the power of two in the scale goes to q, the rest to the float32
        # scores.
        power = 2.0 ** math.floor(math.log2(scale))
        for part, perm in (("q", [1, 0, 2]), ("k", [1, 2, 0]), ("v", [1, 0, 2])):
            x = node("Reshape", [f"{name}.{part}", shape], f"{name}.{part}_heads")
            if part != "v" and v.frequencies:
                angles = self._patch_angles(graph)
                x = self._turned(graph, x, f"{name}.{part}_turned", head // 2, head, angles)
            if part == "q" and power != 1:
                factor = graph.constant(f"{name}.power", np.array(power).astype(floats))
                x = node("Mul", [x, factor], f"{name}.q_scaled")
            by_head[part] = node("Transpose", [x], f"{name}.{part}_rows", perm=perm)
        scores = node("MatMul", [by_head["q"], by_head["k"]], f"{name}.scores")
        scores = graph.cast(scores, floats, "float32", f"{name}.wide_scores")
        if scale != power:
            residue = graph.constant(f"{name}.residue", np.array(scale / power, np.float32))
            scores = node("Mul", [scores, residue], f"{name}.scaled")
        weights = node("Softmax", [scores], f"{name}.softmax", axis=-1)
        weights = graph.cast(weights, "float32", floats, f"{name}.weights")
        mix = node("MatMul", [weights, by_head["v"]], f"{name}.mix")
        rows = node("Transpose", [mix], f"{name}.mix_rows", perm=[1, 0, 2])
        flat = graph.constant(f"{name}.flat", np.array([0, v.width], np.int64))
        return node("Reshape", [rows, flat], f"{name}.attention")

    def _patch_angles(self, graph: Graph) -> str:
        """Tables patch.cos and patch.sin [patches, 1, pairs of a head] from the graph's inputs;
        made once.
        """
        if "patch" not in graph.named:
            graph.named.add("patch")
            axis = graph.constant("patch.axis", np.array([1], np.int64))
            for table in ("cos", "sin"):
                cast = graph.cast(table, "float32", graph.precision.floats, f"{table}.cast")
                graph.node("Unsqueeze", [cast, axis], f"patch.{table}")
        return "patch"

    def activation(self, graph: Graph, d: DecoderConfig, name: str, x: str) -> str:
        if d.activation == "silu":
            gate = graph.node("Sigmoid", [x], f"{name}.gate")
            return graph.node("Mul", [x, gate], name)
        approximate = "tanh" if d.activation == "gelu_tanh" else "none"
        return graph.node("Gelu", [x], name, approximate=approximate)

    def experts(
        self, graph: Graph, weights: CanonicalWeights, n: int, x: str, gates: str, chosen: str
    ) -> str:
        """Each expert's gate times what it gives for all tokens, added up; an expert that no token
        chose stands in the way of an If that is not taken.

        At one token that reads the chosen experts' integers and nothing else. Gathering the chosen
        experts' blocks would not: TensorRT dequantizes int4 straight into a MatMul, of constants
        only, and its Gather takes no 4- or 8-bit type, so blocks gathered as int32 would have to be
        unpacked, written as floats and read again (9 bytes per byte of int4). `experts` 'all'
        leaves the If out.
        """
        name = f"layers.{n}"
        node = graph.node
        floats = graph.precision.floats
        nothing = graph.constant(f"{name}.nothing", np.zeros((), floats))
        y = node("Mul", [x, nothing], f"{name}.none")
        for expert, share in enumerate(shares(graph, weights.decoder, n, gates, chosen)):
            at = f"{name}.experts.{expert}"

            def add_expert(at: str = at, share: str = share, y: str = y) -> str:
                output = one_mlp(graph, self, weights, at, x)
                gate = graph.cast(share, "float32", floats, f"{at}.cast")
                gated = node("Mul", [output, gate], f"{at}.made")
                return node("Add", [y, gated], f"{at}.added")

            if self.chosen_only:
                y = graph.either(used(graph, n, share), f"{at}.sum", add_expert, y)
            else:
                y = add_expert()
        return y

    def quantized(
        self, graph: Graph, name: str, x: str, ints: Ints, bias: np.ndarray | None
    ) -> str:
        """x times a symmetric int4 (blocks along the inputs) or int8 (one scale per output) matrix,
        stored [in, out].

        Raises EdgemedError where the integers have zero points or scales TensorRT does not take.
        """
        if ints.zeros is not None:
            raise EdgemedError(
                f"{name}: has zero points of its own, and TensorRT takes symmetric integers only",
                "Quantize symmetrically, or export with precision=fp16, which expands them",
            )
        if not (ints.scales > 0).all():
            raise EdgemedError(
                f"{name}: has a scale that is not above 0, which TensorRT refuses",
                "Quantize the model again, or export with precision=fp16",
            )
        zero = 1 << ints.bits - 1
        out, inp = ints.q.shape
        # Flipping the top bit of q turns it into q - zero in two's complement.
        signed = np.ascontiguousarray(ints.q.T) ^ np.uint8(zero)
        if ints.bits == 8:
            if (ints.scales != ints.scales[:, :1]).any():
                raise EdgemedError(
                    f"{name}: TensorRT takes int8 with one scale per output, this matrix has one"
                    f" per {ints.block} inputs",
                    "Quantize with group -1, or export with precision=fp16",
                )
            q = graph.constant(f"{name}.q", signed.view(np.int8))
            scale = graph.constant(
                f"{name}.scales", ints.scales[:, 0].astype(graph.precision.floats)
            )
            weight = graph.node("DequantizeLinear", [q, scale], f"{name}.weight", axis=1)
        else:
            # Two of a row share a byte, the first in its low half.
            nibbles = signed.reshape(-1)
            packed = nibbles[0::2] | nibbles[1::2] << 4
            q = graph.constant(
                f"{name}.q",
                packed,
                dims=(inp, out),
                data_type=graph.onnx.TensorProto.INT4,
            )
            scale = graph.constant(f"{name}.scales", ints.scales.T.astype(graph.precision.floats))
            weight = graph.node(
                "DequantizeLinear", [q, scale], f"{name}.weight", axis=0, block_size=ints.block
            )
        if bias is None:
            return graph.node("MatMul", [x, weight], name)
        y = graph.node("MatMul", [x, weight], f"{name}.product")
        return graph.node("Add", [y, graph.constant(f"{name}.bias", bias)], name)

    def w8a8(
        self,
        graph: Graph,
        name: str,
        x: str,
        ints: Ints,
        bias: np.ndarray | None,
        largest: float | None,
    ) -> str:
        """The same where x is quantized to int8 too, with one scale from calibration for the whole
        tensor (`largest` its largest magnitude): explicit quantization, Q and DQ.
        """
        if largest is None:
            raise EdgemedError(
                f"{name}: the checkpoint says nothing of the range of its activations",
                "Quantize with method smoothquant, which measures it on calibration text",
            )
        step = graph.constant(
            f"{name}.step", np.array(max(largest / 127, 1e-7)).astype(graph.precision.floats)
        )
        zero = graph.constant(f"{name}.step_zero", np.zeros((), np.int8))
        integers = graph.node("QuantizeLinear", [x, step, zero], f"{name}.rounded")
        read = graph.node("DequantizeLinear", [integers, step, zero], f"{name}.read")
        return self.quantized(graph, name, read, ints, bias)
