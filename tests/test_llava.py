"""LLaVA: every layout of its checkpoints, its tower, projector and text model against transformers', its prompts, and what goes wrong in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_CLIP, write_tokenizer

Image = pytest.importorskip("PIL.Image")
torch = pytest.importorskip("torch")

from edgemed import plugins  # noqa: E402
from edgemed.checkpoint import open_checkpoint  # noqa: E402
from edgemed.decoder import TorchSession  # noqa: E402
from edgemed.engine import Engine, export  # noqa: E402
from edgemed.errors import EdgemedError  # noqa: E402
from edgemed.families.llava import FAMILY  # noqa: E402
from edgemed.images import fitted_size, patches, prompt_tokens, resized  # noqa: E402
from edgemed.session import Sampling, generate  # noqa: E402
from edgemed.tower import TorchEyes, features  # noqa: E402
from edgemed.vision import VisionSession  # noqa: E402
from edgemed.weights import Weights  # noqa: E402

VOCAB, IMAGE, CONTEXT = 288, 258, 256
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
        "bos_token_id": 1, "eos_token_id": 256}
ROOTS = {"language_model.model.": "model.", "language_model.lm_head": "lm_head", "multi_modal_projector.linear_1": "model.mm_projector.0", "multi_modal_projector.linear_2": "model.mm_projector.2",
         "vision_tower.": "model.vision_tower.vision_tower.vision_model."}
NEW = {"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head", "multi_modal_projector.": "model.multi_modal_projector.", "vision_tower.": "model.vision_tower."}
OLD = {"vision_tower.": "vision_tower.vision_model."}


def noise(seed: int, width: int = 60, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def tokenizer_with_image(path: Path) -> None:
    from tokenizers import Tokenizer

    write_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    assert tokenizer.token_to_id("<image>") == IMAGE
    tokenizer.save(str(path / "tokenizer.json"))


def theirs(path: Path, text: str = "llama", **changes: Any) -> Any:
    """A tiny random LLaVA made and saved by transformers, weights far enough from zero to tell errors."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TINY_CLIP, "num_attention_heads": 1}, text_config={"model_type": text, **TEXT}, image_token_index=IMAGE, **changes)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    tokenizer_with_image(path)
    return transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def renamed(source: Path, out: Path, roots: dict[str, str], config: dict[str, Any] | None = None) -> Path:
    """The same weights under other names, as another layout has them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    stored = load_file(source / "model.safetensors")
    start = {key: next((root for root in roots if key.startswith(root)), "") for key in stored}
    save_file({(roots[start[key]] + key.removeprefix(start[key])) if start[key] else key: tensor for key, tensor in stored.items()}, out / "model.safetensors")
    if config is not None:
        (out / "config.json").write_text(json.dumps(config))
        write_tokenizer(out)
    return out


def authors_config(model_type: str = "llava_llama", **changes: Any) -> dict[str, Any]:
    rope = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    seen = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_hidden_size": 64, "mm_vision_tower": "openai/clip", "image_aspect_ratio": "pad"}
    return {"model_type": model_type, **TEXT, **rope, **seen, "mm_use_im_start_end": False, "tie_word_embeddings": False, **changes}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("llava") / "model"
    return path, theirs(path)


def their_features(model: Any, found: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(output of the tower's layer before the projector, features) of transformers' model for patches as we cut them."""
    side = v.size // v.patch
    pixels = torch.from_numpy(found.pixels).reshape(side, side, 3, v.patch, v.patch).permute(2, 0, 3, 1, 4).reshape(1, 3, v.size, v.size)
    with torch.inference_mode():
        tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        return tower, model.model.get_image_features(pixels).pooler_output[0], pixels


def close(found: Any, right: torch.Tensor) -> float:
    return float((torch.as_tensor(np.asarray(found)) - right).abs().max() / right.abs().max())


# --- images

SIZES = [(60, 60), (100, 37), (37, 100), (333, 200), (20, 90), (1, 1), (56, 57), (56, 56), (700, 4), (1024, 1023)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_pixels_equal_transformers(model: tuple[Path, Any], size: tuple[int, int], fit: str) -> None:
    module = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    asked = {"height": 56, "width": 56} if fit == "stretch" else {"shortest_edge": 56}
    process = module.LlavaImageProcessorPil(size=asked, crop_size={"height": 56, "width": 56}, do_pad=fit == "pad")
    v = FAMILY.vision(open_checkpoint(model[0]).config, json.loads(process.to_json_string()), {})
    assert v.fit == fit
    right = process(images=[noise(1, *size)], return_tensors="np")["pixel_values"][0]
    found = patches(noise(1, *size), v).pixels.reshape(4, 4, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 56, 56)
    assert np.abs(found - right).max() < 1e-5
    if fit == "crop":
        clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil(size=asked, crop_size={"height": 56, "width": 56})
        assert np.abs(found - clip(images=[noise(1, *size)], return_tensors="np")["pixel_values"][0]).max() < 1e-5


# --- layouts

@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_every_layout_gives_transformers_numbers(tmp_path: Path, text: str) -> None:
    model = theirs(tmp_path / "saved", text)
    layouts = {"saved": tmp_path / "saved"}
    layouts |= {name: renamed(tmp_path / "saved", tmp_path / name, roots) for name, roots in (("new", NEW), ("old", OLD))}
    layouts["authors"] = renamed(tmp_path / "saved", tmp_path / "authors", ROOTS, authors_config(f"llava_{text}"))
    for name, path in layouts.items():
        weights = Weights(open_checkpoint(path))
        assert weights.vision.layers == 2 and weights.vision.spare == 1, name
        found = patches(noise(2), weights.vision)
        tower, seen, pixels = their_features(model, found, weights.vision)
        ours = features(weights, found)
        assert close(ours["tower"], tower) < 1e-4 and close(ours["features"], seen) < 1e-4, name
        ids = [5, 6, *[IMAGE] * 16, 7, 8, 9]
        with torch.inference_mode():
            right = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].numpy()
        eyes, session = TorchEyes(weights), TorchSession(weights)
        tokens, pictures = eyes.see([5, 6, eyes.v.token, 7, 8, 9], [noise(2)])
        assert np.abs(session.prefill(tokens, every=True, pictures=pictures) - right).max() < 1e-3, name
        assert weights.vision.token == (VOCAB if name == "authors" else IMAGE)


