"""A command among other processes: signals, children, closed and full outputs, limits on files,
encodings, and numbers that no option can have.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, cli, leftovers, refused

from edgemed.cli import process
from edgemed.errors import EdgemedError
from edgemed.hardware import threads
from edgemed.hardware.child_process import PARENT, run_child

QUICKSTART = ROOT / "recipes" / "quickstart" / "model"


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("process") / "engine"
    done = cli("export", model, "--target", "onnx", "--set", "precision=fp32", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def started(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgemed", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def wait_for(what: object, seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.02)
    return False


# --- signals


@pytest.mark.kill
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_unfinished(model: Path, tmp_path: Path, number: int) -> None:
    arguments = ("quantize", model, "--method", "gptq", "--group", 32, "--out", tmp_path / "out")
    text = ("--calibration", "pubmedqa-abstracts", "--set", "samples=800", "--set", "length=128")
    heeds = partial(signal.signal, number, signal.SIG_DFL)
    running = started(*arguments, *text, preexec_fn=heeds)
    assert wait_for(lambda: list(tmp_path.glob(".out.part")))
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + number, errors
    assert errors.splitlines()[-1].startswith(process.ENDING[number].encode())
    assert b"Traceback" not in errors
    assert not leftovers(tmp_path)


def test_nohup_is_heeded() -> None:
    """Whoever ignores SIGHUP before the start, as nohup does, has it ignored."""
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from edgemed.cli import process; process.prepare()\n"
        "print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,"
        " signal.getsignal(signal.SIGTERM) == process._end)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr


CHILD = (
    "import sys, time; from edgemed.hardware.child_process import die_with_the_parent;"
    " die_with_the_parent(); open(sys.argv[1], 'w').write(str(__import__('os').getpid()));"
    " time.sleep(600)"
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_their_parent(tmp_path: Path, number: int) -> None:
    code = (
        "import sys; from edgemed.cli import process; process.prepare()\n"
        "from edgemed.hardware.child_process import run_child\n"
        f"run_child([sys.executable, '-c', {CHILD!r}, sys.argv[1]])"
    )
    note = tmp_path / "child"
    parent = subprocess.Popen([sys.executable, "-c", code, str(note)])
    assert wait_for(lambda: note.exists() and note.read_text())
    child = int(note.read_text())
    parent.send_signal(number)
    parent.wait(timeout=30)

    def gone() -> bool:
        try:
            # A zombie that nobody has waited for yet has ended as well.
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    assert wait_for(gone, 10)


def test_a_child_whose_parent_is_gone_already_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from edgemed.__main__ import *"],
        env={**os.environ, PARENT: "1"},
        capture_output=True,
    )
    assert done.returncode == 137


def test_run_child_gives_input_and_output() -> None:
    done = run_child([sys.executable, "-c", "print(input())"], "ä\n")
    assert (done.returncode, done.stdout) == (0, "ä\n")


# --- outputs


def test_closed_streams_and_full_devices() -> None:
    shell = partial(subprocess.run, shell=True, capture_output=True, text=True)
    command = f"{sys.executable} -m edgemed list --json"
    closed = shell(f"{command} >&- 2>&- <&-")
    assert closed.returncode == 0
    assert not closed.stderr
    full = shell(f"{command} > /dev/full")
    assert full.returncode == 1
    assert full.stderr.startswith("error: ")
    assert "No space left" in full.stderr
    assert len(full.stderr.splitlines()) == 1
    head = shell(f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}", executable="/bin/bash")
    assert head.stdout.startswith("{\n")
    assert not head.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=str,
)
def test_a_terminal_without_unicode(variables: dict[str, str]) -> None:
    code = (
        "from edgemed.cli import process; process.prepare()\n"
        "from edgemed.console import say, show\n"
        "value = {'\\xe4': '\\xb5'}; say('\\xe4')\n"
        "show(value, True); show([value], False); show(value, False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    document, _ = json.JSONDecoder().raw_decode(done.stdout.decode("ascii"))
    assert document == {"ä": "µ"}


def test_lone_surrogates_do_not_end_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    from edgemed.console import show

    show({"name": "\udcff"}, True)
    assert json.loads(capsys.readouterr().out) == {"name": "\udcff"}


@pytest.mark.parametrize("text", [b"caf\xe9\n", b"\xff\n"])
def test_chat_refuses_other_encodings(engine: Path, text: bytes) -> None:
    running = started("chat", engine, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    _, errors = running.communicate(text, timeout=120)
    assert running.returncode == 1
    assert errors.decode().splitlines()[-1].startswith("error: ")
    assert b"UTF-8" in errors.splitlines()[-1]
    assert b"Traceback" not in errors


def test_arguments_that_are_no_unicode() -> None:
    done = started("generate", "nowhere", "--prompt", os.fsdecode(b"caf\xe9"))
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 2
    assert b"--prompt" in errors
    assert b"UTF-8" in errors
    assert len(errors.splitlines()) == 1


# --- files that cannot be written


@pytest.fixture
def file_limit() -> object:
    """No file may become larger than 512 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments: object) -> subprocess.CompletedProcess[bytes]:
        # The output of a command goes through a pipe, whose size nobody limits.
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (512, before[1]))
        running = started(*arguments, preexec_fn=limit)
        out, errors = running.communicate(timeout=300)
        return subprocess.CompletedProcess(
            arguments, running.returncode, out.decode(), errors.decode()
        )

    return limited


