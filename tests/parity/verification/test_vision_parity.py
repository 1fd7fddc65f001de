"""Parity in stages: what an engine that sees carries, each stage of its comparison with the source,
and the source's answers against transformers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import IMAGE, ROOT, cli, refused

torch = pytest.importorskip("torch")
pytest.importorskip("PIL.Image")

from edgemed import plugins
from edgemed.data.text_sets import image_questions
from edgemed.documents.verify import Stage, VerifyResult
from edgemed.engines.engine import Engine, export
from edgemed.engines.image_reference import SCORED
from edgemed.engines.reference import FILE, Reference
from edgemed.errors import EdgemedError
from edgemed.gguf import mtmd_vision
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.onnx import vision_encoder
from edgemed.onnx.vision_encoder import OnnxVisionEncoder
from edgemed.pipeline.references import answers, image_answers
from edgemed.verification import vision_parity
from edgemed.verification.parity import Limits, verify
from edgemed.verification.spec import VerifySpec

SPEC = VerifySpec(
    "medquad-answers",
    count=2,
    width=48,
    new=8,
)
STAGES = ["pixels", "tower", "projector", "decoder", "end to end"]


@pytest.fixture(scope="module")
def reference(vision_model: Path) -> Reference:
    """The source's answers as a recipe makes them by default: 10 images, 48 tokens about each."""
    source = open_checkpoint(vision_model)
    return replace(
        answers(source, SPEC),
        images=image_answers(source, SPEC, CanonicalWeights(source).vision.pixels),
    )


def made(
    vision_model: Path, reference: Reference | None, out: Path, target: str = "onnx", **params: Any
) -> Engine:
    pytest.importorskip("llama_cpp" if target == "llamacpp" else "onnxruntime")
    return export(
        open_checkpoint(vision_model),
        target,
        plugins.load("targets", target).Params(**params),
        out,
        reference.trim(2) if reference else None,
    )


@pytest.fixture(scope="module")
def engine(
    vision_model: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    return made(
        vision_model, reference, tmp_path_factory.mktemp("engines") / "fp32", precision="fp32"
    )


def by_stage(result: VerifyResult) -> dict[str, Stage]:
    assert [row.stage for row in result.stages] == STAGES
    return {row.stage: row for row in result.stages}


# --- the source against transformers, and exact engines against both


def test_source_answers_as_transformers(vision_model: Path, reference: Reference) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    v = CanonicalWeights(open_checkpoint(vision_model)).vision
    images = reference.images
    process = Qwen2VLImageProcessorPil(min_pixels=v.pixels[0], max_pixels=v.pixels[1])
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        vision_model, dtype=torch.float32
    ).eval()
    assert images.greedy.shape == (10, 48)
    assert len(images.logits) == 10
    for n in range(10):
        seen = process(images=[images.image(n)], return_tensors="pt")
        assert np.abs(seen["pixel_values"].numpy() - images.pixels[n]).max() <= vision_parity.PIXELS
        tokens, _pictures = images.prompt_with_features(n, v, 3, 1024)
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **seen,
                mm_token_type_ids=(ids == IMAGE).int(),
                max_new_tokens=48,
                min_new_tokens=48,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert out.sequences[0, len(tokens) :].tolist() == images.greedy[n].tolist(), f"image {n}"
        assert np.abs(torch.cat(out.logits).numpy()[:SCORED] - images.logits[n]).max() < 1e-3
        if n == 0:
            features = model.model.get_image_features(
                seen["pixel_values"], seen["image_grid_thw"]
            ).pooler_output[0]
            assert (
                vision_parity.relative(images.features[0], features.detach().numpy())
                <= vision_encoder.TOLERANCES["fp32"]
            )
    assert len({tuple(answer) for answer in images.greedy.tolist()}) == 10, (
        "every image is answered in another way, so that a mistaken one shows"
    )


@pytest.mark.parametrize(
    ("target", "params"), [("onnx", {"precision": "fp32"}), ("llamacpp", {"type": "f32"})]
)
def test_exact_engines_answer_every_token(
    vision_model: Path, reference: Reference, tmp_path: Path, target: str, params: dict[str, Any]
) -> None:
    result = verify(
        made(vision_model, reference, tmp_path / "engine", target, **params), reference, Limits(), 1
    )
    found = by_stage(result)
    assert result.passed
    assert all(row.passed for row in result.stages)
    assert found["end to end"].error == 0
    assert found["end to end"].limit == 0
    assert "480 of 480" in found["end to end"].how
    assert found["pixels"].error == 0
    assert 0 < found["tower"].error < 1e-5
    assert 0 < found["projector"].error < 1e-5
    assert found["decoder"].limit == {"onnx": 1e-3, "llamacpp": 5e-3}[target]
    assert 0 < found["decoder"].error < found["decoder"].limit / 4


