"""Where the installed llama.cpp library lies, and its base part.

Its own routines quantize and expand llama.cpp's types, so that they are bit for bit the same.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType

from edgemed.errors import EdgemedError, need


def runtime() -> ModuleType:
    """The llama_cpp package. Raises EdgemedError where it is absent."""
    return need("llama_cpp", "llamacpp")


def library_folder() -> Path:
    """Where llama.cpp's shared libraries lie."""
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override:
        return Path(override)
    return Path(str(runtime().__file__)).parent / "lib"


def library_name(name: str) -> str:
    """The file of one of llama.cpp's libraries on this system."""
    if sys.platform == "win32":
        return f"{name}.dll"
    if sys.platform == "darwin":
        return f"lib{name}.dylib"
    return f"lib{name}.so"


def ggml_base() -> ctypes.CDLL:
    """libggml-base with the prototypes used here. Raises EdgemedError where the installed package
    does not hold it.
    """
    file = library_folder() / library_name("ggml-base")
    if not file.is_file():
        raise EdgemedError(
            f"{file} does not exist",
            "Reinstall llama.cpp: pip install --force-reinstall llama-cpp-python==0.3.36",
        )
    ggml = ctypes.CDLL(str(file))
    i64 = ctypes.c_int64
    pointer = ctypes.c_void_p
    ggml.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, i64, i64, i64, pointer)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.argtypes = (ctypes.c_int, pointer, ctypes.c_size_t)
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_quantize_init.argtypes = (ctypes.c_int,)
    ggml.ggml_quantize_init.restype = None
    return ggml
