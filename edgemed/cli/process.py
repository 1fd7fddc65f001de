"""How a command lives among other processes: signals, closed or full outputs, text that is no
UTF-8, a parent that dies.

`prepare` sets up a process of its own; `faults_as_lines` turns what a person or a machine can cause
into one line and an exit code. Any other exception is a bug in edgemed and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from edgemed.cli.parameters import OutOfRange
from edgemed.errors import EdgemedError
from edgemed.hardware.child_process import die_with_the_parent

# A shell reports 128 + the signal's number. SIGINT is Python's own affair, and typer's.
ENDING = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
GO_ON = "finished steps are kept, run the same command again to go on"
# What to do about an error of the operating system.
FIXES = {
    errno.ENOSPC: "Free space or choose another directory",
    errno.EDQUOT: "Free space within your quota or choose another directory",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or choose another file system",
    errno.EROFS: "Choose a directory that can be written",
    errno.EACCES: "Check the permissions of the file and of its directories",
    errno.EPERM: "Check the permissions of the file and of its directories",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENFILE: "Close other programs: the system has too many open files",
    errno.ENOMEM: "Close other programs, or take a smaller model",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "Check the path",
    errno.EISDIR: "Name a file, not a directory",
}


LIBRARY_WRITE_ERROR = re.compile(
    r"No space left on device|File too large|Disk quota exceeded|PytorchStreamWriter failed writing"
    r"|\(os error (?:27|28|122)\)"
)


def prepare() -> None:
    """Set up this process before a verb runs: open standard streams, readable text, and an orderly
    end by a signal.
    """
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A sign that the terminal's encoding lacks must not end a run of an hour.
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Text is UTF-8 whatever the locale says. Other bytes are refused where they are read.
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    # When peft imports it, it recommends a package for kernels that edgemed does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for number in ENDING:
        # `nohup` and shells in the background ignore a signal on purpose.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)
    die_with_the_parent()


def _open_streams() -> None:
    # Where a standard stream is closed, the next file that is opened would take its number, and
    # what a library prints would land in it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8")
    sys.stdout = sys.stdout or _writer(1)
    sys.stderr = sys.stderr or _writer(2)


def _writer(descriptor: int) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8")


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # SystemExit passes every `finally`: unfinished directories go, and children are ended.
    sys.exit(128 + number)


@contextlib.contextmanager
def faults_as_lines() -> Iterator[None]:
    """Run one command and end with its exit code. Raises SystemExit for everything that is no
    bug: 1 with a line, 2 for a number out of range, 128 + the number of a signal.
    """
    try:
        try:
            yield
        finally:
            _flush()
    except OutOfRange as error:
        _fail(str(error), 2)
    except EdgemedError as error:
        _fail(str(error))
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` does.
        _silence()
        sys.exit(1)
    except OSError as error:
        _fail(os_error_line(error))
    except MemoryError:
        _fail("not enough memory. Close other programs, or take a smaller model")
    except UnicodeEncodeError as error:
        text = ascii(error.object)
        _fail(f"a text or file name is no Unicode: {text[:80]}. Give it in UTF-8")
    except SystemExit as end:
        _say_how_it_ended(end.code)
        raise
    except Exception as error:
        # Libraries written in other languages put the operating system's words into their own.
        if LIBRARY_WRITE_ERROR.search(str(error)):
            _fail(f"a file cannot be written: {error}. Free space, or choose another directory")
        raise


def os_error_line(error: OSError) -> str:
    """What the operating system refused, where, and what to do."""
    reason = error.strerror or str(error)
    place = f"{error.filename}: " if error.filename is not None else ""
    if error.errno == errno.EFBIG:
        reason = "File too large for the limit on file sizes"
    fix = FIXES.get(error.errno or 0, "")
    return f"{place}{reason}. {fix}" if fix else f"{place}{reason}"


def _flush() -> None:
    # Here rather than when the interpreter ends, where a full disk would be a traceback.
    with contextlib.suppress(ValueError):  # of a stream that somebody closed
        sys.stdout.flush()


def _fail(line: str, code: int = 1) -> NoReturn:
    # An exception's text may have several lines; the contract is one.
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.exit(code)
    _silence()
    sys.exit(code)


def _silence() -> None:
    # The interpreter flushes once more when it ends, and what is left cannot be written.
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _say_how_it_ended(code: Any) -> None:
    # typer turns Ctrl-C into exit code 130 without a word.
    words = {128 + number: word for number, word in ENDING.items()} | {130: "interrupted"}
    if code in words:
        with contextlib.suppress(OSError, ValueError):
            print(f"{words[code]}; {GO_ON}", file=sys.stderr, flush=True)
