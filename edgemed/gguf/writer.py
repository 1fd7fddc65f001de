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
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.console import track
from edgemed.errors import EdgemedError, need
from edgemed.gguf.library import ggml_base
from edgemed.hardware.device import machine

if TYPE_CHECKING:
    pass

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
        gguf = need("gguf", "build")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size


def write(
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
            data = tensors[0].read()
            for tensor, following in track(
                list(zip(tensors, [*tensors[1:], None], strict=True)), "gguf"
            ):
                finish = (lambda data=data: data) if tensor.encoded else encoder.start(tensor, data)
                data = following.read() if following else None
                # Plain writes, not numpy's tofile: that one hides 'disk full' behind an error
                # without a number.
                file.write(bytes(-file.tell() % ALIGNMENT))
                file.write(memoryview(finish()).cast("B"))
                del finish
        file.write(bytes(-file.tell() % ALIGNMENT))
    finally:
        writer.close()


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
        data = np.ascontiguousarray(data, np.float32)
        if tensor.type == "F32":
            return lambda: data.view(np.uint8)
        columns = data.shape[-1]
        data = data.reshape(-1, columns)
        rows = len(data)
        kind = int(self.types[tensor.type])
        # The tables behind the IQ types are made once, before the threads need them.
        self.ggml.ggml_quantize_init(kind)
        out = np.empty((rows, tensor.nbytes // rows), np.uint8)
        importance = (
            None
            if tensor.importance is None
            else np.ascontiguousarray(tensor.importance, np.float32).reshape(-1, columns)
        )
        # Experts have an importance each, over their own rows.
        group = rows if importance is None else rows // len(importance)

        def quantize(start: int, count: int) -> None:
            target = out[start:].ctypes.data
            source = data.ctypes.data + start * columns * 4
            size = self.ggml.ggml_quantize_chunk(
                kind,
                source,
                target,
                0,
                count,
                columns,
                None if importance is None else importance[start // group].ctypes.data,
            )
            if not self.ggml.ggml_validate_row_data(kind, target, size):
                raise EdgemedError(
                    f"{tensor.name}: a weight does not fit into {tensor.type}",
                    "Choose a type with a larger range, such as bf16 or f32",
                )

        step = max(1, CHUNK // columns)
        # No task reaches from one expert into the next.
        tasks = [
            self.pool.submit(quantize, start, min(step, first + group - start))
            for first in range(0, rows, group)
            for start in range(first, first + group, step)
        ]

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
        routine = self.ggml[
            f"dequantize_row_{kind.lower().removesuffix('_k')}{'_K' if kind.endswith('_K') else ''}"
        ]
        routine.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        routine.restype = None
        routine(data.ctypes.data, out.ctypes.data, out.size)
        return out
