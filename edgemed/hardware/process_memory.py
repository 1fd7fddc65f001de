"""The memory of this process: its peak, and giving freed blocks back.

A build states its peak memory in the manifest, so reading it must cost nothing and need no library.
"""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path


def reset_peak_memory() -> None:
    """Start a new peak-memory measurement; Linux only, elsewhere the peak stays that of the whole
    process.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident bytes of this process since reset_peak_memory()."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if platform.system() == "Darwin" else 1024
    )


def return_memory() -> None:
    """Give what was freed back to the system. glibc keeps blocks of up to 32 MB for later; where
    their sizes change, as between matrices, that adds up to hundreds of MB.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
