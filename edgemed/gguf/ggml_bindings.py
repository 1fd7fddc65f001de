"""ggml's C interface by ctypes: the tensor library inside the installed llama.cpp, for graphs
llama.cpp itself does not have.

Only what edgemed's own graph needs is declared. A tensor is an address; sizes are given the other
way round than numpy's, fastest axis first.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.gguf.library import library_folder, library_name
from edgemed.gguf.reader import read_gguf

P = ctypes.c_void_p
N = ctypes.c_int
L = ctypes.c_int64
F = ctypes.c_float
Z = ctypes.c_size_t
S = ctypes.c_char_p
B = ctypes.c_bool
F32 = 0
F16 = 1
I32 = 26
I64 = 27  # ggml_type
NEOX = 2  # rotary: element i with element i + half


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", Z), ("mem_buffer", P), ("no_alloc", B)]


class GgufParams(ctypes.Structure):
    _fields_ = [("no_alloc", B), ("ctx", ctypes.POINTER(P))]


# name -> (result, arguments) in libggml-base
BASE: dict[str, tuple[Any, ...]] = {
    "ggml_init": (P, InitParams),
    "ggml_free": (None, P),
    "ggml_get_tensor": (P, P, S),
    "ggml_nbytes": (Z, P),
    "ggml_row_size": (Z, N, L),
    "ggml_type_size": (Z, N),
    "ggml_new_tensor_1d": (P, P, N, L),
    "ggml_new_tensor_2d": (P, P, N, L, L),
    "ggml_new_tensor_3d": (P, P, N, L, L, L),
    "ggml_set_input": (None, P),
    "ggml_set_output": (None, P),
    "ggml_get_data": (P, P),
    "ggml_add": (P, P, P, P),
    "ggml_mul": (P, P, P, P),
    "ggml_div": (P, P, P, P),
    "ggml_sum_rows": (P, P, P),
    "ggml_cont": (P, P, P),
    "ggml_mul_mat": (P, P, P, P),
    "ggml_mul_mat_id": (P, P, P, P, P),
    "ggml_add_id": (P, P, P, P, P),
    "ggml_get_rows": (P, P, P, P),
    "ggml_set_rows": (P, P, P, P, P),
    "ggml_norm": (P, P, P, F),
    "ggml_rms_norm": (P, P, P, F),
    "ggml_soft_max": (P, P, P),
    "ggml_argsort_top_k": (P, P, P, N),
    "ggml_gelu": (P, P, P),
    "ggml_silu": (P, P, P),
    "ggml_swiglu_split": (P, P, P, P),
    "ggml_reshape_2d": (P, P, P, L, L),
    "ggml_reshape_3d": (P, P, P, L, L, L),
    "ggml_permute": (P, P, P, N, N, N, N),
    "ggml_view_2d": (P, P, P, L, L, Z, Z),
    "ggml_view_3d": (P, P, P, L, L, L, Z, Z, Z),
    "ggml_rope_ext": (P, P, P, P, P, N, N, N, F, F, F, F, F, F),
    "ggml_flash_attn_ext": (P, P, P, P, P, P, F, F, F),
    "ggml_new_graph_custom": (P, P, Z, B),
    "ggml_build_forward_expand": (None, P, P),
    "ggml_gallocr_new": (P, P),
    "ggml_gallocr_free": (None, P),
    "ggml_gallocr_alloc_graph": (B, P, P),
    "ggml_backend_cpu_buffer_type": (P,),
    "ggml_backend_cpu_buffer_from_ptr": (P, P, Z),
    "ggml_backend_tensor_alloc": (N, P, P, P),
    "ggml_backend_buffer_free": (None, P),
    "ggml_backend_graph_compute": (N, P, P),
    "ggml_backend_free": (None, P),
    "ggml_dup_tensor": (P, P, P),
    "ggml_nelements": (L, P),
    "ggml_nrows": (L, P),
    "ggml_backend_tensor_set": (None, P, P, Z, Z),
    "ggml_backend_reg_dev_get": (P, P, Z),
    "ggml_backend_reg_get_proc_address": (P, P, S),
    "ggml_backend_dev_supports_op": (B, P, P),
    "ggml_backend_buft_alloc_buffer": (P, P, Z),
    "ggml_backend_buft_get_alloc_size": (Z, P, P),
    "ggml_backend_buffer_get_base": (P, P),
    "gguf_init_from_file": (P, S, GgufParams),
    "gguf_free": (None, P),
    "gguf_get_data_offset": (Z, P),
    "gguf_find_tensor": (L, P, S),
    "gguf_get_tensor_offset": (Z, P, L),
    "gguf_get_n_tensors": (L, P),
    "gguf_get_tensor_name": (S, P, L),
    "gguf_find_key": (L, P, S),
    "gguf_get_val_str": (S, P, L),
}
CPU: dict[str, tuple[Any, ...]] = {
    "ggml_backend_cpu_init": (P,),
    "ggml_backend_cpu_set_n_threads": (None, P, N),
    "ggml_backend_cpu_reg": (P,),
}


@functools.cache
def ggml_library() -> Any:
    """The declared functions as attributes, without their 'ggml_'. Raises EdgemedError where the
    installed llama.cpp lacks one.
    """
    entries: dict[str, Any] = {}
    for name, functions in (("ggml-base", BASE), ("ggml-cpu", CPU)):
        file = library_folder() / library_name(name)
        try:
            shared = ctypes.CDLL(str(file))
            for function, (result, *arguments) in functions.items():
                entry = getattr(shared, function)
                entry.restype = result
                entry.argtypes = arguments
                entries[function.removeprefix("ggml_")] = entry
        except (OSError, AttributeError) as error:
            raise EdgemedError(
                f"{file} cannot be used: {error}",
                "Reinstall llama.cpp: pip install --force-reinstall llama-cpp-python==0.3.36",
            ) from None
    return SimpleNamespace(**entries)


class GgmlWeights:
    """The tensors of a GGUF file, mapped: pages are read when they are first used, so experts that
    no token chooses stay on disk.
    """

    def __init__(self, file: Path, repack: bool = False):
        """repack: hold matrices that every token reads a second time, in an order this CPU
        multiplies faster (ggml's own, where it has one for the type).

        Raises EdgemedError where the file is not readable.
        """
        read_gguf(file, texts=False)
        self.ggml = ggml_library()
        context = P()
        self.gguf = self.ggml.gguf_init_from_file(
            str(file).encode(), GgufParams(True, ctypes.pointer(context))
        )
        if not self.gguf:
            raise EdgemedError(f"ggml cannot read {file}", "Export the engine again")
        self.context = context.value
        with open(file, "rb") as handle:
            # private: ggml wants an address it may write to, and never does
            self.map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        self.start = np.frombuffer(self.map, np.uint8).ctypes.data
        self.buffer = self.ggml.backend_cpu_buffer_from_ptr(self.start, len(self.map))
        self.tensors: dict[str, int] = {}
        begin = self.start + self.ggml.gguf_get_data_offset(self.gguf)
        for number in range(self.ggml.gguf_get_n_tensors(self.gguf)):
            name = self.ggml.gguf_get_tensor_name(self.gguf, number)
            tensor = self.ggml.get_tensor(self.context, name)
            self.ggml.backend_tensor_alloc(
                self.buffer, tensor, begin + self.ggml.gguf_get_tensor_offset(self.gguf, number)
            )
            self.tensors[name.decode()] = tensor
        self.second = self.ggml.init(InitParams(16 << 20, None, True))
        self.repacked: list[int] = []
        if repack:
            self.repacked = self._repacked()

    def _repacked(self) -> list[int]:
        """Put matrices into the CPU's own order and let `tensors` name the copies; returns the
        buffers of the copies.

        Experts stay in the file: nobody knows which of them will be read.
        """
        g = self.ggml
        buffers = []
        device = g.backend_reg_dev_get(g.backend_cpu_reg(), 0)
        for name, mapped in list(self.tensors.items()):
            if not read_by_every_token(name):
                continue
            for order in weight_orders(g, device):
                tensor = g.dup_tensor(self.second, mapped)
                size = g.backend_buft_get_alloc_size(order, tensor)
                buffer = g.backend_buft_alloc_buffer(order, size)
                g.backend_tensor_alloc(buffer, tensor, g.backend_buffer_get_base(buffer))
                # The CPU says whether it can multiply a matrix of this type in this order.
                columns = g.nelements(tensor) // g.nrows(tensor)
                vector = g.new_tensor_2d(self.second, F32, columns, 1)
                product = g.mul_mat(self.second, tensor, vector)
                if g.backend_dev_supports_op(device, product):
                    g.backend_tensor_set(tensor, g.get_data(mapped), 0, g.nbytes(mapped))
                    self._release_pages(mapped)
                    self.tensors[name] = tensor
                    buffers.append(buffer)
                    break
                g.backend_buffer_free(buffer)
        return buffers

    def _release_pages(self, tensor: int) -> None:
        # Else the pages just read would stay with this process until somebody needs the memory.
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = self.ggml.get_data(tensor) - self.start
        last = first + self.ggml.nbytes(tensor)
        # Only whole pages: the first and the last may hold a part of another tensor.
        begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = last // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def text(self, key: str) -> str:
        """A string of the file's metadata. Raises EdgemedError where it is missing."""
        at = self.ggml.gguf_find_key(self.gguf, key.encode())
        if at < 0:
            raise EdgemedError(
                f"the GGUF file has no '{key}'",
                "It is not one of edgemed's own; export the engine again",
            )
        return self.ggml.gguf_get_val_str(self.gguf, at).decode()

    def close(self) -> None:
        for buffer in (self.buffer, *self.repacked):
            self.ggml.backend_buffer_free(buffer)
        self.ggml.free(self.second)
        self.ggml.free(self.context)
        self.ggml.gguf_free(self.gguf)


def read_by_every_token(name: str) -> bool:
    """Whether a tensor is a matrix that is read whole for every token."""
    if not name.endswith(".weight"):
        return False
    return not (name.startswith("token_embd") or "_exps" in name or "norm" in name)


def weight_orders(g: Any, device: int) -> list[int]:
    """Buffer types in which the CPU holds weights in an order of its own."""
    address = g.backend_reg_get_proc_address(
        g.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
    )
    if not address:
        return []
    list_buffer_types = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(address)
    listed = list_buffer_types(device)
    buffer_types: list[int] = []
    # A null pointer ends the list.
    while listed and listed[len(buffer_types)]:
        buffer_types.append(listed[len(buffer_types)])
    return buffer_types


def tensor_view(tensor: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A tensor's memory as a numpy array of this shape (slowest axis first)."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * size).from_address(ggml_library().get_data(tensor))
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)
