"""Builds the ONNX decoder with KV cache straight from the tensors, one part at a time, without
tracing.

Tracing needs the whole model in memory and leaves a graph nobody chose; writing the nodes ourselves
needs one tensor and gives the same graph for every family. Nodes that depend on the runtime (norm,
attention, quantized product) come from a dialect, so that ONNX Runtime gets its contrib operators
and TensorRT plain ONNX from the same walk over the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from edgemed.console import track
from edgemed.errors import need
from edgemed.models.architecture import DecoderConfig
from edgemed.models.weights import CanonicalWeights, Dense, Packed
from edgemed.quantization.grids import (
    Ints,
    block_ints,
    fitting_group,
    ggml_q8,
    packings_label,
    rtn,
)

if TYPE_CHECKING:
    import torch

ALIGN = 4096  # a page, so that the runtime can map each tensor where it lies


@dataclass(frozen=True)
class Precision:
    """Number formats of a graph. floats: 'float32', 'float16' or 'bfloat16' for activations; bits:
    4 or 8 for the layer matrices (packed ones keep their own), None for floats; group: inputs per
    scale, -1 for a whole row, None for the largest that divides it; accuracy_level: MatMulNBits'
    activation format (1 float32, 4 int8); small_tables: embedding in float16 and output
    matrix in int8 of 32 (the grid of GGUF's Q8_0, so that both engines carry the same integers);
    stream: format of the residual stream and the norms, '' for that of the activations; integers:
    activations are quantized to 8 bits as well.
    """

    floats: str = "float32"
    bits: int | None = None
    group: int | None = None
    accuracy_level: int = 4
    small_tables: bool = False
    stream: str = ""
    integers: bool = False


class Dialect(Protocol):
    """The nodes a runtime wants. Each method adds nodes to the graph and returns the name of the
    result.

    chosen_only: of a mixture's experts those that no token chose are not read. domains: operator
    domain -> version, besides the default domain. widths: bits per integer of the quantized
    products it has.
    """

    @property
    def opset(self) -> int: ...
    @property
    def chosen_only(self) -> bool: ...
    @property
    def domains(self) -> Mapping[str, int]: ...
    @property
    def widths(self) -> tuple[int, ...]: ...

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


@runtime_checkable
class SharedBaseDialect(Protocol):
    """A dialect that can leave experts stored as one shared matrix and differences as they are.

    A target whose dialect is none reads such experts as whole matrices (sum_experts of
    CanonicalWeights).
    """

    def shared_base_experts(
        self, graph: Graph, weights: CanonicalWeights, n: int, x: str, gates: str, chosen: str
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
            self.data.write(memoryview(array.view(np.uint8).data).cast("B"))
            self.offset += array.nbytes
        self.tensors.append(tensor)
        if counted:
            self.layer_bytes += round(array.nbytes * self.share)
        return name

    def floats(
        self, name: str, tensor: torch.Tensor, counted: bool = True, stream: bool = False
    ) -> str:
        """Store a float tensor in the format of the activations, or of the residual stream."""
        kind = self.stream if stream else self.precision.floats
        return self.constant(name, tensor.numpy().astype(kind), counted)

    def cast(self, x: str, have: str, want: str, name: str) -> str:
        """x in the format `want`; no node where it has that already."""
        return x if have == want else self.node("Cast", [x], name, to=self.type_of(want))

    def either(self, condition: str, name: str, then: Callable[[], str], otherwise: str) -> str:
        """An If: what then() adds and returns where the condition holds, else the tensor
        `otherwise`. then() may read everything outside.
        """

        def keep() -> str:
            return self.node("Identity", [otherwise], f"{name}.kept")

        return self.node(
            "If",
            [condition],
            name,
            then_branch=self._branch(f"{name}.then", then),
            else_branch=self._branch(f"{name}.else", keep),
        )

    def _branch(self, name: str, build: Callable[[], str]) -> Any:
        """A graph of its own, of the nodes and tensors that build() adds."""
        outer_nodes = self.nodes
        outer_tensors = self.tensors
        self.nodes = []
        self.tensors = []
        result = self.onnx.helper.make_tensor_value_info(build(), self.float_type, None)
        # Weights lie inside, where runtimes look for those of a quantized product.
        branch = self.onnx.helper.make_graph(
            self.nodes, name, [], [result], initializer=self.tensors
        )
        self.nodes = outer_nodes
        self.tensors = outer_tensors
        return branch

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
        opsets = [helper.make_opsetid("", dialect.opset)]
        for domain, version in dialect.domains.items():
            opsets.append(helper.make_opsetid(domain, version))
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
    bias = None
    if matrix.bias is not None:
        bias = matrix.bias.numpy().astype(graph.precision.floats)
    if graph.precision.integers and not exact:
        # Activations are integers too.
        ints = ints_by_rows(matrix)
        y = dialect.w8a8(graph, name, x, ints, bias, weights.activation_ranges.get(name))
    elif graph.precision.bits is not None and not exact:
        y = quantized_linear(graph, dialect, name, x, matrix, bias)
    else:
        return float_linear(graph, name, x, matrix.dense(), bias)
    return with_adapter(graph, name, shape_of(matrix), x, y)


def shape_of(matrix: Dense | Packed) -> tuple[int, ...]:
    """(out, in)."""
    if isinstance(matrix, Packed):
        return tuple(matrix.q.shape)
    return tuple(matrix.weight.shape)


def ints_by_rows(matrix: Dense | Packed) -> Ints:
    """int8 with one scale per output: a packed matrix's own, or a dense one's quantized by RTN."""
    if isinstance(matrix, Packed):
        q = matrix.q
        scales = matrix.scales
    else:
        q, scales = rtn(matrix.weight, 8, matrix.weight.shape[1])
    return Ints(
        q=q.numpy(),
        scales=scales.numpy(),
        bits=8,
        block=q.shape[1],
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
    """x [.., in] -> x W^T + b [.., out] in integers: those of a packed matrix, or of a dense one
    quantized by RTN in the graph's bits and group.
    """
    if isinstance(matrix, Packed):
        if matrix.g_idx is not None:
            # Old act-order checkpoints number their groups freely: put the inputs of one group side
            # by side.
            order = matrix.g_idx.argsort(stable=True)
            indices = graph.constant(f"{name}.order", order.numpy())
            x = graph.node("Gather", [x, indices], f"{name}.ordered", axis=-1)
            matrix = replace(matrix, q=matrix.q[:, order], g_idx=None)
        return dialect.quantized(graph, name, x, block_ints(matrix, dialect.widths), bias)
    bits = graph.precision.bits
    if bits is None:
        raise ValueError(f"{name} is to be quantized in a graph of floats")
    weight = matrix.weight
    group = graph.precision.group or fitting_group(weight.shape[1])
    if group is None or group == -1:
        group = weight.shape[1]
    q, scales = rtn(weight, bits, group)
    ints = Ints(
        q=q.numpy(),
        scales=scales.numpy(),
        bits=bits,
        block=group,
    )
    return dialect.quantized(graph, name, x, ints, bias)


def low_rank(graph: Graph, dialect: Dialect, weights: CanonicalWeights, name: str, x: str) -> str:
    """x [.., in] -> b (a x) + bias [.., out] of an expert's difference 'name'; where the graph has
    integers, in 8 bits of 32 (the rank filled up with zeros).
    """
    a = weights.factor(f"{name}.a")
    b = weights.factor(f"{name}.b")
    bias = None
    if f"{name}.bias" in weights.stored:
        bias = weights.factor(f"{name}.bias").numpy().astype(graph.precision.floats)
    if graph.precision.bits is None:
        low = float_linear(graph, f"{name}.a", x, a, None)
        return float_linear(graph, f"{name}.b", low, b, bias)
    spare = -len(a) % 32
    low = q8_linear(graph, dialect, f"{name}.a", x, np.pad(a.numpy(), ((0, spare), (0, 0))), None)
    return q8_linear(
        graph, dialect, f"{name}.b", low, np.pad(b.numpy(), ((0, 0), (0, spare))), bias
    )


def q8_linear(
    graph: Graph, dialect: Dialect, name: str, x: str, weight: np.ndarray, bias: np.ndarray | None
) -> str:
    """x [.., in] -> x W^T + b [.., out], the weight float32 [out, in] in 8 bits of 32 (the grid of
    GGUF's Q8_0).
    """
    q, scales = ggml_q8(weight)
    ints = Ints(
        q=q,
        scales=scales,
        bits=8,
        block=32,
    )
    return dialect.quantized(graph, name, x, ints, bias)


def w8a8_refused(weights: CanonicalWeights) -> str | None:
    """Why the layer matrices cannot be products of 8-bit integers, or None."""
    if weights.decoder.experts:
        return (
            "w8a8 is not written for mixtures of experts, whose tokens are gathered; use precision"
            " int8"
        )
    packings = weights.packings()
    if not packings:
        return None
    config = weights.quantization or {}
    symmetric = config.get("sym", True) and not config.get("desc_act", False)
    if packings != {(8, -1)} or not symmetric:
        return (
            "w8a8 takes symmetric int8 with one scale per output, the checkpoint holds"
            f" {packings_label(packings)}; quantize with method smoothquant, or export the float"
            " checkpoint"
        )
    return None


def float_linear(
    graph: Graph, name: str, x: str, weight: torch.Tensor, bias: np.ndarray | None
) -> str:
    y = graph.node("MatMul", [x, graph.floats(f"{name}.weight", weight.T)], f"{name}.product")
    # Before the bias, which onnxruntime fuses with what follows.
    y = with_adapter(graph, name, tuple(weight.shape), x, y)
    if bias is None:
        return y
    return graph.node("Add", [y, graph.constant(f"{name}.bias", bias)], name)


def mlp(graph: Graph, dialect: Dialect, weights: CanonicalWeights, n: int, x: str) -> str:
    """What layer n's MLP or mixture of experts gives for x [1, T, hidden]."""
    d = weights.decoder
    name = f"layers.{n}"
    if not d.sparse(n):
        return one_mlp(graph, dialect, weights, name, x)
    experts = d.mixture
    gates, chosen = routed(graph, weights, name, x)
    if experts.has_shared_base:
        if not isinstance(dialect, SharedBaseDialect):
            raise ValueError("experts that share a matrix are read whole for this dialect")
        y = dialect.shared_base_experts(graph, weights, n, x, gates, chosen)
    else:
        if dialect.chosen_only:
            graph.share = experts.active / experts.count
        y = dialect.experts(graph, weights, n, x, gates, chosen)
        graph.share = 1.0
    if not experts.shared:
        return y
    shared = one_mlp(graph, dialect, weights, f"{name}.shared", x)
    return graph.node("Add", [y, shared], f"{name}.mixed")


def one_mlp(graph: Graph, dialect: Dialect, weights: CanonicalWeights, name: str, x: str) -> str:
    """What one MLP, of a layer or an expert, gives for x [.., hidden]."""
    up = linear(graph, dialect, weights, f"{name}.up", x)
    inner = activated(graph, dialect, weights.decoder, name, up)
    return linear(graph, dialect, weights, f"{name}.down", inner)


def activated(graph: Graph, dialect: Dialect, d: DecoderConfig, name: str, y: str) -> str:
    """What the MLP's 'down' reads, from what its 'up' gives."""
    if not d.gated:
        return dialect.activation(graph, d, f"{name}.act", y)
    gate = f"{name}.gate"
    up = f"{name}.value"
    graph.node("Split", [y], f"{name}.halves", [gate, up], axis=-1, num_outputs=2)
    gate = dialect.activation(graph, d, f"{name}.act", gate)
    return graph.node("Mul", [gate, up], f"{name}.gated")


def routed(graph: Graph, weights: CanonicalWeights, name: str, x: str) -> tuple[str, str]:
    """(gates float32, experts chosen int64), each [1, T, active], of x [1, T, hidden]; float32 in
    every precision (ExpertsConfig).
    """
    experts = weights.decoder.mixture
    node = graph.node
    constant = graph.constant
    router = weights.matrix(f"{name}.router")
    wide = graph.cast(x, graph.precision.floats, "float32", f"{name}.router.input")
    weight = constant(f"{name}.router.weight", router.dense().numpy().T)
    logits = node("MatMul", [wide, weight], f"{name}.router.product")
    if router.bias is not None:
        bias = constant(f"{name}.router.bias", router.bias.numpy())
        logits = node("Add", [logits, bias], f"{name}.router")
    gates = f"{name}.gates"
    chosen = f"{name}.chosen"
    probabilities = node("Softmax", [logits], f"{name}.probabilities", axis=-1)
    active = constant(f"{name}.active", np.array([experts.active]))
    node(
        "TopK",
        [probabilities, active],
        f"{name}.best",
        [gates, chosen],
        axis=-1,
        largest=1,
        sorted=1,
    )
    if experts.renormalised:
        axis = constant(f"{name}.gate_axis", np.array([-1]))
        total = node("ReduceSum", [gates, axis], f"{name}.gate_sum", keepdims=1)
        gates = node("Div", [gates, total], f"{name}.shares")
    return gates, chosen


def shares(graph: Graph, d: DecoderConfig, n: int, gates: str, chosen: str) -> list[str]:
    """For each expert of layer n every token's gate for it, 0 where it chose others: float32 [1, T,
    1]. gates, chosen [1, T, active]: see routed.
    """
    name = f"layers.{n}"
    node = graph.node
    count = d.mixture.count
    last_axis = graph.constant(f"{name}.last_axis", np.array([-1]))
    numbers = graph.constant(f"{name}.numbers", np.arange(count).reshape(1, 1, 1, -1))
    # [1, T, active, 1] against [1, 1, 1, count]: which expert each of a token's slots has.
    chosen_wide = node("Unsqueeze", [chosen, last_axis], f"{name}.chosen_wide")
    same = node("Equal", [chosen_wide, numbers], f"{name}.same")
    # The gate at that expert's place and 0 elsewhere: [1, T, active, count].
    gates_wide = node("Unsqueeze", [gates, last_axis], f"{name}.gates_wide")
    no_gate = graph.constant(f"{name}.no_gate", np.zeros(1, np.float32), dims=())
    spread = node("Where", [same, gates_wide, no_gate], f"{name}.spread")
    # A token's slots have different experts, so their sum is a table [1, T, count].
    slots = graph.constant(f"{name}.slots", np.array([2]))
    table = node("ReduceSum", [spread, slots], f"{name}.table", keepdims=0)
    columns = [f"{name}.experts.{j}.share" for j in range(count)]
    node("Split", [table], f"{name}.columns", columns, axis=2, num_outputs=count)
    return columns


def used(graph: Graph, n: int, share: str) -> str:
    """Whether any token has this share of an expert of layer n: a bool without axes, as a condition
    must be.
    """
    largest = graph.node("ReduceMax", [share], f"{share}.largest", keepdims=0)
    return graph.node("Greater", [largest, f"layers.{n}.no_gate"], f"{share}.used")


def embedding(graph: Graph, weights: CanonicalWeights) -> str:
    """tokens [1, T], positions [1, T] -> hidden states [1, T, hidden]."""
    d = weights.decoder
    x = _looked_up(graph, weights, "embed", "tokens")
    if d.positions == "learned":
        x = graph.node("Add", [x, _looked_up(graph, weights, "positions", "positions")], "text")
    return with_image_features(graph, d, x) if weights.vision else x


def _looked_up(graph: Graph, weights: CanonicalWeights, name: str, index: str) -> str:
    """Rows of an embedding table, in the stream's format."""
    kind = "float16" if graph.precision.small_tables else graph.precision.floats
    table = weights.table(name).numpy().astype(kind)
    stored = graph.constant(f"{name}.table", table, counted=False)
    row = graph.node("Gather", [stored, index], f"{name}.row")
    return graph.cast(row, str(table.dtype), graph.stream, f"{name}.value")


def with_image_features(graph: Graph, d: DecoderConfig, x: str) -> str:
    """Image features in their places: input feature_rows int64 [1, T] says which row of features
    [n, hidden] a token is, -1 for text.
    """
    onnx = graph.onnx.TensorProto
    graph.value("inputs", "feature_rows", onnx.INT64, [1, "new"])
    graph.value("inputs", "features", onnx.FLOAT, ["features", d.hidden])
    zero = graph.constant("features.zero", np.array(0))
    # Text reads row 0, which is then not used.
    rows = graph.node("Max", ["feature_rows", zero], "features.picked")
    picked = graph.node("Gather", ["features", rows], "features.row", axis=0)
    picked = graph.cast(picked, "float32", graph.stream, "features.cast")
    is_image = graph.node("GreaterOrEqual", ["feature_rows", zero], "features.seen")
    axis = graph.constant("features.axis", np.array([2]))
    mask = graph.node("Unsqueeze", [is_image, axis], "features.mask")
    return graph.node("Where", [mask, picked, x], "hidden")


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
    bias = None
    if matrix.bias is not None:
        bias = matrix.bias.numpy().astype(graph.precision.floats)
    if name == "lm_head" and graph.precision.small_tables and d.hidden % 32 == 0:
        y = q8_linear(graph, dialect, name, picked, matrix.dense().numpy(), bias)
    else:
        y = float_linear(graph, name, picked, matrix.dense(), bias)
    if graph.precision.floats == "float32":
        graph.node("Identity", [y], "scores")
    else:
        graph.node("Cast", [y], "scores", to=onnx.TensorProto.FLOAT)
    width = d.vocab if d.head == "lm" else d.head_size
    graph.value("outputs", "scores", onnx.TensorProto.FLOAT, [1, "selected", width])


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
        scale = graph.floats(f"{name}.weight", weight, stream=True)
        shift = None
        if bias is not None:
            shift = graph.floats(f"{name}.bias", bias, stream=True)
        return dialect.residual_norm(graph, d, name, x, branch, scale, shift)

    x = embedding(graph, weights)
    # What the last half of a layer adds to the residual stream; the next norm adds it.
    branch: str | None = None
    for n in track(range(d.layers), "onnx graph"):
        name = f"layers.{n}"
        x, read = norm(f"{name}.attn_norm", x, branch)
        qkv = linear(graph, dialect, weights, f"{name}.qkv", read)
        mixed = dialect.attention(graph, d, n, qkv)
        branch = linear(graph, dialect, weights, f"{name}.o", mixed)
        if d.parallel:
            mlp_branch = mlp(graph, dialect, weights, n, read)
            branch = graph.node("Add", [branch, mlp_branch], f"{name}.branches")
        else:
            x, read = norm(f"{name}.mlp_norm", x, branch)
            branch = mlp(graph, dialect, weights, n, read)
    _, y = norm("final_norm", x, branch)
    scores(graph, dialect, weights, y)
    graph.save(weights.family.name, dialect)
    return graph
