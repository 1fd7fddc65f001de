"""The command line run in the process of the tests, with what a process of its own would have.

A test starts hundreds of commands. A new interpreter costs four seconds of imports for each, so
`in_process` calls the command line's own function and gives back what `subprocess.run` would.
Output is caught at the file descriptors, because children and C libraries write there.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

# torch's default generator starts every process with this seed.
TORCH_SEED = 67280421310721
# An interpreter reads these once, when it starts.
START_UP = ("PYTHON", "LD_", "OMP_", "GOMP_", "LC_", "LANG")


def in_process(
    arguments: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run one command line here; its exit code, standard output and standard error.

    env: variables on top of those of the tests. An exception that leaves the command is a traceback
    on standard error and exit code 1, as in a process of its own.

    Raises ValueError for what only a new process can do.
    """
    early = [name for name in env if name.startswith(START_UP)]
    if early:
        raise ValueError(f"{', '.join(early)}: read when Python starts; ask for process=True")
    if "--wait" in arguments and arguments[0] == "bench":
        raise ValueError("bench --wait replaces the process; ask for process=True")
    from edgemed.artifacts.hashing import clear_hash_cache

    clear_hash_cache()
    with ExitStack() as stack:
        stack.enter_context(_interpreter_state())
        stack.enter_context(_environment(env, cwd, arguments))
        stack.enter_context(_torch_state())
        texts = stack.enter_context(_standard_streams(stdin))
        stack.enter_context(_log_to_stderr())
        code = _run(arguments)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Files and engines that a process would close when it ends. The young ones only: all of
        # torch's objects take a third of a second to walk.
        gc.collect(1)
        stdout, stderr = (file.seek(0) or file.read().decode() for file in texts)
    return subprocess.CompletedProcess(["edgemed", *arguments], code, stdout, stderr)


def _run(arguments: Sequence[str]) -> int:
    from edgemed.cli.main import main

    try:
        main(list(arguments))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@functools.cache
def _writer(descriptor: int) -> TextIO:
    """Writes to a file descriptor, wherever it leads at that time. One for all commands, because
    log handlers keep the stream they began with.
    """
    return open(descriptor, "w", encoding="utf-8", closefd=False)


@contextmanager
def _standard_streams(stdin: str | None) -> Iterator[tuple[Any, Any]]:
    """Two files that receive what is written to descriptors 1 and 2, by whatever writes there."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    for stream in streams[1:]:
        stream.flush()
    kept = [os.dup(descriptor) for descriptor in range(3)]
    with ExitStack() as stack:
        source, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        source.write((stdin or "").encode())
        source.seek(0)
        for descriptor, file in enumerate((source, out, err)):
            os.dup2(file.fileno(), descriptor)
        try:
            sys.stdin = stack.enter_context(open(0, encoding="utf-8", closefd=False))
            sys.stdout = _writer(1)
            sys.stderr = _writer(2)
            yield out, err
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdin, sys.stdout, sys.stderr = streams
            for descriptor, copy in enumerate(kept):
                os.dup2(copy, descriptor)
                os.close(copy)


@contextmanager
def _environment(
    env: Mapping[str, str], cwd: Path | None, arguments: Sequence[str]
) -> Iterator[None]:
    variables = dict(os.environ)
    folder = os.getcwd()
    argv = sys.argv
    mask = os.umask(0)
    os.umask(mask)
    try:
        os.environ.update({"COLUMNS": "200", **env})
        os.chdir(cwd or folder)
        sys.argv = ["edgemed", *arguments]
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        os.umask(mask)
        sys.argv = argv


@contextmanager
def _interpreter_state() -> Iterator[None]:
    """Warnings as a new interpreter shows them, and the random generators of the tests kept."""
    import random

    import numpy as np

    states = (random.getstate(), np.random.get_state())
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (
            DeprecationWarning,
            PendingDeprecationWarning,
            ImportWarning,
            ResourceWarning,
        ):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _show_warning
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


@contextmanager
def _torch_state() -> Iterator[None]:
    """torch's generator as in a new process; its settings and the tests' generator afterwards as
    they were.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    generator = torch.get_rng_state()
    threads = torch.get_num_threads()
    kind = torch.get_default_dtype()
    gradients = torch.is_grad_enabled()
    exact = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(TORCH_SEED)
    try:
        yield
    finally:
        torch.set_rng_state(generator)
        torch.set_num_threads(threads)
        torch.set_default_dtype(kind)
        torch.set_grad_enabled(gradients)
        torch.use_deterministic_algorithms(exact)


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Log lines go to the command's standard error: pytest's own handlers stand aside, and those of
    libraries that hold another stream are turned.
    """
    root = logging.getLogger()
    held = root.handlers[:]
    root.handlers = []
    turned = []
    for logger in list(root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler and handler.stream is not sys.stderr:
                turned.append((handler, handler.setStream(sys.stderr)))
    try:
        yield
    finally:
        for handler, stream in turned:
            handler.setStream(stream)
        root.handlers = held
