"""The vision encoder of an engine on libmtmd, llama.cpp's own multimodal library: images in,
features out. It is reached through the ctypes binding inside llama-cpp-python.

Images are resized here first, to the size the model's own rule gives, because libmtmd resizes in
another way and the features are then another image's; it finds nothing left to resize. It
normalises pixels, and runs tower and projector as one graph.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed import plugins
from edgemed.errors import EdgemedError
from edgemed.gguf import mmproj
from edgemed.gguf.llama_session import ERRORS, FILE, LOG, llama_library
from edgemed.gguf.reader import read_gguf
from edgemed.hardware.device import machine
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.architecture import Architecture
from edgemed.vision.preprocessing import (
    EncodedImage,
    FeatureCache,
    check_places,
    placed,
    resized,
    vision_of,
)

if TYPE_CHECKING:
    from PIL import Image

    from edgemed.engines.engine import Engine

IMAGE = 1  # mtmd_input_chunk_type
# Largest error of the features (see vision_parity.relative), by the precision of mmproj.gguf:
# libmtmd's GELU is a table of float16 (measured 5e-4 in f32, 6e-4 in f16, 1.3e-2 in q8_0).
TOLERANCES = {"f32": 5e-3, "f16": 1e-2, "q8_0": 5e-2}


class MtmdVisionEncoder:
    """What OnnxVisionEncoder is to other engines. seconds: what the last call to `see` spent;
    'tower' is tower and projector together, all 0 for images that were kept.
    """

    def __init__(self, engine: Engine, threads: int | None = None):
        if not engine.vision:
            raise EdgemedError(
                f"{engine.path} reads text only",
                "Ask it without an image, or export a vision model",
            )
        self.path = engine.path
        self.v = vision_of(engine.vision)
        self.parts = max(engine.rope_axes, default=0) + 1
        self.context = engine.context
        self.family: Architecture = plugins.load("families", engine.family).FAMILY
        self.lib = llama_library()
        self.mtmd = multimodal()
        self.vocabulary = self._vocabulary(engine)
        self.ctx = self._start(engine, threads or machine()["physical_cores"])
        self.hidden = int(self._said(f"{self._said('general.architecture')}.embedding_length"))
        self.cached = FeatureCache(self._encode)
        self.seconds = dict.fromkeys(("preprocess", "tower", "projector"), 0.0)

    def _vocabulary(self, engine: Engine) -> Any:
        # libmtmd writes the text around an image too, and cannot go on without a vocabulary to do
        # so; no weight is read for it.
        params = self.lib.llama_model_default_params()
        params.vocab_only = True
        ERRORS.clear()
        file = engine.path / FILE
        read_gguf(file, texts=False)
        if not (model := self.lib.llama_model_load_from_file(str(file).encode(), params)):
            raise EdgemedError(
                f"llama.cpp cannot load {file}: {'; '.join(ERRORS) or 'no reason given'}",
                "Export the engine again",
            )
        return model

    def _said(self, key: str) -> str:
        """A value in the text model's metadata."""
        text = ctypes.create_string_buffer(64)
        self.lib.llama_model_meta_val_str(self.vocabulary, key.encode(), text, len(text))
        return text.value.decode()

    def _start(self, engine: Engine, threads: int) -> Any:
        params = self.mtmd.mtmd_context_params_default()
        file = engine.path / mmproj.FILE
        read_gguf(file, texts=False)
        params.n_threads = threads
        params.print_timings = False
        params.warmup = False
        # Its own limits would make it resize again, and the model's own let a narrow image pass
        # that has more pixels than they say.
        params.image_min_tokens = 1
        params.image_max_tokens = 1 << 20
        # Said, because finding out takes a warm-up on a large image. It is faster, and its float16
        # keys and values are lost in the error of the GELU table.
        params.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if not (ctx := self.mtmd.mtmd_init_from_file(str(file).encode(), self.vocabulary, params)):
            self.lib.llama_model_free(self.vocabulary)
            raise EdgemedError(
                f"libmtmd cannot load {file}: {'; '.join(ERRORS) or 'no reason given'}",
                "Export the engine again",
            )
        return ctx

    def features(self, image: Image.Image) -> EncodedImage:
        """(features [n, hidden], (rows, columns) of features) of one RGB image; computed once for
        the same pixels.
        """
        return self.cached.features(image)

    def _encode(self, image: Image.Image) -> EncodedImage:
        marks = [time.perf_counter()]
        image = resized(image, self.v)
        rows, columns = (
            side // (self.v.patch * self.v.merge) for side in (image.height, image.width)
        )
        chunks = self.mtmd.mtmd_input_chunks_init()
        try:
            chunk = self._chunk(chunks, image)
            # A count of features other than the published rule's would mean that libmtmd resized.
            if (count := self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)) != rows * columns:
                raise RuntimeError(
                    f"libmtmd makes {count} features of {image.width} x {image.height} pixels, not"
                    f" {rows * columns}"
                )
            marks.append(time.perf_counter())
            if code := self.mtmd.mtmd_encode_chunk(self.ctx, chunk):
                raise RuntimeError(f"mtmd_encode_chunk gave {code}: {'; '.join(ERRORS)}")
            features = np.ctypeslib.as_array(
                self.mtmd.mtmd_get_output_embd(self.ctx), (count, self.hidden)
            ).copy()
            marks.append(time.perf_counter())
        finally:
            self.mtmd.mtmd_input_chunks_free(chunks)
        for name, spent in zip(self.seconds, np.diff(marks), strict=False):
            self.seconds[name] += float(spent)
        return features, (rows, columns)

    def _chunk(self, chunks: Any, image: Image.Image) -> Any:
        """The chunk of `chunks` that holds one image, preprocessed."""
        mtmd = self.mtmd
        pixels = image.tobytes()
        bitmap = mtmd.mtmd_bitmap_init(
            image.width, image.height, (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        )
        try:
            marker = mtmd.mtmd_default_marker()
            text = mtmd.mtmd_input_text(marker, len(marker), False, True)
            ERRORS.clear()
            if code := mtmd.mtmd_tokenize(
                self.ctx, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1
            ):
                raise RuntimeError(f"mtmd_tokenize gave {code}: {'; '.join(ERRORS)}")
        finally:
            mtmd.mtmd_bitmap_free(bitmap)
        every = (
            mtmd.mtmd_input_chunks_get(chunks, i)
            for i in range(mtmd.mtmd_input_chunks_size(chunks))
        )
        return next(chunk for chunk in every if mtmd.mtmd_input_chunk_get_type(chunk) == IMAGE)

    def see(
        self, tokens: Sequence[int], images: Sequence[Image.Image]
    ) -> tuple[list[int], ImageEmbeddings | None]:
        """As OnnxVisionEncoder.see."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        check_places(tokens, self.v.token, len(images))
        return placed(
            tokens, [self.features(image) for image in images], self.v, self.parts, self.context
        )

    def close(self) -> None:
        if self.ctx is not None:
            self.mtmd.mtmd_free(self.ctx)
            self.lib.llama_model_free(self.vocabulary)
            self.ctx = None


def multimodal() -> Any:
    """libmtmd's C interface; its log goes where llama.cpp's goes."""
    llama_library()
    from llama_cpp import mtmd_cpp

    for log in (mtmd_cpp.mtmd_log_set, mtmd_cpp.mtmd_helper_log_set):
        log(LOG[0], ctypes.c_void_p(0))
    return mtmd_cpp
