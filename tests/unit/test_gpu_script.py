"""bench/gpu.py and gpu.sh without a GPU: every step on the CPU, and what is written down where a
stage fails or does not fit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.process
SCRIPT = ROOT / "bench" / "gpu.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
    )


def lines(file: Path) -> dict[str, dict]:
    return {line["stage"]: line for line in map(json.loads, file.read_text().splitlines())}


def test_dry_run_takes_every_step(tmp_path: Path) -> None:
    done = run(
        "--dry-run",
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "out.jsonl",
        "--only",
        "onnx-int4",
        "--only",
        "tensorrt",
    )
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path / "out.jsonl")
    assert set(found) == {"machine", "quickstart-onnx-int4-cpu-64", "quickstart-tensorrt-fp16"}
    assert found["machine"]["bandwidth_gb_s"] > 0
    line = found["quickstart-onnx-int4-cpu-64"]
    assert line["ok"]
    assert line["parity"]["passed"]
    assert line["dry_run"]
    assert line["random_weights"] is False
    (numbers,) = line["by_prompt"].values()
    assert numbers["new"] == 4
    assert len(numbers["decode_tokens_per_second"]["rounds"]) == 2
    assert numbers["decode_joules_per_token"] is None
    assert line["share_of_bandwidth"]["16"] > 0
    assert line["gpu_memory_bytes"] is None
    refused = found["quickstart-tensorrt-fp16"]
    assert not refused["ok"]
    assert "TensorRT is not installed" in refused["error"]


def test_a_used_up_budget_is_written_down(tmp_path: Path) -> None:
    done = run(
        "--dry-run",
        "--work",
        tmp_path / "work",
        "--out",
        tmp_path / "out.jsonl",
        "--only",
        "onnx-int4",
        "--budget",
        1,
    )
    line = lines(tmp_path / "out.jsonl")["quickstart-onnx-int4-cpu-64"]
    assert done.returncode == 0
    assert not line["ok"]
    assert "budget is used up" in line["error"]


def test_without_a_gpu_both_say_so(tmp_path: Path) -> None:
    path = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    shell = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh")],
        capture_output=True,
        text=True,
        env=path | {"WORK": str(tmp_path / "work")},
    )
    if "nvidia-smi" not in shell.stderr:
        pytest.skip("there is an NVIDIA GPU here")
    assert shell.returncode == 1
    assert "no nvidia-smi" in shell.stderr
    done = run("--work", tmp_path / "work")
    assert done.returncode == 1
    assert "--dry-run takes every step on the CPU" in done.stderr


def test_an_engine_that_sees_is_timed_seeing(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from conftest import write_model

    from edgemed.engines.engine import export
    from edgemed.models.checkpoint import open_checkpoint
    from edgemed.targets.onnx import Params

    path = export(
        open_checkpoint(
            write_model(tmp_path / "model", family="qwen2_vl", max_position_embeddings=512)
        ),
        "onnx",
        Params("fp32"),
        tmp_path / "engine",
    ).path
    code = (
        "import gpu, json; from pathlib import Path; print(json.dumps(gpu.worker('onnx',"
        f" Path({str(path)!r}), 'precision=fp32', gpu.DRY)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent, timeout=100
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])["by_image"]
    assert seen["features"] == 256
    assert all(
        len(seen[f"{part}_seconds"]["rounds"]) == 2 and seen[f"{part}_seconds"]["median"] > 0
        for part in ("preprocess", "tower", "projector")
    )


def test_the_script_is_valid_and_bounded() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")], check=True)
    text = (ROOT / "bench" / "gpu.sh").read_text()
    assert "set -euo pipefail" in text
    assert "BUDGET:-540" in text
    assert "timeout" in text
