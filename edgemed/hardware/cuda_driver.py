"""The little of CUDA an engine needs (memory, copies, a stream, graphs), by ctypes on the driver's
own library.

libcuda comes with every driver, Jetsons included, so nothing has to match a toolkit or a Python
wheel, and a device needs no torch. Tests replace `load_driver` by a library on host memory; no
call here has run on a GPU yet.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError

OUT_OF_MEMORY = 2
CAPTURE_ERRORS = range(900, 910)  # CUDA_ERROR_STREAM_CAPTURE_*
INTEGRATED = 18
MAJOR = 75
MINOR = 76  # CUdevice_attribute
DEVICE_MEMORY = 2
THREAD_LOCAL = 1  # CUmemorytype, CUstreamCaptureMode


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = [
        ("src_x", c_size_t),
        ("src_y", c_size_t),
        ("src_type", c_int),
        ("src_host", c_void_p),
        ("src_device", c_uint64),
        ("src_array", c_void_p),
        ("src_pitch", c_size_t),
        ("dst_x", c_size_t),
        ("dst_y", c_size_t),
        ("dst_type", c_int),
        ("dst_host", c_void_p),
        ("dst_device", c_uint64),
        ("dst_array", c_void_p),
        ("dst_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    ]


class CaptureError(Exception):
    """The work on a stream cannot be captured into a graph; it can still be run."""


def load_driver() -> Any:
    """The driver's library. Raises EdgemedError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise EdgemedError(
            "there is no NVIDIA driver here (libcuda.so.1 cannot be loaded)",
            "Run this on the device, or install the NVIDIA driver",
        ) from None


