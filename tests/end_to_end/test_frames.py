"""Films on the command line: a frame is chosen, all are shown, or the file is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("onnxruntime")
pytest.importorskip("pydicom")

from conftest import cli
from dicom_files import dicom

from edgemed import plugins
from edgemed.engines.engine import Engine, export
from edgemed.models.checkpoint import open_checkpoint

FILM = np.random.default_rng(0).integers(0, 4096, (3, 56, 56), dtype=np.uint16)
WINDOW = {"BitsStored": 12, "HighBit": 11, "WindowCenter": [2000, 40], "WindowWidth": [1000, 400]}


@pytest.fixture(scope="module")
def engine(vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    target = plugins.load("targets", "onnx")
    params = target.Params(precision="fp32", min_pixels=3136, max_pixels=3136)
    out = tmp_path_factory.mktemp("frames") / "engine"
    return export(open_checkpoint(vision_model), "onnx", params, out)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return dicom(tmp_path / "film.dcm", FILM, **WINDOW)


def answer(engine: Engine, *images: object) -> tuple[str, str]:
    words = [word for image in images for word in ("--image", image)]
    done = cli("generate", engine.path, "--prompt", "What?", "--max-tokens", 12, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_one_frame_or_all_of_a_film(engine: Engine, film: Path, tmp_path: Path) -> None:
    stills = [dicom(tmp_path / f"{n}.dcm", frame, **WINDOW) for n, frame in enumerate(FILM)]
    shown, said = answer(engine, film)
    assert said.count("film.dcm: window 2000, width 1000 (first of 2)") == 3
    assert shown == answer(engine, *stills)[0]
    second = cli(
        "generate",
        engine.path,
        "--prompt",
        "What?",
        "--max-tokens",
        12,
        "--image",
        film,
        "--frame",
        1,
    )
    assert second.stdout == answer(engine, stills[1])[0]
    done = cli("generate", engine.path, "--prompt", "a", "--image", film, "--frame", 3)
    assert done.returncode == 1
    assert "has 3 frames, number 3 was asked for" in done.stderr


def test_a_model_of_one_image_refuses_a_film(
    engine: Engine, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = plugins.load("families", "qwen2_vl")
    monkeypatch.setattr(module, "FAMILY", replace(module.FAMILY, several_images=False))
    done = cli("generate", engine.path, "--prompt", "a", "--image", film)
    assert done.returncode == 1
    assert "film.dcm has 3 frames, and this model reads one image. Say which" in done.stderr
    done = cli("generate", engine.path, "--prompt", "a", "--image", film, "--frame", 0)
    assert done.returncode == 0


def test_a_row_names_one_frame_of_a_film(engine: Engine, film: Path, tmp_path: Path) -> None:
    rows = [
        {
            "id": str(n),
            "image": "film.dcm",
            "question": "Which?",
            "options": ["A lung", "A heart"],
            "answer": 1,
            "kind": "o",
            "label": "l",
        }
        for n in range(2)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("eval", engine.path, "--task", f"cells:{file}")
    assert done.returncode == 1
    assert "question 0: " in done.stderr
    assert (
        "has 3 frames, and its row names it as one image. Say which with eval --frame"
        in done.stderr
    )
    keys = set()
    for frame in (0, 2):
        done = cli("eval", engine.path, "--task", f"cells:{file}", "--frame", frame, "--json")
        assert done.returncode == 0, done.stderr
        keys.add(json.loads(done.stdout)["engine"][0]["task_key"])
    assert len(keys) == 2
