"""The main path on real input: the shipped trained model and its adapter through every stage of the
shipped recipe, with sockets denied.

It takes minutes, runs once, and the other tests look at what it left: a test that ran only half of
the recipe would not show that the command in the README works.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, cli

torch = pytest.importorskip("torch")
for package in ("onnx", "onnxruntime", "gguf", "llama_cpp", "peft"):
    pytest.importorskip(package)

RECIPE = ROOT / "recipes" / "quickstart.yaml"
pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (ROOT / "recipes" / "quickstart" / "adapter").is_dir(),
        reason="recipes/quickstart holds no trained model and adapter yet",
    ),
]
# Every Python process started with this folder on its path records and refuses network sockets;
# processes inherit it.
DENY = """
import os, sys
def deny(event, arguments):
    network = event in ("socket.getaddrinfo", "socket.gethostbyname") or (event in ("socket.connect", "socket.bind", "socket.sendto") and not isinstance(arguments[1], (str, bytes)))
    if network:
        with open(os.environ["DENIED_LOG"], "a") as log:
            log.write(f"{os.getpid()} {event} {arguments[1:] if len(arguments) > 1 else arguments}\\n")
        raise PermissionError(f"{event} is denied in this test")
sys.addaudithook(deny)
with open(os.environ["STARTED_LOG"], "a") as log:
    log.write(f"{os.getpid()}\\n")
