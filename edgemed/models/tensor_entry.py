"""Where one tensor lies in a file, and how its bytes become a tensor.

Every kind of weight file is read through these entries: a header or a pickle is parsed once, after
that a tensor is one seek and one plain read. So peak memory is one tensor, whatever the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgemed.errors import EdgemedError, need

if TYPE_CHECKING:
    import torch

# torch's name of a dtype -> bytes of one element
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
# Elements a tensor may have at most: torch counts them in 63 bits.
MOST_ELEMENTS = 1 << 62


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    # torch's name of the dtype
    dtype: str
    shape: tuple[int, ...]
    # first byte in the file
    offset: int
    # bytes from the first element to the last
    nbytes: int
    # elements from one index to the next, by axis; None where the tensor is contiguous
    strides: tuple[int, ...] | None = None


def read_entry(entry: Entry) -> torch.Tensor:
    """One tensor in its stored dtype. Raises EdgemedError where the file has become shorter."""
    torch = need("torch", "build")
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    with open(entry.file, "rb") as handle:
        handle.seek(entry.offset)
        if handle.readinto(memoryview(buffer.numpy())) != entry.nbytes:
            raise EdgemedError(f"{entry.file} is truncated", "Download it again")
    values = buffer.view(getattr(torch, entry.dtype))
    if entry.strides is None:
        return values.reshape(entry.shape)
    return torch.as_strided(values, entry.shape, entry.strides).contiguous()


def is_size(value: object) -> bool:
    """Whether a value from a file can be a size or an offset."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_ELEMENTS


def element_count(shape: tuple[int, ...]) -> int:
    """Elements of a tensor. Raises ValueError where there are more than torch can count."""
    count = math.prod(shape)
    if count > MOST_ELEMENTS:
        raise ValueError(f"a tensor of shape {shortened(list(shape))} is impossible")
    return count


def shortened(value: object) -> str:
    """A value from a file, short enough for a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
