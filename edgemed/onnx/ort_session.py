"""A decoder on ONNX Runtime, its cache bound without copies.

Buffers are private lazily-resident pages: a cache at its full length is paid for as it fills.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.errors import EdgemedError, install_command, need
from edgemed.inference.session import (
    CarriesVision,
    ImageEmbeddings,
    Positions,
    check_room,
    embedding_ids,
    feature_rows,
)
from edgemed.onnx import lora_files
from edgemed.onnx.ort_dialect import ROPE, WIDE_SUMS

if TYPE_CHECKING:
    from edgemed.engines.engine import Engine

# Linux's advice to move pages into huge ones now; Python's mmap module does not know it.
MADV_COLLAPSE = 25
PAGES = Path("/sys/kernel/mm/transparent_hugepage")
# Element types of the cache, as ONNX Runtime names them.
CACHES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def rope_tables(engine: Engine) -> list[np.ndarray]:
    """cos and sin float64 [context, pairs] of plain positions; [] where the model has no rotary
    ones.
    """
    if not engine.rope_frequencies:
        return []
    angles = np.arange(engine.context)[:, None] * np.array(engine.rope_frequencies)
    return [np.cos(angles), np.sin(angles)]


def _lazy_zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    # Pages become resident as the context fills. Huge pages would make the whole buffer resident at
    # the first token, because every head writes at its own distant place.
    buffer = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        buffer.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(buffer, dtype).reshape(shape)


def _use_huge_pages() -> None:
    """Move this process's large private memory into huge pages, where Linux has them and can (6.1
    or newer); nothing is lost where not.
    """
    # Every weight is read once per token, and with pages of 4 KB the CPU's prefetch stops at the
    # end of each. onnxruntime allocates the weights itself, so what it has allocated is moved
    # afterwards. What that gains and costs: docs/measuring.md.
    lines: list[str] = []
    with contextlib.suppress(OSError):
        if "[never]" not in (PAGES / "enabled").read_text():
            size = int((PAGES / "hpage_pmd_size").read_text())
            lines = Path("/proc/self/maps").read_text().splitlines()
    for line in lines:
        addresses, rights, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if rights == "rw-p" and inode == "0" and end - start >= 2 * size:
            # One by one: the kernel gives up a whole range at the first page it finds no room for.
            for page in range(-(-start // size) * size, end - size + 1, size):
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(page), ctypes.c_size_t(size), MADV_COLLAPSE
                )


def _started(ort: Any, engine: Engine, threads: int | None, cuda: bool) -> Any:
    """The InferenceSession of model.onnx. Raises EdgemedError where it does not load, or CUDA is
    asked for and missing.
    """
    if cuda and "CUDAExecutionProvider" not in ort.get_available_providers():
        raise EdgemedError(
            f"{engine.path} was exported for CUDA, and this onnxruntime has no CUDA provider",
            f"pip uninstall onnxruntime; {install_command('onnx-gpu')}",
        )
    if cuda and hasattr(ort, "preload_dlls"):
        # CUDA and cuDNN from the wheels beside it, where the system has none
        ort.preload_dlls()
    try:
        session = ort.InferenceSession(
            str(engine.path / "model.onnx"),
            _options(ort, engine, threads),
            providers=["CUDAExecutionProvider"] if cuda else ["CPUExecutionProvider"],
        )
    except Exception as error:
        # onnxruntime raises a dozen unrelated exception types for a model it cannot load
        raise EdgemedError(
            f"onnxruntime {ort.__version__} cannot load {engine.path}:"
            f" {str(error).splitlines()[0]}",
            "Export the engine again",
        ) from error
    if cuda and session.get_providers()[0] != "CUDAExecutionProvider":
        # onnxruntime only logs this and would run everything on the CPU.
        raise EdgemedError(
            f"onnxruntime {ort.__version__} cannot start CUDA here",
            "Install the CUDA and cuDNN it was built for (its log names the missing library)",
        )
    return session


def _options(ort: Any, engine: Engine, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        # These threads are not OpenMP's, but whoever asks for that policy means them too.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if engine.params.get("precision") == "w8a8":
        options.add_session_config_entry(*WIDE_SUMS)
    return options


class OrtSession(CarriesVision):
    """A Session on ONNX Runtime. All buffers are bound once; a step writes one token id and reads
    one row of scores.
    """

    def __init__(self, engine: Engine, threads: int | None):
        """Raises EdgemedError where the file does not load, or asks for a GPU that is not there."""
        ort = need("onnxruntime", "onnx")
        self.cuda = engine.params.get("provider") == "cuda"
        self.device = "cuda" if self.cuda else "cpu"
        self.session = _started(ort, engine, threads, self.cuda)
        if not self.cuda:
            _use_huge_pages()
        self.head: str = engine.head
        self.width = engine.width
        self.context = engine.context
        self.position = 0
        self.ort = ort
        self.binding = self.session.io_binding()
        # The arena would keep the largest prefill's buffers for good; a device wants that memory
        # back.
        self.shrinking = ort.RunOptions()
        self.shrinking.add_run_config_entry(
            "memory.enable_memory_arena_shrinkage", "gpu:0" if self.cuda else "cpu:0"
        )
        self._bind_cache()
        self._bind_rope(engine)
        self.frequencies = np.array(engine.rope_frequencies)
        self.axes = list(engine.rope_axes)
        self.counted = Positions(max(self.axes) + 1, self.context) if self.axes else None
        self.has_vision = engine.vision is not None
        self.hidden = next(
            (v.shape[1] for v in self.session.get_inputs() if v.name == "features"), 0
        )
        if self.has_vision:
            self._bound("features", np.zeros((1, self.hidden), np.float32))
        self.last = self._bound("last_index", np.zeros(1, np.int32))
        self.total = self._bound("total", np.zeros(1, np.int32))
        self.shape: tuple[int, int] | None = None
        self.folder = engine.path
        self.adapter: str | None = None
        self._adapt(None)

    def _bind_cache(self) -> None:
        """Keys and values [1, kv heads, context, head size] of every layer, read and written in
        place.
        """
        for value in self.session.get_inputs():
            if not value.name.startswith("past."):
                continue
            dtype = CACHES[value.type]
            shape = (1, value.shape[1], self.context, value.shape[3])
            if self.cuda:
                buffer = self.ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)
            else:
                buffer = self.ort.OrtValue.ortvalue_from_numpy(_lazy_zeros(shape, dtype))
            self.binding.bind_ortvalue_input(value.name, buffer)
            self.binding.bind_ortvalue_output(value.name.replace("past", "present"), buffer)

    def _bind_rope(self, engine: Engine) -> None:
        """The rotary tables, in the format in which the graph reads them."""
        self.rope = rope_tables(engine)
        kinds = {value.name: value.type for value in self.session.get_inputs()}
        for number, name in enumerate(ROPE[: len(self.rope)]):
            dtype = np.float16 if kinds[name] == "tensor(float16)" else np.float32
            self.rope[number] = self._bound(name, self.rope[number].astype(dtype))

    def use(self, adapter: str | None) -> None:
        """Go on with one of the engine's adapters, or (None) the base. What was read with the other
        weights is forgotten.
        """
        if adapter != self.adapter:
            self._adapt(adapter)
            self.adapter = adapter
            self.rewind(0)

    def _adapt(self, adapter: str | None) -> None:
        for name, value in lora_files.read(self.folder, adapter, self.session, self.cuda).items():
            self.binding.bind_ortvalue_input(name, value)

    def _bound(self, name: str, array: np.ndarray) -> np.ndarray:
        # OrtValues made from numpy arrays share their memory: writing the array is writing the
        # input.
        self.binding.bind_ortvalue_input(name, self.ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def _shape(self, new: int, selected: int) -> None:
        if self.shape == (new, selected):
            return
        self.tokens = self._bound("tokens", np.zeros((1, new), np.int64))
        self.positions = self._bound("positions", np.zeros((1, new), np.int64))
        self.select = self._bound("select", np.zeros(selected, np.int64))
        if self.has_vision:
            self.feature_rows = self._bound("feature_rows", np.full((1, new), -1, np.int64))
        self.scores = np.zeros((1, selected, self.width), np.float32)
        self.binding.bind_ortvalue_output(
            "scores", self.ort.OrtValue.ortvalue_from_numpy(self.scores)
        )
        self.shape = (new, selected)

    def _set_rotary_rows(
        self, counted: Positions, start: int, count: int, pictures: ImageEmbeddings | None
    ) -> None:
        # Images shift the positions of the tokens after them: the rows of the rotary tables are
        # then those of the tokens' positions, not of their places.
        placed = counted.add(start, count, pictures.positions if pictures else None)
        angles = placed[self.axes].T * self.frequencies
        self.rope[0][start : start + count] = np.cos(angles)
        self.rope[1][start : start + count] = np.sin(angles)

    def _bind_images(self, tokens: Sequence[int], pictures: ImageEmbeddings) -> None:
        self.feature_rows[0] = feature_rows(tokens, pictures, self.has_vision)
        self._bound("features", np.ascontiguousarray(pictures.features, np.float32))

    def prefill(
        self, tokens: Sequence[int], every: bool = False, pictures: ImageEmbeddings | None = None
    ) -> np.ndarray:
        check_room(self, tokens)
        new = len(tokens)
        end = self.position + len(tokens)
        self._shape(new, new if every else 1)
        self.tokens[0] = embedding_ids(tokens, pictures)
        self.positions[0] = np.arange(self.position, end)
        self.select[:] = np.arange(new) if every else new - 1
        self.last[0] = end - 1
        self.total[0] = end
        if self.counted:
            self._set_rotary_rows(self.counted, self.position, new, pictures)
        if pictures:
            self._bind_images(tokens, pictures)
        elif self.has_vision:
            self.feature_rows[:] = -1
        self.session.run_with_iobinding(self.binding, self.shrinking if new > 1 else None)
        self.position = end
        return self.scores[0]

    def step(self, token: int) -> np.ndarray:
        if self.shape != (1, 1) or self.position >= self.context:
            return self.prefill([token])[0]
        position = self.position
        self.tokens[0, 0] = token
        self.positions[0, 0] = position
        self.select[0] = 0
        self.last[0] = position
        self.total[0] = position + 1
        if self.counted:
            self._set_rotary_rows(self.counted, position, 1, None)
        self.session.run_with_iobinding(self.binding)
        self.position = position + 1
        return self.scores[0, 0]

    def rewind(self, position: int) -> None:
        self.position = position

    def close(self) -> None:
        self.close_vision()
        del self.binding, self.session
