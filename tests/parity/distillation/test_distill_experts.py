"""A mixture of experts teaches the dense model made of it: what student and teacher see, that it
comes nearer, and who cannot learn.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from moe_models import ROUTER, write

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

from safetensors.torch import load_file

from edgemed.artifacts import store
from edgemed.data.image_sets import image_rows
from edgemed.data.image_text_windows import encode_images
from edgemed.distillation.objective import StudentModule
from edgemed.distillation.student import load
from edgemed.distillation.teacher import Teacher
from edgemed.errors import EdgemedError
from edgemed.inference.session import ImageEmbeddings
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.recipe import Stage
from edgemed.pipeline.runner import run_step
from edgemed.steps import distill, merge

SMALL = {"length": 224, "batch": 4, "steps": 10, "rate": 2e-3, "evaluate_every": 5}


def stage(kind: str, params: object, model: Path, out: Path) -> tuple[Path, dict]:
    done = run_step(Stage(kind, params), open_checkpoint(model), out.parent, out)
    return done.path, store.read_manifest(done.path)["notes"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under the config names of StableLM's old code, as the quickstart's model has them."""
    return write(
        tmp_path_factory.mktemp("moe") / "model",
        "moe-tinymed",
        norm_eps=1e-5,
        rope_pct=0.25,
        partial_rotary_factor=None,
        layer_norm_eps=1e-5,
        max_position_embeddings=256,
    )


@pytest.fixture(scope="module")
def dense(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage(
        "merge", merge.Params(experts="dense"), teacher, tmp_path_factory.mktemp("dense") / "dense"
    )[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for n in range(4):
        Image.fromarray(
            np.random.default_rng(n).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        ).save(folder / f"{n}.png")
    rows = [
        {"id": n, "image": f"{n % 4}.png", "question": f"{n}?", "answer": f"It is {n % 3}."}
        for n in range(20)
    ]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return str(folder / "rows.jsonl")


def test_both_see_what_the_reference_sees(teacher: Path, dense: Path, pictures: str) -> None:
    """The image token lies outside the vocabulary here; the student's text model is transformers'
    own.
    """
    rows = image_rows(pictures)[:2]
    for path, is_student in ((teacher, False), (dense, True)):
        weights = CanonicalWeights(open_checkpoint(path))
        tokens, labels, images = encode_images(weights, pictures, rows, 224, 10**9)
        assert (tokens == weights.vision.token).any()
        assert weights.vision.token >= weights.decoder.vocab
        run = (
            StudentModule(load(weights), weights.decoder.layers, (), (64, 64))
            if is_student
            else Teacher(weights)
        )
        with torch.no_grad():
            found = (
                run(torch.from_numpy(tokens), images.batch([0, 1], "cpu"))["logits"]
                if is_student
                else run(torch.from_numpy(tokens), (), images.batch([0, 1], "cpu"))[0]
            )
        for n in range(2):
            end = np.flatnonzero(labels[n] != -100)[-1] + 1
            seen = ImageEmbeddings(images.features[n], images.positions[n, :, :end], images.token)
            assert (
                np.abs(
                    found[n, :end].numpy()
                    - TorchSession(weights).prefill(
                        tokens[n, :end].tolist(), every=True, pictures=seen
                    )
                ).max()
                < 1e-4
            )


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden": 0.5}, {"lora": 4, "rate": 5e-3}, {"on_policy": 1.0}, {"top_k": 16}],
    ids=["scores", "hidden", "lora", "own answers", "top-k"],
)
def test_the_dense_model_comes_nearer_to_its_experts(
    changes: dict, teacher: Path, dense: Path, pictures: str, tmp_path: Path
) -> None:
    path, notes = stage(
        "distill",
        distill.Params(**{**SMALL, **changes, "calibration": pictures, "teacher": str(teacher)}),
        dense,
        tmp_path / "out",
    )
    assert notes["after"]["kl"] < 0.9 * notes["before"]["kl"]
    assert notes["teacher_parameters"] > notes["parameters"]
    before = load_file(dense / "model.safetensors")
    after = load_file(path / "model.safetensors")
    assert set(after) == {key for key in before if not key.endswith("position_ids")}
    vision_encoder = [key for key in after if "image_tower" in key or "mm_projector" in key]
    assert vision_encoder
    assert all(torch.equal(after[key], before[key]) for key in vision_encoder)
    assert not torch.equal(
        after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    )
    assert (
        CanonicalWeights(open_checkpoint(path)).decoder
        == CanonicalWeights(open_checkpoint(dense)).decoder
    )
    assert not any(ROUTER in key for key in after)
    assert any(name.startswith("teacher/") for name in store.read_manifest(path)["inputs"])


@pytest.mark.parametrize(
    ("name", "model_type", "words"),
    [
        (
            "moe-tinymed",
            "moe_llava_stablelm",
            (
                r"no class that could train the student .* \(moe_llava_stablelm\).*merge:"
                r" \{experts: dense\}"
            ),
        ),
        ("moe-tinymed-phi", "llava_phi", "no class that could train .*llava_phi"),
    ],
)
def test_who_cannot_learn(
    name: str, model_type: str, words: str, teacher: Path, pictures: str, tmp_path: Path
) -> None:
    student = write(tmp_path / "student", name, model_type=model_type, max_position_embeddings=256)
    with pytest.raises(EdgemedError, match=words) as error:
        stage(
            "distill",
            distill.Params(
                **SMALL,
                calibration=pictures,
                teacher=str(teacher),
                larger=True,
            ),
            student,
            tmp_path / "out",
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