# --- engines

def engine_of(path: Path, target: str, out: Path, **params: Any) -> Engine:
    return export(open_checkpoint(path), target, plugins.load("targets", target).Params(**params), out)


@pytest.fixture(scope="module", params=["onnx", "llamacpp"])
def exact(request: pytest.FixtureRequest, model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Any, float]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip({"onnx": "onnxruntime", "llamacpp": "llama_cpp"}[request.param])
    params = {"onnx": {"precision": "fp32"}, "llamacpp": {"type": "f32"}}[request.param]
    return engine_of(model[0], request.param, tmp_path_factory.mktemp("exact") / "engine", **params), model[1], {"onnx": 1e-3, "llamacpp": 5e-3}[request.param]


def test_exact_engine_sees_as_transformers(exact: tuple[Engine, Any, float]) -> None:
    engine, model, bound = exact
    eyes, session = VisionSession(engine, 1), engine.open(1)
    try:
        for seed, size in enumerate([(60, 60), (100, 37), (30, 200)]):
            found = patches(noise(seed, *size), eyes.v)
            tower, seen, pixels = their_features(model, found, eyes.v)
            assert close(eyes.run_tower(found), tower) < 1e-4 and close(eyes.run_projector(tower.numpy()), seen) < 1e-4
            tokens, pictures = eyes.see([5, 6, IMAGE, 7, 8, 9], [noise(seed, *size)])
            with torch.inference_mode():
                right = model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0].numpy()
                written = model.generate(input_ids=torch.tensor([tokens]), pixel_values=pixels, max_new_tokens=24, do_sample=False, eos_token_id=None)[0, len(tokens) :].tolist()
            session.rewind(0)
            assert np.abs(session.prefill(tokens, every=True, pictures=pictures) - right).max() < bound
            session.rewind(0)
            assert list(generate(session, tokens, Sampling(max_tokens=24), pictures=pictures)) == written
    finally:
        session.close()


def test_two_images_in_one_prompt(exact: tuple[Engine, Any, float]) -> None:
    engine, model, bound = exact
    eyes, session = VisionSession(engine, 1), engine.open(1)
    try:
        text = FAMILY.chat("Which is larger?", 2, eyes.v.conversation)
        ids = prompt_tokens(engine.tokenizer(), text, eyes.v)
        assert ids[0] == 1 and ids.count(IMAGE) == 2 and engine.tokenizer().decode(ids[1:], skip_special_tokens=False) == text
        tokens, pictures = eyes.see(ids, [noise(1), noise(2)])
        pixels = torch.cat([their_features(model, patches(noise(seed), eyes.v), eyes.v)[2] for seed in (1, 2)])
        with torch.inference_mode():
            right = model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0].numpy()
        assert np.abs(session.prefill(tokens, every=True, pictures=pictures) - right).max() < bound
        session.rewind(0)
        tokens, swapped = eyes.see(ids, [noise(2), noise(1)])
        assert np.abs(session.prefill(tokens, pictures=swapped)[-1] - right[-1]).max() > 10 * bound, "the order of the images matters"
    finally:
        session.close()


@pytest.mark.parametrize("target,params,most", [("onnx", {"precision": "int8", "group": 32, "tower": "int8"}, 0.05), ("onnx", {"precision": "int4", "group": 32}, 0.25),
                                                ("onnx", {"precision": "fp16", "tower": "fp16"}, 0.005), ("llamacpp", {"type": "q8_0"}, 0.05)])
def test_smaller_engines_stay_near(model: tuple[Path, Any], tmp_path: Path, target: str, params: dict[str, Any], most: float) -> None:
    engine = engine_of(model[0], target, tmp_path / "engine", **params)
    weights = Weights(open_checkpoint(model[0]))
    logits = []
    for eyes, session in ((VisionSession(engine, 1), engine.open(1)), (TorchEyes(weights), TorchSession(weights))):
        tokens, pictures = eyes.see([5, IMAGE, 7, 8], [noise(4)])
        logits.append(session.prefill(tokens, every=True, pictures=pictures).copy())
        session.close()
    error = float(np.abs(logits[0] - logits[1]).mean())
    assert 0 < error < most


