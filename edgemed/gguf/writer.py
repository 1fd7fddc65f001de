"""Writes a GGUF file tensor by tensor, quantizing with llama.cpp's own routine, so that a 10 GB
checkpoint needs 1 GB of memory.

The next tensor is read while the rows of this one are quantized on all cores; nothing larger than a
few tensors is ever held, and there is no intermediate float file. Each row is quantized by
ggml_quantize_chunk, hence bit for bit as llama-quantize does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.console import track
from edgemed.errors import EdgemedError, need
from edgemed.gguf.library import ggml_base
from edgemed.hardware.device import machine

ALIGNMENT = 32
CHUNK = 1 << 19  # weights per quantization task: large against the call, small against a tensor


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file. shape as numpy has it, (rows, columns), (width,) or (experts, rows,
    columns); type: a ggml type name.

    read() gives float32 of that shape, or the finished bytes (uint8) where `encoded`. importance:
    float32 [columns], of experts [experts, columns], or None.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], np.ndarray]
    encoded: bool = False
    importance: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.shape, self.type)


def tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of this shape in a ggml type."""
    gguf = need("gguf", "build")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def write_gguf(
    path: Path,
    arch: str,
    describe: Callable[[Any], None],
    tensors: Sequence[Tensor],
    threads: int | None = None,
) -> None:
    """Write `tensors` to `path`. describe(writer) adds the metadata to a gguf.GGUFWriter. threads:
    None for all cores.

    Raises EdgemedError where a weight does not fit its type, OSError where the disk is full.
    """
    gguf = need("gguf", "build")
    writer = gguf.GGUFWriter(path, arch)
    describe(writer)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.nbytes,
            gguf.GGMLQuantizationType[tensor.type],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    try:
        with Encoder(threads) as encoder:
            followers: list[Tensor | None] = [*tensors[1:], None]
            data = tensors[0].read()
            for tensor, following in track(list(zip(tensors, followers, strict=True)), "gguf"):
                finish = _started(encoder, tensor, data)
                # The next tensor is read while the threads quantize this one.
                if following is not None:
                    data = following.read()
                # Plain writes, not numpy's tofile: that one hides 'disk full' behind an error
                # without a number.
                file.write(bytes(-file.tell() % ALIGNMENT))
                file.write(memoryview(finish().data).cast("B"))
                del finish
        file.write(bytes(-file.tell() % ALIGNMENT))
    finally:
        writer.close()


def _started(encoder: Encoder, tensor: Tensor, data: np.ndarray) -> Callable[[], np.ndarray]:
    if tensor.encoded:
        return lambda: data
    return encoder.start(tensor, data)


class Encoder:
    """float32 rows -> ggml blocks on all cores."""

    def __init__(self, threads: int | None = None):
        self.ggml = ggml_base()
        self.types = need("gguf", "build").GGMLQuantizationType
        self.pool = ThreadPoolExecutor(threads or machine()["logical_cores"])

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def start(self, tensor: Tensor, data: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin to quantize float32 `data`, by its last axis; calling the result waits and gives
        uint8 [rows, bytes per row].

        That call raises EdgemedError where a weight does not fit the type.
        """
        values = np.ascontiguousarray(data, np.float32)
        if tensor.type == "F32":
            return lambda: values.view(np.uint8)
        columns = values.shape[-1]
        matrix = values.reshape(-1, columns)
        rows = len(matrix)
        kind = int(self.types[tensor.type])
        # The tables behind the IQ types are made once, before the threads need them.
        self.ggml.ggml_quantize_init(kind)
        out = np.empty((rows, tensor.nbytes // rows), np.uint8)
        importance = None
        group = rows
        if tensor.importance is not None:
            importance = np.ascontiguousarray(tensor.importance, np.float32).reshape(-1, columns)
            # Experts have an importance each, over their own rows.
            group = rows // len(importance)

        def quantize(start: int, count: int) -> None:
            target = out[start:].ctypes.data
            # Addresses in bytes: a float32 has four.
            source = matrix.ctypes.data + start * columns * 4
            weights = None if importance is None else importance[start // group].ctypes.data
            size = self.ggml.ggml_quantize_chunk(
                kind,
                source,
                target,
                0,
                count,
                columns,
                weights,
            )
            if not self.ggml.ggml_validate_row_data(kind, target, size):
                raise EdgemedError(
                    f"{tensor.name}: a weight does not fit into {tensor.type}",
                    "Choose a type with a larger range, such as bf16 or f32",
                )

        step = max(1, CHUNK // columns)
        tasks = []
        for first in range(0, rows, group):
            end = first + group
            for start in range(first, end, step):
                # No task reaches from one expert into the next.
                count = min(step, end - start)
                tasks.append(self.pool.submit(quantize, start, count))

        def finish() -> np.ndarray:
            for task in tasks:
                task.result()
            return out

        return finish

    def expand(self, kind: str, data: np.ndarray) -> np.ndarray:
        """Blocks of an integer type, uint8 [rows, bytes per row] -> the float32 [rows, columns]
        they stand for, by ggml's own routine.
        """
        block, size = need("gguf", "build").GGML_QUANT_SIZES[self.types[kind]]
        data = np.ascontiguousarray(data)
        out = np.empty((len(data), data.shape[1] // size * block), np.float32)
        # ggml spells dequantize_row_q4_0, but dequantize_row_q4_K.
        spelled = kind.lower()
        if kind.endswith("_K"):
            spelled = kind[:-2].lower() + "_K"
        routine = self.ggml[f"dequantize_row_{spelled}"]
        routine.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        routine.restype = None
        routine(data.ctypes.data, out.ctypes.data, out.size)
        return out
