"""Checks every node of an ONNX graph against a table of what one TensorRT version parses, without
TensorRT.

TensorRT says what it refuses only on the device, perhaps hours after the export and on another
desk. The tables (parser_tables/*.yaml) name the source of every entry and say which of their
statements are inferred; passing them is no proof that an engine builds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgemed import params, plugins
from edgemed.errors import EdgemedError, need
from edgemed.onnx.ort_cpu_types import nested

# ONNX's element types by TensorRT's names.
TYPES = {
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "INT32": "INT32",
    "INT64": "INT64",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "INT4": "INT4",
    "BOOL": "BOOL",
    "FLOAT8E4M3FN": "FP8",
    "FLOAT4E2M1": "FP4",
    "DOUBLE": "DOUBLE",
    "UINT4": "UINT4",
    "STRING": "STRING",
}
# Which input's type an operator's row is about, where it is not the first.
TYPED_INPUT = {"Where": 1}


@dataclass(frozen=True)
class Rule:
    """What a parser takes of one operator. types: of its data input, none where it is not parsed.
    source: a key of the table's sources.

    constant: inputs that must be known at build time; zero: inputs that must be absent or all 0;
    below: input -> bound; attributes: name -> values allowed; outputs: how many may be used;
    opset_below: taken below this opset only; int4_into: the only readers of an int4 result.
    """

    types: tuple[str, ...]
    source: str
    constant: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    below: dict[int, int] = field(default_factory=dict)
    attributes: dict[str, list[Any]] = field(default_factory=dict)
    outputs: int | None = None
    opset_below: int | None = None
    int4_into: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Table:
    """One version's parser. since, until: TensorRT versions it holds for, the end excluded.
    inferred: what in it no source states.
    """

    version: str
    since: str
    until: str
    opset: dict[str, Any]
    network_types: tuple[str, ...]
    sources: dict[str, str]
    operators: dict[str, Any]
    inferred: str = ""

    def rule(self, op: str) -> Rule | None:
        """The rule of an operator, None where the table has none."""
        if op not in self.operators:
            return None
        where = f"parser_tables/tensorrt-{self.version}.yaml: {op}"
        return params.build(Rule, self.operators[op], where)

    def holds(self, version: str) -> bool:
        """Whether an installed TensorRT '10.3.0.26' is one this table speaks of."""
        return numbers(self.since) <= numbers(version) < numbers(self.until)


def numbers(version: str) -> tuple[int, ...]:
    """'10.3.0.26' -> (10, 3). Anything behind the second number is a patch and parses the same."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def versions() -> list[str]:
    return sorted(
        (name.removeprefix("tensorrt-") for name in plugins.names("tensorrt/parser_tables")),
        key=numbers,
    )


def read_table(version: str) -> Table:
    """The table of parser_tables/tensorrt-VERSION.yaml. Raises EdgemedError for a version without
    one.
    """
    import yaml

    if version not in versions():
        raise EdgemedError(
            f"there is no table of what TensorRT {version} parses",
            f"Known: {', '.join(versions())}",
        )
    file = plugins.ROOT / "tensorrt" / "parser_tables" / f"tensorrt-{version}.yaml"
    return params.build(Table, yaml.safe_load(file.read_text(encoding="utf-8")), file.name)


def check_graph(file: Path, table: Table) -> dict[str, Any]:
    """Read an ONNX file (not its data) and return nodes, operators {op: count}, dynamic axes,
    inferred statements used, and problems, one sentence each.
    """
    onnx = need("onnx", "build")
    model = onnx.shape_inference.infer_shapes(
        onnx.load(str(file), load_external_data=False), strict_mode=True
    )
    graph = _Graph(onnx, model.graph)
    problems = []
    inferred = []
    if table.inferred:
        inferred.append(table.inferred)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    first, last = table.opset["documented"]
    if not first <= opset <= last:
        if reason := table.opset["beyond"].get(opset):
            inferred.append(f"opset {opset}: {reason}")
        else:
            problems.append(f"opset {opset} is outside {first} to {last}")
    for value in (*model.graph.input, *model.graph.output):
        if graph.types[value.name] not in table.network_types:
            problems.append(
                f"{value.name}: {graph.types[value.name]} cannot enter or leave a network"
            )
    nodes = [node for part in nested(graph.onnx, model.graph) for node in part.node]
    for node in nodes:
        problems += [f"{node.name}: {problem}" for problem in _node(node, graph, table, opset)]
    axes = sorted(
        {
            d.dim_param
            for value in model.graph.input
            for d in value.type.tensor_type.shape.dim
            if d.dim_param
        }
    )
    return {
        "tensorrt": table.version,
        "nodes": len(nodes),
        "opset": opset,
        "operators": dict(Counter(n.op_type for n in nodes)),
        "dynamic_axes": axes,
        "inferred": inferred,
        "problems": problems,
    }