# --- steps

def qwen2_vl(path: Path) -> tuple[Path, Any]:
    """A tiny Qwen2-VL made and saved by transformers, for the steps that must keep any tower."""
    transformers = pytest.importorskip("transformers")
    from conftest import tiny_config

    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(**tiny_config("qwen2_vl"))).eval()
    model.save_pretrained(path)
    write_tokenizer(path)
    return path, model


PREPROCESSOR = {"do_pad": True, "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "min_pixels": 3136, "max_pixels": 12544}


@pytest.fixture(scope="module", params=["saved", "authors", "qwen2_vl"])
def seeing(request: pytest.FixtureRequest, model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    if request.param == "qwen2_vl":
        path, _ = qwen2_vl(folder / "base")
    else:
        path = renamed(model[0], folder / "base", {} if request.param == "saved" else ROOTS, None if request.param == "saved" else authors_config())
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return path


def asked(path: Path) -> np.ndarray:
    """Logits of a checkpoint for a prompt with one image."""
    weights = Weights(open_checkpoint(path))
    eyes, session = TorchEyes(weights), TorchSession(weights)
    tokens, pictures = eyes.see([5, 6, eyes.v.token, 7, 8], [noise(5, 80, 60)])
    return session.prefill(tokens, every=True, pictures=pictures)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_merge_keeps_the_tower(seeing: Path, tmp_path: Path, alpha: float) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from edgemed.steps import merge

    weights = Weights(open_checkpoint(seeing))
    text = weights.family.text_config(weights.checkpoint.config) if weights.family.text_config else None
    base = (transformers.AutoModelForImageTextToText.from_pretrained(seeing, dtype=torch.float32) if text is None else
            transformers.AutoModelForCausalLM.from_pretrained(seeing, dtype=torch.float32, config=transformers.AutoConfig.for_model(**text)))
    regex = r".*(language_model|model)\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=regex)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    notes = merge.run(weights.checkpoint, tmp_path / "merged", merge.Params(str(tmp_path / "adapter"), alpha=alpha))
    assert notes["check_written"]["max_abs_error"] < 1e-4
    done = Weights(open_checkpoint(tmp_path / "merged"))
    assert done.vision == weights.vision and (tmp_path / "merged" / "preprocessor_config.json").is_file()
    for name in weights.parts:
        if name.startswith("vision.") and weights.parts[name].kind == "matrix":
            assert torch.equal(done.matrix(name).dense(), weights.matrix(name).dense())
    # What the merge should give for an image, from the base's weights and the adapter's product alone.
    tensors = dict(wrapped.named_parameters())
    for n in range(weights.decoder.layers):
        a, b = (next(t for name, t in tensors.items() if f"layers.{n}.mlp.down_proj.lora_{side}" in name and "visual" not in name) for side in "AB")
        scale = 8 / 4  # peft's default alpha over r
        right = weights.matrix(f"layers.{n}.down").dense() + alpha * scale * (b @ a).detach()
        assert (done.matrix(f"layers.{n}.down").dense() - right).abs().max() < 1e-5
    assert np.abs(asked(tmp_path / "merged") - asked(seeing)).max() > 1e-3


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_keeps_the_tower(seeing: Path, tmp_path: Path, method: str) -> None:
    from edgemed.steps import quantize

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"id": n, "text": f"patient {n} was given {n * 37 % 101} mg and improved after {n % 9} days"}) + "\n" for n in range(40)))
    (tmp_path / "packed").mkdir()
    source = Weights(open_checkpoint(seeing))
    quantize.run(source.checkpoint, tmp_path / "packed", quantize.Params(method, bits=8, group=32, calibration=str(text) if method == "gptq" else None, samples=8, length=32))
    done = Weights(open_checkpoint(tmp_path / "packed"))
    assert done.vision == source.vision and done.parts.keys() == source.parts.keys()
    for name, part in source.parts.items():
        if name.startswith("vision.") and part.kind == "matrix":
            assert torch.equal(done.matrix(name).dense(), source.matrix(name).dense().half().float()), name
    assert "qweight" in str(sorted(done.checkpoint.tensors)) and not [key for key in done.checkpoint.tensors if key.endswith("qweight") and ("vis" in key or "projector" in key)]
    assert (tmp_path / "packed" / "preprocessor_config.json").is_file()
    assert 0 < np.abs(asked(tmp_path / "packed") - asked(seeing)).mean() < 0.05
    pytest.importorskip("onnxruntime")
    engine = engine_of(tmp_path / "packed", "onnx", tmp_path / "engine")
    session, eyes = engine.open(1), VisionSession(engine, 1)
    tokens, pictures = eyes.see([5, 6, eyes.v.token, 7, 8], [noise(5, 80, 60)])
    assert engine.precision == "int8 g32" and np.abs(session.prefill(tokens, every=True, pictures=pictures) - asked(tmp_path / "packed")).mean() < 0.05
    session.close()
