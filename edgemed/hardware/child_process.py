"""Processes that edgemed starts for a measurement: they end when their parent does.

A bench that goes on after its parent was killed takes the machine's time and memory, and nobody
reads its result. A child asks the kernel for its end itself, because work between fork and exec is
not safe beside threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

# prctl(2)
PR_SET_PDEATHSIG = 1
# The environment variable by which a child knows that it is one: its parent's process number.
PARENT = "EDGEMED_PARENT"


def run_child(
    command: Sequence[str],
    text: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command of edgemed in a process of its own and catch its output. text: its standard
    input; env: its environment, None for this process'; timeout: seconds it may take.

    It is ended where this process is interrupted or dies. Raises subprocess.TimeoutExpired.
    """
    variables = dict(os.environ if env is None else env) | {PARENT: str(os.getpid())}
    return subprocess.run(
        command,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=variables,
        timeout=timeout,
    )


def die_with_the_parent() -> None:
    """In a child: ask the kernel to end this process when its parent dies (Linux), and end at once
    where it is dead already. Does nothing in any other process.
    """
    parent = os.environ.pop(PARENT, "")
    if not parent.isdecimal() or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the kernel was asked.
    if os.getppid() != int(parent):
        sys.exit(128 + signal.SIGKILL)
