"""What a machine does to a run: a full disk, a kill in the middle, two runs at once, a missing
runtime, altered files.

All of them really happen here, to the real command line: a small file system is mounted where that
is allowed, processes get SIGKILL, bytes on disk are changed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, cli, leftovers, refused, write_model

from edgemed.errors import install_command

torch = pytest.importorskip("torch")

TARGETS = ("onnx", "llamacpp")


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    common = {"onnx": ["--set", "precision=fp32"], "llamacpp": ["--set", "type=f32"]}
    for target in TARGETS:
        done = cli("export", model, "--target", target, "--out", folder / target, *common[target])
        assert done.returncode == 0, done.stderr
    return {target: folder / target for target in TARGETS}


def hashes(folder: Path) -> dict[str, str]:
    """Every file but manifests and the documents written from them (times, memory), by name."""
    dated = ("manifest.json", "README.md", "bom.cdx.json")
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in dated
    }


# --- disk full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB; the tiny model's engines need more."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        # What a failed command still maps would keep the file system busy.
        gc.collect()
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.disk_full
@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "--target", "onnx", "--set", "precision=fp32", "--prompts", "none"],
        ["export", "--target", "llamacpp", "--set", "type=f32", "--prompts", "none"],
        ["quantize", "--method", "rtn", "--group", "32", "--bits", "8"],
    ],
    ids=["onnx", "llamacpp", "quantize"],
)
def test_disk_full(small_disk: Path, tmp_path: Path, arguments: list[str]) -> None:
    big = write_model(tmp_path / "big", n_layer=16)
    refused(
        cli(arguments[0], big, *arguments[1:], "--out", small_disk / "out"),
        "disk is full",
        small_disk / "out",
    )
    assert not list(small_disk.iterdir())


@pytest.mark.disk_full
def test_disk_full_while_merging(small_disk: Path, model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(
        r=2,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    refused(
        cli("merge", model, "--adapter", tmp_path / "adapter", "--out", small_disk / "out"),
        "disk is full",
        small_disk / "out",
    )
    assert not list(small_disk.iterdir())


@pytest.mark.disk_full
def test_report_that_cannot_be_written(model: Path, small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"model: {model}\nengines:\n  - onnx: {{precision: fp32}}\nverify: {{prompts:"
        " pubmedqa-abstracts, count: 4, width: 64, new: 8}\n"
    )
    refused(cli("run", tmp_path / "r.yaml", "--work", small_disk / "work"), "disk is full")
    assert not leftovers(small_disk)


# --- killed, and twice at once

RECIPE = """model: {model}
steps:
  - quantize: {{method: gptq, bits: 4, group: 32, calibration: pubmedqa-abstracts, samples: {samples}, length: 128}}
engines:
  - onnx: {{}}
  - llamacpp: {{from_checkpoint: true}}