class Cuda:
    """The first GPU, its primary context, and one stream. Addresses are integers; sizes are
    bytes.
    """

    def __init__(self) -> None:
        """Raises EdgemedError where there is no driver or no GPU it can use."""
        self.lib = load_driver()
        for name, types in (
            ("cuMemAlloc_v2", (POINTER(c_uint64), c_size_t)),
            ("cuMemFree_v2", (c_uint64,)),
            ("cuMemsetD8Async", (c_uint64, ctypes.c_ubyte, c_size_t, c_void_p)),
            ("cuMemcpyHtoDAsync_v2", (c_uint64, c_void_p, c_size_t, c_void_p)),
            ("cuMemcpyDtoHAsync_v2", (c_void_p, c_uint64, c_size_t, c_void_p)),
            ("cuMemHostAlloc", (POINTER(c_void_p), c_size_t, ctypes.c_uint)),
            ("cuGraphInstantiateWithFlags", (POINTER(c_void_p), c_void_p, c_uint64)),
        ):
            getattr(self.lib, name).argtypes = types
        code = self.lib.cuInit(0)
        device = c_int()
        code = code or self.lib.cuDeviceGet(byref(device), 0)
        if code:
            raise EdgemedError(
                f"the NVIDIA driver finds no GPU it can use ({self._error(code)})",
                "Check nvidia-smi; after a driver update, restart",
            )
        self.device = device
        self.context = c_void_p()
        self.stream = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(self.context), device)
        self.enter()
        # 1: does not wait for the default stream
        self._call("cuStreamCreate", byref(self.stream), 1)
        self.held: list[int] = []
        self.pinned: list[c_void_p] = []

    def _error(self, code: int) -> str:
        text = c_char_p()
        self.lib.cuGetErrorName(code, byref(text))
        return text.value.decode() if text.value else f"CUDA error {code}"

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.lib, name)(*arguments)
        if code in CAPTURE_ERRORS:
            raise CaptureError(self._error(code))
        if code == OUT_OF_MEMORY:
            raise EdgemedError(
                f"the GPU has no memory left ({self.free() / 1e6:.1f} MB free)",
                "Close other programs, or export with a smaller context or int4",
            )
        if code:
            raise RuntimeError(f"{name}: {self._error(code)}")

    def enter(self) -> None:
        """Make the GPU current in this thread."""
        self._call("cuCtxSetCurrent", self.context)

    # --- what it is

    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, 256, self.device)
        return text.value.decode()

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), number, self.device)
        return value.value

    def capability(self) -> str:
        """Compute capability, '8.7'."""
        return f"{self._attribute(MAJOR)}.{self._attribute(MINOR)}"

    def driver(self) -> str:
        """The newest CUDA this driver serves, '12.6'."""
        value = c_int()
        self._call("cuDriverGetVersion", byref(value))
        return f"{value.value // 1000}.{value.value % 1000 // 10}"

    def shared(self) -> bool:
        """Whether the GPU shares its memory with the CPU, as Jetsons do."""
        return bool(self._attribute(INTEGRATED))

    def free(self) -> int:
        """Bytes that can be had. Where memory is shared the driver does not count what the file
        cache would give back, so the system's number is taken.
        """
        import psutil

        if self.shared():
            return int(psutil.virtual_memory().available)
        free = c_size_t()
        total = c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    # --- memory

    def alloc(self, size: int) -> int:
        """Device memory, zeroed; freed by close()."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), size)
        self.held.append(address.value)
        self._call("cuMemsetD8Async", address.value, 0, size, self.stream)
        return address.value

    def host(self, size: int) -> np.ndarray:
        """Page-locked host memory as uint8 [size]; freed by close()."""
        address = c_void_p()
        self._call("cuMemHostAlloc", byref(address), size, 0)
        self.pinned.append(address)
        return np.ctypeslib.as_array(ctypes.cast(address, POINTER(ctypes.c_uint8)), (size,))

    def to_device(self, address: int, array: np.ndarray) -> None:
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def to_host(self, array: np.ndarray, address: int) -> None:
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)

    def rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
    ) -> None:
        """Copy `height` pieces of `width` bytes within the device, their starts a pitch apart."""
        copy = Copy2D(
            src_type=DEVICE_MEMORY,
            src_device=source,
            src_pitch=source_pitch,
            dst_type=DEVICE_MEMORY,
            dst_device=target,
            dst_pitch=target_pitch,
            width=width,
            height=height,
        )
        self._call("cuMemcpy2DAsync_v2", byref(copy), self.stream)

    def wait(self) -> None:
        self._call("cuStreamSynchronize", self.stream)

    # --- graphs

    def capture(self, work: Callable[[], None]) -> c_void_p:
        """Record what `work` puts on the stream, without running it. Raises CaptureError where that
        is impossible.
        """
        graph = c_void_p()
        ready = c_void_p()
        self._call("cuStreamBeginCapture_v2", self.stream, THREAD_LOCAL)
        try:
            work()
        finally:
            # A capture that was begun must be ended, or the stream stays unusable.
            code = self.lib.cuStreamEndCapture(self.stream, byref(graph))
        if code or not graph.value:
            raise CaptureError(self._error(code))
        self._call("cuGraphInstantiateWithFlags", byref(ready), graph, 0)
        self._call("cuGraphDestroy", graph)
        return ready

    def launch(self, ready: c_void_p) -> None:
        self._call("cuGraphLaunch", ready, self.stream)

    def forget(self, ready: c_void_p) -> None:
        self._call("cuGraphExecDestroy", ready)

    def bandwidth(self, size: int = 1 << 30, rounds: int = 20) -> float:
        """Measured device memory bandwidth, 10^9 bytes/s read and written: the best of `rounds`
        copies within the device.
        """
        import time

        size = min(size, self.free() // 8)
        source = self.alloc(size)
        target = self.alloc(size)
        best = float("inf")
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            self.rows(target, size, source, size, size, 1)
            self.wait()
            best = min(best, time.perf_counter() - started)
        for address in (source, target):
            self.held.remove(address)
            self._call("cuMemFree_v2", address)
        return 2 * size / best / 1e9

    def close(self) -> None:
        for address in self.held:
            self._call("cuMemFree_v2", address)
        for pinned in self.pinned:
            self._call("cuMemFreeHost", pinned)
        self.held = []
        self.pinned = []
        self._call("cuStreamDestroy_v2", self.stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self.device)
