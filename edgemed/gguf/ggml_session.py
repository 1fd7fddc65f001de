"""A decoder as a ggml graph of our own, on the library inside the installed llama.cpp: for mixtures
of experts llama.cpp has no graph for.

One GGUF file is mapped and its quantized weights are used as they lie; only experts that some token
chose are read. The graph is built from Decoder's values and kept as long as its shape stays the
same, so that decoding builds one every 256 tokens.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.gguf import ggml_bindings
from edgemed.gguf.ggml_bindings import F16, F32, I32, I64, NEOX, GgmlWeights, view
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
    plain = [d.rope_theta ** (-i / len(d.rope_frequencies)) for i in range(len(d.rope_frequencies))]
    return (
        None
        if np.allclose(plain, d.rope_frequencies, rtol=1e-6)
        else "edgemed's ggml graph knows no rescaled rotary frequencies"
    )


def read_decoder(text: str) -> DecoderConfig:
    values = json.loads(text)
    experts = values["experts"] and ExpertsConfig(
        **{**values["experts"], "layers": tuple(values["experts"]["layers"])}
    )
    return DecoderConfig(
        **{
            **values,
            "experts": experts,
            **{
                name: tuple(values[name])
                for name in ("score_scale", "rope_frequencies", "rope_axes")
            },
        }
    )


class GgmlSession(CarriesVision):
    """A Session on ggml. Keys and values are [context, kv heads * head size] per layer, float32 for
    a float32 file, float16 otherwise.
    """

    def __init__(self, engine: Engine, threads: int | None):
        self.ggml = ggml_bindings.library()
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
        self.rows = -(-engine.context // BATCH) * BATCH
        # Pages become resident as the context fills.
        row = d.kv_size * self.ggml.type_size(self.kind)
        self.memory = mmap.mmap(-1, 2 * d.layers * self.rows * row)
        start = np.frombuffer(self.memory, np.uint8).ctypes.data
        self.buffer = self.ggml.backend_cpu_buffer_from_ptr(start, len(self.memory))
        self.cache_context = self.ggml.init(ggml_bindings.InitParams(1 << 20, None, True))
        self.cache = []
        for place in range(2 * d.layers):
            tensor = self.ggml.new_tensor_2d(self.cache_context, self.kind, d.kv_size, self.rows)
            self.ggml.backend_tensor_alloc(self.buffer, tensor, start + place * self.rows * row)
            self.cache.append(tensor)
        self.allocator = self.ggml.gallocr_new(self.ggml.backend_cpu_buffer_type())
        self.graph: _Graph | None = None

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: ImageEmbeddings | None = None
    ) -> np.ndarray:
        check_room(self, tokens)
        spans = [(0, len(tokens))]
        shown = 0
        kept = []
        if pictures:
            if not self.has_vision:
                raise EdgemedError(
                    "this engine reads text only",
                    "Ask it without an image, or export a model that sees",
                )
            check_image_embeddings(tokens, pictures)
            spans = runs(tokens, pictures.token)
        for start, end in spans:
            image = pictures is not None and tokens[start] == pictures.token
            for first in range(start, end, BATCH):
                count = min(BATCH, end - first)
                found = self._run(
                    (
                        pictures.features[shown : shown + count]
                        if image
                        else np.array(tokens[first : first + count], np.int32)
                    ),
                    every,
                )
                shown += count if image else 0
                if every:
                    kept.append(found.copy())
        return np.concatenate(kept) if every else found

    def step(self, token: int) -> np.ndarray:
        if self.position >= self.context:
            check_room(self, [token])
        return self._run(np.array([token], np.int32), False)[0]

    def _run(self, given: np.ndarray, every: bool) -> np.ndarray:
        """Append token ids int32 [T] or features float32 [T, hidden]; scores of the last, or of
        all.
        """
        new = len(given)
        end = self.position + len(given)
        shape = (new, -(-end // BATCH) * BATCH, given.ndim == 2, every)
        if self.graph is None or self.graph.shape != shape:
            self._forget()
            self.graph = _Graph(self, shape)
        graph = self.graph
        graph.given[:] = given
        graph.positions[:] = graph.places[:] = np.arange(self.position, end)
        graph.mask[:] = -np.inf
        for row in range(new):
            graph.mask[row, : self.position + row + 1] = 0
        if code := self.ggml.backend_graph_compute(self.backend, graph.graph):
            raise RuntimeError(f"ggml gave {code} for {new} tokens at position {self.position}")
        self.position = end
        return graph.scores

    def rewind(self, position: int) -> None:
        self.position = position

    def _forget(self) -> None:
        if self.graph:
            self.ggml.free(self.graph.context)
            self.graph = None

    def close(self) -> None:
        self.close_vision()
        if self.backend is None:
            return
        self._forget()
        self.ggml.gallocr_free(self.allocator)
        self.ggml.backend_free(self.backend)
        self.ggml.backend_buffer_free(self.buffer)
        self.ggml.free(self.cache_context)
        self.weights.close()
        self.backend = None


class _Graph:
    """One graph: shape = (new tokens, rows of the cache, whether features are given instead of ids,
    whether every token's scores are wanted).
    """

    def __init__(self, session: GgmlSession, shape: tuple[int, int, bool, bool]):
        self.shape = shape
        self.d = session.d
        self.g = session.ggml
        self.session = session
        self.t = session.weights.tensors
        new, rows, features, every = shape
        g = self.g
        d = self.d
        # Names of tensors and nodes only; what they hold is allocated below.
        self.context = c = g.init(ggml_bindings.InitParams(64 << 20, None, True))
        self.graph = g.new_graph_custom(c, NODES, False)
        given = g.new_tensor_2d(c, F32, d.hidden, new) if features else g.new_tensor_1d(c, I32, new)
        self.position = g.new_tensor_1d(c, I32, new)
        self.place = g.new_tensor_1d(c, I64, new)
        self.masked = g.new_tensor_2d(c, F16, rows, new)
        for tensor in (given, self.position, self.place, self.masked):
            g.set_input(tensor)
        x = given if features else g.get_rows(c, self.t["token_embd.weight"], given)
        for n in range(d.layers):
            read = self.norm(f"blk.{n}.attn_norm", x)
            branch = self.linear(f"blk.{n}.attn_output", self.attention(n, read))
            if d.parallel:
                branch = g.add(c, branch, self.mlp(n, read))
            else:
                x = g.add(c, x, branch)
                branch = self.mlp(n, self.norm(f"blk.{n}.ffn_norm", x))
            x = g.add(c, x, branch)
        if not every:
            x = g.view_2d(c, x, d.hidden, 1, 4 * d.hidden, 4 * d.hidden * (new - 1))
        name = "output" if "output.weight" in self.t else "token_embd"
        scores = self.linear(name, self.norm("output_norm", x))
        g.set_output(scores)
        g.build_forward_expand(self.graph, scores)
        if not g.gallocr_alloc_graph(session.allocator, self.graph):
            raise EdgemedError(f"there is no memory for a graph of {new} tokens", "Free some")
        self.given = view(
            given, (new, d.hidden) if features else (new,), np.float32 if features else np.int32
        )
        self.positions = view(self.position, (new,), np.int32)
        self.places = view(self.place, (new,), np.int64)
        self.mask = view(self.masked, (new, rows), np.float16)
        self.scores = view(scores, (new if every else 1, d.vocab), np.float32)

    def norm(self, name: str, x: int) -> int:
        y = (self.g.rms_norm if self.d.norm == "rmsnorm" else self.g.norm)(
            self.context, x, self.d.norm_eps
        )
        y = self.g.mul(self.context, y, self.t[f"{name}.weight"])
        return (
            self.g.add(self.context, y, self.t[f"{name}.bias"]) if f"{name}.bias" in self.t else y
        )

    def linear(self, name: str, x: int) -> int:
        y = self.g.mul_mat(self.context, self.t[f"{name}.weight"], x)
        return (
            self.g.add(self.context, y, self.t[f"{name}.bias"]) if f"{name}.bias" in self.t else y
        )

    def attention(self, n: int, x: int) -> int:
        g = self.g
        c = self.context
        d = self.d
        new, rows, *_ = self.shape
        if f"blk.{n}.attn_qkv.weight" in self.t:
            joined = self.linear(f"blk.{n}.attn_qkv", x)
            width = 4 * (d.q_size + 2 * d.kv_size)
            q, k, v = (
                g.cont(c, g.view_2d(c, joined, size, new, width, 4 * start))
                for size, start in (
                    (d.q_size, 0),
                    (d.kv_size, d.q_size),
                    (d.kv_size, d.q_size + d.kv_size),
                )
            )
        else:
            q, k, v = (self.linear(f"blk.{n}.attn_{part}", x) for part in "qkv")
        q = self._rotated(q, d.heads)
        k = self._rotated(k, d.kv_heads)
        held = []
        for cache, made in zip(
            self.session.cache[2 * n : 2 * n + 2],
            (g.reshape_2d(c, k, d.kv_size, new), v),
            strict=True,
        ):
            written = g.set_rows(c, cache, made, self.place)
            g.build_forward_expand(self.graph, written)  # before it is read
            size = g.type_size(self.session.kind)
            held.append(
                g.permute(
                    c,
                    g.view_3d(
                        c,
                        cache,
                        d.head_dim,
                        d.kv_heads,
                        rows,
                        size * d.head_dim,
                        size * d.kv_size,
                        0,
                    ),
                    0,
                    2,
                    1,
                    3,
                )
            )
        mixed = g.flash_attn_ext(
            c, g.permute(c, q, 0, 2, 1, 3), *held, self.masked, d.head_dim**-0.5, 0.0, 0.0
        )
        return g.reshape_2d(c, mixed, d.q_size, new)

    def _rotated(self, x: int, heads: int) -> int:
        d = self.d
        new = self.shape[0]
        x = self.g.reshape_3d(self.context, x, d.head_dim, heads, new)
        return self.g.rope_ext(
            self.context,
            x,
            self.position,
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
        if up is not None:
            return self.g.swiglu_split(self.context, gate, up)
        return (self.g.silu if self.d.activation == "silu" else self.g.gelu)(self.context, gate)

    def mlp(self, n: int, x: int) -> int:
        if not self.d.sparse(n):
            return self._one_mlp(f"blk.{n}", "", x)
        y = self._mixture(n, x)
        return (
            self.g.add(self.context, y, self._one_mlp(f"blk.{n}", "_shexp", x))
            if self.d.experts.shared
            else y
        )

    def _one_mlp(self, at: str, suffix: str, x: int) -> int:
        up = self.linear(f"{at}.ffn_up{suffix}", x)
        gate = self.linear(f"{at}.ffn_gate{suffix}", x) if self.d.gated else None
        return self.linear(
            f"{at}.ffn_down{suffix}",
            self.activated(up if gate is None else gate, None if gate is None else up),
        )

    def _mixture(self, n: int, x: int) -> int:
        """As decoder.mlp: gates of all experts, the largest chosen, and only those multiplied
        (mul_mat_id).
        """
        g = self.g
        c = self.context
        d = self.d
        e = self.d.experts
        new = self.shape[0]
        at = f"blk.{n}"
        gates = g.soft_max(c, self.linear(f"{at}.ffn_gate_inp", x))
        chosen = g.argsort_top_k(c, gates, e.active)
        share = g.get_rows(c, g.reshape_3d(c, gates, 1, e.count, new), chosen)
        if e.renormalised:
            flat = g.reshape_2d(c, share, e.active, new)
            share = g.reshape_3d(c, g.div(c, flat, g.sum_rows(c, flat)), 1, e.active, new)

        def product(name: str, x: int) -> int:
            y = g.mul_mat_id(c, self.t[f"{at}.{name}.weight"], x, chosen)
            return (
                g.add_id(c, y, self.t[f"{at}.{name}.bias"], chosen)
                if f"{at}.{name}.bias" in self.t
                else y
            )

        x = g.reshape_3d(c, x, d.hidden, 1, new)
        up = product("ffn_up_exps", x)
        y = self.activated(product("ffn_gate_exps", x), up) if d.gated else self.activated(up, None)
        y = g.mul(c, product("ffn_down_exps", y), share)
        parts = [
            g.view_2d(c, y, d.hidden, new, 4 * d.hidden * e.active, 4 * d.hidden * slot)
            for slot in range(e.active)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = g.add(c, total, part)
        return total if len(parts) > 1 else g.cont(c, total)
