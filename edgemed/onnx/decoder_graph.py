"""Builds the ONNX decoder with KV cache straight from the tensors, one part at a time, without
tracing.

Tracing needs the whole model in memory and leaves a graph nobody chose; writing the nodes ourselves
needs one tensor and gives the same graph for every family. Nodes that depend on the runtime (norm,
attention, quantized product) come from a dialect, so that ONNX Runtime gets its contrib operators
and TensorRT plain ONNX from the same walk over the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgemed.console import track
from edgemed.errors import need
from edgemed.models.architecture import DecoderConfig
from edgemed.models.weights import CanonicalWeights, Dense, Packed
from edgemed.quantization.grids import Ints, block_ints, ggml_q8, labelled, rtn

if TYPE_CHECKING:
    import torch

ALIGN = 4096  # a page, so that the runtime can map each tensor where it lies


@dataclass(frozen=True)
class Precision:
    """Number formats of a graph. floats: 'float32', 'float16' or 'bfloat16' for activations; bits:
    4 or 8 for the layer matrices (packed ones keep their own), None for floats; group: inputs per
    scale, -1 for a whole row; accuracy_level: MatMulNBits' activation format (1 float32, 4 int8);
    small_tables: embedding in float16 and output matrix in int8 of 32 (the grid of GGUF's Q8_0, so
    that both engines carry the same integers); stream: format of the residual stream and the norms,
    '' for that of the activations; integers: activations are rounded to 8 bits as well.
    """

    floats: str = "float32"
    bits: int | None = None
    group: int = 128
    accuracy_level: int = 4
    small_tables: bool = False
    stream: str = ""
    integers: bool = False


class Dialect(Protocol):
    """The nodes a runtime wants. Each method adds nodes to the graph and returns the name of the
    result. chosen_only: of a mixture's experts those that no token chose are not read. A target
    that reads experts whole (Weights) has no `based`.
    """

    opset: int
    chosen_only: bool
    domains: dict[str, int]
    widths: tuple[int, ...]  # bits per integer of the quantized products it has

    def inputs(self, graph: Graph, d: DecoderConfig) -> None: ...
    def residual_norm(
        self,
        graph: Graph,
        d: DecoderConfig,
        name: str,
        x: str,
        add: str | None,
        weight: str,
        bias: str | None,
    ) -> tuple[str, str]: ...
    def attention(self, graph: Graph, d: DecoderConfig, layer: int, qkv: str) -> str: ...
    def activation(self, graph: Graph, d: DecoderConfig, name: str, x: str) -> str: ...
    def experts(
        self, graph: Graph, weights: CanonicalWeights, n: int, x: str, gates: str, chosen: str
    ) -> str: ...
    def based(
        self, graph: Graph, weights: CanonicalWeights, n: int, x: str, gates: str, chosen: str
    ) -> str: ...
    def quantized(
        self, graph: Graph, name: str, x: str, ints: Ints, bias: np.ndarray | None
    ) -> str: ...
    def w8a8(
        self,
        graph: Graph,
        name: str,
        x: str,
        ints: Ints,
        bias: np.ndarray | None,
        largest: float | None,
    ) -> str: ...


@dataclass
class Graph:
    """An ONNX graph under construction; tensors go straight to the data file."""

    out: Path
    precision: Precision
    file: str = "model.onnx"
    nodes: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    offset: int = 0
    named: set[str] = field(default_factory=set)  # nodes that are made once for all who need them
    layer_bytes: int = 0  # weight bytes every new token has to read
    adapted: frozenset[str] = frozenset()  # canonical parts that an adapter may change at run time
    # what they add to the residual stream before its next norm
    changes: list[str] = field(default_factory=list)
    share: float = 1.0  # how much of what is stored now that is: of experts, those that are chosen

    def __post_init__(self) -> None:
        self.onnx = need("onnx", "build")
        self.data = open(self.out / self.data_file, "wb")  # noqa: SIM115 - save() closes it

    @property
    def data_file(self) -> str:
        return f"{self.file}.data"

    @property
    def float_type(self) -> int:
        return self.type_of(self.precision.floats)

    @property
    def stream(self) -> str:
        return self.precision.stream or self.precision.floats

    def type_of(self, floats: str) -> int:
        return getattr(self.onnx.TensorProto, {"float32": "FLOAT"}.get(floats, floats.upper()))

    def node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        outputs: list[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add one node; its first output is called `name` unless outputs are given."""
        outputs = outputs or [name]
        self.nodes.append(
            self.onnx.helper.make_node(
                op, inputs, outputs, name=f"{name}/{op}", domain=domain, **attributes
            )
        )
        return outputs[0]

    def constant(
        self,
        name: str,
        array: np.ndarray,
        counted: bool = True,
        dims: tuple[int, ...] | None = None,
        data_type: int | None = None,
    ) -> str:
        """Store a tensor. counted: it is read whole for every new token (embedding tables are not).

        dims, data_type: what the bytes of `array` stand for, where numpy has no such type (packed
        int4).
        """
        array = np.ascontiguousarray(array)
        tensor = self.onnx.TensorProto(
            name=name,
            dims=array.shape if dims is None else dims,
            data_type=data_type or self.onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
        )
        if array.nbytes < 1024:
            tensor.raw_data = array.tobytes()
        else:
            padding = -self.offset % ALIGN
            self.data.write(b"\0" * padding)
            self.offset += padding
            tensor.data_location = self.onnx.TensorProto.EXTERNAL
            for key, value in (
                ("location", self.data_file),
                ("offset", self.offset),
                ("length", array.nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
            # as bytes: Python's buffers know no bfloat16
            self.data.write(memoryview(array.view(np.uint8)).cast("B"))
            self.offset += array.nbytes
        self.tensors.append(tensor)
        self.layer_bytes += round(array.nbytes * self.share) if counted else 0
        return name

    def floats(
        self, name: str, tensor: torch.Tensor, counted: bool = True, stream: bool = False
    ) -> str:
        return self.constant(
            name, tensor.numpy().astype(self.stream if stream else self.precision.floats), counted
        )

    def cast(self, x: str, have: str, want: str, name: str) -> str:
        """x in the format `want`; no node where it has that already."""
        return x if have == want else self.node("Cast", [x], name, to=self.type_of(want))

    def either(self, condition: str, name: str, then: Callable[[], str], otherwise: str) -> str:
        """An If: what then() adds and returns where the condition holds, else the tensor
        `otherwise`. then() may read everything outside.
        """
        ways = {}
        for way, build in (
            ("then", then),
            ("else", lambda: self.node("Identity", [otherwise], f"{name}.kept")),
        ):
            outside = (self.nodes, self.tensors)
            self.nodes = []
            self.tensors = []
            result = self.onnx.helper.make_tensor_value_info(build(), self.float_type, None)
            # Weights lie inside, where runtimes look for those of a quantized product.
            ways[f"{way}_branch"] = self.onnx.helper.make_graph(
                self.nodes, f"{name}.{way}", [], [result], initializer=self.tensors
            )
            self.nodes, self.tensors = outside
        return self.node("If", [condition], name, **ways)

    def value(self, kind: str, name: str, dtype: int, shape: list[int | str]) -> None:
        getattr(self, kind).append(self.onnx.helper.make_tensor_value_info(name, dtype, shape))

    def optional(self, name: str, shape: list[int | str]) -> str:
        """An input that need not be given: without it, it is a tensor in which every size given by
        a name is 0.
        """
        self.value("inputs", name, self.float_type, shape)
        self.tensors.append(
            self.onnx.TensorProto(
                name=name,
                dims=[size if isinstance(size, int) else 0 for size in shape],
                data_type=self.float_type,
                raw_data=b"",
            )
        )
        return name

    def save(self, name: str, dialect: Dialect) -> None:
        """Write model.onnx; raises onnx's own error where the graph is not well formed (a bug)."""
        helper = self.onnx.helper
        self.data.close()
        graph = helper.make_graph(
            self.nodes, name, self.inputs, self.outputs, initializer=self.tensors
        )
        opsets = [
            helper.make_opsetid("", dialect.opset),
            *(helper.make_opsetid(d, v) for d, v in dialect.domains.items()),
        ]
        model = helper.make_model(
            graph, opset_imports=opsets, producer_name="edgemed", ir_version=10
        )
        self.onnx.save_model(model, self.out / self.file)


def linear(
    graph: Graph,
    dialect: Dialect,
    weights: CanonicalWeights,
    name: str,
    x: str,
    exact: bool = False,
) -> str:
    """x [.., in] -> x W^T + b [.., out], in the precision of the graph; exact: in its floats, not
    its integers.
    """
    matrix = weights.matrix(name)
    bits = None if exact else graph.precision.bits
    bias = matrix.bias.numpy().astype(graph.precision.floats) if matrix.bias is not None else None
    shape = (matrix.q if isinstance(matrix, Packed) else matrix.weight).shape
    if graph.precision.integers and not exact:
        q, scales = (
            (matrix.q, matrix.scales)
            if isinstance(matrix, Packed)
            else rtn(matrix.dense(), 8, matrix.weight.shape[1])
        )
        y = dialect.w8a8(
            graph,
            name,
            x,
            Ints(
                q.numpy(),
                scales.numpy(),
                8,
                q.shape[1],
            ),
            bias,
            weights.activation_ranges.get(name),
        )
        return with_adapter(graph, name, shape, x, y)
    if bits is None:
        return float_linear(graph, name, x, matrix.dense(), bias)
    return with_adapter(
        graph, name, shape, x, quantized_linear(graph, dialect, name, x, matrix, bias)
    )


def with_adapter(graph: Graph, name: str, shape: tuple[int, ...], x: str, y: str) -> str:
    """y; of a matrix that adapters change y + (x A) B, with the factors NAME.lora_a [in, rank] and
    NAME.lora_b [rank, out] given at run time. Without them their rank is 0.

    In float32, what goes to the residual stream anyway is added there (Graph.changes): onnxruntime
    fuses a product's bias with the sum behind it, and with a node between the two the base's scores
    would differ in their last digits from those of an engine without adapters. In float16 that sum
    would be rounded once more.
    """
    if name not in graph.adapted:
        return y
    rows, columns = shape
    a = graph.optional(f"{name}.lora_a", [columns, f"{name}.rank"])
    b = graph.optional(f"{name}.lora_b", [f"{name}.rank", rows])
    low = graph.node("MatMul", [x, a], f"{name}.low")
    change = graph.node("MatMul", [low, b], f"{name}.change")
    if graph.precision.floats == "float32" and name.endswith((".o", ".down")):
        graph.changes.append(change)
        return y
    return graph.node("Add", [y, change], f"{name}.adapted")


def quantized_linear(
    graph: Graph,
    dialect: Dialect,
    name: str,
    x: str,
    matrix: Dense | Packed,
    bias: np.ndarray | None,
) -> str:
    """The same in integers: a packed matrix's own, or a dense one's rounded to nearest in the
    graph's bits and group.
    """
    if isinstance(matrix, Packed):
        if matrix.g_idx is not None:
            # Old act-order checkpoints number their groups freely: put the inputs of one group side
            # by side.
            order = matrix.g_idx.argsort(stable=True)
            x = graph.node(
                "Gather",
                [x, graph.constant(f"{name}.order", order.numpy())],
                f"{name}.ordered",
                axis=-1,
            )
            matrix = Packed(
                matrix.q[:, order],
                matrix.scales,
                matrix.zeros,
                None,
                matrix.bits,
                matrix.group,
                matrix.bias,
            )
        return dialect.quantized(graph, name, x, block_ints(matrix, dialect.widths), bias)
    weight = matrix.dense()
    group = weight.shape[1] if graph.precision.group == -1 else graph.precision.group
    q, scales = rtn(weight, graph.precision.bits, group)
    return dialect.quantized(
        graph,
        name,
        x,
        Ints(
            q.numpy(),
            scales.numpy(),
            graph.precision.bits,
            group,
        ),
        bias,
    )


def low_rank(graph: Graph, dialect: Dialect, weights: CanonicalWeights, name: str, x: str) -> str:
    """x [.., in] -> b (a x) + bias [.., out] of an expert's difference 'name'; where the graph has
    integers, in 8 bits of 32 (the rank filled up with zeros).
    """
    a = weights.factor(f"{name}.a")
    b = weights.factor(f"{name}.b")
    bias = (
        weights.factor(f"{name}.bias").numpy().astype(graph.precision.floats)
        if f"{name}.bias" in weights.stored
        else None
    )
    if graph.precision.bits is None:
        return float_linear(
            graph, f"{name}.b", float_linear(graph, f"{name}.a", x, a, None), b, bias
        )
    spare = -len(a) % 32
    for form, factor, added in (
        ("a", np.pad(a.numpy(), ((0, spare), (0, 0))), None),
        ("b", np.pad(b.numpy(), ((0, 0), (0, spare))), bias),
    ):
        q, scales = ggml_q8(factor)
        x = dialect.quantized(
            graph,
            f"{name}.{form}",
            x,
            Ints(
                q,
                scales,
                8,
                32,
            ),
            added,
        )
    return x


def w8a8_refused(weights: CanonicalWeights) -> str | None:
    """Why the layer matrices cannot be products of 8-bit integers, or None."""
    if weights.decoder.experts:
        return (
            "w8a8 is not written for mixtures of experts, whose tokens are gathered; use precision"
            " int8"
        )
    stored = weights.packings()
    if stored and (
        stored != {(8, -1)}
        or not weights.quantization.get("sym", True)
        or weights.quantization.get("desc_act", False)
    ):
        return (
            "w8a8 takes symmetric int8 with one scale per output, the checkpoint holds"
            f" {labelled(stored)}; quantize with method smoothquant, or export the float checkpoint"
        )
    return None


def float_linear(
    graph: Graph, name: str, x: str, weight: torch.Tensor, bias: np.ndarray | None
) -> str:
    y = graph.node("MatMul", [x, graph.floats(f"{name}.weight", weight.T)], f"{name}.product")
    # Before the bias, which onnxruntime fuses with what follows.
    y = with_adapter(graph, name, weight.shape, x, y)
    return (
        graph.node("Add", [y, graph.constant(f"{name}.bias", bias)], name)
        if bias is not None
        else y
    )


def mlp(graph: Graph, dialect: Dialect, weights: CanonicalWeights, n: int, x: str) -> str:
    """What layer n's MLP or mixture of experts gives for x [1, T, hidden]."""
    d = weights.decoder
    name = f"layers.{n}"
    if not d.sparse(n):
        return one_mlp(graph, dialect, weights, name, x)
    gates, chosen = routed(graph, weights, name, x)
    if d.experts.has_shared_base:
        y = dialect.based(graph, weights, n, x, gates, chosen)
        return (
            graph.node(
                "Add", [y, one_mlp(graph, dialect, weights, f"{name}.shared", x)], f"{name}.mixed"
            )
            if d.experts.shared
            else y
        )
    graph.share = d.experts.active / d.experts.count if dialect.chosen_only else 1.0
    y = dialect.experts(graph, weights, n, x, gates, chosen)
    graph.share = 1.0
    return (
        graph.node(
            "Add", [y, one_mlp(graph, dialect, weights, f"{name}.shared", x)], f"{name}.mixed"
        )
        if d.experts.shared
        else y
    )


def one_mlp(graph: Graph, dialect: Dialect, weights: CanonicalWeights, name: str, x: str) -> str:
    """What one MLP, of a layer or an expert, gives for x [.., hidden]."""
    y = activated(
        graph, dialect, weights.decoder, name, linear(graph, dialect, weights, f"{name}.up", x)
    )
    return linear(graph, dialect, weights, f"{name}.down", y)


def activated(graph: Graph, dialect: Dialect, d: DecoderConfig, name: str, y: str) -> str:
    """What the MLP's 'down' reads, from what its 'up' gives."""
    if d.gated:
        gate = f"{name}.gate"
        up = f"{name}.value"
        graph.node("Split", [y], f"{name}.halves", [gate, up], axis=-1, num_outputs=2)
        return graph.node(
            "Mul", [dialect.activation(graph, d, f"{name}.act", gate), up], f"{name}.gated"
        )
    return dialect.activation(graph, d, f"{name}.act", y)


def routed(graph: Graph, weights: CanonicalWeights, name: str, x: str) -> tuple[str, str]:
    """(gates float32, experts chosen int64), each [1, T, active], of x [1, T, hidden]; float32 in
    every precision (family.Experts).
    """
    e = weights.decoder.experts
    node = graph.node
    router = weights.matrix(f"{name}.router")
    wide = graph.cast(x, graph.precision.floats, "float32", f"{name}.router.input")
    scores = node(
        "MatMul",
        [wide, graph.constant(f"{name}.router.weight", router.dense().numpy().T)],
        f"{name}.router.product",
    )
    if router.bias is not None:
        scores = node(
            "Add",
            [scores, graph.constant(f"{name}.router.bias", router.bias.numpy())],
            f"{name}.router",
        )
    gates = f"{name}.gates"
    chosen = f"{name}.chosen"
    probabilities = node("Softmax", [scores], f"{name}.probabilities", axis=-1)
    node(
        "TopK",
        [probabilities, graph.constant(f"{name}.active", np.array([e.active]))],
        f"{name}.best",
        [gates, chosen],
        axis=-1,
        largest=1,
        sorted=1,
    )
    if e.renormalised:
        total = node(
            "ReduceSum",
            [gates, graph.constant(f"{name}.gate_axis", np.array([-1]))],
            f"{name}.gate_sum",
            keepdims=1,
        )
        gates = node("Div", [gates, total], f"{name}.shares")
    return gates, chosen


def shares(graph: Graph, d: DecoderConfig, n: int, gates: str, chosen: str) -> list[str]:
    """For each expert of layer n every token's gate for it, 0 where it chose others: float32 [1, T,
    1]. gates, chosen [1, T, active]: see routed.
    """
    name = f"layers.{n}"
    node = graph.node
    last = graph.constant(f"{name}.last_axis", np.array([-1]))
    numbers = graph.constant(f"{name}.numbers", np.arange(d.experts.count).reshape(1, 1, 1, -1))
    same = node(
        "Equal", [node("Unsqueeze", [chosen, last], f"{name}.chosen_wide"), numbers], f"{name}.same"
    )
    spread = node(
        "Where",
        [
            same,
            node("Unsqueeze", [gates, last], f"{name}.gates_wide"),
            graph.constant(f"{name}.no_gate", np.zeros(1, np.float32), dims=()),
        ],
        f"{name}.spread",
    )
    table = node(
        "ReduceSum",
        [spread, graph.constant(f"{name}.slots", np.array([2]))],
        f"{name}.table",
        keepdims=0,
    )
    columns = [f"{name}.experts.{j}.share" for j in range(d.experts.count)]
    node("Split", [table], f"{name}.columns", columns, axis=2, num_outputs=d.experts.count)
    return columns


def used(graph: Graph, n: int, share: str) -> str:
    """Whether any token has this share of an expert of layer n: a bool without axes, as a condition
    must be.
    """
    return graph.node(
        "Greater",
        [graph.node("ReduceMax", [share], f"{share}.largest", keepdims=0), f"layers.{n}.no_gate"],
        f"{share}.used",
    )


def embedding(graph: Graph, weights: CanonicalWeights) -> str:
    """tokens [1, T], positions [1, T] -> hidden states [1, T, hidden]."""
    rows = []
    d = weights.decoder
    for name, index in (
        ("embed", "tokens"),
        *((("positions", "positions"),) if d.positions == "learned" else ()),
    ):
        table = weights.table(name).numpy()
        table = table.astype("float16" if graph.precision.small_tables else graph.precision.floats)
        row = graph.node(
            "Gather", [graph.constant(f"{name}.table", table, counted=False), index], f"{name}.row"
        )
        rows.append(graph.cast(row, str(table.dtype), graph.stream, f"{name}.value"))
    x = graph.node("Add", rows, "text") if len(rows) > 1 else rows[0]
    return with_pictures(graph, d, x) if weights.vision else x


def with_pictures(graph: Graph, d: DecoderConfig, x: str) -> str:
    """Image features in their places: input feature_rows int64 [1, T] says which row of features
    [n, hidden] a token is, -1 for text.
    """
    onnx = graph.onnx.TensorProto
    graph.value("inputs", "feature_rows", onnx.INT64, [1, "new"])
    graph.value("inputs", "features", onnx.FLOAT, ["features", d.hidden])
    zero = graph.constant("features.zero", np.array(0))
    picked = graph.node(
        "Gather",
        ["features", graph.node("Max", ["feature_rows", zero], "features.picked")],
        "features.row",
        axis=0,
    )
    picked = graph.cast(picked, "float32", graph.stream, "features.cast")
    seen = graph.node(
        "Unsqueeze",
        [
            graph.node("GreaterOrEqual", ["feature_rows", zero], "features.seen"),
            graph.constant("features.axis", np.array([2])),
        ],
        "features.mask",
    )
    return graph.node("Where", [seen, picked, x], "hidden")


def scores(graph: Graph, dialect: Dialect, weights: CanonicalWeights, x: str) -> None:
    """Final hidden states [1, T, hidden] -> output 'scores' float32 [1, selected, width]: logits,
    or the scores of a head.
    """
    d = weights.decoder
    onnx = graph.onnx
    graph.value("inputs", "select", onnx.TensorProto.INT64, ["selected"])
    picked = graph.node("Gather", [x, "select"], "picked", axis=1)
    name = "lm_head" if d.head == "lm" else "head"
    matrix = weights.matrix(name)
    bias = matrix.bias.numpy().astype(graph.precision.floats) if matrix.bias is not None else None
    if name == "lm_head" and graph.precision.small_tables and d.hidden % 32 == 0:
        q, scale = ggml_q8(matrix.dense().numpy())
        y = dialect.quantized(
            graph,
            name,
            picked,
            Ints(
                q,
                scale,
                8,
                32,
            ),
            bias,
        )
    else:
        y = float_linear(graph, name, picked, matrix.dense(), bias)
    if graph.precision.floats == "float32":
        graph.node("Identity", [y], "scores")
    else:
        graph.node("Cast", [y], "scores", to=onnx.TensorProto.FLOAT)
    graph.value(
        "outputs",
        "scores",
        onnx.TensorProto.FLOAT,
        [1, "selected", d.vocab if d.head == "lm" else d.head_size],
    )


def build_decoder(
    weights: CanonicalWeights,
    out: Path,
    precision: Precision,
    dialect: Dialect,
    adapted: frozenset[str] = frozenset(),
) -> Graph:
    """Write model.onnx and model.onnx.data into `out`, holding one part in memory at a time.
    Returns the finished graph. adapted: see with_adapter.
    """
    d = weights.decoder
    graph = Graph(out, precision, adapted=adapted)
    for name in ("tokens", "positions"):
        graph.value("inputs", name, graph.onnx.TensorProto.INT64, [1, "new"])
    dialect.inputs(graph, d)

    def norm(name: str, x: str, branch: str | None) -> tuple[str, str]:
        weight, bias = weights.norm(name)
        if d.norm == "layernorm" and bias is None:
            bias = weight.new_zeros(weight.shape)
        while graph.changes:
            change = graph.changes.pop()
            x = graph.node("Add", [x, change], f"{change}d")
        return dialect.residual_norm(
            graph,
            d,
            name,
            x,
            branch,
            graph.floats(f"{name}.weight", weight, stream=True),
            None if bias is None else graph.floats(f"{name}.bias", bias, stream=True),
        )

    x = embedding(graph, weights)
    branch = None
    for n in track(range(d.layers), "onnx graph"):
        name = f"layers.{n}"
        x, read = norm(f"{name}.attn_norm", x, branch)
        branch = linear(
            graph,
            dialect,
            weights,
            f"{name}.o",
            dialect.attention(graph, d, n, linear(graph, dialect, weights, f"{name}.qkv", read)),
        )
        if d.parallel:
            branch = graph.node(
                "Add", [branch, mlp(graph, dialect, weights, n, read)], f"{name}.branches"
            )
        else:
            x, read = norm(f"{name}.mlp_norm", x, branch)
            branch = mlp(graph, dialect, weights, n, read)
    _, y = norm("final_norm", x, branch)
    scores(graph, dialect, weights, y)
    graph.save(weights.family.name, dialect)
    return graph