class _Graph:
    """Types, ranks, constants and readers by tensor name."""

    def __init__(self, onnx: Any, graph: Any):
        self.onnx = onnx
        names = {number: name for name, number in onnx.TensorProto.DataType.items()}
        parts = list(nested(onnx, graph))
        values = [
            value for part in parts for value in (*part.input, *part.output, *part.value_info)
        ]
        self.types = {
            v.name: TYPES.get(
                names[v.type.tensor_type.elem_type], names[v.type.tensor_type.elem_type]
            )
            for v in values
        }
        self.ranks = {
            v.name: len(v.type.tensor_type.shape.dim)
            for v in values
            if v.type.tensor_type.HasField("shape")
        }
        stored = [tensor for part in parts for tensor in part.initializer]
        self.constants = {t.name: t for t in stored}
        self.types |= {t.name: TYPES.get(names[t.data_type], names[t.data_type]) for t in stored}
        self.ranks |= {t.name: len(t.dims) for t in stored}
        self.readers: dict[str, list[str]] = {}
        for node in (node for part in parts for node in part.node):
            for name in node.input:
                self.readers.setdefault(name, []).append(node.op_type)
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self.constants[node.output[0]] = attribute.t

    def value(self, name: str) -> np.ndarray | None:
        """A small constant's value; None where it is not constant or lies in the data file."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            return None
        return self.onnx.numpy_helper.to_array(tensor)


def _node(node: Any, graph: _Graph, table: Table, opset: int) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield (
            f"operator {node.op_type} belongs to {node.domain}, and TensorRT parses the default"
            " domain only"
        )
        return
    rule = table.rule(node.op_type)
    if rule is None or not rule.types:
        yield f"operator {node.op_type} is not parsed by TensorRT {table.version}"
        return
    if rule.opset_below and opset >= rule.opset_below:
        yield (
            f"operator {node.op_type} is parsed below opset {rule.opset_below} only"
            f" ({rule.source}), the graph has {opset}"
        )
    yield from _types(node, graph, rule)
    yield from _inputs(node, graph, rule)
    attributes = {
        attribute.name: graph.onnx.helper.get_attribute_value(attribute)
        for attribute in node.attribute
    }
    for name, allowed in rule.attributes.items():
        value = attributes.get(name)
        if isinstance(value, bytes):
            value = value.decode()
        if value is not None and value not in allowed:
            yield (
                f"{node.op_type} with {name}={value}; TensorRT takes {', '.join(map(str, allowed))}"
            )
    used = sum(1 for name in node.output if name)
    if rule.outputs and used > rule.outputs:
        yield f"{node.op_type} with {used} outputs; TensorRT gives {rule.outputs}"


def _types(node: Any, graph: _Graph, rule: Rule) -> Iterator[str]:
    typed = []
    if node.input:
        typed.append(node.input[TYPED_INPUT.get(node.op_type, 0)])
    if node.op_type == "Cast":
        typed.extend(node.output)
    for name in typed:
        kind = graph.types.get(name)
        if kind is None or name not in graph.ranks:
            yield f"the type or rank of '{name}' cannot be inferred"
        elif kind not in rule.types:
            yield f"{node.op_type} of {kind}; TensorRT takes {', '.join(rule.types)}"
        if kind == "INT4" and rule.int4_into:
            readers = set(graph.readers.get(node.output[0], []))
            if readers - set(rule.int4_into) or graph.ranks.get(name) != 2:
                yield (
                    f"int4 of rank {graph.ranks.get(name)} read by"
                    f" {', '.join(sorted(readers)) or 'nothing'}; TensorRT takes matrices read by"
                    f" {', '.join(rule.int4_into)}"
                )


def _inputs(node: Any, graph: _Graph, rule: Rule) -> Iterator[str]:
    names = {index: name for index, name in enumerate(node.input) if name}
    for index in rule.constant:
        if index in names and names[index] not in graph.constants:
            yield f"{node.op_type}'s input '{names[index]}' must be known when the engine is built"
    for index in rule.zero:
        if index in names and ((value := graph.value(names[index])) is None or value.any()):
            yield f"{node.op_type}'s zero point '{names[index]}' must be 0"
    for index, bound in rule.below.items():
        value = graph.value(names[index]) if index in names else None
        if value is None or not (value < bound).all():
            yield f"{node.op_type}'s input '{names.get(index, index)}' must be below {bound}" + (
                "" if value is None else f", it is {value.max()}"
            )


def graph_bytes(folder: Path, name: str) -> int:
    """Size of a graph and its data file."""
    return sum(part.stat().st_size for part in folder.glob(f"{name}.onnx*"))


def estimate(
    folder: Path,
    graphs: tuple[str, ...],
    context: int,
    cache_bytes: int,
    workspace: int,
    scores: int = 0,
) -> dict[str, int]:
    """What building and running are expected to take, in bytes: rules of thumb, not measurements.

    plan: the weights of all graphs in their formats plus 3 %. They are built one after the other:
    building holds the weights of the largest in the parser, the serialized plan and the engine on
    the GPU (three times the weights) besides the workspace. Running holds plans, cache, the
    activations of the longest prompt part (taken as 5 % of the decoder's weights, at least 64 MB)
    and scores, the attention of a vision tower over its largest image.
    """
    sizes = {name: graph_bytes(folder, name) for name in graphs}
    plan = math.ceil(1.03 * sum(sizes.values()))
    largest = max(sizes.values())
    run = plan + cache_bytes + max(64 << 20, sizes["model"] // 20) + scores
    expected = {
        "plan": plan,
        "build_memory": 3 * largest + workspace,
        "run_memory": run,
        "cache": cache_bytes,
        "context": context,
    }
    if scores:
        expected["tower_attention"] = scores
    return expected