@pytest.mark.parametrize(
    ("tower", "least", "most"), [("fp16", 1e-5, 2e-3), ("int8", 1e-3, 3e-2), ("w8a8", 1e-3, 6e-2)]
)
def test_narrow_towers_have_limits_of_their_own(
    vision_model: Path, reference: Reference, tmp_path: Path, tower: str, least: float, most: float
) -> None:
    result = verify(
        made(vision_model, reference, tmp_path / "engine", precision="fp32", tower=tower),
        reference,
        Limits(),
        1,
    )
    found = by_stage(result)
    assert result.passed, result.problems
    for name in ("tower", "projector"):
        assert least < found[name].error < most
        assert found[name].limit == vision_encoder.TOLERANCES[tower]
        assert f"the {tower} {name}" in found[name].how
    assert found["decoder"].limit == 1e-3, "the decoder is as exact as ever"
    assert 0 < found["end to end"].error < 0.05 == found["end to end"].limit
    assert "of 480 greedy tokens" in found["end to end"].how


def test_a_bfloat16_tower(vision_model: Path, reference: Reference, tmp_path: Path) -> None:
    found = by_stage(
        verify(
            made(
                vision_model,
                reference,
                tmp_path / "engine",
                "tensorrt",
                precision="fp32",
                tower="bf16",
            ),
            reference,
            Limits(),
            1,
        )
    )
    for name in ("tower", "projector"):
        assert 1e-4 < found[name].error < 2e-2
        assert found[name].limit == vision_encoder.TOLERANCES["bf16"]
        assert found[name].passed


@pytest.mark.parametrize(("mmproj", "most"), [("f32", 2e-3), ("f16", 3e-3), ("q8_0", 3e-2)])
def test_libmtmds_tower_and_projector_are_one_stage(
    vision_model: Path, reference: Reference, tmp_path: Path, mmproj: str, most: float
) -> None:
    result = verify(
        made(
            vision_model,
            reference,
            tmp_path / "engine",
            "llamacpp",
            type="f32",
            vision="mtmd",
            mmproj=mmproj,
        ),
        reference,
        Limits(),
        1,
    )
    found = {row.stage: row for row in result.stages}
    assert list(found) == ["projector", "decoder", "end to end"], result.problems
    assert result.passed, result.problems
    assert 1e-5 < found["projector"].error < most
    assert found["projector"].limit == mtmd_vision.TOLERANCES[mmproj]
    assert f"{mmproj} tower and projector in one" in found["projector"].how
    assert ("share of greedy tokens" in found["end to end"].how) == (mmproj == "f32"), (
        "only float32 must answer every token"
    )


def test_quantized_decoder_is_held_to_divergence(
    vision_model: Path, reference: Reference, tmp_path: Path
) -> None:
    quantized = made(vision_model, reference, tmp_path / "engine", precision="int8", group=32)
    found = by_stage(verify(quantized, reference, Limits(), 1))
    assert found["tower"].limit == 1e-4
    assert 0 < found["decoder"].error < found["decoder"].limit == 0.05
    assert "top-1 agreement" in found["decoder"].how
    assert "at 80 answer positions" in found["decoder"].how
    assert "at all 480 tokens" in found["decoder"].how
    carried = by_stage(verify(quantized, quantized.reference(), Limits(), 1))
    assert "at 16 answer positions" in carried["decoder"].how, (
        "two of sixteen would already be too many to differ"
    )
    assert "at all 96 tokens" in carried["decoder"].how, (
        "two of sixteen would already be too many to differ"
    )
    strict = verify(quantized, reference, Limits(0.05, 1.0), 1)
    assert not by_stage(strict)["decoder"].passed
    assert any("stage decoder" in problem for problem in strict.problems)


# --- each stage fails where its own part is wrong, and no other does


def wrong(reference: Reference, **changes: Any) -> Reference:
    return replace(reference, images=replace(reference.images, **changes))