@pytest.mark.parametrize("verb", ["export", "bench", "report"])
def test_limit_on_file_sizes(engine: Path, file_limit: object, tmp_path: Path, verb: str) -> None:
    before = {p.name: p.stat().st_size for p in engine.iterdir()}
    arguments = {
        "export": ("export", QUICKSTART, "--prompts", "none", "--out", tmp_path / "e"),
        "bench": ("bench", engine, "--runs", 1, "--generate", 2, "--prompt", 4),
        "report": ("report", engine, "--out", tmp_path / "page.html"),
    }[verb]
    line = refused(file_limit(*arguments), "limit on file sizes")
    where = {"export": tmp_path / "e", "bench": "records.jsonl", "report": tmp_path / "page"}
    assert str(where[verb]) in line
    assert not list(tmp_path.iterdir())
    assert {p.name: p.stat().st_size for p in engine.iterdir()} == before
    assert not leftovers(engine.parent)


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "ENGINE", "--task", "section", "--limit", 2, "--out", "OUT/e.json"),
        ("report", "ENGINE", "--out", "OUT/page.html"),
        ("card", "ENGINE"),
        ("sign", "ENGINE", "--key", "KEYS/private.pem"),
        ("keygen", "--out", "OUT/keys"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_full_disk(
    engine: Path,
    tmp_path: Path,
    arguments: tuple[object, ...],
) -> None:
    """Every file that is made new is on a full disk; nothing is left and nothing is changed."""
    keys = tmp_path / "keys"
    assert cli("keygen", "--out", keys).returncode == 0
    out = tmp_path / "out"
    out.mkdir()
    engine = Path(shutil.copytree(engine, tmp_path / "engine"))
    # The card is written again.
    if arguments[0] == "card":
        (engine / "README.md").write_text("altered")
    before = {p.name: p.read_bytes() for p in engine.iterdir()}
    places = {"ENGINE": engine, "OUT": out, "KEYS": keys}
    words = []
    for word in arguments:
        head, slash, rest = str(word).partition("/")
        words.append(f"{places[head]}{slash}{rest}" if head in places else word)
    code = (
        "import builtins, io, sys\n"
        "class Full(io.RawIOBase):\n"
        "    def writable(self): return True\n"
        "    def write(self, data): raise OSError(28, 'No space left on device')\n"
        "opened = io.open\n"
        "def full(file, mode='r', *rest, **options):\n"
        "    handle = opened(file, mode, *rest, **options)\n"
        "    if not set('wxa') & set(mode) or str(file).endswith(('.lock', 'null')):\n"
        "        return handle\n"
        "    handle.close()\n"
        "    raw = io.BufferedWriter(Full(), 1)\n"
        "    return raw if 'b' in mode else io.TextIOWrapper(raw, 'utf-8', write_through=True)\n"
        "builtins.open = io.open = full\n"
        "from edgemed.cli.main import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = refused(done)
    assert "No space left" in line or "disk is full" in line
    assert {p.name: p.read_bytes() for p in engine.iterdir()} == before
    assert not [p for p in out.rglob("*") if p.is_file()]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(27, "File too large", "x"), ("x", "limit on file sizes", "ulimit -f")),
        (OSError(28, "No space left on device", "x"), ("x: No space left", "Free space")),
        (OSError(30, "Read-only file system", "x"), ("x: Read-only",)),
        (OSError(5, "Input/output error"), ("Input/output error",)),
        (PermissionError(13, "Permission denied", "x"), ("x: Permission denied", "permissions")),
        (MemoryError(), ("not enough memory",)),
        (RuntimeError("I/O error: File too large (os error 27)"), ("File too large",)),
        (EdgemedError("two\nlines", "fix"), ("two", "lines", "fix")),
    ],
    ids=repr,
)
def test_one_line_each(
    error: Exception, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, process.faults_as_lines():
        raise error
    assert end.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words)


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError), process.faults_as_lines():
        raise RuntimeError("a bug")


# --- threads


def test_threads_beyond_the_machine(engine: Path, tmp_path: Path) -> None:
    for arguments in (
        ("generate", engine, "--prompt", "x"),
        ("bench", engine),
        ("verify", engine),
        ("eval", engine, "--task", "section"),
    ):
        done = cli(*arguments, "--threads", 100_000)
        assert done.returncode == 2
        assert done.stderr.startswith("error: Invalid value for '--threads': 100000")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {QUICKSTART}\nengines: [onnx]\nbench: {{threads: 100000}}\n")
    refused(cli("run", recipe, "--work", tmp_path / "w"), "threads: 100000 is out of range")


def test_threads_a_machine_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, most in ((1, 16), (2, 16), (8, 32), (64, 256), (1000, 512), (None, 16)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert threads.most_threads() == most
        threads.check_threads(None)
        threads.check_threads(1)
        threads.check_threads(most)
        for number in (0, -1, most + 1):
            with pytest.raises(EdgemedError, match="threads are not possible"):
                threads.check_threads(number)


def test_every_session_checks_its_threads(engine: Path) -> None:
    from edgemed import open_engine
    from edgemed.hardware.device import read_bandwidth

    opened = open_engine(engine)
    for use in (opened.open, opened.open_vision, read_bandwidth):
        with pytest.raises(EdgemedError, match="threads are not possible"):
            use(10**6)
