"""Models that see as TensorRT engines, without TensorRT: tower, projector and decoder of the plain
dialect on ONNX Runtime against transformers and the torch source, every node against the parser
tables, and three plans built and run by the fake interface.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from conftest import cli, refused, tiny_config, tokens, write_tokenizer

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
Image = pytest.importorskip("PIL.Image")

from edgemed.artifacts import store
from edgemed.engines.engine import Engine, export, finish, open_engine
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling, generate
from edgemed.inference.session import ImageEmbeddings, Session
from edgemed.models.architecture import VisionConfig
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import TorchSession
from edgemed.models.weights import CanonicalWeights, Dense
from edgemed.onnx.vision_graph import build_vision
from edgemed.quantization.grids import rtn
from edgemed.targets import tensorrt as target
from edgemed.targets.tensorrt import PROFILES, Params
from edgemed.tensorrt.build import patch_range
from edgemed.tensorrt.dialect import PlainDialect
from edgemed.tensorrt.parser_check import check_graph, read_table
from edgemed.vision import torch_encoder
from edgemed.vision.preprocessing import fitted_size, most_features, patches, vision_of

TOKEN = 260
BEFORE = 262
AFTER = 263  # image, vision start and end in the tiny config
CONTEXT = 640
LIMITS = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 64, "context": CONTEXT}
SIZES = [(140, 84), (60, 60), (333, 200), (20, 90)]
TEXT = [5, 9, 77, 30]


def noise(width: int, height: int) -> Any:
    return Image.fromarray(
        np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


def prompt(images: int, start: int = 5) -> list[int]:
    """Text with a place for each image, and text behind the last."""
    return [start, 9, *[t for n in range(images) for t in (BEFORE, TOKEN, AFTER, 40 + n)], 77]


def error(found: np.ndarray, right: np.ndarray) -> float:
    """Relative, of the whole array."""
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny random Qwen2-VL saved by transformers, and the model itself."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("sees") / "model"
    config = transformers.AutoConfig.for_model(
        **tiny_config("qwen2_vl", max_position_embeddings=2048)
    )
    config.pad_token_id = None
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32
    ).eval()
    write_tokenizer(path)
    return path, model


@pytest.fixture(scope="module")
def engines(
    vision_model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Unbuilt engines."""
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = open_checkpoint(vision_model[0])
    kinds = {
        "fp32": Params(
            precision="fp32",
            tower="fp32",
            prefill=40,
            **LIMITS,
        ),
        "fp16": Params(precision="fp16", **LIMITS),
        "bf16": Params(precision="bf16", tower="bf16", **LIMITS),
        "int4": Params(
            precision="int4",
            group=32,
            activations="fp32",
            tower="int8",
            **LIMITS,
        ),
    }
    return {
        name: export(checkpoint, "tensorrt", params, folder / name).path
        for name, params in kinds.items()
    }


def theirs(
    model: Any, images: list[Any], ids: list[int], v: VisionConfig, new: int = 0
) -> tuple[np.ndarray, list[int]]:
    """transformers' logits [T, vocab] of a prompt whose image tokens stand once for each feature,
    and its greedy continuation.
    """
    found = [patches(image, v) for image in images]
    feeds = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": (torch.tensor([ids]) == TOKEN).long(),
    }
    if images:
        feeds |= {
            "pixel_values": torch.from_numpy(np.concatenate([f.pixels for f in found])),
            "image_grid_thw": torch.tensor([[1, f.rows, f.columns] for f in found]),
        }
    with torch.inference_mode():
        logits = model(**feeds).logits[0].numpy()
        greedy = (
            model.generate(
                **feeds, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(ids) :].tolist()
            if new
            else []
        )
    return logits, greedy


# --- tower and projector


