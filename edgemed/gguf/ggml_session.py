"""A decoder as a ggml graph of our own, on the library inside the installed llama.cpp: for mixtures
of experts llama.cpp has no graph for.

One GGUF file is mapped and its quantized weights are used as they lie; only experts that some token
chose are read. The graph is built from DecoderConfig's values and kept as long as its shape stays
the same, so that decoding builds one every 256 tokens.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.gguf import ggml_bindings
from edgemed.gguf.ggml_bindings import F16, F32, I32, I64, NEOX, GgmlWeights, tensor_view
from edgemed.gguf.llama_session import runs
from edgemed.hardware.device import machine
from edgemed.inference.session import (
    CarriesVision,
    ImageEmbeddings,
    check_image_embeddings,
    check_room,
)
from edgemed.models.architecture import DecoderConfig, ExpertsConfig

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine

FILE = "graph.gguf"
ARCH = "edgemed"
KEY = "edgemed.models.torch_decoder"
BATCH = 256  # tokens per run, and rows of the cache a graph looks at are a multiple of it
NODES = 8192  # room for the nodes of a graph


def refuses(d: DecoderConfig) -> str | None:
    """Why this graph does not compute a decoder, or None."""
    if d.positions != "rope" or d.rope_axes or d.head != "lm" or d.activation == "gelu":
        return (
            "edgemed's ggml graph knows plain rotary positions, SiLU and the tanh form of GELU, and"
            " language models"
        )
    pairs = len(d.rope_frequencies)
    plain = [d.rope_theta ** (-i / pairs) for i in range(pairs)]
    if not np.allclose(plain, d.rope_frequencies, rtol=1e-6):
        return "edgemed's ggml graph knows no rescaled rotary frequencies"
    return None


def read_decoder(text: str) -> DecoderConfig:
    """The numbers of a decoder from the JSON of their dataclass, where tuples are lists."""
    values = json.loads(text)
    if values["experts"]:
        experts = values["experts"]
        experts["layers"] = tuple(experts["layers"])
        values["experts"] = ExpertsConfig(**experts)
    for name in ("score_scale", "rope_frequencies", "rope_axes"):
        values[name] = tuple(values[name])
    return DecoderConfig(**values)


def whole_batches(tokens: int) -> int:
    """The next multiple of BATCH."""
    return -(-tokens // BATCH) * BATCH


class GgmlSession(CarriesVision):
    """A Session on ggml. Keys and values are [context, kv heads * head size] per layer, float32 for
    a float32 file, float16 otherwise.
    """

    def __init__(self, engine: Engine, threads: int | None):
        self.ggml = ggml_bindings.ggml_library()
        self.weights = GgmlWeights(engine.path / FILE, engine.params["repack"])
        self.d = d = read_decoder(self.weights.text(KEY))
        self.head = "lm"
        self.width = engine.width
        self.context = engine.context
        self.position = 0
        self.has_vision = engine.vision is not None
        self.backend = self.ggml.backend_cpu_init()
        self.ggml.backend_cpu_set_n_threads(self.backend, threads or machine()["physical_cores"])
        self.kind = F32 if engine.precision == "F32" else F16
        self.rows = whole_batches(engine.context)
        # Keys and values of each layer, one tensor behind the other. Pages become resident as the
        # context fills.
        row_bytes = d.kv_size * self.ggml.type_size(self.kind)
        tensor_bytes = self.rows * row_bytes
        self.memory = mmap.mmap(-1, 2 * d.layers * tensor_bytes)
        start = np.frombuffer(self.memory, np.uint8).ctypes.data
        self.buffer = self.ggml.backend_cpu_buffer_from_ptr(start, len(self.memory))
        self.cache_context = self.ggml.init(ggml_bindings.InitParams(1 << 20, None, True))
        self.cache = []
        for number in range(2 * d.layers):
            tensor = self.ggml.new_tensor_2d(self.cache_context, self.kind, d.kv_size, self.rows)
            self.ggml.backend_tensor_alloc(self.buffer, tensor, start + number * tensor_bytes)
            self.cache.append(tensor)
        self.allocator = self.ggml.gallocr_new(self.ggml.backend_cpu_buffer_type())
        self.graph: _Graph | None = None

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: ImageEmbeddings | None = None
    ) -> np.ndarray:
        check_room(self, tokens)
        spans = [(0, len(tokens))]
        if pictures:
            if not self.has_vision:
                raise EdgemedError(
                    "this engine reads text only",
                    "Ask it without an image, or export a vision model",
                )
            check_image_embeddings(tokens, pictures)
            spans = runs(tokens, pictures.token)
        features_read = 0
        scores = []
        for start, end in spans:
            for first in range(start, end, BATCH):
                count = min(BATCH, end - first)
                if pictures and tokens[start] == pictures.token:
                    inputs = pictures.features[features_read : features_read + count]
                    features_read += count
                else:
                    inputs = np.array(tokens[first : first + count], np.int32)
                last = self._run(inputs, every)
                if every:
                    # The next run writes its scores to the same memory.
                    scores.append(last.copy())
        return np.concatenate(scores) if every else last

    def step(self, token: int) -> np.ndarray:
        if self.position >= self.context:
            check_room(self, [token])
        return self._run(np.array([token], np.int32), False)[0]

    def _run(self, inputs: np.ndarray, every: bool) -> np.ndarray:
        """Append token ids int32 [T] or features float32 [T, hidden]; scores of the last, or of
        all.
        """
        new = len(inputs)
        end = self.position + new
        shape = GraphShape(
            new=new,
            rows=whole_batches(end),
            features=inputs.ndim == 2,
            every=every,
        )
        if self.graph is None or self.graph.shape != shape:
            self._free_graph()
            self.graph = _Graph(self, shape)
        graph = self.graph
        graph.inputs[:] = inputs
        graph.positions[:] = np.arange(self.position, end)
        # A token's row of the cache is its position.
        graph.cache_rows[:] = graph.positions
        graph.mask[:] = -np.inf
        for row in range(new):
            graph.mask[row, : self.position + row + 1] = 0
        if code := self.ggml.backend_graph_compute(self.backend, graph.graph):
            raise RuntimeError(f"ggml gave {code} for {new} tokens at position {self.position}")
        self.position = end
        return graph.scores

    def rewind(self, position: int) -> None:
        self.position = position

    def _free_graph(self) -> None:
        if self.graph:
            self.ggml.free(self.graph.context)
            self.graph = None

    def close(self) -> None:
        self.close_vision()
        if self.backend is None:
            return
        self._free_graph()
        self.ggml.gallocr_free(self.allocator)
        self.ggml.backend_free(self.backend)
        self.ggml.backend_buffer_free(self.buffer)
        self.ggml.free(self.cache_context)
        self.weights.close()
        self.backend = None


@dataclass(frozen=True)
class GraphShape:
    """What a graph is built for. new: tokens of a run. rows: of the cache it looks at. features:
    whether it reads features instead of token ids. every: whether it gives every token's scores.
    """

    new: int
    rows: int
    features: bool
    every: bool


class _Graph:
    """One graph, with its inputs and outputs as numpy arrays over ggml's memory."""

    def __init__(self, session: GgmlSession, shape: GraphShape):
        self.shape = shape
        self.d = session.d
        self.g = session.ggml
        self.session = session
        self.tensors = session.weights.tensors
        g = self.g
        d = self.d
        new = shape.new
        # Names of tensors and nodes only; what they hold is allocated below.
        self.context = c = g.init(ggml_bindings.InitParams(64 << 20, None, True))
        self.graph = g.new_graph_custom(c, NODES, False)
        if shape.features:
            inputs = g.new_tensor_2d(c, F32, d.hidden, new)
        else:
            inputs = g.new_tensor_1d(c, I32, new)
        self.position_input = g.new_tensor_1d(c, I32, new)
        self.cache_row_input = g.new_tensor_1d(c, I64, new)
        self.mask_input = g.new_tensor_2d(c, F16, shape.rows, new)
        for tensor in (inputs, self.position_input, self.cache_row_input, self.mask_input):
            g.set_input(tensor)
        scores = self._scores(inputs)
        g.set_output(scores)
        g.build_forward_expand(self.graph, scores)
        if not g.gallocr_alloc_graph(session.allocator, self.graph):
            raise EdgemedError(f"there is no memory for a graph of {new} tokens", "Free some")
        if shape.features:
            self.inputs = tensor_view(inputs, (new, d.hidden), np.float32)
        else:
            self.inputs = tensor_view(inputs, (new,), np.int32)
        self.positions = tensor_view(self.position_input, (new,), np.int32)
        self.cache_rows = tensor_view(self.cache_row_input, (new,), np.int64)
        self.mask = tensor_view(self.mask_input, (new, shape.rows), np.float16)
        self.scores = tensor_view(scores, (new if shape.every else 1, d.vocab), np.float32)

    def _scores(self, inputs: int) -> int:
        """The whole decoder: token ids or features -> scores."""
        g = self.g
        c = self.context
        d = self.d
        x = inputs
        if not self.shape.features:
            x = g.get_rows(c, self.tensors["token_embd.weight"], inputs)
        for n in range(d.layers):
            read = self.norm(f"blk.{n}.attn_norm", x)
            branch = self.linear(f"blk.{n}.attn_output", self.attention(n, read))
            if d.parallel:
                branch = g.add(c, branch, self.mlp(n, read))
            else:
                x = g.add(c, x, branch)
                branch = self.mlp(n, self.norm(f"blk.{n}.ffn_norm", x))
            x = g.add(c, x, branch)
        if not self.shape.every:
            # The last token's row of float32 [new, hidden].
            row_bytes = 4 * d.hidden
            x = g.view_2d(c, x, d.hidden, 1, row_bytes, row_bytes * (self.shape.new - 1))
        name = "output" if "output.weight" in self.tensors else "token_embd"
        return self.linear(name, self.norm("output_norm", x))

    def _with_bias(self, name: str, y: int) -> int:
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else self.g.add(self.context, y, bias)

    def norm(self, name: str, x: int) -> int:
        normalise = self.g.rms_norm if self.d.norm == "rmsnorm" else self.g.norm
        y = normalise(self.context, x, self.d.norm_eps)
        y = self.g.mul(self.context, y, self.tensors[f"{name}.weight"])
        return self._with_bias(name, y)

    def linear(self, name: str, x: int) -> int:
        y = self.g.mul_mat(self.context, self.tensors[f"{name}.weight"], x)
        return self._with_bias(name, y)

    def attention(self, n: int, x: int) -> int:
        """Heads' outputs [new, q_size] of layer n for x [new, hidden]; the new rows go into the
        cache first.
        """
        g = self.g
        c = self.context
        d = self.d
        new = self.shape.new
        q, k, v = self._projections(n, x)
        q = self._rotated(q, d.heads)
        k = self._rotated(k, d.kv_heads)
        key_cache, value_cache = self.session.cache[2 * n : 2 * n + 2]
        keys = self._cached(key_cache, g.reshape_2d(c, k, d.kv_size, new))
        values = self._cached(value_cache, v)
        # ggml wants [head size, tokens, heads], fastest axis first.
        queries = g.permute(c, q, 0, 2, 1, 3)
        mixed = g.flash_attn_ext(
            c, queries, keys, values, self.mask_input, d.head_dim**-0.5, 0.0, 0.0
        )
        return g.reshape_2d(c, mixed, d.q_size, new)

    def _projections(self, n: int, x: int) -> list[int]:
        """q, k and v of the new tokens, each [new, its size]."""
        if f"blk.{n}.attn_qkv.weight" not in self.tensors:
            return [self.linear(f"blk.{n}.attn_{letter}", x) for letter in "qkv"]
        d = self.d
        joined = self.linear(f"blk.{n}.attn_qkv", x)
        # The three lie side by side in each row of float32.
        row_bytes = 4 * (d.q_size + 2 * d.kv_size)
        parts = []
        start = 0
        for size in (d.q_size, d.kv_size, d.kv_size):
            part = self.g.view_2d(self.context, joined, size, self.shape.new, row_bytes, 4 * start)
            parts.append(self.g.cont(self.context, part))
            start += size
        return parts

    def _cached(self, cache: int, new_rows: int) -> int:
        """A cache with the new rows written into it, as [head size, rows, key heads]."""
        g = self.g
        c = self.context
        d = self.d
        written = g.set_rows(c, cache, new_rows, self.cache_row_input)
        # Put into the graph here, so that it is written before it is read.
        g.build_forward_expand(self.graph, written)
        item = g.type_size(self.session.kind)
        by_head = g.view_3d(
            c,
            cache,
            d.head_dim,
            d.kv_heads,
            self.shape.rows,
            item * d.head_dim,
            item * d.kv_size,
            0,
        )
        return g.permute(c, by_head, 0, 2, 1, 3)

    def _rotated(self, x: int, heads: int) -> int:
        d = self.d
        by_head = self.g.reshape_3d(self.context, x, d.head_dim, heads, self.shape.new)
        # Behind the base: no rescaling of frequencies, and none of YaRN's corrections.
        return self.g.rope_ext(
            self.context,
            by_head,
            self.position_input,
            None,
            2 * len(d.rope_frequencies),
            NEOX,
            d.context,
            d.rope_theta,
            1.0,
            0.0,
            1.0,
            32.0,
            1.0,
        )

    def activated(self, gate: int, up: int | None) -> int:
        """What the MLP's 'down' reads. up: None where the MLP is not gated."""
        if up is not None:
            return self.g.swiglu_split(self.context, gate, up)
        activate = self.g.silu if self.d.activation == "silu" else self.g.gelu
        return activate(self.context, gate)

    def mlp(self, n: int, x: int) -> int:
        if not self.d.sparse(n):
            return self._one_mlp(f"blk.{n}", "", x)
        y = self._mixture(n, x)
        if not self.d.mixture.shared:
            return y
        return self.g.add(self.context, y, self._one_mlp(f"blk.{n}", "_shexp", x))

    def _one_mlp(self, at: str, suffix: str, x: int) -> int:
        up = self.linear(f"{at}.ffn_up{suffix}", x)
        if self.d.gated:
            gate = self.linear(f"{at}.ffn_gate{suffix}", x)
            inner = self.activated(gate, up)
        else:
            inner = self.activated(up, None)
        return self.linear(f"{at}.ffn_down{suffix}", inner)

    def _mixture(self, n: int, x: int) -> int:
        """As torch_decoder's: gates of all experts, the largest chosen, and only those multiplied
        (mul_mat_id).
        """
        g = self.g
        c = self.context
        d = self.d
        active = d.mixture.active
        new = self.shape.new
        at = f"blk.{n}"
        gates = g.soft_max(c, self.linear(f"{at}.ffn_gate_inp", x))
        chosen = g.argsort_top_k(c, gates, active)
        share = self._shares(gates, chosen)
        # The axis in the middle: all chosen experts of a token read the same row.
        rows = g.reshape_3d(c, x, d.hidden, 1, new)
        up = self._expert_product(f"{at}.ffn_up_exps", rows, chosen)
        if d.gated:
            gate = self._expert_product(f"{at}.ffn_gate_exps", rows, chosen)
            inner = self.activated(gate, up)
        else:
            inner = self.activated(up, None)
        y = g.mul(c, self._expert_product(f"{at}.ffn_down_exps", inner, chosen), share)
        # y is float32 [new, active, hidden]; the rows of a token are added up.
        row_bytes = 4 * d.hidden
        slots = [
            g.view_2d(c, y, d.hidden, new, row_bytes * active, row_bytes * slot)
            for slot in range(active)
        ]
        if active == 1:
            return g.cont(c, slots[0])
        total = slots[0]
        for slot in slots[1:]:
            total = g.add(c, total, slot)
        return total

    def _shares(self, gates: int, chosen: int) -> int:
        """The gates of the chosen experts, [new, active, 1], divided by their sum where the model
        does so.
        """
        g = self.g
        c = self.context
        experts = self.d.mixture
        new = self.shape.new
        share = g.get_rows(c, g.reshape_3d(c, gates, 1, experts.count, new), chosen)
        if not experts.renormalised:
            return share
        flat = g.reshape_2d(c, share, experts.active, new)
        normalised = g.div(c, flat, g.sum_rows(c, flat))
        return g.reshape_3d(c, normalised, 1, experts.active, new)

    def _expert_product(self, name: str, x: int, chosen: int) -> int:
        """x times the matrices of each token's chosen experts."""
        y = self.g.mul_mat_id(self.context, self.tensors[f"{name}.weight"], x, chosen)
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else self.g.add_id(self.context, y, bias, chosen)