"""


@pytest.fixture(scope="module")
def denied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("denied")
    (folder / "sitecustomize.py").write_text(DENY)
    # Nothing is told to be offline: being offline must not depend on a setting of this test run.
    return {
        "PYTHONPATH": str(folder),
        "DENIED_LOG": str(folder / "denied.log"),
        "STARTED_LOG": str(folder / "started.log"),
        "HF_HUB_OFFLINE": "0",
    }


@pytest.fixture(scope="module")
def work(denied: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "work"
    done = cli("run", RECIPE, "--work", out, env=denied, process=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def report(work: Path) -> dict[str, object]:
    return json.loads((work / "report.json").read_text(encoding="utf-8"))


def engine_of(report: dict, name: str) -> dict:
    return next(engine for engine in report["engines"] if engine["name"] == name)


def test_the_denial_works(denied: dict[str, str], tmp_path: Path) -> None:
    environment = {**denied, "DENIED_LOG": str(tmp_path / "log"), "PATH": "/usr/bin:/bin"}
    for code in (
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request as u; u.urlopen('http://localhost:9')",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 1
        assert "denied in this test" in done.stderr
    assert len((tmp_path / "log").read_text().splitlines()) >= 2


def test_no_socket_was_opened(work: Path, denied: dict[str, str]) -> None:
    started = Path(denied["STARTED_LOG"]).read_text().split()
    recipe = yaml.safe_load(RECIPE.read_text())
    # The run itself and one bench process per engine: the denial was on in all of them.
    assert len(set(started)) >= 1 + len(recipe["engines"])
    log = Path(denied["DENIED_LOG"])
    assert not log.exists(), log.read_text()


def test_report_is_there_and_whole(work: Path, report: dict) -> None:
    page = (work / "report.html").read_text(encoding="utf-8")
    assert len(report["engines"]) == len(yaml.safe_load(RECIPE.read_text())["engines"])
    assert report["not_measured"]
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page
    assert '<link rel="stylesheet"' not in page
    for engine in report["engines"]:
        assert engine["name"] in page
        assert (work / "engines" / engine["name"] / "manifest.json").is_file()


def test_every_engine_passed_and_was_measured(report: dict) -> None:
    for engine in report["engines"]:
        assert engine["verify"]["passed"], engine["verify"]["problems"]
        names = {record["name"] for record in engine["records"]}
        assert {"decode_tokens_per_second", "step_milliseconds"} <= names
        assert all(r["value"] > 0 for r in engine["records"])
        assert [(result["task"], result["strategy"]) for result in engine["evals"]] == [
            ("section", "zero-shot")
        ]
        assert engine["gate"]["verdict"] == "pass"
        assert engine["manifest"]["key"]


def test_fp32_engine_gives_every_greedy_token(report: dict) -> None:
    result = engine_of(report, "onnx-fp32")["verify"]
    assert result["prompts"] >= 20
    assert result["greedy_new"] >= 64
    assert (
        result["greedy_same"] == result["greedy_tokens"] == result["prompts"] * result["greedy_new"]
    )
    assert result["max_logit_error"] < 1e-3
    assert result["top1"] == 1.0


def test_the_task_is_really_solved(report: dict) -> None:
    for result in [
        *report["source_evals"],
        *(r for engine in report["engines"] for r in engine["evals"]),
    ]:
        if result["strategy"] == "zero-shot":
            assert result["accuracy"] >= 0.75 > result["majority"] + 0.2, result["model"]


def test_int4_engines_carry_the_same_integers(work: Path, report: dict) -> None:
    import onnx
    from gguf import GGUFReader

    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.models.weights import CanonicalWeights

    (packed,) = (work / "store").glob("quantize-*")
    weights = CanonicalWeights(open_checkpoint(packed))
    graph = onnx.load(work / "engines" / "onnx-int4" / "model.onnx")
    stored = {
        t.name: onnx.numpy_helper.to_array(t, str(work / "engines" / "onnx-int4"))
        for t in graph.graph.initializer
    }
    blocks = {
        t.name: t.data for t in GGUFReader(work / "engines" / "gguf-q4_0" / "model.gguf").tensors
    }
    names = {"qkv": "attn_qkv", "o": "attn_output", "up": "ffn_up", "down": "ffn_down"}
    for n in range(weights.decoder.layers):
        for name in weights.decoder.matrices(n):
            q = weights.matrix(f"layers.{n}.{name}").q.numpy()
            nibbles = stored[f"layers.{n}.{name}.q"]
            assert (np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(q.shape) == q).all()
            # Q4_0: per 32 weights two bytes of scale, then the first 16 in the low nibbles and the
            # last 16 in the high ones.
            raw = blocks[f"blk.{n}.{names[name]}.weight"].reshape(q.shape[0], -1, 18)[..., 2:]
            assert (np.concatenate([raw & 15, raw >> 4], axis=-1).reshape(q.shape) == q).all()


def test_second_run_reuses_every_step(work: Path, denied: dict[str, str]) -> None:
    def times() -> dict[Path, int]:
        # Records are the measurements of each run and grow, and an engine's documents show the
        # newest; everything else must stay as it is.
        grows = ("records.jsonl", "README.md", "bom.cdx.json", "manifest.json")
        return {
            p: p.stat().st_mtime_ns
            for p in (work / "store").rglob("*")
            if p.is_file() and p.name not in grows
        }

    before = times()
    done = cli(
        "run",
        RECIPE,
        "--work",
        work,
        "--set",
        "bench.runs=1",
        "--set",
        "bench.generate=8",
        env=denied,
        process=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert times() == before
    assert "running" not in done.stderr


def test_set_reaches_a_step(work: Path, tmp_path: Path) -> None:
    """--set quantize.bits=8 on a shortened recipe: the merge is reused, the engine is another
    one.
    """
    recipe = yaml.safe_load(RECIPE.read_text())
    short = {key: recipe[key] for key in ("model", "steps")} | {
        "engines": [{"onnx": {}}],
        "verify": {"prompts": "pubmedqa-abstracts", "count": 4, "width": 64, "new": 16},
    }
    file = RECIPE.parent / ".short.yaml"
    file.write_text(yaml.safe_dump(short))
    try:
        done = cli(
            "run",
            file,
            "--work",
            work,
            "--set",
            "quantize.bits=8",
            "--set",
            "quantize.samples=8",
            process=True,
            timeout=600,
        )
    finally:
        file.unlink()
    assert done.returncode == 0, done.stderr
    assert "merge: reused" in done.stderr
    assert "quantize: running" in done.stderr
    (engine,) = json.loads((work / "report.json").read_text())["engines"]
    assert engine["precision"] == "int8 g64"
    assert engine["verify"]["top1"] > 0.97