@pytest.mark.parametrize(("kind", "bound"), [("fp32", 1e-4), ("fp16", 2e-3), ("bf16", 1e-2)])
def test_tower_and_projector_equal_transformers(
    engines: dict[str, Path], vision_model: tuple[Path, Any], kind: str, bound: float
) -> None:
    vision_encoder = open_engine(engines[kind]).open_vision(1)
    visual = vision_model[1].model.visual
    for size in SIZES:
        found = patches(noise(*size), vision_encoder.v)
        with torch.inference_mode():
            right = visual(
                torch.from_numpy(found.pixels),
                grid_thw=torch.tensor([[1, found.rows, found.columns]]),
            )
        ours = vision_encoder.run_tower(found)
        assert ours.shape == (len(found.pixels), 64), size
        assert error(ours, right.last_hidden_state.numpy()) < bound, size
        features, grid = vision_encoder.features(noise(*size))
        assert features.dtype == np.float32, size
        assert grid == (found.rows // 2, found.columns // 2), size
        assert error(features, right.pooler_output.numpy()) < bound, size
    vision_encoder.close()


class Rounded(CanonicalWeights):
    """What a decoder in int4 of 32 and a tower in int8, one scale per output, hold; tables, patches
    and output matrix stay float.
    """

    def matrix(self, name: str) -> Dense:
        matrix = super().matrix(name)
        if name in ("lm_head", "vision.patch"):
            return Dense(matrix.dense(), matrix.bias)
        bits, group = (8, matrix.dense().shape[1]) if name.startswith("vision.") else (4, 32)
        q, scale = rtn(matrix.dense(), bits, group)
        return Dense((q.float() - (1 << bits - 1)) * scale.repeat_interleave(group, 1), matrix.bias)


def test_int8_tower_carries_its_integers(
    engines: dict[str, Path], vision_model: tuple[Path, Any]
) -> None:
    vision_encoder = open_engine(engines["int4"]).open_vision(1)
    weights = Rounded(open_checkpoint(vision_model[0]))
    for size in SIZES[:2]:
        right = torch_encoder.features(weights, patches(noise(*size), vision_encoder.v))[
            "features"
        ].numpy()
        plain = torch_encoder.features(
            CanonicalWeights(weights.checkpoint), patches(noise(*size), vision_encoder.v)
        )["features"].numpy()
        found = vision_encoder.features(noise(*size))[0]
        assert error(found, right) < 5e-3 < error(plain, right)
        assert error(found, plain) < 0.1
    vision_encoder.close()


def clip_weights(layers: int = 3) -> tuple[Any, Any, VisionConfig]:
    """(a source of tensors under our names, transformers' tiny random CLIP tower, its Vision):
    learned positions, a class token, one size.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    projector = [torch.nn.Linear(48, 64), torch.nn.Linear(64, 64)]
    # LLaVA reads the layer before the last.
    v = VisionConfig(
        width=48,
        layers=layers - 1,
        heads=3,
        ffn=96,
        norm_eps=1e-5,
        activation="quick_gelu",
        patch=14,
        projector_hidden=64,
        token=9,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        size=56,
        pre_norm=True,
    )
    inside = {
        name.removeprefix("vision_model."): tensor.detach()
        for name, tensor in model.state_dict().items()
    }

    def dense(*names: str) -> Dense:
        return Dense(
            torch.cat([inside[f"{name}.weight"] for name in names]),
            torch.cat([inside[f"{name}.bias"] for name in names]),
        )

    def matrix(name: str) -> Dense:
        if name == "vision.patch":
            return Dense(inside["embeddings.patch_embedding.weight"].reshape(48, -1), None)
        if name.startswith("vision.projector"):
            linear = projector[name.endswith("second")]
            return Dense(linear.weight.detach(), linear.bias.detach())
        _, _, n, part = name.split(".")
        at = f"encoder.layers.{n}."
        return dense(
            *{
                "qkv": [f"{at}self_attn.{p}_proj" for p in "qkv"],
                "o": [f"{at}self_attn.out_proj"],
                "up": [f"{at}mlp.fc1"],
                "down": [f"{at}mlp.fc2"],
            }[part]
        )

    def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        module = (
            "pre_layrnorm"
            if name == "vision.pre_norm"
            else f"encoder.layers.{name.split('.')[2]}.layer_norm{1 if 'attn' in name else 2}"
        )
        return inside[f"{module}.weight"], inside[f"{module}.bias"]

    def table(name: str) -> torch.Tensor:
        return inside[
            (
                "embeddings.class_embedding"
                if name == "vision.class"
                else "embeddings.position_embedding.weight"
            )
        ]

    weights = SimpleNamespace(
        vision=v,
        require_vision=lambda: v,
        decoder=SimpleNamespace(hidden=64),
        matrix=matrix,
        norm=norm,
        table=table,
    )
    return (
        weights,
        SimpleNamespace(
            clip=model, projector=torch.nn.Sequential(projector[0], torch.nn.GELU(), projector[1])
        ),
        v,
    )


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("floats", "stream", "bound"), [("float32", "float32", 1e-4), ("float16", "float32", 5e-3)]
)
def test_a_clip_tower_equals_transformers(
    tmp_path: Path, profile: str, floats: Any, stream: str, bound: float
) -> None:
    weights, model, v = clip_weights()
    build_vision(weights, tmp_path, PlainDialect(None), floats, None, group=-1, stream=stream)
    found = patches(noise(80, 50), v)
    with torch.inference_mode():
        pixels = (
            torch.from_numpy(found.pixels)
            .reshape(4, 4, 3, 14, 14)
            .permute(2, 0, 3, 1, 4)
            .reshape(1, 3, 56, 56)
        )
        right = model.clip(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        right = {"tower": right.numpy(), "projector": model.projector(right).numpy()}
    feeds = {"pixels": found.pixels}
    for name in ("tower", "projector"):
        ours = ort.InferenceSession(
            str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"]
        ).run(None, feeds)[0]
        assert ours.shape == right[name].shape
        assert error(ours, right[name]) < bound
        assert not check_graph(tmp_path / f"{name}.onnx", read_table(PROFILES[profile]))["problems"]
        feeds = {"tower": ours}
    assert patch_range(v, 2048) == (16, 16, 16)


# --- the decoder: features and positions of three parts


def answers(
    session: Session, vision_encoder: Any, ids: list[int], images: list[Any], new: int
) -> tuple[list[int], np.ndarray, list[int]]:
    """(tokens, scores of all of them, greedy continuation) of a prompt with images, from the
    start.
    """
    seen, pictures = vision_encoder.see(ids, images)
    session.rewind(0)
    scores = session.prefill(seen, every=True, pictures=pictures).copy()
    session.rewind(0)
    return seen, scores, list(generate(session, seen, Sampling(max_tokens=new), pictures=pictures))


def test_unbuilt_engine_answers_as_transformers(
    engines: dict[str, Path], vision_model: tuple[Path, Any]
) -> None:
    engine = open_engine(engines["fp32"])
    vision_encoder = engine.open_vision(1)
    session = engine.open(1)
    for images in (
        [noise(*SIZES[0])],
        [noise(*SIZES[2])],
        [noise(*SIZES[3]), noise(*SIZES[1])],
        [],
    ):
        seen, scores, greedy = answers(session, vision_encoder, prompt(len(images)), images, 24)
        right, continued = theirs(vision_model[1], images, seen, vision_encoder.v, 24)
        assert np.abs(scores - right).max() < 1e-3, len(images)
        assert greedy == continued, len(images)
    session.close()


def asked_twice(session: Session, vision_encoder: Any) -> tuple[list[int], np.ndarray, np.ndarray]:
    """A question behind two images, and another after going back to the end of the second image;
    scores of the last tokens.
    """
    images = [noise(*SIZES[0]), noise(*SIZES[1])]
    seen, pictures = vision_encoder.see(prompt(2), images)
    session.rewind(0)
    first = session.prefill(
        [*seen, *TEXT],
        pictures=ImageEmbeddings(
            pictures.features,
            np.hstack(
                [
                    pictures.positions,
                    pictures.positions.max() + 1 + np.arange(4) + np.zeros((3, 1), int),
                ]
            ),
            TOKEN,
        ),
    )
    first = first[-1].copy()
    session.rewind(len(seen))
    second = [session.prefill(TEXT[::-1])[-1].copy(), session.step(3).copy()]
    return seen, first, np.array(second)


def test_second_question_after_going_back(
    engines: dict[str, Path], vision_model: tuple[Path, Any]
) -> None:
    engine = open_engine(engines["fp32"])
    vision_encoder = engine.open_vision(1)
    session = engine.open(1)
    seen, first, second = asked_twice(session, vision_encoder)
    images = [noise(*SIZES[0]), noise(*SIZES[1])]
    assert (
        np.abs(
            first - theirs(vision_model[1], images, [*seen, *TEXT], vision_encoder.v)[0][-1]
        ).max()
        < 1e-3
    )
    assert (
        np.abs(
            second
            - theirs(vision_model[1], images, [*seen, *TEXT[::-1], 3], vision_encoder.v)[0][-2:]
        ).max()
        < 1e-3
    )
    session.close()


def test_lower_precisions_stay_near(
    engines: dict[str, Path], vision_model: tuple[Path, Any]
) -> None:
    images = [noise(*SIZES[0]), noise(*SIZES[1])]
    weights = Rounded(open_checkpoint(vision_model[0]))
    for kind, bound in (("fp16", 0.06), ("bf16", 0.4)):
        engine = open_engine(engines[kind])
        vision_encoder = engine.open_vision(1)
        session = engine.open(1)
        seen, scores, _ = answers(session, vision_encoder, prompt(2), images, 1)
        right, _ = theirs(vision_model[1], images, seen, vision_encoder.v)
        assert np.abs(scores - right).max() < bound, kind
        session.close()
    engine = open_engine(engines["int4"])
    vision_encoder = engine.open_vision(1)
    session = engine.open(1)
    seen, scores, _ = answers(session, vision_encoder, prompt(2), images, 1)
    rounded = torch_encoder.TorchVisionEncoder(weights)
    rounded.v = vision_encoder.v
    source = TorchSession(weights)
    tokens_, pictures = rounded.see(prompt(2), images)
    right = source.prefill(tokens_, every=True, pictures=pictures)
    assert seen == tokens_
    assert (
        np.abs(scores - right).max()
        < 0.1
        < np.abs(scores - theirs(vision_model[1], images, seen, vision_encoder.v)[0]).max()
    )
    session.close()


# --- the parser tables


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("precision", "kind"), [("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("int4", "int8")]
)
def test_three_graphs_pass_every_table(
    vision_model: tuple[Path, Any], tmp_path: Path, profile: Any, precision: Any, kind: Any
) -> None:
    engine = export(
        open_checkpoint(vision_model[0]),
        "tensorrt",
        Params(profile, precision, 32, tower=kind, **LIMITS),
        tmp_path / "engine",
    )
    notes = store.read_manifest(engine.path)["notes"]
    assert notes["parser"]["dynamic_axes"] == ["features", "new", "past", "selected"]
    assert not notes["parser"]["problems"]
    for name in ("tower", "projector"):
        report = notes["vision_parser"][name]
        graph = onnx.load(engine.path / f"{name}.onnx", load_external_data=False)
        assert report["tensorrt"] == PROFILES[profile]
        assert report["opset"] == 20
        assert report["dynamic_axes"] == ["patches"]
        assert not report["problems"]
        assert {entry.domain for entry in graph.opset_import} == {""}
    inputs = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in onnx.load(engine.path / "model.onnx", load_external_data=False).graph.input
    }
    assert inputs["rope_positions"] == [3, "new"]
    assert inputs["features"] == ["features", 64]
    assert inputs["feature_rows"] == [1, "new"]
    sizes = notes["expected_bytes"]
    weights = {
        name: sum(f.stat().st_size for f in engine.path.glob(f"{name}.onnx*"))
        for name in ("model", "tower", "projector")
    }
    assert sum(weights.values()) <= sizes["plan"] < 1.1 * sum(weights.values())
    assert sizes["build_memory"] == 3 * max(weights.values()) + 1024 * 10**6
    # 64 features at most in a square, 113 in the narrowest image; 4 patches each, 2 heads, 8 bytes
    # a score.
    assert sizes["tower_attention"] == 8 * 2 * (4 * 113) ** 2
    assert notes["tower_bytes"] > 0


def test_norms_and_softmax_are_float32(engines: dict[str, Path]) -> None:
    model = onnx.shape_inference.infer_shapes(
        onnx.load(engines["fp16"] / "tower.onnx", load_external_data=False), strict_mode=True
    )
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)
    }
    for op, kind in (("LayerNormalization", 1), ("Softmax", 1), ("MatMul", 10)):
        kinds = {types[node.input[0]] for node in model.graph.node if node.op_type == op}
        assert kinds == {kind}, op


def test_a_problem_names_its_graph(
    vision_model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemed.tensorrt import parser_check

    table = read_table("10.3")
    # Each of these operators is in one graph alone: the decoder has RMS norms, and only the
    # projector an exact Gelu.
    for op, graph in (("Where", "model"), ("LayerNormalization", "tower"), ("Gelu", "projector")):
        lacking = replace(
            table, operators={**table.operators, op: {**table.operators[op], "types": []}}
        )
        monkeypatch.setattr(parser_check, "read_table", lambda version, lacking=lacking: lacking)
        with pytest.raises(
            EdgemedError,
            match=rf"TensorRT 10.3 would not parse {graph}.onnx: .*operator {op} is not parsed",
        ):
            export(
                open_checkpoint(vision_model[0]), "tensorrt", Params(**LIMITS), tmp_path / "engine"
            )
        assert not (tmp_path / "engine").exists()


# --- three plans


def built(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **machine: Any
) -> tuple[Any, Engine]:
    here = fake_tensorrt.install(monkeypatch, **machine)
    engine = open_engine(shutil.copytree(engines["fp32"], tmp_path / "engine"))
    finish(engine, 300)
    return here, open_engine(engine.path, check=True)


def test_three_plans_are_built(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, engine = built(engines, tmp_path, monkeypatch)
    plan = store.read_manifest(engine.path / "on-device" / "plan")
    assert sorted(plan["files"]) == ["model.plan", "projector.plan", "tower.plan"]
    assert set(plan["notes"]["seconds_by_graph"]) == {"model", "tower", "projector"}
    assert [entry for entry in here.log if entry[0] == "network"] == [("network", 2)] * 3, (
        "strongly typed"
    )
    # One timing cache: what the first network's kernels took is there for the others.
    assert [entry[1] for entry in here.log if entry[0] == "timing cache"] == [
        b"",
        b"timings",
        b"timings",
    ]
    decoder, vision_encoder, projector = (entry[1] for entry in here.log if entry[0] == "profiles")
    assert decoder[0]["features"] == ((40, 64),) * 3
    assert decoder[1]["features"] == ((1, 64),) * 3
    assert decoder[0]["rope_positions"] == ((3, 1), (3, 40), (3, 40))
    assert decoder[1]["feature_rows"] == ((1, 1),) * 3
    assert vision_encoder == [
        {
            "pixels": ((4, 1176), (256, 1176), (452, 1176)),
            **dict.fromkeys(("cos", "sin"), ((4, 16), (256, 16), (452, 16))),
        }
    ]
    assert projector == [{"tower": ((4, 64), (256, 64), (452, 64))}]
    assert not engine.emulation
    assert [
        f.name
        for f in (engine.path / "on-device").iterdir()
        if f.is_file() and "timing" not in f.name
    ] == []


def test_built_engine_sees_and_answers_as_transformers(
    engines: dict[str, Path],
    vision_model: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, engine = built(engines, tmp_path, monkeypatch)
    vision_encoder = engine.open_vision()
    session = engine.open()
    assert type(vision_encoder.graphs).__name__ == "TensorRTVisionGraphs"
    # 60 and 15 features: both run across parts of 40 tokens
    images = [noise(*SIZES[2]), noise(*SIZES[0])]
    for shown in (images, images[1:], []):
        seen, scores, greedy = answers(session, vision_encoder, prompt(len(shown)), shown, 30)
        right, continued = theirs(vision_model[1], shown, seen, vision_encoder.v, 30)
        assert np.abs(scores - right).max() < 1e-3
        assert greedy == continued
    assert {
        entry[2]
        for entry in here.log
        if entry[0] == "execute" and entry[2] in ("tower", "projector")
    } == {"tower", "projector"}
    seen, first, second = asked_twice(session, vision_encoder)
    shown = [noise(*SIZES[0]), noise(*SIZES[1])]
    assert (
        np.abs(
            first - theirs(vision_model[1], shown, [*seen, *TEXT], vision_encoder.v)[0][-1]
        ).max()
        < 1e-3
    )
    assert (
        np.abs(
            second
            - theirs(vision_model[1], shown, [*seen, *TEXT[::-1], 3], vision_encoder.v)[0][-2:]
        ).max()
        < 1e-3
    )
    # An image whose last feature is the only token of its part is read by the decode profile.
    seen, pictures = vision_encoder.see([5, BEFORE, TOKEN], [noise(*SIZES[0])])
    session.rewind(0)
    alone = ImageEmbeddings(pictures.features[:-1], pictures.positions[:, :-1], TOKEN)
    session.prefill(seen[:-1], pictures=alone)
    last = ImageEmbeddings(
        pictures.features[-1:],
        pictures.positions[:, -1:] - pictures.positions[:, :-1].max() - 1,
        TOKEN,
    )
    source = TorchSession(CanonicalWeights(open_checkpoint(vision_model[0])))
    source.prefill(seen[:-1], pictures=alone)
    assert (
        np.abs(
            session.prefill(seen[-1:], pictures=last)[0]
            - source.prefill(seen[-1:], pictures=last)[0]
        ).max()
        < 1e-3
    )
    session.close()
    vision_encoder.close()
    assert not here.driver.blocks, "everything is given back"


def test_build_verb_finishes_and_verifies_what_it_sees(
    vision_model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemed import api
    from edgemed.engines.image_reference import make_image_reference
    from edgemed.engines.reference import make_reference

    fake_tensorrt.install(monkeypatch)
    weights = CanonicalWeights(open_checkpoint(vision_model[0]))
    params = Params(precision="fp32", tower="fp32", **LIMITS)
    v = target.limited_vision(weights, params)

    def look(image: Any) -> tuple[Any, np.ndarray, np.ndarray]:
        found = patches(image, v)
        return found, *(
            torch_encoder.features(weights, found)[part].numpy() for part in ("tower", "features")
        )

    images = make_image_reference(
        TorchSession(weights),
        look,
        [(prompt(1), np.asarray(noise(*size))) for size in SIZES[:2]],
        4,
        v,
        3,
    )
    reference = replace(
        make_reference(TorchSession(weights), np.array([tokens(32, seed=3)]), 8, 4), images=images
    )
    engine = export(weights.checkpoint, "tensorrt", params, tmp_path / "engine", reference)
    found = api.build(engine.path, measure=False)
    assert found.verify.passed
    assert found.verify.ran_on == "tensorrt"
    assert len(found.plan["files"]) == 3
    stages = {stage.stage: stage for stage in found.verify.stages}
    assert {"pixels", "tower", "projector"} < set(stages)
    assert all(stage.passed for stage in stages.values())
    assert 0 < stages["tower"].error < 1e-4


@pytest.mark.parametrize("at", ["tower", "projector"])
def test_an_interrupted_build_leaves_nothing(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    from edgemed.tensorrt import build

    fake_tensorrt.install(monkeypatch)
    engine = open_engine(shutil.copytree(engines["fp32"], tmp_path / "engine"))
    whole = build.serialized

    def stopped(trt: Any, engine: Engine, name: str, *rest: Any) -> Any:
        if name == at:
            raise KeyboardInterrupt
        return whole(trt, engine, name, *rest)

    monkeypatch.setattr(build, "serialized", stopped)
    with pytest.raises(KeyboardInterrupt):
        finish(engine, 300)
    left = sorted(
        f.name for f in (engine.path / "on-device").iterdir() if not f.name.endswith(".lock")
    )
    assert left == ["timing-10.3.0.30-8.7.cache"], "kernel timings are kept, and whole"
    assert engine.emulation, "kernel timings are kept, and whole"
    monkeypatch.setattr(build, "serialized", whole)
    finish(engine, 300)
    assert not engine.emulation


def test_a_missing_or_foreign_plan(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = built(engines, tmp_path, monkeypatch)
    (engine.path / "on-device" / "plan" / "tower.plan").unlink()
    with pytest.raises(EdgemedError, match="tower.plan is missing"):
        open_engine(engine.path, check=True)
    with pytest.raises(EdgemedError, match="tower.plan is missing. Remove .* edgemed build"):
        engine.open_vision()
    fake_tensorrt.install(monkeypatch, gpu="Thor", capability=(11, 0))
    with pytest.raises(EdgemedError, match="was built for Orin"):
        engine.open_vision()


def test_memory_of_the_tower_is_said(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, engine = built(engines, tmp_path, monkeypatch)
    here.driver.memory = here.driver.used + 1_500_000
    with pytest.raises(
        EdgemedError, match=r"images and activations of the tower need \d.\d MB of GPU memory"
    ):
        engine.open_vision()
    here.driver.memory = 1 << 30
    shutil.rmtree(engine.path / "on-device" / "plan")
    monkeypatch.setattr("edgemed.tensorrt.build.score_bytes", lambda v, context: 2 << 30)
    with pytest.raises(
        EdgemedError,
        match=r"building tower.onnx needs about 28\d\d MB of GPU memory.*fewer max_pixels",
    ):
        finish(engine, 300)


def test_a_bf16_tower_before_ampere(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(monkeypatch, gpu="Tesla T4", capability=(7, 5))
    path = shutil.copytree(engines["fp16"], tmp_path / "engine")
    with pytest.raises(EdgemedError, match="has no bfloat16"):
        finish(replace(open_engine(path), params={**open_engine(path).params, "tower": "bf16"}))


# --- sizes of images


def test_no_image_becomes_more_features_than_expected() -> None:
    v = VisionConfig(
        width=32,
        layers=1,
        heads=2,
        ffn=64,
        norm_eps=1e-6,
        activation="gelu",
        patch=14,
        projector_hidden=128,
        token=9,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        temporal=2,
        merge=2,
        frequencies=(1.0,),
    )
    random = np.random.default_rng(0)
    for least, most in (
        (0, 3136),
        (3136, 3136),
        (3136, 12544),
        (50176, 1003520),
        (784 * 300, 784 * 320),
    ):
        v = replace(v, pixels=(least, most))
        low, usual, high = patch_range(v, 10**6)
        assert low <= usual <= high == 4 * most_features(v)
        largest = 0
        for _ in range(3000):
            short = int(random.integers(1, 400))
            size = (short, int(min(short * 200, short * np.exp(random.uniform(0, np.log(200))))))
            width, height = fitted_size(*size, v)
            largest = max(largest, width * height // 784)
        for size in [(n, 200 * n) for n in range(1, 60)]:
            width, height = fitted_size(*size, v)
            largest = max(largest, width * height // 784)
        assert 0.5 * most_features(v) < largest <= most_features(v), (least, most)


# --- bad input


def test_images_meet_an_engine_that_reads_text(
    model: Path, vision_model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(monkeypatch)
    engine = export(
        open_checkpoint(model), "tensorrt", Params(precision="fp32"), tmp_path / "engine"
    )
    with pytest.raises(EdgemedError, match="reads text only"):
        engine.open_vision()
    pictures = ImageEmbeddings(np.zeros((1, 64), np.float32), np.arange(3)[None], 7)
    unbuilt = engine.open(1)
    finish(engine, 300)
    for session in (unbuilt, engine.open()):
        with pytest.raises(EdgemedError, match="this engine reads text only"):
            session.prefill([1, 7, 2], pictures=pictures)
        session.close()


@pytest.mark.parametrize("kind", ["stand-in", "plan"])
def test_images_that_do_not_fit(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _, engine = (
        built(engines, tmp_path, monkeypatch)
        if kind == "plan"
        else (None, open_engine(engines["fp32"]))
    )
    vision_encoder = engine.open_vision(1)
    session = engine.open(1)
    with pytest.raises(EdgemedError, match="places for 1 images, 2 were given"):
        vision_encoder.see(prompt(1), [noise(60, 60)] * 2)
    seen, pictures = vision_encoder.see(prompt(1), [noise(60, 60)])
    with pytest.raises(EdgemedError, match="has room for 5 image features, the images have 4"):
        session.prefill([*seen, TOKEN], pictures=pictures)
    with pytest.raises(EdgemedError, match=r"prompt and images are \d+ tokens long, 640 fit"):
        vision_encoder.see(prompt(12), [noise(333, 200)] * 12)
    assert session.position == 0
    if kind == "plan":
        v = vision_of(engine.vision)
        vision_encoder.v = replace(v, pixels=(v.pixels[0], 10**7))
        with pytest.raises(
            EdgemedError,
            match=(
                r"this image becomes \d+ tokens, and this engine's plan takes 113. Export with"
                r" fewer max_pixels"
            ),
        ):
            vision_encoder.see(prompt(1), [noise(1000, 1000)])
    session.close()


def test_an_image_token_may_lie_outside_the_vocabulary(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = built(engines, tmp_path, monkeypatch)
    emulation = open_engine(engines["fp32"])
    vision_encoder = emulation.open_vision(1)
    found = []
    seen, pictures = vision_encoder.see(prompt(1), [noise(60, 60)])
    for session in (emulation.open(1), engine.open()):
        for token in (TOKEN, -200):
            session.rewind(0)
            found.append(
                session.prefill(
                    [token if t == TOKEN else t for t in seen],
                    pictures=replace(pictures, token=token),
                )[-1].copy()
            )
        session.close()
    assert np.abs(np.array(found) - found[0]).max() < 1e-5


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"max_pixels": 100, "min_pixels": 4000}, "min_pixels 4000 is above max_pixels 100"),
        (
            {"context": 100, "min_pixels": 784 * 200, "max_pixels": 784 * 300},
            (
                "an image becomes at least 200 tokens, context 100 holds none; choose a longer"
                " context or fewer min_pixels"
            ),
        ),
        ({"max_pixels": 20_000_000}, r"images of 20000000 pixels make 8192 patches"),
    ],
)
def test_limits_it_cannot_keep(
    vision_model: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    params: dict[str, int],
    said: str,
) -> None:
    monkeypatch.setattr(target, "SCORES", 10**9)
    with pytest.raises(EdgemedError, match=said):
        export(open_checkpoint(vision_model[0]), "tensorrt", Params(**params), tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_generate_with_an_image_names_the_build(engines: dict[str, Path], tmp_path: Path) -> None:
    noise(60, 60).save(tmp_path / "a.png")
    refused(
        cli("generate", engines["fp32"], "--prompt", "a", "--image", tmp_path / "a.png"),
        "is unbuilt",
        f"edgemed build {engines['fp32']}",
    )


def test_text_alone_costs_no_features(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, engine = built(engines, tmp_path, monkeypatch)
    session = engine.open()
    session.prefill(tokens(30, seed=1))
    here.driver.calls.clear()
    for _ in range(5):
        session.step(5)
    assert here.driver.calls.count("cuMemcpyHtoDAsync_v2") == 5
    assert here.driver.calls.count("cuMemcpy2DAsync_v2") == 5
    session.close()
