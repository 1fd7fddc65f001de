"""LLaVA: every layout of its checkpoints, its tower, projector and text model against
transformers', its prompts, and what goes wrong in one line.
"""

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

from edgemed import plugins
from edgemed.engines.engine import Engine, export
from edgemed.errors import EdgemedError
from edgemed.families.llava import FAMILY
from edgemed.inference.decoding import Sampling, generate
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights
from edgemed.onnx.vision_encoder import OnnxVisionEncoder
from edgemed.vision.preprocessing import fitted_size, patches, prompt_tokens, resized
from edgemed.vision.torch_encoder import TorchVisionEncoder, features

VOCAB = 288
IMAGE = 258
CONTEXT = 384
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 256,
}
ROOTS = {
    "language_model.model.": "model.",
    "language_model.lm_head": "lm_head",
    "multi_modal_projector.linear_1": "model.mm_projector.0",
    "multi_modal_projector.linear_2": "model.mm_projector.2",
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}
NEW = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.": "model.vision_tower.",
}
OLD = {"vision_tower.": "vision_tower.vision_model."}


def noise(seed: int, width: int = 60, height: int = 60) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


def tokenizer_with_image(path: Path) -> None:
    from tokenizers import Tokenizer

    write_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    assert tokenizer.token_to_id("<image>") == IMAGE
    tokenizer.save(str(path / "tokenizer.json"))


def theirs(path: Path, text: str = "llama", **changes: Any) -> Any:
    """A tiny random LLaVA made and saved by transformers, weights far enough from zero to tell
    errors.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TINY_CLIP, "num_attention_heads": 1},
        text_config={"model_type": text, **TEXT},
        image_token_index=IMAGE,
        **changes,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    tokenizer_with_image(path)
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32
    ).eval()


def renamed(
    source: Path, out: Path, roots: dict[str, str], config: dict[str, Any] | None = None
) -> Path:
    """The same weights under other names, as another layout has them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    stored = load_file(source / "model.safetensors")
    start = {key: next((root for root in roots if key.startswith(root)), "") for key in stored}
    save_file(
        {
            (roots[start[key]] + key.removeprefix(start[key])) if start[key] else key: tensor
            for key, tensor in stored.items()
        },
        out / "model.safetensors",
    )
    if config is not None:
        (out / "config.json").write_text(json.dumps(config))
        write_tokenizer(out)
    return out


