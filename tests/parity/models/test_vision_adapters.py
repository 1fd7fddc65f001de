"""Adapters of engines that see: what they make of an answer about an image is checked against the
source with them, and the source against peft's own model.

No adapter reaches the tower, so of the stages the two behind it are measured for each adapter, and
all of them for the base.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import IMAGE, cli, write_model, write_vision_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL.Image")

from edgemed import plugins
from edgemed.engines.engine import Engine, export
from edgemed.engines.image_reference import SCORED
from edgemed.engines.reference import Reference
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.weights import CanonicalWeights
from edgemed.pipeline.references import answers, image_answers
from edgemed.verification.parity import Limits, verify, with_adapters
from edgemed.verification.spec import VerifySpec

SPEC = VerifySpec(
    "medquad-answers",
    count=2,
    width=48,
    new=8,
    images=3,
    image_new=16,
)
STAGES = ["pixels", "tower", "projector", "decoder", "end to end"]
# family -> the modules its adapter changes; of the mixture, attention alone can be switched.
MODULES = {
    "qwen2_vl": r".*language_model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)",
    "llava": r".*language_model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)",
    "moe-tinymed": ["q_proj", "o_proj"],
}


def write_adapter(model: Path, out: Path, family: str, seed: int = 0) -> str:
    """A PEFT adapter with factors far from zero, saved by peft; of the mixture, which transformers
    does not know, written as its authors' code would.
    """
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=MODULES[family])
    generator = torch.Generator().manual_seed(seed)
    if family in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        wrapped = peft.get_peft_model(
            transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
            config,
        )
        with torch.no_grad():
            for _, parameter in sorted(wrapped.named_parameters()):
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        wrapped.save_pretrained(out)
        return str(out)
    from safetensors.torch import save_file

    weights = CanonicalWeights(open_checkpoint(model))
    factors = {}
    for name, part in weights.parts.items():
        for module, rows in (
            zip(part.modules, part.rows or part.shape[:1], strict=True)
            if name.startswith("layers.")
            else ()
        ):
            if module.split(".")[-1] in MODULES[family]:
                for side, shape in (("A", (4, part.shape[1])), ("B", (rows, 4))):
                    factors[f"base_model.model.{module}.lora_{side}.weight"] = 0.2 * torch.randn(
                        shape, generator=generator
                    )
    config.save_pretrained(out)
    save_file(factors, out / "adapter_model.safetensors")
    return str(out)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """family -> (tiny random model that sees, adapter)."""
    folder = tmp_path_factory.mktemp("seeing")
    made = {}
    for family in MODULES:
        model = (
            write_vision_model(folder / family, max_position_embeddings=1024)
            if family == "qwen2_vl"
            else _roomy(folder / family, family)
        )
        made[family] = (model, write_adapter(model, folder / f"{family}-adapter", family))
    return made


def _roomy(path: Path, family: str) -> Path:
    """The tiny model with room for a chat about an image."""
    write_model(
        path,
        family=family,
        **({} if family == "llava" else {"max_position_embeddings": 512, "seq_length": 512}),
    )
    if family == "llava":
        config = json.loads((path / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = 512
        (path / "config.json").write_text(json.dumps(config))
    return path


def told(model: Path, adapter: str | None) -> Reference:
    source = open_checkpoint(model)
    one = ("notes", adapter) if adapter else None
    return replace(
        answers(source, SPEC, one),
        images=image_answers(source, SPEC, CanonicalWeights(source).vision.pixels, one),
    ).trim(2)


def made(seeing: tuple[Path, str], out: Path, target: str, **params: Any) -> Engine:
    pytest.importorskip("llama_cpp" if target == "llamacpp" else "onnxruntime")
    model, adapter = seeing
    built = plugins.load("targets", target).Params(**params, adapters={"notes": adapter})
    return export(
        open_checkpoint(model),
        target,
        built,
        out,
        told(model, None),
        adapted={"notes": told(model, adapter)},
    )


def test_the_source_with_an_adapter_answers_about_images_as_peft_does(
    seeing: dict[str, tuple[Path, str]],
) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, adapter = seeing["qwen2_vl"]
    v = CanonicalWeights(open_checkpoint(model)).vision
    plain, images = (told(model, one).images for one in (None, adapter))
    process = Qwen2VLImageProcessorPil(min_pixels=v.pixels[0], max_pixels=v.pixels[1])
    right = peft.PeftModel.from_pretrained(
        transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
        adapter,
    ).eval()
    for n in range(len(images.features)):
        seen = process(images=[images.image(n)], return_tensors="pt")
        tokens, _ = images.prompt_with_features(n, v, 3, 1024)
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            out = right.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **seen,
                mm_token_type_ids=(ids == IMAGE).int(),
                max_new_tokens=16,
                min_new_tokens=16,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert (
            out.sequences[0, len(tokens) :].tolist()
            == images.greedy[n].tolist()
            != plain.greedy[n].tolist()
        )
        assert np.abs(torch.cat(out.logits).numpy()[:SCORED] - images.logits[n]).max() < 1e-3
        assert np.array_equal(images.features[n], plain.features[n]), (
            "an adapter changes nothing in front of the decoder"
        )


@pytest.mark.parametrize(
    ("family", "target", "params"),
    [
        ("qwen2_vl", "onnx", {"precision": "fp32"}),
        ("qwen2_vl", "llamacpp", {"type": "f32"}),
        ("qwen2_vl", "llamacpp", {"type": "f32", "vision": "mtmd", "mmproj": "f32"}),
        ("llava", "onnx", {"precision": "fp32"}),
        ("llava", "llamacpp", {"type": "f32"}),
        ("moe-tinymed", "onnx", {"precision": "fp32"}),
    ],
)
def test_each_adapter_is_shown_the_images(
    seeing: dict[str, tuple[Path, str]],
    family: str,
    target: str,
    params: dict[str, Any],
    tmp_path: Path,
) -> None:
    engine = made(seeing[family], tmp_path / "engine", target, **params)
    result = with_adapters(engine, verify(engine, engine.reference(), Limits(), 1), Limits(), 1)
    assert result.passed, result.problems
    own = {row.stage: row for row in result.adapters["notes"].stages}
    assert list(own) == ["decoder", "end to end"]
    assert {row.stage for row in result.stages} >= {"projector", *own}
    assert own["decoder"].limit == plugins.load("targets", target).FP32_TOLERANCE[engine.precision]
    assert 0 < own["decoder"].error < own["decoder"].limit
    if params.get("vision") != "mtmd":
        assert own["end to end"].error == 0
        assert "48 of 48 greedy tokens" in own["end to end"].how


@pytest.mark.parametrize("target", ["onnx", "llamacpp"])
def test_an_adapter_that_answers_wrongly_about_images_fails(
    seeing: dict[str, tuple[Path, str]], target: str, tmp_path: Path
) -> None:
    engine = made(
        seeing["qwen2_vl"],
        tmp_path / "engine",
        target,
        **({"precision": "fp32"} if target == "onnx" else {"type": "f32"}),
    )
    base = engine.reference()
    right = engine.reference("notes")
    forgotten = replace(right, images=base.images)
    result = verify(engine, forgotten, Limits(), 1, "notes")
    assert not result.passed
    assert [row.stage for row in result.stages if not row.passed] == [
        "decoder",
        "end to end",
    ]
    assert all(problem.startswith("stage ") for problem in result.problems), (
        "on text it is right: only the images show it"
    )
    forgotten.save(engine.path / "adapters" / "notes")
    whole = with_adapters(engine, verify(engine, base, Limits(), 1), Limits(), 1)
    assert not whole.passed
    assert all(problem.startswith("notes: stage ") for problem in whole.problems)
    with pytest.raises(EdgemedError, match="say nothing about images"):
        verify(engine, replace(right, images=None), Limits(), 1, "notes")


def test_a_recipe_and_the_command_line_show_images_to_adapters(
    seeing: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    model, adapter = seeing["qwen2_vl"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {model}\nengines:\n- onnx: {{precision: fp32, max_pixels: 12544, adapters:"
        f" {{notes: {adapter}}}}}\nverify: {{prompts: medquad-answers, count: 2, width: 48, new: 8,"
        " images: 3, image_new: 12}\n"
    )
    done = cli("run", recipe, "--work", tmp_path / "work", "--json")
    assert done.returncode == 0, done.stderr
    assert "reference answers about images with notes" in " ".join(done.stderr.split())
    (engine,) = json.loads(done.stdout)["engines"]
    assert engine["verify"]["passed"]
    assert [row["stage"] for row in engine["verify"]["adapters"]["notes"]["stages"]] == STAGES[3:]
    shown = cli("verify", tmp_path / "work" / "engines" / engine["name"], "--threads", 1)
    assert shown.returncode == 0, shown.stderr
    rows = [
        line.split() for line in shown.stdout.splitlines() if "passed" in line and "how" not in line
    ]
    assert [" ".join(row[: row.index("passed")]) for row in rows if row[0] != "passed"] == [
        *STAGES,
        *STAGES[3:],
    ]
