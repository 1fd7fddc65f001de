"""The shipped vision models, really trained, through their shipped recipes: what the README's
second and third commands leave behind.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, cli
from filelock import FileLock

for package in ("torch", "onnx", "onnxruntime", "gguf", "llama_cpp", "PIL"):
    pytest.importorskip(package)

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", params=["quickstart-vlm", "quickstart-moe"])
def report(request: pytest.FixtureRequest, shared: Path) -> dict:
    out = shared / request.param
    recipe = ROOT / "recipes" / f"{request.param}.yaml"
    # These tests only read, so a second worker takes the first one's run.
    with FileLock(shared / f".{request.param}.once"):
        if not (out / "report.json").is_file():
            done = cli("run", recipe, "--work", out, process=True, timeout=1500)
            assert done.returncode == 0, done.stderr
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_every_stage_of_every_engine_keeps_to_its_source(report: dict) -> None:
    for engine in report["engines"]:
        found = engine["verify"]
        assert found["passed"], found["problems"]
        assert [row["stage"] for row in found["stages"]] == [
            "pixels",
            "tower",
            "projector",
            "decoder",
            "end to end",
        ]
    exact = {row["stage"]: row for row in report["engines"][0]["verify"]["stages"]}
    assert report["engines"][0]["precision"] == "fp32"
    assert exact["tower"]["error"] < 1e-4
    assert exact["projector"]["error"] < 1e-4
    # Ten images, 48 tokens each.
    assert exact["end to end"]["error"] == 0
    assert "480 of 480" in exact["end to end"]["how"]


def test_the_models_really_see(report: dict) -> None:
    for found in [
        *report["source_evals"],
        *(result for engine in report["engines"] for result in engine["evals"]),
    ]:
        # Guessing among three or four options gives 0.29, the most frequent place of the right one
        # 0.35.
        assert found["task"] == "cells", found["model"]
        assert found["n"] == 234, found["model"]
        assert found["accuracy"] > 0.7, found["model"]
    assert all(engine["gate"]["verdict"] == "pass" for engine in report["engines"])


def test_a_question_about_an_image_was_timed(report: dict) -> None:
    for engine in report["engines"]:
        names = {record["name"] for record in engine["records"]}
        assert {
            f"image_{what}_seconds"
            for what in (
                "preprocess",
                "tower",
                "projector",
                "prefill",
                "first_token",
                "second_question",
            )
        } <= names


def test_the_shipped_models_stay_small() -> None:
    for name in ("quickstart-vlm", "quickstart-moe"):
        folder: Path = ROOT / "recipes" / name / "model"
        assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6, (
            "at most 20 MB in 16 bits"
        )
        assert "not for clinical use" in (folder / "README.md").read_text(encoding="utf-8")
