"""A GGUF engine as a Session, on llama.cpp's C interface (the ctypes binding inside
llama-cpp-python).

It stands beside the package's Llama class because that one copies every row of scores and times
decoding with it; here a step writes one token id and reads the scores where llama.cpp keeps them.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgemed.engines.engine import Engine
from edgemed.errors import EdgemedError, need
from edgemed.gguf import lora_files
from edgemed.gguf.reader import read_gguf
from edgemed.hardware.device import machine
from edgemed.inference.session import (
    CarriesVision,
    ImageEmbeddings,
    Positions,
    check_image_embeddings,
    check_room,
)

FILE = "model.gguf"
HEAD = "head.npz"
# of one number in the KV cache, scales included
CACHE_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}
BATCH = 512  # tokens per llama_decode call


class LlamaSession(CarriesVision):
    """A Session on llama.cpp. One token is decoded through a batch made once; scores are read where
    llama.cpp keeps them.
    """

    def __init__(self, engine: Engine, threads: int | None):
        self.lib = llama_library()
        self.head: str = engine.head
        self.width = engine.width
        self.context = engine.context
        self.position = 0
        self.matrix: np.ndarray | None = None
        if engine.head != "lm":
            with np.load(engine.path / HEAD) as arrays:
                self.matrix = arrays["weight"].T.copy()
                self.bias = arrays["bias"]
        file = engine.path / FILE
        # llama.cpp ends the process where a header is damaged.
        read_gguf(file, texts=False)
        model_params = self.lib.llama_model_default_params()
        model_params.use_extra_bufts = engine.params["repack"]
        ERRORS.clear()
        self.model = self.lib.llama_model_load_from_file(str(file).encode(), model_params)
        if not self.model:
            raise EdgemedError(
                f"llama.cpp cannot load {file}: {'; '.join(ERRORS) or 'no reason given'}",
                "Export the engine again",
            )
        self.size = self.matrix.shape[0] if self.matrix is not None else self.width
        # llama.cpp wants to know of all adapters before it plans a context's graph.
        self.adapters = lora_files.load_adapters(
            self.lib, self.model, engine.path, engine.adapters, ERRORS
        )
        self.adapter: str | None = None
        self.ctx = self.lib.llama_init_from_model(self.model, self._settings(engine, threads))
        if not self.ctx:
            self.lib.llama_model_free(self.model)
            raise EdgemedError(
                f"llama.cpp cannot start {file}: {'; '.join(ERRORS) or 'no reason given'}",
                "Export it with a smaller context",
            )
        self.memory = self.lib.llama_get_memory(self.ctx)
        self.batch, self.one = (
            self.lib.llama_batch_init(size, 0, 1) for size in (self.batch_size, 1)
        )
        self.batch_arrays = _arrays(self.batch, self.batch_size)
        self.one_ids, self.one_positions, wanted = _arrays(self.one, 1)
        self.one.n_tokens = 1
        wanted[0] = 1
        self.decode = self.lib.llama_decode
        self.read = (
            self.lib.llama_get_logits if self.matrix is None else self.lib.llama_get_embeddings
        )
        self.address: int | None = None
        self.row = np.empty(0, np.float32)
        self.hidden = self.lib.llama_model_n_embd(self.model)
        self.centred = engine.centred
        self.has_vision = engine.vision is not None
        self.counted = (
            Positions(max(engine.rope_axes) + 1, self.context) if engine.rope_axes else None
        )

    def _settings(self, engine: Engine, threads: int | None) -> Any:
        lib = self.lib
        params = self.lib.llama_context_default_params()
        self.batch_size = min(BATCH, engine.context)
        params.n_ctx = engine.context
        params.n_batch = self.batch_size
        params.n_ubatch = self.batch_size
        params.n_outputs_max = params.n_outputs_max_per_seq = self.batch_size
        params.n_threads = params.n_threads_batch = threads or machine()["physical_cores"]
        kv = cache_type(engine.params["kv"], engine.precision == "F32")
        params.type_k = params.type_v = {
            "f32": lib.GGML_TYPE_F32,
            "f16": lib.GGML_TYPE_F16,
            "q8_0": lib.GGML_TYPE_Q8_0,
        }[kv]
        # Flash attention rounds q to the cache's type; llama.cpp insists on it for a quantized
        # cache.
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if kv == "q8_0"
            else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.embeddings = self.matrix is not None
        params.pooling_type = lib.LLAMA_POOLING_TYPE_NONE
        params.no_perf = True
        return params

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: ImageEmbeddings | None = None
    ) -> np.ndarray:
        check_room(self, tokens)
        if pictures and not self.has_vision:
            raise EdgemedError(
                "this engine reads text only",
                "Ask it without an image, or export a vision model",
            )
        placed = (
            self.counted.add(self.position, len(tokens), pictures.positions if pictures else None)
            if self.counted
            else None
        )
        spans = [(0, len(tokens), False)]
        if pictures:
            check_image_embeddings(tokens, pictures)
            spans = [
                (start, end, tokens[start] == pictures.token)
                for start, end in runs(tokens, pictures.token)
            ]
        scores = []
        consumed = 0
        begin = self.position
        for start, end, image in spans:
            for first in range(start, end, self.batch_size):
                count = min(self.batch_size, end - first)
                wanted = every or first + count == len(tokens)
                positions = (
                    np.arange(begin + first, begin + first + count)[None]
                    if placed is None
                    else placed[:, first : first + count]
                )
                if image and pictures:
                    self._decode_features(
                        pictures.features[consumed : consumed + count], positions, every, wanted
                    )
                    consumed += count
                else:
                    self._decode_tokens(tokens[first : first + count], positions[0], every, wanted)
                if every:
                    scores.append(self._outputs(count).copy())
        # With embeddings on, llama.cpp gives a row for every token of the batch.
        return (
            np.concatenate(scores)
            if every
            else self._outputs(count if self.matrix is not None else 1)[-1:]
        )

    def _decode_tokens(
        self, tokens: Sequence[int], positions: np.ndarray, every: bool, last: bool
    ) -> None:
        ids, places, wanted = self.batch_arrays
        count = self.batch.n_tokens = len(tokens)
        ids[:count] = tokens
        places[:count] = positions
        wanted[:count] = every
        wanted[count - 1] = last
        self._decode(self.batch, count)

    def _decode_features(
        self, features: np.ndarray, positions: np.ndarray, every: bool, last: bool
    ) -> None:
        """Image features in the place of token embeddings. positions [parts, n]; llama.cpp reads
        all of the first part, then all of the second.
        """
        count = len(features)
        rows = np.ascontiguousarray(
            features - features.mean(-1, keepdims=True) if self.centred else features, np.float32
        )
        # Models with positions of several parts count four of them there, the last empty.
        places = np.zeros((4 if len(positions) > 1 else 1, count), np.int32)
        places[: len(positions)] = positions
        wanted = np.full(count, every, np.int8)
        wanted[-1] = last
        # A batch that holds embeddings and no tokens; its sequence numbers are those of the batch
        # made once.
        batch = type(self.batch)(
            count,
            None,
            rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            places.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self.batch.n_seq_id,
            self.batch.seq_id,
            wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self._decode(batch, count)

    def step(self, token: int) -> np.ndarray:
        # The inner loop of every measurement: no calls but the two into llama.cpp.
        position = self.position
        if position >= self.context:
            check_room(self, [token])
        self.one_ids[0] = token
        self.one_positions[0] = (
            position if self.counted is None else self.counted.add(position, 1)[0, 0]
        )
        if code := self.decode(self.ctx, self.one):
            self._fail(code, 1)
        self.position = position + 1
        pointer = self.read(self.ctx)
        if ctypes.addressof(pointer.contents) != self.address:
            self._view(pointer)
        return self.row if self.matrix is None else self.row @ self.matrix + self.bias

    def _decode(self, batch: Any, count: int) -> None:
        if code := self.decode(self.ctx, batch):
            self._fail(code, count)
        self.position += count

    def _fail(self, code: int, count: int) -> None:
        raise RuntimeError(
            f"llama_decode gave {code} for {count} tokens at position {self.position}:"
            f" {'; '.join(ERRORS)}"
        )

    def _view(self, pointer: Any) -> None:
        # Making a numpy view costs more than reading it; llama.cpp's buffer rarely moves.
        self.address = ctypes.addressof(pointer.contents)
        self.row = np.ctypeslib.as_array(pointer, (self.size,))

    def _outputs(self, rows: int) -> np.ndarray:
        outputs = np.ctypeslib.as_array(self.read(self.ctx), (rows, self.size))
        return outputs if self.matrix is None else outputs @ self.matrix + self.bias

    def rewind(self, position: int) -> None:
        place = (
            position
            if self.counted is None or position >= self.position
            else int(self.counted.held[0, position])
        )
        self.lib.llama_memory_seq_rm(self.memory, 0, place, -1)
        self.position = position

    def use(self, adapter: str | None) -> None:
        """Go on with one of the engine's adapters, or (None) the base. What was read with the other
        weights is forgotten.
        """
        if adapter != self.adapter:
            lora_files.use(self.lib, self.ctx, self.adapters[adapter] if adapter else None)
            self.adapter = adapter
            self.rewind(0)

    def close(self) -> None:
        self.close_vision()
        if self.ctx is None:
            return
        self.address = None
        self.row = np.empty(0, np.float32)
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_batch_free(self.one)
        self.lib.llama_free(self.ctx)
        self.lib.llama_model_free(self.model)
        self.ctx = None


def cache_type(kv: str, exact: bool) -> str:
    """The format of the KV cache that `kv` asks for; 'auto' is f32 in a file of float32 weights,
    else f16.
    """
    if kv != "auto":
        return kv
    return "f32" if exact else "f16"


def runs(tokens: Sequence[int], token: int) -> list[tuple[int, int]]:
    """(start, end) of the stretches of a prompt that are all this token, or all others."""
    changes = np.flatnonzero(np.diff(np.array(tokens) == token)) + 1
    ends = [0, *changes.tolist(), len(tokens)]
    return list(itertools.pairwise(ends))


def _arrays(batch: Any, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token ids, positions, output wanted) of a llama_batch as numpy views; all tokens belong to
    sequence 0.
    """
    for i in range(size):
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
    return (
        np.ctypeslib.as_array(batch.token, (size,)),
        np.ctypeslib.as_array(batch.pos, (size,)),
        np.ctypeslib.as_array(batch.logits, (size,)),
    )


ERRORS: list[str] = []  # llama.cpp's error lines since the last load
LOG: list[Any] = []  # the log callback: llama.cpp keeps only its address


def llama_library() -> Any:
    """llama_cpp's C interface with its log silenced; error lines are kept for messages."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # libgomp's threads spin at every barrier, which on a busy machine costs two thirds of the
        # decoding speed and more; a short spin keeps the speed of a quiet machine. Read when
        # libgomp is loaded: after torch it has no effect.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    lib = need("llama_cpp", "llamacpp").llama_cpp
    if not LOG:

        def keep(level: int, text: bytes, _: Any) -> None:
            if level == 4 and text.strip():
                ERRORS.append(text.decode(errors="replace").strip())

        LOG.append(lib.llama_log_callback(keep))
        lib.llama_log_set(LOG[0], ctypes.c_void_p(0))
        lib.llama_backend_init()
    return lib