verify: {{prompts: pubmedqa-abstracts, count: 2, width: 64, new: 8, max_kl: 9, min_top1: 0}}
"""


def recipe(folder: Path, model: Path, samples: int = 4) -> Path:
    file = folder / "r.yaml"
    file.write_text(RECIPE.format(model=model, samples=samples))
    return file


def start(file: Path, work: Path) -> subprocess.Popen[str]:
    # Where the tests run in the background, a shell has made them ignore SIGINT, and what they
    # start would inherit that.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-m", "edgemed", "run", str(file), "--work", str(work)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeds,
    )


@pytest.mark.kill
def test_killed_in_the_middle_then_completed_is_identical(model: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, model, samples=400)
    killed = tmp_path / "killed"
    whole = tmp_path / "whole"
    running = start(file, killed)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((killed / "store").glob(".quantize-*.part/*")):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    part = list((killed / "store").glob(".quantize-*.part"))
    assert part, "the kill came too late to show anything"
    assert not list((killed / "store").glob("quantize-*")), (
        "the kill came too late to show anything"
    )
    for work in (killed, whole):
        done = cli("run", file, "--work", work)
        assert done.returncode == 0, done.stderr
    assert hashes(killed / "store") == hashes(whole / "store")
    assert len(hashes(whole / "store")) > 10
    assert not leftovers(killed)


def test_a_second_run_reuses_everything(model: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, model)
    work = tmp_path / "work"
    assert cli("run", file, "--work", work).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (work / "store").rglob("*")}
    done = cli("run", file, "--work", work)
    assert done.returncode == 0
    assert "reused" in done.stderr
    assert "running" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (work / "store").rglob("*")} == before
    other = cli("run", file, "--work", work, "--set", "quantize.bits=8")
    assert other.returncode == 0, other.stderr
    assert len(list((work / "store").glob("quantize-*"))) == 2


@pytest.mark.process
def test_two_runs_at_once_on_one_cache(model: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, model, samples=32)
    work = tmp_path / "work"
    runs = [start(file, work) for _ in range(2)]
    ends = [(run.communicate(timeout=240), run.returncode) for run in runs]
    assert [code for _, code in ends] == [0, 0], ends
    assert len(list((work / "store").glob("quantize-*"))) == 1
    assert not leftovers(work)
    # One of them made the checkpoint, the other waited for it.
    assert sorted("quantize: reused" in errors for (_, errors), _ in ends) == [False, True]


@pytest.mark.kill
def test_interrupt_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    running = start(recipe(tmp_path, model, samples=400), tmp_path / "work")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(
        (tmp_path / "work" / "store").glob(".quantize-*.part/*")
    ):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    # CPython ends by the signal itself where it came while a string was being executed; a shell
    # reports 130 either way.
    assert running.returncode in (130, -signal.SIGINT), errors
    assert errors.splitlines()[-1].startswith("interrupted"), errors
    assert "Traceback" not in errors, errors
    assert not leftovers(tmp_path / "work")


# --- engines on a device


def test_prompt_longer_than_the_context(engines: dict[str, Path]) -> None:
    for target in TARGETS:
        refused(cli("generate", engines[target], "--prompt", "x" * 193), "193 tokens", "192 fit")
        fits = cli("generate", engines[target], "--prompt", "x" * 192, "--max-tokens", 1)
        assert fits.returncode == 0, fits.stderr


@pytest.mark.process
@pytest.mark.parametrize(
    ("target", "package", "extra"),
    [("onnx", "onnxruntime", "onnx"), ("llamacpp", "llama_cpp", "llamacpp")],
)
def test_runtime_not_installed(
    engines: dict[str, Path], tmp_path: Path, target: str, package: str, extra: str
) -> None:
    refused(
        cli(
            "generate",
            engines[target],
            "--prompt",
            "hello",
            env=without(tmp_path, package),
            process=True,
        ),
        package,
        f"Install edgemed[{extra}]: {install_command(extra)}",
    )


@pytest.mark.process
def test_build_packages_not_installed(model: Path, tmp_path: Path) -> None:
    done = cli(
        "export",
        model,
        "--target",
        "onnx",
        "--prompts",
        "none",
        "--out",
        tmp_path / "out",
        env=without(tmp_path, "torch"),
        process=True,
    )
    refused(done, "torch", "Install edgemed[build]: pip install -e")
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)


def without(folder: Path, package: str) -> dict[str, str]:
    """An environment in which `package` is not installed, for a process that starts in it."""
    (folder / "sitecustomize.py").write_text(
        "import sys\nclass Absent:\n    def find_spec(self, name, path=None, target=None):\n      "
        f"  if name.split('.')[0] == '{package}':\n            raise ModuleNotFoundError(\"No"
        f" module named '{package}'\", name='{package}')\nsys.meta_path.insert(0, Absent())\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("verb", ["verify", "bench", "eval"])
def test_altered_engine_is_refused(
    engines: dict[str, Path], tmp_path: Path, target: str, verb: str
) -> None:
    altered = Path(shutil.copytree(engines[target], tmp_path / "altered"))
    file = altered / {"onnx": "model.onnx.data", "llamacpp": "model.gguf"}[target]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    options = {"verify": [], "bench": ["--runs", 1], "eval": ["--task", "section"]}[verb]
    refused(cli(verb, altered, *options), altered, f"{file.name} was altered")


def test_manifest_recheck(engines: dict[str, Path], tmp_path: Path) -> None:
    engine = Path(shutil.copytree(engines["onnx"], tmp_path / "engine"))
    done = cli("verify", "--manifest", engine, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["intact"] is True
    (engine / "extra.bin").write_bytes(b"1")
    (engine / "tokenizer.json").unlink()
    done = cli("verify", "--manifest", engine, "--json")
    assert done.returncode == 1
    assert sorted(json.loads(done.stdout)["problems"]) == [
        "extra.bin was added",
        "tokenizer.json is missing",
    ]
    refused(cli("generate", engine, "--prompt", "x"), "tokenizer.json")
    (engine / "manifest.json").write_text("{")
    refused(cli("verify", "--manifest", engine), "manifest.json", "cannot be read")
    (engine / "manifest.json").unlink()
    refused(cli("verify", engine), engine, "no manifest.json")
    refused(cli("verify", tmp_path / "nowhere"), "nowhere", "does not exist")
    refused(cli("verify", "--manifest", tmp_path / "nowhere"), "nowhere")


def test_altered_result_in_the_store_is_not_reused(model: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, model)
    work = tmp_path / "work"
    assert cli("run", file, "--work", work).returncode == 0
    (made,) = (work / "store").glob("quantize-*")
    with open(made / "model.safetensors", "r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\1\2\3\4")
    refused(cli("run", file, "--work", work), made, "model.safetensors was altered", "Remove")


def test_a_shipped_text_that_differs_from_its_card_is_refused(tmp_path: Path, model: Path) -> None:
    card = Path(shutil.copytree(ROOT / "calibration" / "pubmedqa-abstracts", tmp_path / "card"))
    with open(card / "calibration.jsonl", "a") as handle:
        handle.write('{"id": "x", "text": "slipped in"}\n')
    done = cli(
        "quantize",
        model,
        "--group",
        32,
        "--set",
        "samples=1",
        "--set",
        "length=16",
        "--calibration",
        card,
        "--out",
        tmp_path / "out",
    )
    refused(done, "calibration.jsonl", "differs from its card")
    assert not (tmp_path / "out").exists()