def authors_config(model_type: str = "llava_llama", **changes: Any) -> dict[str, Any]:
    rope = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    seen = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 64,
        "mm_vision_tower": "openai/clip",
        "image_aspect_ratio": "pad",
    }
    return {
        "model_type": model_type,
        **TEXT,
        **rope,
        **seen,
        "mm_use_im_start_end": False,
        "tie_word_embeddings": False,
        **changes,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("llava") / "model"
    return path, theirs(path)


def their_features(model: Any, found: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(output of the tower's layer before the projector, features) of transformers' model for
    patches as we cut them.
    """
    side = v.size // v.patch
    pixels = (
        torch.from_numpy(found.pixels)
        .reshape(side, side, 3, v.patch, v.patch)
        .permute(2, 0, 3, 1, 4)
        .reshape(1, 3, v.size, v.size)
    )
    with torch.inference_mode():
        tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        return tower, model.model.get_image_features(pixels).pooler_output[0], pixels


def close(found: Any, right: torch.Tensor) -> float:
    return float((torch.as_tensor(np.asarray(found)) - right).abs().max() / right.abs().max())


# --- images

SIZES = [
    (60, 60),
    (100, 37),
    (37, 100),
    (333, 200),
    (20, 90),
    (1, 1),
    (56, 57),
    (56, 56),
    (700, 4),
    (1024, 1023),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_pixels_equal_transformers(
    model: tuple[Path, Any], size: tuple[int, int], fit: str
) -> None:
    module = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    asked = {"height": 56, "width": 56} if fit == "stretch" else {"shortest_edge": 56}
    process = module.LlavaImageProcessorPil(
        size=asked, crop_size={"height": 56, "width": 56}, do_pad=fit == "pad"
    )
    v = FAMILY.vision(open_checkpoint(model[0]).config, json.loads(process.to_json_string()), {})
    assert v.fit == fit
    right = process(images=[noise(1, *size)], return_tensors="np")["pixel_values"][0]
    found = (
        patches(noise(1, *size), v)
        .pixels.reshape(4, 4, 3, 14, 14)
        .transpose(2, 0, 3, 1, 4)
        .reshape(3, 56, 56)
    )
    assert np.abs(found - right).max() < 1e-5
    if fit == "crop":
        clip = pytest.importorskip(
            "transformers.models.clip.image_processing_pil_clip"
        ).CLIPImageProcessorPil(size=asked, crop_size={"height": 56, "width": 56})
        assert (
            np.abs(
                found - clip(images=[noise(1, *size)], return_tensors="np")["pixel_values"][0]
            ).max()
            < 1e-5
        )


# --- layouts


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_every_layout_gives_transformers_numbers(tmp_path: Path, text: str) -> None:
    model = theirs(tmp_path / "saved", text)
    layouts = {"saved": tmp_path / "saved"}
    layouts |= {
        name: renamed(tmp_path / "saved", tmp_path / name, roots)
        for name, roots in (("new", NEW), ("old", OLD))
    }
    layouts["authors"] = renamed(
        tmp_path / "saved", tmp_path / "authors", ROOTS, authors_config(f"llava_{text}")
    )
    for name, path in layouts.items():
        weights = CanonicalWeights(open_checkpoint(path))
        assert weights.vision.layers == 2, name
        assert weights.vision.spare == 1, name
        found = patches(noise(2), weights.vision)
        tower, seen, pixels = their_features(model, found, weights.vision)
        ours = features(weights, found)
        assert close(ours["tower"], tower) < 1e-4, name
        assert close(ours["features"], seen) < 1e-4, name
        ids = [5, 6, *[IMAGE] * 16, 7, 8, 9]
        with torch.inference_mode():
            right = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].numpy()
        vision_encoder = TorchVisionEncoder(weights)
        session = TorchSession(weights)
        tokens, pictures = vision_encoder.see([5, 6, vision_encoder.v.token, 7, 8, 9], [noise(2)])
        assert (
            np.abs(session.prefill(tokens, every=True, pictures=pictures) - right).max() < 1e-3
        ), name
        assert weights.vision.token == (VOCAB if name == "authors" else IMAGE)


# --- engines


def engine_of(path: Path, target: str, out: Path, **params: Any) -> Engine:
    return export(
        open_checkpoint(path), target, plugins.load("targets", target).Params(**params), out
    )


@pytest.fixture(scope="module", params=["onnx", "llamacpp"])
def exact(
    request: pytest.FixtureRequest,
    model: tuple[Path, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Engine, Any, float]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip({"onnx": "onnxruntime", "llamacpp": "llama_cpp"}[request.param])
    params = {"onnx": {"precision": "fp32"}, "llamacpp": {"type": "f32"}}[request.param]
    return (
        engine_of(model[0], request.param, tmp_path_factory.mktemp("exact") / "engine", **params),
        model[1],
        {"onnx": 1e-3, "llamacpp": 5e-3}[request.param],
    )


def test_exact_engine_sees_as_transformers(exact: tuple[Engine, Any, float]) -> None:
    engine, model, bound = exact
    vision_encoder = OnnxVisionEncoder(engine, 1)
    session = engine.open(1)
    try:
        for seed, size in enumerate([(60, 60), (100, 37), (30, 200)]):
            found = patches(noise(seed, *size), vision_encoder.v)
            tower, seen, pixels = their_features(model, found, vision_encoder.v)
            assert close(vision_encoder.run_tower(found), tower) < 1e-4
            assert close(vision_encoder.run_projector(tower.numpy()), seen) < 1e-4
            tokens, pictures = vision_encoder.see([5, 6, IMAGE, 7, 8, 9], [noise(seed, *size)])
            with torch.inference_mode():
                right = (
                    model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0].numpy()
                )
                written = model.generate(
                    input_ids=torch.tensor([tokens]),
                    pixel_values=pixels,
                    max_new_tokens=24,
                    do_sample=False,
                    eos_token_id=None,
                )[0, len(tokens) :].tolist()
            session.rewind(0)
            assert (
                np.abs(session.prefill(tokens, every=True, pictures=pictures) - right).max() < bound
            )
            session.rewind(0)
            assert (
                list(generate(session, tokens, Sampling(max_tokens=24), pictures=pictures))
                == written
            )
    finally:
        session.close()


def test_two_images_in_one_prompt(exact: tuple[Engine, Any, float]) -> None:
    engine, model, bound = exact
    vision_encoder = OnnxVisionEncoder(engine, 1)
    session = engine.open(1)
    try:
        text = FAMILY.chat("Which is larger?", 2, vision_encoder.v.conversation)
        ids = prompt_tokens(engine.tokenizer(), text, vision_encoder.v)
        assert ids[0] == 1
        assert ids.count(IMAGE) == 2
        assert engine.tokenizer().decode(ids[1:], skip_special_tokens=False) == text
        tokens, pictures = vision_encoder.see(ids, [noise(1), noise(2)])
        pixels = torch.cat(
            [
                their_features(model, patches(noise(seed), vision_encoder.v), vision_encoder.v)[2]
                for seed in (1, 2)
            ]
        )
        with torch.inference_mode():
            right = model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0].numpy()
        assert np.abs(session.prefill(tokens, every=True, pictures=pictures) - right).max() < bound
        session.rewind(0)
        tokens, swapped = vision_encoder.see(ids, [noise(2), noise(1)])
        assert (
            np.abs(session.prefill(tokens, pictures=swapped)[-1] - right[-1]).max() > 10 * bound
        ), "the order of the images matters"
    finally:
        session.close()


@pytest.mark.parametrize(
    ("target", "params", "most"),
    [
        ("onnx", {"precision": "int8", "group": 32, "tower": "int8"}, 0.05),
        ("onnx", {"precision": "int4", "group": 32}, 0.25),
        ("onnx", {"precision": "fp16", "tower": "fp16"}, 0.005),
        ("llamacpp", {"type": "q8_0"}, 0.05),
    ],
)
def test_smaller_engines_stay_near(
    model: tuple[Path, Any], tmp_path: Path, target: str, params: dict[str, Any], most: float
) -> None:
    engine = engine_of(model[0], target, tmp_path / "engine", **params)
    weights = CanonicalWeights(open_checkpoint(model[0]))
    logits = []
    for vision_encoder, session in (
        (OnnxVisionEncoder(engine, 1), engine.open(1)),
        (TorchVisionEncoder(weights), TorchSession(weights)),
    ):
        tokens, pictures = vision_encoder.see([5, IMAGE, 7, 8], [noise(4)])
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
    model = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.for_model(**tiny_config("qwen2_vl"))
    ).eval()
    model.save_pretrained(path)
    write_tokenizer(path)
    return path, model


PREPROCESSOR = {
    "do_pad": True,
    "size": {"shortest_edge": 56},
    "crop_size": {"height": 56, "width": 56},
}
PIXELS = {"min_pixels": 3136, "max_pixels": 12544}


@pytest.fixture(scope="module", params=["saved", "authors", "qwen2_vl"])
def seeing(
    request: pytest.FixtureRequest,
    model: tuple[Path, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    preprocessor: dict[str, Any] = PREPROCESSOR
    if request.param == "qwen2_vl":
        path, _ = qwen2_vl(folder / "base")
        preprocessor = PIXELS
    else:
        path = renamed(
            model[0],
            folder / "base",
            {} if request.param == "saved" else ROOTS,
            None if request.param == "saved" else authors_config(),
        )
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


def asked(path: Path) -> np.ndarray:
    """Logits of a checkpoint for a prompt with one image."""
    weights = CanonicalWeights(open_checkpoint(path))
    vision_encoder = TorchVisionEncoder(weights)
    session = TorchSession(weights)
    tokens, pictures = vision_encoder.see([5, 6, vision_encoder.v.token, 7, 8], [noise(5, 80, 60)])
    return session.prefill(tokens, every=True, pictures=pictures)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_merge_keeps_the_tower(seeing: Path, tmp_path: Path, alpha: float) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from edgemed.steps import merge

    weights = CanonicalWeights(open_checkpoint(seeing))
    text = (
        weights.family.text_config(weights.checkpoint.config)
        if weights.family.text_config
        else None
    )
    base = (
        transformers.AutoModelForImageTextToText.from_pretrained(seeing, dtype=torch.float32)
        if text is None
        else transformers.AutoModelForCausalLM.from_pretrained(
            seeing, dtype=torch.float32, config=transformers.AutoConfig.for_model(**text)
        )
    )
    regex = r".*(language_model|model)\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=regex)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    notes = merge.run(
        weights.checkpoint,
        tmp_path / "merged",
        merge.Params(str(tmp_path / "adapter"), alpha=alpha),
    )
    assert notes["check_written"]["max_abs_error"] < 1e-4
    done = CanonicalWeights(open_checkpoint(tmp_path / "merged"))
    assert done.vision == weights.vision
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    for name in weights.parts:
        if name.startswith("vision.") and weights.parts[name].kind == "matrix":
            assert torch.equal(done.matrix(name).dense(), weights.matrix(name).dense())
    # What the merge should give for an image, from the base's weights and the adapter's product
    # alone.
    tensors = dict(wrapped.named_parameters())
    for n in range(weights.decoder.layers):
        a, b = (
            next(
                t
                for name, t in tensors.items()
                if f"layers.{n}.mlp.down_proj.lora_{side}" in name and "visual" not in name
            )
            for side in "AB"
        )
        scale = 8 / 4  # peft's default alpha over r
        right = weights.matrix(f"layers.{n}.down").dense() + alpha * scale * (b @ a).detach()
        assert (done.matrix(f"layers.{n}.down").dense() - right).abs().max() < 1e-5
    assert np.abs(asked(tmp_path / "merged") - asked(seeing)).max() > 1e-3


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_keeps_the_tower(seeing: Path, tmp_path: Path, method: str) -> None:
    from edgemed.steps import quantize

    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps(
                {
                    "id": n,
                    "text": (
                        f"patient {n} was given {n * 37 % 101} mg and improved after {n % 9} days"
                    ),
                }
            )
            + "\n"
            for n in range(40)
        )
    )
    (tmp_path / "packed").mkdir()
    source = CanonicalWeights(open_checkpoint(seeing))
    quantize.run(
        source.checkpoint,
        tmp_path / "packed",
        quantize.Params(
            method,
            bits=8,
            group=32,
            calibration=str(text) if method == "gptq" else None,
            samples=8,
            length=32,
        ),
    )
    done = CanonicalWeights(open_checkpoint(tmp_path / "packed"))
    assert done.vision == source.vision
    assert done.parts.keys() == source.parts.keys()
    for name, part in source.parts.items():
        if name.startswith("vision.") and part.kind == "matrix":
            assert torch.equal(
                done.matrix(name).dense(), source.matrix(name).dense().half().float()
            ), name
    assert "qweight" in str(sorted(done.checkpoint.tensors))
    assert not [
        key
        for key in done.checkpoint.tensors
        if key.endswith("qweight") and ("vis" in key or "projector" in key)
    ]
    assert (tmp_path / "packed" / "preprocessor_config.json").is_file()
    assert 0 < np.abs(asked(tmp_path / "packed") - asked(seeing)).mean() < 0.05
    pytest.importorskip("onnxruntime")
    engine = engine_of(tmp_path / "packed", "onnx", tmp_path / "engine")
    session = engine.open(1)
    vision_encoder = OnnxVisionEncoder(engine, 1)
    tokens, pictures = vision_encoder.see([5, 6, vision_encoder.v.token, 7, 8], [noise(5, 80, 60)])
    assert engine.precision == "int8 g32"
    assert (
        np.abs(
            session.prefill(tokens, every=True, pictures=pictures) - asked(tmp_path / "packed")
        ).mean()
        < 0.05
    )
    session.close()


# --- tokenizers, prompts, towers in a folder of their own


def sentencepiece(path: Path, prepend: bool = True) -> Any:
    """A tokenizer of Llama 2's kind: BPE over texts whose spaces are written as signs, unknown
    characters as bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    text = [
        f"USER: Is the {organ} of patient {n} enlarged? ASSISTANT: {'yes' if n % 2 else 'no'},"
        " it is."
        for n in range(40)
        for organ in ("liver", "heart", "lung")
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prepend else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCAB - 8,
            special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{n:02X}>" for n in range(200)]],
            limit_alphabet=40,
        ),
    )
    told = json.loads(tokenizer.to_str())
    told["added_tokens"] = told["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(told))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text("{}")
    return tokenizer


@pytest.mark.parametrize("prepend", [True, False])
def test_a_sentencepiece_tokenizer_in_gguf_is_the_checkpoints(
    model: tuple[Path, Any], tmp_path: Path, prepend: bool
) -> None:
    lib = pytest.importorskip("llama_cpp").llama_cpp
    from edgemed.gguf.llama_session import llama_library

    path = renamed(model[0], tmp_path / "model", ROOTS, authors_config(vocab_size=VOCAB))
    tokenizer = sentencepiece(path, prepend)
    # It has 200 of the 256 bytes: llama.cpp ends where a text has another.
    with pytest.raises(EdgemedError, match=r"no token for 45 of the bytes of texts \(<0xC8>"):
        engine_of(path, "llamacpp", tmp_path / "engine", type="f32")
    engine = engine_of(path, "llamacpp", tmp_path / "engine", type="f32", tokenizer="edgemed")
    llama_library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    loaded = lib.llama_model_load_from_file(str(engine.path / "model.gguf").encode(), params)
    found = (lib.llama_token * 256)()
    vocabulary = lib.llama_model_get_vocab(loaded)
    for text in (
        "Is the heart enlarged? yes",
        "USER: liver ASSISTANT: no,  it",
        "lung",
        " lung",
        "is &# it?",
        "\nIs the liver?",
    ):
        count = lib.llama_tokenize(
            vocabulary, text.encode(), len(text.encode()), found, 256, False, False
        )
        assert list(found[:count]) == tokenizer.encode(text, add_special_tokens=False).ids, text
    lib.llama_model_free(loaded)


def test_authors_layout_from_text_to_answer(model: tuple[Path, Any], tmp_path: Path) -> None:
    """Nothing in this layout has an image token: the prompt is split where an image stands, and
    both runtimes never look its id up.
    """
    path = renamed(model[0], tmp_path / "model", ROOTS, authors_config())
    tokenizer = sentencepiece(path)
    weights = CanonicalWeights(open_checkpoint(path))
    v = weights.vision
    assert (v.token, v.start, v.conversation, v.fit) == (VOCAB, (1,), "vicuna", "pad")
    text = FAMILY.chat("Is the liver enlarged?", 1, v.conversation)
    before, after = text.split("<image>")
    ids = prompt_tokens(tokenizer, text, v)
    assert ids == [1, *tokenizer.encode(before).ids, VOCAB, *tokenizer.encode(after).ids]
    source = TorchSession(weights)
    tokens, pictures = TorchVisionEncoder(weights).see(ids, [noise(3)])
    right = source.prefill(tokens, pictures=pictures)[-1].copy()
    # The vocabulary lacks bytes that llama.cpp's own programs need.
    gguf = {"type": "f32", "tokenizer": "edgemed"}
    for target, params in (("onnx", {"precision": "fp32"}), ("llamacpp", gguf)):
        engine = engine_of(path, target, tmp_path / target, **params)
        session = engine.open(1)
        vision_encoder = OnnxVisionEncoder(engine, 1)
        assert prompt_tokens(engine.tokenizer(), text, vision_encoder.v) == ids
        tokens, pictures = vision_encoder.see(ids, [noise(3)])
        assert np.abs(session.prefill(tokens, pictures=pictures)[-1] - right).max() < 5e-3
        session.close()


@pytest.mark.parametrize(
    ("config", "form", "text"),
    [
        (
            authors_config("llava_llama"),
            "vicuna",
            (
                "A chat between a curious user and an artificial intelligence assistant. The"
                " assistant gives helpful, detailed, and polite answers to the user's questions."
                " USER: <image>\nWhy? ASSISTANT:"
            ),
        ),
        (authors_config("llava_mistral"), "mistral", "[INST] <image>\nWhy? [/INST]"),
        (authors_config("llava_qwen2"), "huatuo", "<|user|>\n<image>\nWhy?\n<|assistant|>\n"),
        (
            authors_config("llava_qwen"),
            "chatml",
            (
                "<|im_start|>system\nYou are a helpful"
                " assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhy?<|im_end|>\n<|im_start|>assistant\n"
            ),
        ),
        (
            authors_config("llava_qwen", conversation="huatuo"),
            "huatuo",
            "<|user|>\n<image>\nWhy?\n<|assistant|>\n",
        ),
        (
            authors_config("llava_qwen", _name_or_path="x/HuatuoGPT-Vision-7B"),
            "huatuo",
            "<|user|>\n<image>\nWhy?\n<|assistant|>\n",
        ),
    ],
)
def test_conversation_forms(config: dict[str, Any], form: str, text: str) -> None:
    v = FAMILY.vision(config, {}, {})
    assert v.conversation == form
    assert FAMILY.chat(" Why?\n", 1, form) == text
    assert v.start == ((1,) if form in ("vicuna", "mistral") else ())
    assert FAMILY.chat("Why?", 3, form).count("<image>\n") == 3


def test_numbers_of_the_published_models() -> None:
    from edgemed.models.parameter_count import parameters
    from edgemed.planning.choices import vision_parameters
    from edgemed.planning.inspect import described, inspect

    weights = CanonicalWeights(described("huatuogpt-vision-7b"))
    # Qwen2-7B's 7,615,616,512, CLIP-ViT-L/14-336's 303,507,456 and the projector's 3584 * (1024 +
    # 1) + 3584 * (3584 + 1)
    assert parameters(weights) == 7_615_616_512 + 303_507_456 + 3584 * 1025 + 3584 * 3585
    v = weights.vision
    assert (v.layers, v.spare, (v.size // v.patch) ** 2) == (23, 1, 576)
    assert vision_parameters(weights) < 303_507_456 + 3584 * 4610
    assert inspect("random:llava")["family"] == "llava"
    # llava-hf/llava-1.5-7b-hf's config.json says of its text model only what differs from
    # LlamaConfig
    short = {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_config": FAMILY.reference_config["vision_config"],
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    }
    d = FAMILY.decoder(short, {})
    assert (d.hidden, d.layers, d.heads, d.kv_heads, d.ffn, d.vocab, d.context, d.eos) == (
        4096,
        32,
        32,
        32,
        11008,
        32064,
        4096,
        2,
    )


def test_a_sliding_window_bounds_the_context() -> None:
    assert FAMILY.decoder(authors_config("llava_mistral", sliding_window=96), {}).context == 96
    assert (
        FAMILY.decoder(authors_config("llava_mistral", sliding_window=None), {}).context == CONTEXT
    )


def test_a_tower_in_a_folder_of_its_own(model: tuple[Path, Any], tmp_path: Path) -> None:
    """The authors' LLaVA stores no tower and names CLIP on a hub: its folder may be put into the
    checkpoint's.
    """
    from safetensors.torch import load_file, save_file

    path = renamed(model[0], tmp_path / "model", ROOTS, authors_config())
    tensors = load_file(path / "model.safetensors")
    tower = {key: t for key, t in tensors.items() if "vision_tower" in key}
    save_file(
        {key: t for key, t in tensors.items() if key not in tower}, path / "model.safetensors"
    )
    right = asked(model[0])
    with pytest.raises(
        EdgemedError,
        match=(
            "has no vision tower .*config.json names openai/clip. Put that CLIP model's folder"
            " beside the weights and call it vision_tower"
        ),
    ):
        CanonicalWeights(open_checkpoint(path))
    (path / "vision_tower").mkdir()
    inside = {key.split("vision_tower.vision_tower.")[1]: t for key, t in tower.items()} | {
        "logit_scale": torch.ones(())
    }
    torch.save(inside, path / "vision_tower" / "pytorch_model.bin")
    (path / "vision_tower" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "size": 56, "crop_size": 56})
    )
    assert CanonicalWeights(open_checkpoint(path)).vision.mean == (0.5, 0.5, 0.5)
    assert "vision_tower/pytorch_model.bin" in open_checkpoint(path).hashes()
    (path / "vision_tower" / "preprocessor_config.json").unlink()
    config = authors_config(image_aspect_ratio="square")
    (path / "config.json").write_text(json.dumps(config))
    assert np.abs(asked(path) - right).max() < 1e-4


# --- what goes wrong


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear' is not supported"),
        (
            {"mm_vision_select_feature": "cls_patch"},
            "mm_vision_select_feature 'cls_patch' is not supported",
        ),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True is not supported"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' is not supported"),
        (
            {"mm_vision_select_layer": [-2, -5]},
            r"features of layer \[-2, -5\] of a tower of 24 are not supported",
        ),
        ({"mm_vision_select_layer": -30}, "features of layer -30"),
        ({"conversation": "plain"}, "conversation 'plain' is not known"),
        ({"hidden_size": None}, "hidden_size None"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(EdgemedError, match=said):
        FAMILY.vision(authors_config(**change), {}, {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_config": {"model_type": "gemma"}}, "a text model of type 'gemma' is not supported"),
        (
            {"vision_config": {"model_type": "siglip_vision_model"}},
            "a vision tower of type 'siglip_vision_model' is not supported",
        ),
        (
            {"vision_config": {**TINY_CLIP, "hidden_act": "relu"}},
            "hidden_act 'relu' of the vision tower",
        ),
        (
            {"vision_config": {**TINY_CLIP, "hidden_size": "64"}},
            "vision_config.hidden_size '64' is not a whole number",
        ),
        (
            {"vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy 'full' is not supported",
        ),
    ],
)
def test_configs_of_transformers_that_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(EdgemedError, match=said):
        FAMILY.vision({**FAMILY.reference_config, **change}, {}, {})


@pytest.mark.parametrize(
    ("preprocessor", "said"),
    [
        ({"resample": 2}, "resample 2"),
        ({"size": {"shortest_edge": 224}}, "size {'shortest_edge': 224}"),
        ({"crop_size": 224}, "crop_size 224"),
        ({"do_center_crop": False}, "do_center_crop false"),
        ({"size": {"longest_edge": 336}}, "size {'longest_edge': 336}"),
        ({"do_normalize": False}, "do_normalize False"),
    ],
)
def test_rules_of_resizing_that_are_refused(preprocessor: dict[str, Any], said: str) -> None:
    with pytest.raises(EdgemedError, match=f"preprocessor_config.json: {said} is not supported"):
        FAMILY.vision(FAMILY.reference_config, preprocessor, {})


def test_what_processor_config_says_comes_first(model: tuple[Path, Any], tmp_path: Path) -> None:
    path = renamed(model[0], tmp_path / "model", {})
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.1, 0.1]}))
    (path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_mean": [0.2, 0.2, 0.2]}, "patch_size": 14})
    )
    assert CanonicalWeights(open_checkpoint(path)).vision.mean == (0.2, 0.2, 0.2)
    (path / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert CanonicalWeights(open_checkpoint(path)).vision.mean == (0.1, 0.1, 0.1)
    (path / "processor_config.json").write_text("[]")
    with pytest.raises(EdgemedError, match="processor_config.json is not a JSON object"):
        CanonicalWeights(open_checkpoint(path))


def test_images_that_cannot_be_squared() -> None:
    v = FAMILY.vision(authors_config(), {}, {})
    with pytest.raises(EdgemedError, match="900 x 4 pixels is too narrow"):
        fitted_size(900, 4, v)
    with pytest.raises(
        EdgemedError,
        match=(
            "30000 x 200 pixels cannot be padded to a square. Reduce it below 20000 pixels a side"
        ),
    ):
        resized(Image.new("RGB", (30_000, 200)), v)


def test_images_and_places_must_agree(exact: tuple[Engine, Any, float], tmp_path: Path) -> None:
    from edgemed.api import PromptForm, stream

    engine, *_ = exact
    noise(1).save(tmp_path / "a.png")
    vision_encoder = OnnxVisionEncoder(engine, 1)
    session = engine.open(1)
    try:
        for ids, images in (([5, IMAGE, IMAGE], 1), ([5, 6], 1), ([5, IMAGE], 2)):
            with pytest.raises(
                EdgemedError, match=f"places for {ids.count(IMAGE)} images, {images} were given"
            ):
                vision_encoder.see(ids, [noise(1)] * images)
        with pytest.raises(EdgemedError, match="are 386 tokens long, 384 fit"):
            vision_encoder.see([5, *[IMAGE] * 24, 6], [noise(1)] * 24)
    finally:
        session.close()
    with pytest.raises(EdgemedError, match="places for 1 images, 0 were given"):
        list(stream(engine.path, "What is <image>?", Sampling(max_tokens=2)))
    with pytest.raises(EdgemedError, match="places for 2 images, 1 were given"):
        list(
            stream(
                engine.path, "What is <image>?", Sampling(max_tokens=2), images=[tmp_path / "a.png"]
            )
        )
    with pytest.raises(EdgemedError, match="family llava has no template 'reasoning'"):
        list(
            stream(
                engine.path,
                "What?",
                Sampling(max_tokens=2),
                images=[tmp_path / "a.png"],
                form=PromptForm("reasoning"),
            )
        )


def test_a_question_about_an_image_is_answered_as_its_source_does(
    exact: tuple[Engine, Any, float], model: tuple[Path, Any], tmp_path: Path
) -> None:
    from edgemed.api import stream
    from edgemed.evaluation.opened_model import evaluate_opened, open_source, start_engine
    from edgemed.evaluation.prompting import PromptSettings
    from edgemed.evaluation.task import questions

    for seed in (1, 2):
        noise(seed, 70, 50).save(tmp_path / f"{seed}.png")
    engine = exact[0]
    weights = CanonicalWeights(open_checkpoint(model[0]))
    tokens, pictures = TorchVisionEncoder(weights).see(
        prompt_tokens(engine.tokenizer(), FAMILY.chat("What?", 1, "vicuna"), weights.vision),
        [Image.open(tmp_path / "1.png")],
    )
    written = list(
        generate(TorchSession(weights), tokens, Sampling(max_tokens=8), frozenset({256}), pictures)
    )
    assert "".join(
        stream(engine.path, "What?", Sampling(max_tokens=8), images=[tmp_path / "1.png"])
    ) == engine.tokenizer().decode(written).rstrip("\ufffd")
    rows = [
        {
            "id": str(n),
            "image": f"{n % 2 + 1}.png",
            "question": "Which?",
            "options": ["A lung", "Heart"],
            "answer": 1,
            "kind": "o",
            "label": "l",
        }
        for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = questions(f"cells:{tmp_path / 'rows.jsonl'}")
    for settings in (PromptSettings(), PromptSettings("generated", rationale=2)):
        ours, theirs = (
            evaluate_opened(m, cells, "m", "k", "zero-shot", settings).items
            for m in (start_engine(engine, True, 1), open_source(weights.checkpoint, True))
        )
        assert [item.answer for item in ours] == [item.answer for item in theirs]
        assert all(
            np.allclose(one.scores, other.scores, atol=2e-2)
            for one, other in zip(ours, theirs, strict=True)
        )


def test_every_kind_of_image_file_becomes_features(
    exact: tuple[Engine, Any, float], tmp_path: Path
) -> None:
    from edgemed.vision.image_io import open_image

    vision_encoder = OnnxVisionEncoder(exact[0], 1)
    noise(1).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.linspace(1000, 3000, 400).astype(np.uint16).reshape(20, 20)).save(
        tmp_path / "deep.png"
    )
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    frames = [Image.new("P", (5, 5), shade) for shade in (10, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name in ("cmyk.jpg", "deep.png", "dot.png", "moving.gif"):
        found, grid = vision_encoder.features(open_image(tmp_path / name))
        assert found.shape == (16, 64)
        assert np.isfinite(found).all()
        assert grid == (4, 4)


def test_one_size_only(model: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(
        EdgemedError,
        match="reads images of 56 x 56 pixels and no others. Leave min_pixels and max_pixels out",
    ):
        engine_of(model[0], "onnx", tmp_path / "engine", precision="fp32", max_pixels=10_000)


def test_projector_trained_beside_an_adapter_is_not_lost(tmp_path: Path) -> None:
    from edgemed.steps import merge

    for name in ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(
        EdgemedError, match="non_lora_trainables.bin holds weights that peft does not know"
    ):
        merge.inputs(merge.Params(str(tmp_path)))
