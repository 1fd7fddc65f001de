"""Mixtures of experts: one layer against the authors' vectors, whole models against transformers'
layers with the papers' formula, and damaged checkpoints.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calibration_texts import dose_texts
from conftest import ROOT, VOCAB, rewrite, tiny_config, tokens
from moe_models import MODELS, reference, write

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnx")

import onnx

from edgemed import params as strict
from edgemed import plugins
from edgemed.engines.engine import Engine, export
from edgemed.errors import EdgemedError
from edgemed.inference.decoding import Sampling, generate
from edgemed.models import parameter_count
from edgemed.models.architecture import DecoderConfig, ExpertsConfig
from edgemed.models.checkpoint import Checkpoint, open_checkpoint
from edgemed.models.torch_decoder import TorchSession, logits, mlp
from edgemed.models.weights import CanonicalWeights
from edgemed.onnx.ort_cpu_types import nested
from edgemed.onnx.vision_encoder import OnnxVisionEncoder
from edgemed.planning import inspect
from edgemed.quantization.importance_matrix import importance
from edgemed.steps import quantize
from edgemed.vision.torch_encoder import TorchVisionEncoder

ORACLES = ROOT / "tests" / "data" / "moe"
IDS = tokens(40)


@pytest.mark.parametrize("base", ["stablelm", "phi"])
@pytest.mark.parametrize("meta", [False, True])
def test_one_layer_gives_the_authors_vectors(base: str, meta: bool) -> None:
    from safetensors.torch import load_file

    stored = load_file(ORACLES / f"moe_{base}_{'medmoe' if meta else 'tinymed'}.safetensors")
    experts = ExpertsConfig(
        4,
        1 if meta else 2,
        (0,),
        renormalised=not meta,
        shared=meta,
        router_bias=meta,
    )
    gated = base == "stablelm"
    d = DecoderConfig(
        64,
        1,
        1,
        1,
        64,
        128,
        8,
        8,
        1e-5,
        (1.0,),
        activation="silu" if gated else "gelu_tanh",
        gated=gated,
        experts=experts,
    )

    def matrix(at: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        modules = (
            [at.replace("up", "gate_proj"), at.replace("up", "up_proj")]
            if gated and at.endswith("up")
            else [at.replace("down", "down_proj")]
            if gated
            else [at.replace("up", "fc1").replace("down", "fc2")]
        )
        return torch.cat([stored[f"{m}.weight"] for m in modules]), stored.get(f"{modules[0]}.bias")

    def place(name: str) -> str:
        return name.replace("experts.", "mlp.deepspeed_moe.experts.deepspeed_experts.").replace(
            "shared.", "mlp.meta_moe."
        )

    layer = {name: matrix(place(name)) for name in d.matrices(0)[2:]} | {
        "router": (
            stored["mlp.deepspeed_moe.gate.wg.weight"],
            stored.get("mlp.deepspeed_moe.gate.wg.bias"),
        )
    }
    computed: list[tuple[str, int]] = []

    def product(layer, name, x):
        computed.append((name, len(x)))
        return torch.nn.functional.linear(x, *layer[name])

    found = mlp(d, layer, 0, stored["input"], product)
    assert (found - stored["output"]).abs().max() < 1e-5
    work = sum(
        rows for name, rows in computed if name.startswith("experts.") and name.endswith("up")
    )
    assert work == 600 * experts.active, "every token passes the experts it chose and no other"


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference(name: str, tmp_path: Path) -> None:
    base, meta = MODELS[name]
    path = write(tmp_path / "model", name)
    with torch.inference_mode():
        right = reference(path, json.loads((path / "config.json").read_text()), base)(
            input_ids=torch.tensor([IDS])
        ).logits[0]
    weights = CanonicalWeights(open_checkpoint(path))
    d = weights.decoder
    assert d.experts == ExpertsConfig(4, 1 if meta else 2, (0, 2), not meta, meta, meta)
    assert d.parallel == (base == "Phi")
    assert (logits(weights, torch.tensor([IDS]))[0] - right).abs().max() < 1e-4
    session = TorchSession(weights)
    assert np.abs(session.prefill(IDS[:30], every=True) - right[:30].numpy()).max() < 1e-4
    assert np.abs(session.step(IDS[30]) - right[30].numpy()).max() < 1e-4
    used = {
        tensor
        for part, keys in weights.keys.items()
        for key in keys
        for tensor in (weights.parts[part].weight(key), f"{key}.bias")
    }
    assert set(weights.checkpoint.tensors) <= used, "stored and never read"


@pytest.mark.parametrize(
    ("kind", "name"), [("llava_stablelm", "moe-tinymed"), ("llava_phi", "moe-tinymed-phi")]
)
def test_a_model_without_experts(kind: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model", name, model_type=kind)
    assert not any("deepspeed" in key for key in open_checkpoint(path).tensors)
    assert CanonicalWeights(open_checkpoint(path)).decoder.experts is None
    with torch.inference_mode():
        right = reference(path, json.loads((path / "config.json").read_text()), MODELS[name][0])(
            input_ids=torch.tensor([IDS])
        ).logits[0]
    assert (
        logits(CanonicalWeights(open_checkpoint(path)), torch.tensor([IDS]))[0] - right
    ).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "billions"),
    [("moe-tinymed", 3.20), ("med-moe", 3.62), ("moe-tinymed-phi", 5.61), ("med-moe-phi", 6.45)],
)
def test_published_sizes(name: str, billions: float) -> None:
    found = inspect.inspect(f"random:{name}")
    assert round(found["parameters"] / 1e9, 2) == billions
    assert found["architecture"]["experts"]["count"] == 4
    d = inspect.dimensions(CanonicalWeights(inspect.described(name)))
    weights = sum(
        weight
        for part, (kind, weight, _) in parameter_count.sizes(
            CanonicalWeights(inspect.described(name))
        ).items()
        if part.startswith("layers.") and kind in ("matrix", "router")
    )
    assert d.matrices + d.expert_layers * d.experts * d.expert == weights
    assert d.active == (1 if name.startswith("med") else 2)


def test_image_features_equal_transformers(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from edgemed.vision.preprocessing import Patches
    from edgemed.vision.torch_encoder import features

    path = write(
        tmp_path / "model", "moe-tinymed", mm_image_tower="/nowhere/clip", image_aspect_ratio="pad"
    )
    weights = CanonicalWeights(open_checkpoint(path))
    v = weights.vision
    read = weights.checkpoint.read
    tower = CLIPVisionModel(CLIPVisionConfig(**tiny_config("moe-tinymed")["vision_config"])).eval()
    state = {
        key: read(f"model.image_tower.image_tower.vision_model.{key.removeprefix('vision_model.')}")
        for key in tower.state_dict()
        if not key.endswith("position_ids")
    }
    tower.load_state_dict(state, strict=False)
    pixels = torch.randn(1, 3, v.size, v.size, generator=torch.Generator().manual_seed(0))
    cut = (
        pixels.reshape(3, v.size // v.patch, v.patch, v.size // v.patch, v.patch)
        .permute(1, 3, 0, 2, 4)
        .reshape(-1, v.patch_size)
    )
    with torch.inference_mode():
        seen = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        projected = seen
        for n in (0, 2):
            at = f"model.mm_projector.image_spatial_proj.{n}"
            projected = torch.nn.functional.linear(
                projected if n == 0 else torch.nn.functional.gelu(projected),
                read(f"{at}.weight"),
                read(f"{at}.bias"),
            )
    side = v.size // v.patch
    assert (
        features(weights, Patches(cut.numpy(), side, side))["features"] - projected
    ).abs().max() < 1e-4
    assert (v.token, v.fit, v.marker) == (VOCAB, "pad", "<image>")
    assert weights.family.chat("Is it normal?", 1, v.conversation).endswith(
        "answers to the user's questions. USER: <image>\nIs it normal? ASSISTANT:"
    )


# --- damaged checkpoints

MOE = "model.layers.{}.mlp.deepspeed_moe."


@pytest.fixture(scope="module")
def tinymed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("moe") / "model", "moe-tinymed")


@pytest.fixture(scope="module")
def medmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("meta") / "model", "med-moe")


def refused(path: Path, *named: str) -> None:
    with pytest.raises(EdgemedError) as error:
        CanonicalWeights(open_checkpoint(path))
    assert "\n" not in str(error.value), str(error.value)
    assert all(name in str(error.value) for name in named), str(error.value)


def without(*parts: str):
    return lambda tensors: {
        key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)
    }


def test_missing_experts(tinymed: Path, tmp_path: Path) -> None:
    refused(
        rewrite(tinymed, tmp_path / "all", without(MOE.format(2))),
        "layer 2 has none of the experts",
        "config.json says it does",
    )
    refused(
        rewrite(tinymed, tmp_path / "one", without(f"{MOE.format(2)}experts.deepspeed_experts.1.")),
        "layer 2 misses expert 1",
        "says 4",
    )
    refused(
        rewrite(
            tinymed,
            tmp_path / "half",
            without(f"{MOE.format(2)}experts.deepspeed_experts.3.up_proj"),
        ),
        "deepspeed_experts.3.up_proj.weight' (layers.2.experts.3.up) is missing",
    )


def test_another_number_of_experts(tinymed: Path, tmp_path: Path) -> None:
    at = f"{MOE.format(0)}experts.deepspeed_experts."
    refused(
        rewrite(
            tinymed,
            tmp_path / "more",
            lambda t: (
                t
                | {key.replace(f"{at}3", f"{at}4"): t[key].clone() for key in t if f"{at}3" in key}
            ),
        ),
        "layer 0 has 5 experts",
        "says 4",
    )
    config = json.loads((tinymed / "config.json").read_text())
    for changed, named in (
        ({"num_experts": [3]}, "layer 0 has 4 experts, config.json says 3"),
        ({"num_experts": [4, 2]}, "moe.num_experts [4, 2]"),
        ({"top_k_experts": 5}, "moe.top_k_experts 5 of 4 experts"),
        ({"moe_layers_idx": [0]}, "layer 2 has experts, config.json says it does not"),
        ({"moe_layers_idx": [0, 9]}, "[0, 9] of a model of 3 layers"),
        ({"use_residual": True}, "use_residual"),
    ):
        path = rewrite(tinymed, tmp_path / str(len(list(tmp_path.iterdir()))), lambda t: t)
        (path / "config.json").write_text(json.dumps(config | {"moe": config["moe"] | changed}))
        refused(path, named)


def test_a_router_of_the_wrong_width(tinymed: Path, tmp_path: Path) -> None:
    key = f"{MOE.format(2)}gate.wg.weight"
    refused(
        rewrite(tinymed, tmp_path / "router", lambda t: t | {key: t[key][:3]}),
        key,
        "has shape [3, 64], config.json asks for [4, 64]",
    )


def test_mixed_variants(tinymed: Path, medmoe: Path, tmp_path: Path) -> None:
    refused(
        rewrite(medmoe, tmp_path / "meta", without("model.layers.2.mlp.meta_moe.")),
        "mixes two architectures",
        "layer 0 has",
        "layer 2 has not both",
    )
    refused(rewrite(medmoe, tmp_path / "bias", without(".gate.wg.bias")), "mixes two architectures")
    refused(
        rewrite(
            tinymed,
            tmp_path / "router",
            lambda t: t | {f"{MOE.format(0)}gate.wg.bias": torch.zeros(4)},
        ),
        "mixes two architectures",
    )


EXPERT = f"{MOE.format(2)}experts.deepspeed_experts."


def test_an_expert_of_another_size(tinymed: Path, tmp_path: Path) -> None:
    narrow = {"up_proj": 0, "gate_proj": 0, "down_proj": 1}
    path = rewrite(
        tinymed,
        tmp_path / "size",
        lambda t: (
            t
            | {
                f"{EXPERT}1.{m}.weight": t[f"{EXPERT}1.{m}.weight"].narrow(axis, 0, 96).clone()
                for m, axis in narrow.items()
            }
        ),
    )
    refused(path, "layer 2, expert 1", "is float32 [64, 96], the other experts' float32 [64, 128]")


def test_an_expert_of_another_format_or_without_its_bias(tinymed: Path, tmp_path: Path) -> None:
    path = rewrite(
        tinymed,
        tmp_path / "half",
        lambda t: t | {f"{EXPERT}3.up_proj.weight": t[f"{EXPERT}3.up_proj.weight"].half()},
    )
    refused(
        path,
        "layer 2, expert 3",
        f"'{EXPERT}3.up_proj.weight' is float16 [128, 64], the other experts' float32 [128, 64]",
    )
    phi = write(tmp_path / "phi", "moe-tinymed-phi")
    refused(
        rewrite(phi, tmp_path / "bias", without(f"{EXPERT}0.fc1.bias")),
        "layer 2, expert 0",
        "fc1.weight' has no bias, the other experts' a bias",
    )


def test_experts_in_files_that_name_different_bases(tinymed: Path, tmp_path: Path) -> None:
    """Shards as a merge of several models leaves them; the same names, no names, and names of files
    without experts are all let through.
    """
    import shutil

    from safetensors.torch import load_file, save_file

    def sharded(name: str, bases: dict[str, str | None]) -> Path:
        path = tmp_path / name
        stored = load_file(tinymed / "model.safetensors")
        places = {}
        shutil.copytree(tinymed, path, ignore=shutil.ignore_patterns("*.safetensors"))
        for key in stored:
            expert = (
                key.split("deepspeed_experts.")[1][0] if "deepspeed_experts." in key else "rest"
            )
            places.setdefault(f"{expert}.safetensors", []).append(key)
        for file, held in places.items():
            base = bases.get(file.removesuffix(".safetensors"))
            save_file(
                {key: stored[key] for key in held},
                path / file,
                metadata={"format": "pt"} | ({"base_model": base} if base else {}),
            )
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {key: file for file, held in places.items() for key in held}})
        )
        return path

    for name, bases in (
        ("none", {}),
        ("one", {"1": "phi-2"}),
        ("same", dict.fromkeys("0123", "phi-2")),
        ("rest", {**dict.fromkeys("0123", "phi-2"), "rest": "clip"}),
    ):
        assert CanonicalWeights(open_checkpoint(sharded(name, bases))).decoder.experts.count == 4
    refused(
        sharded("other", {**dict.fromkeys("013", "stablelm-2-1_6b"), "2": "phi-2"}),
        "layer 0, expert 2",
        "is made from phi-2, the other experts' stablelm-2-1_6b",
    )


def test_nan_in_one_expert(tinymed: Path, tmp_path: Path) -> None:
    key = f"{MOE.format(2)}experts.deepspeed_experts.1.up_proj.weight"
    path = rewrite(
        tinymed, tmp_path / "nan", lambda t: t | {key: torch.full_like(t[key], float("nan"))}
    )
    with pytest.raises(
        EdgemedError,
        match=r"model\.layers\.2\.mlp\..*deepspeed_experts\.1\.up_proj\.weight' holds 8192 NaN",
    ):
        logits(CanonicalWeights(open_checkpoint(path)), torch.tensor([IDS]))


# --- quantizing


def quantized(path: Path, out: Path, **values: object) -> tuple[dict, CanonicalWeights]:
    out.mkdir()
    params = strict.build(quantize.Params, {"bits": 8, "group": 64, **values}, "quantize")
    return quantize.run(open_checkpoint(path), out, params), CanonicalWeights(open_checkpoint(out))


def card(folder: Path) -> str:
    return dose_texts(folder / "text.jsonl")


@pytest.mark.parametrize("name", ["moe-tinymed", "med-moe-phi"])
def test_gptq_counts_the_tokens_of_every_expert(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model", name)
    notes, weights = quantized(
        path,
        tmp_path / "packed",
        method="gptq",
        calibration=card(tmp_path),
        samples=4,
        length=40,
        expert_tokens=50,
    )
    d = weights.decoder
    said = notes["experts"]
    assert set(said) == {"layers.0", "layers.2"}
    for layer in said.values():
        assert sum(layer["tokens"]) == 4 * 40 * d.experts.active
        assert layer["forced"] == [0] * 4
        assert layer["rounded"] == [e for e, count in enumerate(layer["tokens"]) if count < 50]
    assert any(layer["rounded"] for layer in said.values())
    assert any(len(layer["rounded"]) < 4 for layer in said.values())
    plain = CanonicalWeights(open_checkpoint(path))
    rounded = quantized(path, tmp_path / "rtn", method="rtn")[1]
    for n in (0, 2):
        for expert in range(4):
            same = all(
                torch.equal(
                    weights.matrix(f"layers.{n}.experts.{expert}.{part}").q,
                    rounded.matrix(f"layers.{n}.experts.{expert}.{part}").q,
                )
                for part in ("up", "down")
            )
            assert same == (expert in said[f"layers.{n}"]["rounded"])
        router = weights.keys[f"layers.{n}.router"][0]
        assert weights.checkpoint.tensors[f"{router}.weight"].dtype == "float32"
        assert torch.equal(
            weights.matrix(f"layers.{n}.router").weight, plain.matrix(f"layers.{n}.router").weight
        )
    assert set(notes["errors"]) == {
        f"layers.{n}.{matrix}" for n in range(3) for matrix in d.matrices(n)
    }
    right, found = (logits(w, torch.tensor([IDS]))[0] for w in (plain, weights))
    assert (found - right).square().mean() < 0.02 * right.square().mean()


def test_experts_can_be_calibrated_on_tokens_that_did_not_choose_them(tmp_path: Path) -> None:
    path = write(tmp_path / "model", "med-moe")
    notes, _ = quantized(
        path,
        tmp_path / "packed",
        method="gptq",
        calibration=card(tmp_path),
        samples=4,
        length=40,
        expert_tokens=50,
        route_at_least=60,
    )
    for layer in notes["experts"].values():
        assert [t + f for t, f in zip(layer["tokens"], layer["forced"], strict=True)] == [
            max(60, t) for t in layer["tokens"]
        ]
        assert layer["rounded"] == []
    with pytest.raises(
        EdgemedError, match=r"route_at_least: -1 is out of range. Give a number at least 0"
    ):
        quantized(
            path,
            tmp_path / "wrong",
            method="gptq",
            calibration=card(tmp_path),
            samples=4,
            length=40,
            route_at_least=-1,
        )


def test_importance_is_of_the_tokens_that_reached_an_expert(tinymed: Path) -> None:
    weights = CanonicalWeights(open_checkpoint(tinymed))
    seen = {}
    from edgemed.models import torch_decoder as module

    found = importance(weights, [IDS])
    with torch.inference_mode():
        x = module.embed(weights, torch.tensor([IDS]))
        layer = module.load_layer(weights, 0)

        def product(layer, name, x):
            seen[name] = x.reshape(-1, x.shape[-1])
            return module.linear(layer, name, x)

        module.block(weights.decoder, layer, 0, x, product=product)
    for name in ("qkv", "experts.1.up", "experts.1.down"):
        assert np.abs(found[f"layers.0.{name}"] - seen[name].square().mean(0).numpy()).max() < 1e-4


# --- engines


def answers_as(checkpoint: Checkpoint, engine: Engine) -> None:
    """The engine's greedy tokens are the checkpoint's."""
    source = TorchSession(CanonicalWeights(checkpoint))
    session = engine.open(1)
    said = []
    for each in (source, session):
        said.append(list(generate(each, IDS[:9], Sampling(max_tokens=40))))
    assert said[0] == said[1]
    assert len(said[0]) > 1
    session.close()


def scores(engine: Engine, every: int = 30) -> np.ndarray:
    session = engine.open(1)
    found = np.concatenate(
        [
            session.prefill(IDS[:every], every=True).copy(),
            *(session.step(token)[None].copy() for token in IDS[every:]),
        ]
    )
    session.close()
    return found


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_gives_the_models_scores_and_tokens(
    name: str, target: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint = open_checkpoint(write(tmp_path / "model", name))
    module = plugins.load("targets", target)
    engine = export(checkpoint, target, module.Params(precision="fp32"), tmp_path / "engine")
    right = logits(CanonicalWeights(checkpoint), torch.tensor([IDS]))[0].numpy()
    assert np.abs(scores(engine) - right).max() < 1e-4
    answers_as(checkpoint, engine)


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, -1)])
def test_the_experts_integers_are_carried(
    medmoe: Path, tmp_path: Path, target: str, bits: int, group: int
) -> None:
    pytest.importorskip("onnxruntime")
    quantized(medmoe, tmp_path / "packed", method="rtn", bits=bits, group=group)
    checkpoint = open_checkpoint(tmp_path / "packed")
    module = plugins.load("targets", target)
    wide = {"accuracy_level": 1} if target == "onnx" else {"activations": "fp32"}
    engine = export(checkpoint, target, module.Params(**wide), tmp_path / "engine")
    weights = CanonicalWeights(checkpoint)
    expected = logits(weights, torch.tensor([IDS]))[0].numpy()
    found = scores(engine)
    if target == "tensorrt":
        # The output matrix stays as stored there; ONNX Runtime's gets integers of its own.
        assert np.abs(found - expected).max() < 1e-3
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.95
    model = onnx.load(engine.path / "model.onnx")
    numbers = {}
    for part in nested(onnx, model.graph):
        numbers |= {
            t.name: onnx.numpy_helper.to_array(t, str(engine.path))
            for t in part.initializer
            if t.name.endswith(".q")
        }
    for name in (
        f"layers.{n}.{matrix}" for n in range(3) for matrix in weights.decoder.matrices(n)
    ):
        q = numbers[f"{name}.q"]
        right = weights.matrix(name).q.numpy()
        if target == "tensorrt":
            q = (q.astype(np.int32).T + (1 << bits - 1)).astype(np.uint8)
        elif bits == 4:
            q = np.stack([q & 15, q >> 4], -1)
        assert (q.reshape(right.shape) == right).all(), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_tensorrt_graphs_parse_and_may_compute_all_experts(
    tinymed: Path, tmp_path: Path, precision: str
) -> None:
    pytest.importorskip("onnxruntime")
    module = plugins.load("targets", "tensorrt")
    found = []
    right = logits(CanonicalWeights(open_checkpoint(tinymed)), torch.tensor([IDS]))[0].numpy()
    for experts, profile in (("chosen", "jetpack6"), ("chosen", "trt11"), ("all", "jetpack7")):
        engine = export(
            open_checkpoint(tinymed),
            "tensorrt",
            module.Params(precision=precision, experts=experts, profile=profile),
            tmp_path / f"{experts}-{profile}",
        )
        found.append(engine)
        ifs = json.loads((engine.path / "manifest.json").read_text())["notes"]["parser"][
            "operators"
        ].get("If", 0)
        assert ifs == (8 if experts == "chosen" else 0)
        inferred = onnx.shape_inference.infer_shapes(
            onnx.load(engine.path / "model.onnx", load_external_data=False)
        ).graph
        ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred.value_info}
        assert all(ranks[node.input[0]] == 0 for node in inferred.node if node.op_type == "If"), (
            "TensorRT wants a condition without axes"
        )
        # A token whose experts are close may go to another one in half precision.
        assert np.median(np.abs(scores(engine) - right)) < 0.02
    assert found[0].bytes_per_token < found[2].bytes_per_token


def test_an_expert_that_nobody_chose_is_not_computed(tinymed: Path, tmp_path: Path) -> None:
    """The graph of ONNX Runtime profiled: as many experts' products run as tokens chose experts."""
    ort = pytest.importorskip("onnxruntime")
    engine = export(
        open_checkpoint(tinymed),
        "onnx",
        plugins.load("targets", "onnx").Params(precision="int8", group=32),
        tmp_path / "engine",
    )
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = ort.InferenceSession(
        str(engine.path / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    d = CanonicalWeights(open_checkpoint(tinymed)).decoder
    feeds = {
        "tokens": np.array([[5]]),
        "positions": np.array([[0]]),
        "select": np.array([0]),
        "last_index": np.array([0], np.int32),
        "total": np.array([1], np.int32),
        "feature_rows": np.array([[-1]]),
        "features": np.zeros((1, d.hidden), np.float32),
        "rope.cos": np.ones((8, len(d.rope_frequencies)), np.float32),
        "rope.sin": np.zeros((8, len(d.rope_frequencies)), np.float32),
    }
    feeds |= {
        v.name: np.zeros((1, d.kv_heads, 8, d.head_dim), np.float32)
        for v in session.get_inputs()
        if v.name.startswith("past.")
    }
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [
        event
        for event in events
        if event.get("args", {}).get("op_name") == "MatMulNBits"
        and ".experts." in event["name"]
        and "kernel_time" in event["name"]
    ]
    # those of no rows are called and do nothing
    ran = [
        event["name"]
        for event in ran
        if all(next(iter(event["args"]["input_type_shape"][0].values())))
    ]
    assert len(ran) == 2 * 2 * len(d.experts.layers), ran


# --- llama.cpp


def gguf(checkpoint: Checkpoint, out: Path, **values: object) -> Engine:
    return export(checkpoint, "llamacpp", plugins.load("targets", "llamacpp").Params(**values), out)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("moe-tinymed", {}),
        ("moe-tinymed", {"model_type": "llava_stablelm"}),
        ("moe-tinymed-phi", {"model_type": "llava_phi"}),
    ],
)
def test_stock_llamacpp_computes_what_it_has_a_graph_for(
    name: str, changes: dict, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    checkpoint = open_checkpoint(write(tmp_path / "model", name, **changes))
    right = logits(CanonicalWeights(checkpoint), torch.tensor([IDS]))[0].numpy()
    # ggml reads GELU from a float16 table
    assert np.abs(scores(gguf(checkpoint, tmp_path / "f32", type="f32")) - right).max() < 5e-3
    for wanted in ("q8_0", "q4_k_m"):
        found = scores(gguf(checkpoint, tmp_path / wanted, type=wanted))
        # A token whose experts are close may go to another one.
        assert np.median(np.abs(found - right)) < {"q8_0": 0.1, "q4_k_m": 0.8}[wanted]


def test_the_gguf_equals_llama_quantizes(tinymed: Path, tmp_path: Path) -> None:
    llama = pytest.importorskip("llama_cpp").llama_cpp
    from gguf import GGUFReader

    checkpoint = open_checkpoint(tinymed)
    source = gguf(checkpoint, tmp_path / "f32", type="f32").path / "model.gguf"
    for wanted, number in (
        ("q8_0", llama.LLAMA_FTYPE_MOSTLY_Q8_0),
        ("q4_k_m", llama.LLAMA_FTYPE_MOSTLY_Q4_K_M),
    ):
        params = llama.llama_model_quantize_default_params()
        theirs = tmp_path / f"{wanted}.gguf"
        params.ftype = number
        params.nthread = 1
        assert llama.llama_model_quantize(str(source).encode(), str(theirs).encode(), params) == 0
        ours = {
            t.name: t
            for t in GGUFReader(
                gguf(checkpoint, tmp_path / wanted, type=wanted).path / "model.gguf"
            ).tensors
        }
        for tensor in GGUFReader(theirs).tensors:
            assert ours[tensor.name].tensor_type == tensor.tensor_type, tensor.name
            assert np.array_equal(ours[tensor.name].data, tensor.data), tensor.name


def test_every_expert_has_its_own_importance(tinymed: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    checkpoint = open_checkpoint(tinymed)
    for kind, imatrix in (("plain", None), ("weighted", card(tmp_path))):
        engine = gguf(
            checkpoint, tmp_path / kind, type="q4_k_m", imatrix=imatrix, samples=2, length=40
        )
        right = logits(CanonicalWeights(checkpoint), torch.tensor([IDS]))[0].numpy()
        assert np.median(np.abs(scores(engine) - right)) < 0.8
    plain, weighted = (
        (tmp_path / kind / "model.gguf").read_bytes() for kind in ("plain", "weighted")
    )
    assert len(plain) == len(weighted)
    assert plain != weighted


@pytest.mark.parametrize("name", ["med-moe", "moe-tinymed-phi", "med-moe-phi", "moe-llava-qwen"])
def test_a_graph_of_our_own_where_llamacpp_has_none(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    checkpoint = open_checkpoint(write(tmp_path / "model", name))
    right = logits(CanonicalWeights(checkpoint), torch.tensor([IDS]))[0].numpy()
    engine = gguf(checkpoint, tmp_path / "f32", type="f32")
    assert [file.name for file in engine.path.glob("*.gguf")] == ["graph.gguf"]
    assert np.abs(scores(engine) - right).max() < 5e-3
    answers_as(checkpoint, engine)
    for wanted in ("q8_0", "q4_k_m"):
        found = scores(gguf(checkpoint, tmp_path / wanted, type=wanted))
        # A token whose experts are close may go to another one.
        assert np.median(np.abs(found - right)) < {"q8_0": 0.1, "q4_k_m": 0.8}[wanted]
    with pytest.raises(EdgemedError, match="leave kv out"):
        gguf(checkpoint, tmp_path / "kv", type="q8_0", kv="q8_0")


def test_our_own_graph_speaks_the_session_protocol(medmoe: Path, tmp_path: Path) -> None:
    """Longer than one batch and one block of the cache, forgotten and read again, to the end of the
    context.
    """
    pytest.importorskip("llama_cpp")
    checkpoint = open_checkpoint(write(tmp_path / "long", "med-moe", max_position_embeddings=300))
    ids = tokens(300, seed=3)
    session = gguf(checkpoint, tmp_path / "engine", type="f32").open(1)
    right = logits(CanonicalWeights(checkpoint), torch.tensor([ids]))[0].numpy()
    assert np.abs(session.prefill(ids[:270], every=True) - right[:270]).max() < 1e-3
    session.rewind(100)
    assert np.abs(session.prefill(ids[100:255])[0] - right[254]).max() < 1e-3
    for position in range(255, 300):
        assert np.abs(session.step(ids[position]) - right[position]).max() < 1e-3
    for append in (lambda: session.step(0), lambda: session.prefill([0])):
        with pytest.raises(EdgemedError, match="longer than the context"):
            append()
    session.close()


def test_matrices_in_the_cpus_own_order(medmoe: Path, tmp_path: Path) -> None:
    engine = gguf(open_checkpoint(medmoe), tmp_path / "engine", type="q4_0")
    scored = {}
    for repack in (True, False):
        session = replace(engine, params={**engine.params, "repack": repack}).open(1)
        scored[repack] = [
            session.prefill(IDS[:20], every=True).copy(),
            session.step(IDS[20]).copy(),
        ]
        names = {
            name
            for name, tensor in session.weights.tensors.items()
            if tensor != session.weights.ggml.get_tensor(session.weights.context, name.encode())
        }
        assert len(names) == len(session.weights.repacked)
        assert not [name for name in names if "_exps" in name or "norm" in name]
        assert repack or not names
        if repack and "avx2" in Path("/proc/cpuinfo").read_text():
            assert {"blk.0.attn_output.weight", "blk.0.ffn_up_shexp.weight"} <= names, (
                "4-bit matrices are faster in that order on this CPU"
            )
        session.close()
    # The same integers in another order; activations are rounded to 8 bits either way.
    for with_it, without in zip(scored[True], scored[False], strict=True):
        assert np.abs(with_it - without).max() < 0.02 * np.abs(without).max()


def test_our_own_graph_carries_integers(medmoe: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    quantized(medmoe, tmp_path / "packed", method="rtn", group=32)
    checkpoint = open_checkpoint(tmp_path / "packed")
    engine = gguf(checkpoint, tmp_path / "engine", from_checkpoint=True)
    assert (
        json.loads((engine.path / "manifest.json").read_text())["notes"]["types"]["Q8_0"]
        == 3 * 4 + 2 * (3 + 3) + 3 + 1
    )
    right = logits(CanonicalWeights(checkpoint), torch.tensor([IDS]))[0].numpy()
    assert np.median(np.abs(scores(engine) - right)) < 0.1


def test_a_damaged_graph_file(medmoe: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    engine = gguf(open_checkpoint(medmoe), tmp_path / "engine", type="q8_0")
    (engine.path / "graph.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EdgemedError, match=r"graph\.gguf is GGUF version 0"):
        engine.open(1)
    (engine.path / "graph.gguf").write_bytes(b"GGUF\3" + bytes(7) + b"\xff" * 92)
    with pytest.raises(EdgemedError, match=r"graph\.gguf"):
        engine.open(1)


def test_integers_cannot_be_carried_through_the_mean(tinymed: Path, tmp_path: Path) -> None:
    quantized(tinymed, tmp_path / "packed", method="rtn", group=32)
    with pytest.raises(EdgemedError, match="mean taken out, which other integers hold"):
        gguf(open_checkpoint(tmp_path / "packed"), tmp_path / "engine", from_checkpoint=True)


# --- images


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in ("moe-tinymed", "med-moe-phi")
        for target in ("onnx", "tensorrt", "llamacpp")
    ],
)
def test_a_question_about_an_image(tmp_path: Path, name: str, target: str) -> None:
    """Tower, projector and splice of each engine against the torch tower and decoder."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip(
        {"onnx": "onnxruntime", "tensorrt": "onnxruntime", "llamacpp": "llama_cpp"}[target]
    )
    module = plugins.load("targets", target)
    checkpoint = open_checkpoint(write(tmp_path / "model", name))
    params = (
        module.Params(type="f32")
        if target == "llamacpp"
        else module.Params(precision="fp32", tower="fp32")
    )
    engine = export(checkpoint, target, params, tmp_path / "engine")
    weights = CanonicalWeights(checkpoint)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8)
    )
    prompt = [*IDS[:6], weights.vision.token, *IDS[6:12]]
    found = []
    for vision_encoder, session in (
        (TorchVisionEncoder(weights), TorchSession(weights)),
        (OnnxVisionEncoder(engine, 1), engine.open(1)),
    ):
        ids, pictures = vision_encoder.see(prompt, [picture])
        assert len(ids) == 12 + (weights.vision.size // weights.vision.patch) ** 2
        found.append(
            [
                session.prefill(ids, every=True, pictures=pictures).copy(),
                session.step(IDS[12]).copy(),
            ]
        )
    assert all(np.abs(a - b).max() < 5e-3 for a, b in zip(*found, strict=True))