@pytest.mark.parametrize("name", ["pixels", "tower", "features"])
def test_a_wrong_part_is_named(engine: Engine, reference: Reference, name: str) -> None:
    arrays = tuple(array * np.float32(1.001) for array in getattr(reference.images, name))
    found = by_stage(verify(engine, wrong(reference, **{name: arrays}), Limits(), 1))
    failed = {stage for stage in STAGES if not found[stage].passed}
    first, behind = {
        "pixels": ("pixels", {"tower"}),
        "tower": ("tower", {"projector"}),
        "features": ("projector", {"decoder"}),
    }[name]
    assert first in failed, "what was given wrong inputs may fail too"
    assert failed <= {
        first,
        *behind,
    }, "what was given wrong inputs may fail too"


FAULTS = {
    "another mean": ("pixels", "preprocess", lambda pixels: pixels + np.float32(0.01)),
    "patches in another order": ("tower", "run_tower", lambda tower: np.roll(tower, 1, 0)),
    "rows and columns swapped": ("tower", "axes", None),
    "features in another order": (
        "projector",
        "run_projector",
        lambda features: features[::-1].copy(),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_engine_shows_in_its_own_stage(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    stage, method, change = FAULTS[fault]
    run_tower = OnnxVisionEncoder.run_tower
    patches = vision_parity.patches
    if method == "preprocess":
        for module in (
            "edgemed.verification.vision_parity.patches",
            "edgemed.onnx.vision_encoder.patches",
        ):
            monkeypatch.setattr(
                module,
                lambda image, v: replace(found := patches(image, v), pixels=change(found.pixels)),
            )
    elif method == "axes":
        monkeypatch.setattr(
            OnnxVisionEncoder,
            "run_tower",
            lambda self, found: run_tower(
                self, replace(found, rows=found.columns, columns=found.rows)
            ),
        )
    else:
        right = getattr(OnnxVisionEncoder, method)
        monkeypatch.setattr(
            OnnxVisionEncoder, method, lambda self, given: change(right(self, given))
        )
    result = verify(engine, reference.trim(2), Limits(), 1)
    assert not result.passed
    assert [row.stage for row in result.stages if not row.passed] == [stage, "end to end"]


def test_relative_error_by_hand() -> None:
    right = np.array([[3.0, 4.0]], np.float32)
    assert vision_parity.relative(right, right) == 0
    assert vision_parity.relative(np.array([[3.0, 4.5]], np.float32), right) == pytest.approx(0.125)
    spiked = np.ones((100, 100), np.float32)
    spiked[0, 0] = 300
    assert vision_parity.relative(spiked + np.float32(0.01), spiked) == pytest.approx(
        1 / np.sqrt(9999 + 9e4)
    ), "beside the one large value alone it would be 3e-5"


def test_wrong_answers_and_scores(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = reference.images.greedy.copy()
    greedy[3, 40] = (greedy[3, 40] + 1) % 250
    result = verify(engine, wrong(reference, greedy=greedy), Limits(), 1)
    assert not result.passed
    assert [row.stage for row in result.stages if not row.passed] == ["end to end"]
    assert "472 of 480" in result.problems[0]
    result = verify(
        engine, wrong(reference, logits=reference.images.logits + np.float32(0.01)), Limits(), 1
    )
    assert [row.stage for row in result.stages if not row.passed] == ["decoder"]
    monkeypatch.setattr(
        OnnxVisionEncoder,
        "run_tower",
        lambda self, found: np.full((len(found.pixels), self.v.width), np.nan, np.float32),
    )
    with pytest.raises(EdgemedError, match=r"NaN or infinite numbers for an image \(stage tower\)"):
        verify(engine, reference, Limits(), 1)


def test_another_image_is_another_answer(engine: Engine, reference: Reference) -> None:
    """Were the images not looked at, turning them over would change nothing."""
    turned = tuple(picture[::-1, ::-1].copy() for picture in reference.images.pictures)
    found = by_stage(verify(engine, wrong(reference, pictures=turned), Limits(), 1))
    assert not found["pixels"].passed
    assert not found["end to end"].passed
    assert found["tower"].passed
    assert found["decoder"].passed


# --- what travels


def test_reference_with_images_survives_storage(reference: Reference, tmp_path: Path) -> None:
    reference.save(tmp_path)
    back = Reference.load(tmp_path)
    assert back.digest() == reference.digest()
    assert [p.shape for p in back.images.pictures] == [p.shape for p in reference.images.pictures]
    trimmed = reference.trim(2)
    assert len(trimmed.images.pixels) == len(trimmed.images.logits) == 2
    assert len(trimmed.images.pictures) == len(trimmed.images.greedy) == 10
    assert trimmed.digest() != reference.digest()
    plain = replace(reference, images=None)
    plain.save(tmp_path)
    with np.load(tmp_path / FILE) as arrays:
        assert sorted(arrays) == [
            "greedy",
            "logits",
            "prompt",
            "windows",
        ], "a text model's file is what it was"
    assert Reference.load(tmp_path).images is None
    assert plain.digest() != reference.digest()
    assert wrong(reference, pictures=reference.images.pictures[::-1]).digest() != reference.digest()


def test_the_carried_reference_is_checked_without_torch(engine: Engine) -> None:
    carried = engine.reference()
    result = verify(engine, carried, Limits(), 1)
    assert result.passed
    assert "of 2 images" in by_stage(result)["tower"].how
    assert "480 of 480" in by_stage(result)["end to end"].how
    assert (engine.path / FILE).stat().st_size < 2e6


def test_no_images_asked_for(vision_model: Path, reference: Reference, tmp_path: Path) -> None:
    source = open_checkpoint(vision_model)
    none = replace(
        reference,
        images=image_answers(
            source, replace(SPEC, images=0), CanonicalWeights(source).vision.pixels
        ),
    )
    engine = made(vision_model, none, tmp_path / "engine", precision="fp32")
    assert verify(engine, engine.reference(), Limits(), 1).stages == ()


def test_the_engines_own_size_of_images(
    vision_model: Path, reference: Reference, tmp_path: Path
) -> None:
    with pytest.raises(EdgemedError, match="image 1 becomes 48 patches, in its reference 192"):
        verify(
            made(
                vision_model, reference, tmp_path / "other", precision="fp32", max_pixels=64 * 196
            ),
            reference,
            Limits(),
            1,
        )
    source = open_checkpoint(vision_model)
    small = replace(
        reference, images=image_answers(source, replace(SPEC, images=2), (3136, 64 * 196))
    )
    assert verify(
        made(vision_model, small, tmp_path / "own", precision="fp32", max_pixels=64 * 196),
        small,
        Limits(),
        1,
    ).passed


# --- through the command line, a run and its report, and the bench


def test_exported_verified_and_shown(vision_model: Path, tmp_path: Path) -> None:
    from edgemed.api import export as export_model

    engine = export_model(
        str(vision_model), "onnx", tmp_path / "engine", "medquad-answers", precision="fp32"
    )
    done = cli("verify", engine.path, "--threads", 1)
    assert done.returncode == 0, done.stderr
    rows = [
        line.split() for line in done.stdout.splitlines() if "passed" in line and "how" not in line
    ]
    assert [" ".join(row[: row.index("passed")]) for row in rows if row[0] != "passed"] == STAGES
    assert "480 of 480 greedy tokens" in " ".join(done.stdout.split())
    found = json.loads(cli("verify", engine.path, "--threads", 1, "--json").stdout)
    assert found["passed"]
    assert [row["stage"] for row in found["stages"]] == STAGES
    old = engine.reference()
    replace(old, images=None).save(engine.path)
    refused(cli("verify", engine.path), "reference.npz")


def test_run_reports_stages_and_a_question_about_an_image(
    vision_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from edgemed.pipeline import runner as run_module
    from edgemed.pipeline.recipe import read_recipe
    from edgemed.reporting.report import markdown, render

    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {vision_model}\nengines:\n- onnx: {{precision: fp32}}\n- onnx: {{precision: fp32, tower:"
        " fp16, max_pixels: 12544, name: small}\nverify: {prompts: medquad-answers, count: 2,"
        " width: 48, new: 8, images: 3, image_new: 12}\nbench: {prompt: [8], generate: 4, runs:"
        " 2, image: 56, threads: 1}\n"
    )
    measured = run_module.bench_engine
    # one is enough
    monkeypatch.setattr(
        run_module,
        "bench_engine",
        lambda engine, recipe: measured(engine, recipe) if engine.name == "small" else [],
    )
    document = json.loads(
        (run_module.run(read_recipe(recipe), tmp_path / "work").parent / "report.json").read_text()
    )
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(document, json.loads((ROOT / "docs" / "report.schema.json").read_text()))
    for entry, tower in zip(document["engines"], ("fp32", "fp16"), strict=True):
        assert entry["verify"]["passed"]
        assert entry["stages"] == entry["verify"]["stages"]
        assert [row["stage"] for row in entry["stages"]] == STAGES
        assert tower in entry["stages"][1]["how"]
        assert "36 of 36 greedy tokens" in entry["stages"][4]["how"]
        assert "of 3 images" in entry["stages"][1]["how"]
        assert (
            json.loads(
                (tmp_path / "work" / "engines" / entry["name"] / "manifest.json").read_text()
            )["verify"]["stages"]
            == entry["stages"]
        )
        card = (tmp_path / "work" / "engines" / entry["name"] / "README.md").read_text()
        assert "vqa-rad-images" in card
        assert "CC0-1.0" in card
        assert "| projector | yes |" in card
        assert ("first token of a second question about it" in card) == (entry["name"] == "small")
    assert {
        r["name"]: r["n"]
        for r in document["engines"][1]["records"]
        if r["name"].startswith("image_")
    } == {
        **{
            f"image_{name}_seconds": 2
            for name in (
                "preprocess",
                "tower",
                "projector",
                "prefill",
                "first_token",
                "second_question",
            )
        },
        "image_load_seconds": 1,
    }
    for page in (render(document), markdown(document)):
        assert "largest relative error" in page
        assert "end to end" in page
        assert "question about an image" in page
    started = {p.name: p.stat().st_mtime for p in (tmp_path / "work" / "store").glob("images-*")}
    assert len(started) == 2, "the source is shown each size of images once"


def test_bench_of_an_image(engine: Engine) -> None:
    from edgemed.benchmarking.bench import bench
    from edgemed.benchmarking.spec import BenchSpec

    found = {r.name: r for r in bench(engine, BenchSpec((16,), 4, 3, 1, image=112))}
    parts = [
        found[f"image_{name}_seconds"] for name in ("preprocess", "tower", "projector", "prefill")
    ]
    first = found["image_first_token_seconds"]
    second = found["image_second_question_seconds"]
    assert first.how == {"image": 112, "features": 16, "tokens": 32, "threads": 1, "runs": 3}
    assert first.n == 3
    # Each is a median of its own, so sums agree only roughly.
    assert first.spread.max >= max(part.value for part in parts)
    assert second.spread.min < first.spread.max
    assert not [
        name
        for name in {r.name for r in bench(engine, BenchSpec((16,), 4, 1, 1, image=0))}
        if name.startswith("image_")
    ]
    with pytest.raises(
        EdgemedError,
        match=(
            "1344 x 1344 pixels and a question are .* tokens, 1024 fit. Bench a smaller image with"
            " --image SIDE"
        ),
    ):
        bench(engine, BenchSpec((16,), 4, 1, 1, image=1344))
    with pytest.raises(EdgemedError, match="-1 x -1 pixels is none"):
        bench(engine, BenchSpec((16,), 4, 1, 1, image=-1))


def test_a_second_question_costs_no_second_look(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemed.benchmarking.bench import image_questions
    from edgemed.benchmarking.spec import BenchSpec

    looks = []
    run_tower = OnnxVisionEncoder.run_tower
    monkeypatch.setattr(
        OnnxVisionEncoder,
        "run_tower",
        lambda self, found: looks.append(found.pixels) or run_tower(self, found),
    )
    session = engine.open(1)
    image_questions(engine, session, BenchSpec((16,), 4, 3, 1, image=56))
    session.close()
    assert len(looks) == 4, "one look at each image, and every round another image"
    assert len({pixels.tobytes() for pixels in looks}) == 4, (
        "one look at each image, and every round another image"
    )


# --- faults


def test_faults_end_in_one_line(
    vision_model: Path, engine: Engine, reference: Reference, tmp_path: Path
) -> None:
    with pytest.raises(
        EdgemedError, match="is a vision model, and its reference answers say nothing about images"
    ):
        verify(engine, replace(reference, images=None), Limits(), 1)
    with pytest.raises(
        EdgemedError, match="vqa-rad-images has 10 images, 11 are asked for. Ask for 0 to 10"
    ):
        image_questions(11)
    with pytest.raises(EdgemedError, match="with question and answer takes .* tokens, 192 fit"):
        verify(
            made(vision_model, reference, tmp_path / "short", precision="fp32", context=192),
            reference,
            Limits(),
            1,
        )
    whole = (engine.path / FILE).read_bytes()
    for damaged in (
        whole[:1000],
        whole[: len(whole) // 2] + bytes(100) + whole[len(whole) // 2 + 100 :],
        b"",
        b"PK nothing",
    ):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(EdgemedError, match="reference.npz is damaged") as caught:
            Reference.load(tmp_path).digest()
        assert "\n" not in str(caught.value)
    with np.load(engine.path / FILE) as arrays:
        np.savez(
            tmp_path / FILE,
            **{name: array for name, array in arrays.items() if name != "image_tower_1"},
        )
    with pytest.raises(EdgemedError, match="reference.npz is damaged: .*image_tower_1"):
        Reference.load(tmp_path)
