"""Arrays from an .npz file that came from elsewhere: only numbers, and only as many as the file can
hold.

numpy itself makes room for whatever an array's header says, before it reads the first number.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from edgemed.errors import EdgemedError

MOST_ARRAYS = 10_000
# Bytes of all arrays. Scores compress to about a half; whoever says a hundred times as much as the
# file has is not believed.
SMALL = 64 << 20
MOST_RATIO = 50
KINDS = "biuf"  # numpy's letters for truth values, whole numbers and numbers
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
    OSError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def read_arrays(path: Path, fix: str) -> dict[str, np.ndarray]:
    """name -> array. fix: what to do where the file is damaged.

    Raises EdgemedError for what is no .npz file, more than MOST_ARRAYS arrays, one that is not of
    numbers, and a header that says more than the file holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _arrays(archive, max(SMALL, MOST_RATIO * path.stat().st_size))
    except DAMAGED as error:
        raise damaged(path, error, fix) from None


def damaged(path: Path, error: Exception, fix: str) -> EdgemedError:
    """The error that says in one line why a file cannot be read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return EdgemedError(f"{path} is damaged: {reason}", fix)


def _arrays(archive: zipfile.ZipFile, most_bytes: int) -> dict[str, np.ndarray]:
    members = archive.infolist()
    names = [member.filename.removesuffix(".npy") for member in members]
    if len(names) > MOST_ARRAYS or len(set(names)) < len(names):
        raise ValueError(f"it holds {len(names)} arrays, or two of one name")
    if sum(member.file_size for member in members) > most_bytes:
        raise ValueError(f"its arrays would take more than {most_bytes} bytes")
    return {name: _array(archive, member) for name, member in zip(names, members, strict=True)}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as handle:
        version = np.lib.format.read_magic(handle)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(handle)
        nbytes = member.file_size - handle.tell()
    if dtype.hasobject or dtype.kind not in KINDS:
        raise ValueError(f"array {member.filename} is not of numbers")
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != nbytes:
        raise ValueError(f"array {member.filename} has {nbytes} bytes, not those of {shape}")
    with archive.open(member) as handle:
        array: np.ndarray = np.lib.format.read_array(handle, allow_pickle=False)
    return array


def check_array(name: str, array: np.ndarray, kinds: str, dimensions: int) -> None:
    """Raise ValueError where an array has another number of dimensions, numbers of another kind
    ('f', 'iu'), or one that is not finite.
    """
    if array.ndim != dimensions or array.dtype.kind not in kinds:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
    if "f" in kinds and not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite numbers")
