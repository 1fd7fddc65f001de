"""What a user of llama-cpp-python's own bindings would write to ask about an image: the peer that
bench/vlm.py holds edgemed against.

mtmd_tokenize, mtmd_helper_eval_chunks, then llama_decode in a loop, on the same model.gguf and
mmproj.gguf. Nothing of edgemed is used.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
from llama_cpp import mtmd_cpp as mtmd

BATCH = 512


class StockLoop:
    """model.gguf and mmproj.gguf of one folder. context: tokens of the KV cache."""

    def __init__(self, folder: Path, context: int, threads: int):
        self.quiet = lib.llama_log_callback(lambda level, text, data: None)
        for log in (lib.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
            log(self.quiet, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(
            str(folder / "model.gguf").encode(), lib.llama_model_default_params()
        )
        params = lib.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = BATCH
        params.n_ubatch = BATCH
        params.n_threads = threads
        params.n_threads_batch = threads
        self.ctx = lib.llama_init_from_model(self.model, params)
        settings = mtmd.mtmd_context_params_default()
        settings.n_threads = threads
        settings.print_timings = False
        settings.warmup = False
        # What its own default, a trial during the warm-up on a large image, comes to on a CPU.
        settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.vision_encoder = mtmd.mtmd_init_from_file(
            str(folder / "mmproj.gguf").encode(), self.model, settings
        )
        self.width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.memory = lib.llama_get_memory(self.ctx)
        self.batch = lib.llama_batch_init(1, 0, 1)
        self.position = 0

    def ask(self, text: str, pixels: np.ndarray) -> tuple[int, dict[str, float]]:
        """(first token, seconds of 'preprocess' and 'tower and prefill'). text: with one media
        marker; pixels uint8 [height, width, 3].
        """
        started = time.perf_counter()
        chunks = mtmd.mtmd_input_chunks_init()
        lib.llama_memory_seq_rm(self.memory, 0, -1, -1)
        height, width, _ = pixels.shape
        bitmap = mtmd.mtmd_bitmap_init(
            width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        )
        prompt = mtmd.mtmd_input_text(text.encode(), len(text.encode()), False, True)
        if mtmd.mtmd_tokenize(
            self.vision_encoder,
            chunks,
            ctypes.byref(prompt),
            (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap),
            1,
        ):
            raise SystemExit("mtmd_tokenize failed")
        tokenized = time.perf_counter()
        past = lib.llama_pos(0)
        if mtmd.mtmd_helper_eval_chunks(
            self.vision_encoder, self.ctx, chunks, 0, 0, BATCH, True, ctypes.byref(past)
        ):
            raise SystemExit("mtmd_helper_eval_chunks failed")
        token = self._best()
        self.position = past.value
        done = time.perf_counter()
        mtmd.mtmd_bitmap_free(bitmap)
        mtmd.mtmd_input_chunks_free(chunks)
        return token, {"preprocess": tokenized - started, "tower and prefill": done - tokenized}

    def _best(self) -> int:
        return int(
            np.ctypeslib.as_array(lib.llama_get_logits_ith(self.ctx, -1), (self.width,)).argmax()
        )

    def write(self, token: int, new: int) -> list[int]:
        """`new` greedy tokens after `token`."""
        batch = self.batch
        found = []
        batch.n_tokens = 1
        batch.n_seq_id[0] = 1
        batch.seq_id[0][0] = 0
        batch.logits[0] = 1
        for _ in range(new):
            batch.token[0] = token
            batch.pos[0] = self.position
            if lib.llama_decode(self.ctx, batch):
                raise SystemExit("llama_decode failed")
            token = self._best()
            found.append(token)
            self.position += 1
        return found
