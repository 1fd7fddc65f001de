"""The ONNX Runtime target: a decoder built with ONNX Runtime's contrib operators, run with a KV cache that is never copied.

GroupQueryAttention reads and writes one shared buffer per layer in place and MatMulNBits keeps 4- and 8-bit weights packed;
both were measured fastest for one-sequence decoding (bench/attention_ops.py, bench/accuracy_level.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgemed.errors import EdgemedError, need
from edgemed.grid import Ints
from edgemed.session import check_room

if TYPE_CHECKING:
    from edgemed.engine import Engine
    from edgemed.family import Decoder
    from edgemed.graph import Graph
    from edgemed.weights import Weights

MS = "com.microsoft"
# Largest logit error against the float32 source, for precisions that must be exact.
EXACT = {"fp32": 1e-3}
# Linux's advice to move pages into huge ones now; Python's mmap module does not know it.
MADV_COLLAPSE = 25
PAGES = Path("/sys/kernel/mm/transparent_hugepage")
# The package that runs these engines, and the extra that installs it.
RUNTIME = ("onnxruntime", "onnx")


@dataclass(frozen=True)
class Params:
    """precision: 'auto' carries a quantized checkpoint's integers and is fp32 otherwise; int8/int4 round other matrices to nearest.

    group: inputs per scale where edgemed does that rounding. accuracy_level: 4 computes with int8 activations, 1 with float32.
    """

    precision: Literal["auto", "fp32", "fp16", "int8", "int4"] = "auto"
    group: Literal[32, 64, 128] = 128
    accuracy_level: Literal[1, 4] = 4


def label(params: Params) -> str:
    """A short engine name."""
    return "onnx" if params.precision == "auto" else f"onnx-{params.precision}"


def inputs(params: Params) -> dict[str, str]:
    """sha256 of every file that params name: none."""
    return {}


def bits_of(weights: Weights, params: Params) -> int | None:
    if params.precision == "auto":
        return weights.quantization["bits"] if weights.quantization else None
    return {"int8": 8, "int4": 4}.get(params.precision)


def supports(weights: Weights, params: Params) -> str | None:
    """Why this model cannot become this engine, or None."""
    d, bits = weights.decoder, bits_of(weights, params)
    stored = weights.quantization["bits"] if weights.quantization else None
    if bits and stored and bits != stored:
        return f"the checkpoint holds {stored}-bit integers and precision {params.precision} asks for {bits}; use precision auto"
    if stored and weights.quantization["group_size"] != -1 and weights.quantization["group_size"] % 16:
        return f"MatMulNBits needs groups that are a multiple of 16, this checkpoint has {weights.quantization['group_size']}"
    if d.head_dim % 8:
        return f"GroupQueryAttention needs a head size that is a multiple of 8, this model has {d.head_dim}"
    if d.hidden % 32:
        return f"hidden size {d.hidden} is not a multiple of 32"
    if bits and not stored and (d.hidden % params.group or d.ffn % params.group):
        return f"group {params.group} does not divide rows of {d.hidden} and {d.ffn}; choose group 32 or 64"
    return None


class OrtDialect:
    """ONNX Runtime's operators: GroupQueryAttention, MatMulNBits, SkipLayerNormalization, FastGelu (domain com.microsoft)."""

    opset = 20
    domains = {MS: 1}

    def inputs(self, graph: Graph, d: Decoder) -> None:
        int32 = graph.onnx.TensorProto.INT32
        graph.value("inputs", "last_index", int32, [1])  # index of the newest position: total - 1
        graph.value("inputs", "total", int32, [1])
        shape = [1, d.kv_heads, "context", d.head_dim]
        for n in range(d.layers):
            for part in ("key", "value"):
                graph.value("inputs", f"past.{n}.{part}", graph.float_type, shape)
                graph.value("outputs", f"present.{n}.{part}", graph.float_type, shape)

    def residual_norm(self, graph: Graph, d: Decoder, name: str, x: str, add: str | None, weight: str, bias: str) -> tuple[str, str]:
        """(x + add, norm(x + add)); one fused node where there is something to add."""
        if add is None:
            return x, graph.node("LayerNormalization", [x, weight, bias], name, epsilon=d.norm_eps, axis=-1)
        outputs = [name, "", "", f"{name}.sum"]
        graph.node("SkipLayerNormalization", [x, add, weight, bias], name, outputs, MS, epsilon=d.norm_eps)
        return f"{name}.sum", name

    def attention(self, graph: Graph, d: Decoder, layer: int, qkv: str) -> str:
        past = [f"past.{layer}.key", f"past.{layer}.value"]
        name = f"layers.{layer}.attention"
        outputs = [name, f"present.{layer}.key", f"present.{layer}.value"]
        return graph.node(
            "GroupQueryAttention", [qkv, "", "", *past, "last_index", "total"], name, outputs, MS,
            num_heads=d.heads, kv_num_heads=d.kv_heads, scale=d.score_scale[layer],
        )

    def activation(self, graph: Graph, d: Decoder, name: str, x: str) -> str:
        return graph.node("FastGelu" if d.activation == "gelu_tanh" else "Gelu", [x], name, domain=MS)

    def quantized(self, graph: Graph, name: str, x: str, ints: Ints, bias: np.ndarray | None) -> str:
        out, inp = ints.q.shape
        blocks = ints.q.reshape(out, inp // ints.block, ints.block)
        packed = blocks if ints.bits == 8 else blocks[..., 0::2] | blocks[..., 1::2] << 4
        inputs = [x, graph.constant(f"{name}.q", packed), graph.constant(f"{name}.scales", ints.scales.astype(graph.precision.floats))]
        inputs += [graph.constant(f"{name}.zeros", _pack_zeros(ints)) if ints.zeros is not None else "", ""]
        inputs += [graph.constant(f"{name}.bias", bias)] if bias is not None else []
        while not inputs[-1]:
            inputs.pop()
        return graph.node(
            "MatMulNBits", inputs, name, domain=MS, K=inp, N=out, bits=ints.bits, block_size=ints.block, accuracy_level=graph.precision.accuracy_level
        )


def _pack_zeros(ints: Ints) -> np.ndarray:
    if ints.bits == 8:
        return ints.zeros
    padded = np.pad(ints.zeros, ((0, 0), (0, ints.zeros.shape[1] % 2)))
    return padded[:, 0::2] | padded[:, 1::2] << 4


def build(weights: Weights, out: Path, params: Params) -> dict[str, Any]:
    """Write model.onnx (+ .data); returns the facts for engine.json and the manifest."""
    from edgemed.graph import Precision, build_decoder

    bits = bits_of(weights, params)
    floats = "float16" if params.precision == "fp16" else "float32"
    group = weights.quantization["group_size"] if weights.quantization else params.group
    precision = Precision(floats, bits, params.group, params.accuracy_level, small_tables=bits is not None)
    graph = build_decoder(weights, out, precision, OrtDialect())
    origin = "gptq checkpoint" if weights.quantization else "rounded to nearest"
    label = f"int{bits} {'per column' if group == -1 else f'g{group}'}" if bits else {"float32": "fp32", "float16": "fp16"}[floats]
    return {
        "precision": label, "bytes_per_token": graph.layer_bytes, "attention": "GroupQueryAttention, shared buffer",
        **({"integers": origin, "output_matrix": "int8 of 32 (Q8_0 grid)", "embedding": "float16"} if bits else {}),
    }


def open(engine: Engine, threads: int | None) -> OrtSession:
    return OrtSession(engine, threads)


def _lazy_zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    # Pages become resident as the context fills. Huge pages would make the whole buffer resident at the first token, because
    # every head writes at its own distant place.
    buffer = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        buffer.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(buffer, dtype).reshape(shape)


def _use_huge_pages() -> None:
    """Move this process's large private memory into huge pages, where Linux has them and can (6.1 or newer); nothing is lost where not."""
    # Every weight is read once per token, and with pages of 4 KB the CPU's prefetch stops at the end of each. onnxruntime allocates the
    # weights itself, so what it has allocated is moved afterwards. What that gains and costs: docs/measuring.md.
    lines: list[str] = []
    with contextlib.suppress(OSError):
        if "[never]" not in (PAGES / "enabled").read_text():
            size, lines = int((PAGES / "hpage_pmd_size").read_text()), Path("/proc/self/maps").read_text().splitlines()
    for line in lines:
        addresses, rights, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if rights == "rw-p" and inode == "0" and end - start >= 2 * size:
            # One by one: the kernel gives up a whole range at the first page it finds no room for.
            for page in range(-(-start // size) * size, end - size + 1, size):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(page), ctypes.c_size_t(size), MADV_COLLAPSE)


class OrtSession:
    """A Session on ONNX Runtime. All buffers are bound once; a step writes one token id and reads one row of scores."""

    def __init__(self, engine: Engine, threads: int | None):
        ort = need("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(str(engine.path / "model.onnx"), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen unrelated exception types for a model it cannot load
            raise EdgemedError(f"onnxruntime {ort.__version__} cannot load {engine.path}: {str(error).splitlines()[0]}", "Export the engine again") from error
        _use_huge_pages()
        self.head, self.width, self.context, self.position = engine.head, engine.width, engine.context, 0
        self.ort, self.binding = ort, self.session.io_binding()
        # The arena would keep the largest prefill's buffers for good; a device wants that memory back.
        self.shrinking = ort.RunOptions()
        self.shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        for value in self.session.get_inputs():
            if value.name.startswith("past."):
                dtype = np.float16 if value.type == "tensor(float16)" else np.float32
                shape = (1, value.shape[1], self.context, value.shape[3])
                buffer = ort.OrtValue.ortvalue_from_numpy(_lazy_zeros(shape, dtype))
                self.binding.bind_ortvalue_input(value.name, buffer)
                self.binding.bind_ortvalue_output(value.name.replace("past", "present"), buffer)
        self.last, self.total = self._bound("last_index", np.zeros(1, np.int32)), self._bound("total", np.zeros(1, np.int32))
        self.shape: tuple[int, int] | None = None

    def _bound(self, name: str, array: np.ndarray) -> np.ndarray:
        # OrtValues made from numpy arrays share their memory: writing the array is writing the input.
        self.binding.bind_ortvalue_input(name, self.ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def _shape(self, new: int, selected: int) -> None:
        if self.shape == (new, selected):
            return
        self.tokens = self._bound("tokens", np.zeros((1, new), np.int64))
        self.positions = self._bound("positions", np.zeros((1, new), np.int64))
        self.select = self._bound("select", np.zeros(selected, np.int64))
        self.scores = np.zeros((1, selected, self.width), np.float32)
        self.binding.bind_ortvalue_output("scores", self.ort.OrtValue.ortvalue_from_numpy(self.scores))
        self.shape = (new, selected)

    def prefill(self, tokens: Sequence[int], every: bool = False) -> np.ndarray:
        check_room(self, tokens)
        new, end = len(tokens), self.position + len(tokens)
        self._shape(new, new if every else 1)
        self.tokens[0], self.positions[0] = tokens, np.arange(self.position, end)
        self.select[:] = np.arange(new) if every else new - 1
        self.last[0], self.total[0] = end - 1, end
        self.session.run_with_iobinding(self.binding, self.shrinking if new > 1 else None)
        self.position = end
        return self.scores[0]

    def step(self, token: int) -> np.ndarray:
        if self.shape != (1, 1) or self.position >= self.context:
            return self.prefill([token])[0]
        position = self.position
        self.tokens[0, 0], self.positions[0, 0], self.select[0] = token, position, 0
        self.last[0], self.total[0] = position, position + 1
        self.session.run_with_iobinding(self.binding)
        self.position = position + 1
        return self.scores[0, 0]

    def rewind(self, position: int) -> None:
        self.position = position

    def close(self) -> None:
        del self.binding, self.session


def self_check() -> str:
    """Run one quantized product through onnxruntime and compare it with numpy; returns a sentence.

    Raises EdgemedError where onnxruntime is missing or gives a wrong result on this CPU.
    """
    ort = need("onnxruntime", "onnx")
    try:
        import onnx  # noqa: F401 - the check has to write a graph, which only the build extra can
    except ModuleNotFoundError:
        return f"onnxruntime {ort.__version__} imports; its arithmetic is checked by edgemed verify ENGINE"
    import tempfile

    random = np.random.default_rng(0)
    q, scales = random.integers(0, 16, (64, 256), dtype=np.uint8), random.random((64, 2), dtype=np.float32)
    x = random.standard_normal((300, 256), dtype=np.float32)
    expected = x @ ((q.reshape(64, 2, 128).astype(np.float32) - 8) * scales[..., None]).reshape(64, 256).T
    with tempfile.TemporaryDirectory() as folder:
        found = _product(ort, Path(folder), x, Ints(q, scales, 4, 128))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if error > 0.02:
        raise EdgemedError(f"onnxruntime {ort.__version__} gives wrong 4-bit products on this CPU (relative error {error:.2g})", "pip install --force-reinstall onnxruntime")
    return f"onnxruntime {ort.__version__}: 4-bit product with int8 activations within {error:.1e} of numpy"


def _product(ort: Any, folder: Path, x: np.ndarray, ints: Ints) -> np.ndarray:
    from edgemed.graph import Graph, Precision

    graph, dialect = Graph(folder, Precision(bits=ints.bits, group=ints.block)), OrtDialect()
    graph.value("inputs", "x", graph.float_type, list(x.shape))
    graph.value("outputs", "y", graph.float_type, [len(x), len(ints.q)])
    dialect.quantized(graph, "y", "x", ints, None)
    graph.save("self-check", dialect)
    return ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
