"""The llama.cpp target against the torch reference and against llama.cpp's own quantizer, on small
random models.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import once, tiny_config

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

from edgemed import plugins
from edgemed.artifacts.hashing import file_sha256
from edgemed.artifacts.store import read_manifest
from edgemed.engines.engine import Engine, export, open_engine
from edgemed.errors import EdgemedError
from edgemed.gguf import llama_session, preserved_integers, writer
from edgemed.gguf.quant_types import FILE_TYPES, Model, needs_imatrix, tensor_types
from edgemed.gguf.tensor_map import NAMES
from edgemed.models.architecture import all_families
from edgemed.models.checkpoint import Checkpoint, Writer, open_checkpoint
from edgemed.models.gptq_packing import pack
from edgemed.models.random_weights import make_random
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights, Packed
from edgemed.quantization import importance_matrix
from edgemed.quantization.grids import rtn
from edgemed.targets import llamacpp
from edgemed.targets.llamacpp import Params

CONFIG = {
    "model_type": "gpt2",
    "n_embd": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 640,
    "vocab_size": 512,
    "scale_attn_by_inverse_layer_idx": True,
    "initializer_range": 0.05,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
TOKENS = [(i * 37 + i * i) % 512 for i in range(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_random(CONFIG, tmp_path_factory.mktemp("random") / "model", dtype="float32")


@pytest.fixture(scope="module")
def engine(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return export(model, "llamacpp", Params("f32"), tmp_path_factory.mktemp("f32") / "engine")


def tensors_of(engine: Engine) -> dict[str, object]:
    return {t.name: t for t in gguf.GGUFReader(engine.path / "model.gguf").tensors}


def expected(checkpoint: Checkpoint, tokens: list[int]) -> np.ndarray:
    return logits(CanonicalWeights(checkpoint), torch.tensor([tokens]))[0].numpy()


def test_f32_logits_prefill_step_and_rewind(model: Checkpoint, engine: Engine) -> None:
    # 600 tokens are more than one batch of 512, and the inverse-layer scale would show as an error
    # of 1e-2 and more.
    right = expected(model, TOKENS)
    session = engine.open(2)
    try:
        found = session.prefill(TOKENS, every=True)
        assert found.shape == right.shape
        assert np.abs(found - right).max() < 5e-3
        assert (found.argmax(-1) == right.argmax(-1)).all()
        session.rewind(0)
        assert np.abs(session.prefill(TOKENS[:550])[0] - right[549]).max() < 5e-3
        for position in range(550, 560):
            assert np.abs(session.step(TOKENS[position]) - right[position]).max() < 5e-3
        session.rewind(300)
        assert session.position == 300
        assert np.abs(session.prefill(TOKENS[300:320], every=True) - right[300:320]).max() < 5e-3
    finally:
        session.close()


def test_the_scale_by_layer_matters_here(model: Checkpoint) -> None:
    plain = replace(model, config={**model.config, "scale_attn_by_inverse_layer_idx": False})
    assert np.abs(expected(model, TOKENS[:64]) - expected(plain, TOKENS[:64])).max() > 1e-2


def test_longer_than_context(engine: Engine) -> None:
    session = engine.open(1)
    try:
        with pytest.raises(EdgemedError, match="longer than the context: 641 tokens, 640 fit"):
            session.prefill([1] * 641)
        session.prefill([1] * 640)
        with pytest.raises(EdgemedError, match="641 tokens, 640 fit"):
            session.step(1)
    finally:
        session.close()


@pytest.mark.parametrize(("kind", "largest"), [("q8_0", 0.1), ("q4_k_m", 1.5), ("q6_k", 0.3)])
def test_quantized_files_run(model: Checkpoint, tmp_path: Path, kind: str, largest: float) -> None:
    engine = export(model, "llamacpp", Params(kind), tmp_path / kind)
    session = engine.open(2)
    try:
        error = np.abs(
            session.prefill(TOKENS[:64], every=True) - expected(model, TOKENS[:64])
        ).max()
    finally:
        session.close()
    assert 5e-3 < error < largest
    assert engine.precision == kind.upper()
    assert engine.random_weights
    assert engine.bytes_per_token < (engine.path / "model.gguf").stat().st_size


def test_short_context_and_other_caches(model: Checkpoint, tmp_path: Path) -> None:
    engine = export(
        model,
        "llamacpp",
        Params(
            "f16",
            context=128,
            kv="q8_0",
            repack=False,
        ),
        tmp_path / "short",
    )
    assert engine.context == 128
    session = engine.open(1)
    try:
        assert (
            np.abs(session.prefill(TOKENS[:100], every=True) - expected(model, TOKENS[:100])).max()
            < 0.1
        )
        with pytest.raises(EdgemedError, match="128 fit"):
            session.prefill(TOKENS[:29])
    finally:
        session.close()
    with pytest.raises(EdgemedError, match="context 641 is longer than the model's 640"):
        export(model, "llamacpp", Params(context=641), tmp_path / "long")


def test_importance_is_the_mean_square_of_the_inputs(model: Checkpoint) -> None:
    weights = CanonicalWeights(model)
    windows = [TOKENS[:50], TOKENS[50:80]]
    columns = importance_matrix.importance(weights, windows)
    assert set(columns) == {
        f"layers.{n}.{name}" for n in range(4) for name in ("qkv", "o", "up", "down")
    }
    norm, bias = weights.norm("layers.0.attn_norm")
    inputs = []
    for window in windows:
        x = weights.table("embed")[torch.tensor(window)] + weights.table("positions")[: len(window)]
        inputs.append(torch.nn.functional.layer_norm(x, (256,), norm, bias, 1e-5))
    right = torch.cat(inputs).square().mean(0).numpy()
    np.testing.assert_allclose(columns["layers.0.qkv"], right, rtol=1e-4)


LOW = [name for name in FILE_TYPES if name.startswith(("iq", "q2_k_s"))]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Engine]:
    folder = tmp_path_factory.mktemp("small")
    model = make_random(
        {**CONFIG, "n_layer": 1, "n_inner": 256, "vocab_size": 128},
        folder / "model",
        dtype="float32",
    )
    return model, export(model, "llamacpp", Params("f32"), folder / "f32")


@pytest.mark.parametrize("kind", [name for name in FILE_TYPES if name not in ("f32", *LOW)])
def test_bit_identical_to_llama_model_quantize(
    small: tuple[Checkpoint, Engine], tmp_path: Path, kind: str
) -> None:
    model, source = small
    assert (
        compare_with_llama(
            source, export(model, "llamacpp", Params(kind), tmp_path / kind), kind, None, tmp_path
        )
        == 16
    )


@pytest.mark.parametrize("kind", ["q4_k_m", "q4_0", *LOW])
def test_bit_identical_with_importance(
    small: tuple[Checkpoint, Engine], tmp_path: Path, kind: str
) -> None:
    model, source = small
    columns = importance_matrix.importance(
        CanonicalWeights(model), [[t % 128 for t in TOKENS[:200]]]
    )
    importance_matrix.save(tmp_path / "importance.npz", columns)
    made = export(
        model, "llamacpp", Params(kind, imatrix=str(tmp_path / "importance.npz")), tmp_path / kind
    )
    assert compare_with_llama(source, made, kind, columns, tmp_path) == 16


def test_mixtures_at_sixteen_layers(tmp_path: Path) -> None:
    # llama.cpp's dry run says which type it would choose; sixteen layers reach every rule about the
    # first and last layers.
    model = make_random(
        {**CONFIG, "n_layer": 16, "n_inner": 256, "vocab_size": 128},
        tmp_path / "model",
        dtype="float32",
    )
    source = export(model, "llamacpp", Params("f32"), tmp_path / "f32")
    columns = {"layers.0.qkv": np.ones(256, np.float32)}
    weights = CanonicalWeights(model)
    shapes = {
        t: place.shape
        for t, place in llamacpp.layout(weights.family, weights.decoder, weights.parts).items()
    }
    for kind in FILE_TYPES:
        for given in (None, columns):
            said = dry_run(source, kind, given)
            ours, _ = tensor_types(Model(shapes, 16, imatrix=given is not None), kind)
            assert {t: ours[t].lower() for t in said} == said, kind
            # four matrices per layer and the embedding change their type
            assert kind == "f32" or len(said) == 65


def dry_run(source: Engine, kind: str, columns: dict[str, np.ndarray] | None) -> dict[str, str]:
    """tensor -> type of every tensor llama.cpp would change."""
    lib = llama_cpp.llama_cpp
    lines = []
    params = quantize_params(kind, columns)
    params.dry_run = True
    callback = lib.llama_log_callback(lambda level, text, _: lines.append(text.decode()))
    lib.llama_log_set(callback, None)
    try:
        assert (
            lib.llama_model_quantize(
                str(source.path / "model.gguf").encode(), b"unused", ctypes.byref(params)
            )
            == 0
        )
    finally:
        lib.llama_log_set(llama_session.LOG[0], None)
    found = re.findall(
        r"\] +(\S+) +- \[[^\]]*\], type = +f32, size = [^\n]*-> [^\n]*\((\w+)\)", "".join(lines)
    )
    return {name: kind.lower() for name, kind in found}


def quantize_params(kind: str, columns: dict[str, np.ndarray] | None) -> ctypes.Structure:
    lib = llama_session.llama_library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind][0]
    params.nthread = 2
    if columns:
        entries = (lib.llama_model_imatrix_data * (len(columns) + 1))()
        for entry, (name, values) in zip(entries, columns.items(), strict=False):
            _, layer, part = name.split(".")
            entry.name = f"blk.{layer}.{NAMES[part][0]}.weight".encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        params.imatrix = entries
    return params


def compare_with_llama(
    source: Engine, made: Engine, kind: str, columns: dict[str, np.ndarray] | None, folder: Path
) -> int:
    """Let llama.cpp quantize the float32 file and count the tensors that are the same in type and
    bytes.
    """
    lib = llama_cpp.llama_cpp
    params = quantize_params(kind, columns)
    theirs = folder / "theirs.gguf"
    assert (
        lib.llama_model_quantize(
            str(source.path / "model.gguf").encode(), str(theirs).encode(), ctypes.byref(params)
        )
        == 0
    )
    ours = tensors_of(made)
    same = 0
    for tensor in gguf.GGUFReader(theirs).tensors:
        assert ours[tensor.name].tensor_type == tensor.tensor_type, tensor.name
        assert np.array_equal(ours[tensor.name].data, tensor.data), tensor.name
        same += 1
    assert same == len(ours)
    return same


def family_in_eight_layers(family: str, folder: Path) -> None:
    """A random checkpoint of a family as folder/model, and its float32 engine as folder/f32."""
    # Query heads in groups of four, so that the rules for shared key heads are met; eight layers,
    # so that those for the first and last are.
    small = {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "max_position_embeddings": 128,
        "n_embd": 256,
        "n_head": 8,
        "n_layer": 8,
        "n_positions": 128,
        "vocab_size": 256,
    }
    published = all_families()[family].reference_config
    folder.mkdir()
    values = {k: v for k, v in small.items() if k in published}
    if family == "qwen2_vl":
        # Its vision tower ends in the width of the text model.
        values["vision_config"] = tiny_config(family)["vision_config"] | {"hidden_size": 256}
    model = make_random(
        tiny_config(family, **values),
        folder / "model",
        dtype="float32",
    )
    export(model, "llamacpp", Params("f32"), folder / "f32")


@pytest.mark.parametrize("kind", ["q4_k_m", "q3_k_m", "q2_k", "q5_k_s", "iq4_xs", "iq3_s", "q8_0"])
@pytest.mark.parametrize("family", plugins.names("families"))
def test_every_family_gets_the_types_llama_quantize_gives(
    family: str, kind: str, shared: Path, tmp_path: Path
) -> None:
    folder = once(
        shared / f"eight-layers-{family}", lambda path: family_in_eight_layers(family, path)
    )
    source = open_engine(folder / "f32")
    made = export(open_checkpoint(folder / "model"), "llamacpp", Params(kind), tmp_path / kind)
    assert compare_with_llama(source, made, kind, None, tmp_path) == len(tensors_of(source))


def test_importance_changed_in_place_makes_a_new_engine(
    small: tuple[Checkpoint, Engine], tmp_path: Path
) -> None:
    model = small[0]
    file = tmp_path / "importance.npz"
    columns = importance_matrix.importance(
        CanonicalWeights(model), [[t % 128 for t in TOKENS[:200]]]
    )
    params = Params("q2_k_s", imatrix=str(file))
    importance_matrix.save(file, columns)
    first, again = (
        read_manifest(export(model, "llamacpp", params, tmp_path / "first").path) for _ in range(2)
    )
    assert first == again
    assert first["inputs"]["imatrix"] == file_sha256(file)
    importance_matrix.save(file, {name: values[::-1] for name, values in columns.items()})
    with pytest.raises(EdgemedError, match="made from other inputs"):
        export(model, "llamacpp", params, tmp_path / "first")
    second = read_manifest(export(model, "llamacpp", params, tmp_path / "second").path)
    assert first["key"] != second["key"]
    assert first["files"]["model.gguf"] != second["files"]["model.gguf"]


def test_low_bits_need_importance(model: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(EdgemedError, match="type iq2_xs needs an importance matrix"):
        export(model, "llamacpp", Params("iq2_xs"), tmp_path / "blind")
    with pytest.raises(EdgemedError, match="does not exist"):
        export(
            model,
            "llamacpp",
            Params("iq2_xs", imatrix=str(tmp_path / "none.npz")),
            tmp_path / "none",
        )
    importance_matrix.save(tmp_path / "other.npz", {"layers.0.qkv": np.ones(8, np.float32)})
    with pytest.raises(EdgemedError, match="was made for another model"):
        export(
            model,
            "llamacpp",
            Params("iq2_xs", imatrix=str(tmp_path / "other.npz")),
            tmp_path / "other",
        )
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_narrow_rows_fall_back_and_say_so(tmp_path: Path) -> None:
    narrow = make_random(
        {**CONFIG, "n_embd": 64, "n_layer": 2}, tmp_path / "narrow", dtype="float32"
    )
    engine = export(narrow, "llamacpp", Params("q4_k_m"), tmp_path / "engine")
    notes = read_manifest(engine.path)["notes"]
    assert notes["fallbacks"]["blk.0.attn_output.weight"] == "Q4_K -> Q5_0"
    assert notes["fallbacks"]["blk.1.attn_qkv.weight"] == "Q6_K -> Q8_0"
    assert "blk.0.ffn_down.weight" not in notes["fallbacks"]  # 256 columns
    source = export(narrow, "llamacpp", Params("f32"), tmp_path / "f32")
    assert compare_with_llama(source, engine, "q4_k_m", None, tmp_path) == 28
    session = engine.open(1)
    assert np.isfinite(session.prefill(TOKENS[:300])).all()
    session.close()


def test_rules_for_shared_key_heads_and_odd_rows() -> None:
    shapes = {
        "token_embd.weight": (512, 80),
        "blk.0.attn_qkv.weight": (96, 256),
        "blk.0.ffn_down.weight": (80, 40),
        "output_norm.weight": (80,),
    }
    types, fallbacks = tensor_types(Model(shapes, 1, group_heads=4), "q2_k")
    assert types == {
        "token_embd.weight": "F16",
        "blk.0.attn_qkv.weight": "Q4_K",
        "blk.0.ffn_down.weight": "F16",
        "output_norm.weight": "F32",
    }
    assert set(fallbacks) == {"token_embd.weight", "blk.0.ffn_down.weight"}
    assert needs_imatrix("blk.0.ffn_up.weight", "Q2_K", "q2_k_s")
    assert not needs_imatrix("blk.0.ffn_up.weight", "Q2_K", "q2_k")
    assert not needs_imatrix("token_embd.weight", "IQ2_S", "iq2_m")


def packed_checkpoint(
    source: Checkpoint,
    out: Path,
    bits: int,
    group: int,
    order: bool = False,
    zero: int | None = None,
) -> Checkpoint:
    """The model with its layer matrices rounded to nearest in AutoGPTQ's v1 layout."""
    out.mkdir()
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": True,
        "desc_act": order,
        "checkpoint_format": "gptq",
    }
    weights = CanonicalWeights(source, fold=True)
    writer = Writer(
        out, {**weights.family.folded(source.config), "quantization_config": quantization}
    )
    keys = {
        weights.keys[n][0]: n
        for n, part in weights.parts.items()
        if n.startswith("layers.") and part.kind == "matrix"
    }
    for key in source.tensors:
        module, _, last = key.rpartition(".")
        if module not in keys or last != "weight":
            writer.add(
                key, weights.matrix(keys[module]).bias if module in keys else source.read(key)
            )
            continue
        dense = weights.matrix(keys[module]).dense()
        q, scales = rtn(dense, bits, group)
        groups = torch.arange(dense.shape[1]) // group
        writer.add(f"{module}.qweight", pack(q.T.contiguous(), bits, 0))
        writer.add(
            f"{module}.qzeros",
            pack(
                torch.full(scales.T.shape, (zero or 1 << (bits - 1)) - 1, dtype=torch.uint8),
                bits,
                1,
            ),
        )
        writer.add(f"{module}.scales", scales.T.to(torch.float16))
        writer.add(f"{module}.g_idx", (groups.flip(0) if order else groups).to(torch.int32))
    writer.close()
    return open_checkpoint(out)


@pytest.mark.parametrize(
    ("bits", "group", "kind"), [(4, 32, "Q4_0"), (4, 128, "Q4_0"), (8, 64, "Q8_0")]
)
def test_from_checkpoint_carries_the_integers(
    model: Checkpoint, tmp_path: Path, bits: int, group: int, kind: str
) -> None:
    packed = packed_checkpoint(model, tmp_path / "packed", bits, group)
    engine = export(packed, "llamacpp", Params(from_checkpoint=True), tmp_path / "engine")
    found = tensors_of(engine)
    weights = CanonicalWeights(packed, fold=True)
    for name in ("layers.0.qkv", "layers.1.qkv", "layers.3.o", "layers.2.up", "layers.3.down"):
        _, layer, part = name.split(".")
        tensor = found[f"blk.{layer}.{NAMES[part][0]}.weight"]
        matrix = weights.matrix(name)
        assert isinstance(matrix, Packed)
        assert tensor.tensor_type.name == kind
        assert np.array_equal(
            gguf.dequantize(tensor.data, tensor.tensor_type), matrix.dense().numpy()
        )
    assert (
        found["token_embd.weight"].tensor_type.name,
        found["output.weight"].tensor_type.name,
    ) == ("F16", "Q8_0")
    assert engine.precision == f"{kind} carried"
    session = engine.open(2)
    right = expected(packed, TOKENS[:64])
    # llama.cpp rounds activations to 8 bits
    assert np.abs(session.prefill(TOKENS[:64], every=True) - right).max() < 0.15
    session.close()


def test_one_quantization_two_engines(model: Checkpoint, tmp_path: Path) -> None:
    # llama.cpp rounds activations to 8 bits for integer weights; the same file with its weights
    # written out computes in float32.
    onnx = pytest.importorskip("edgemed.targets.onnx")
    pytest.importorskip("onnxruntime")
    packed = packed_checkpoint(model, tmp_path / "packed", 4, 64)
    carried = export(
        packed, "llamacpp", Params(from_checkpoint=True, kv="f32"), tmp_path / "carried"
    )
    floats = [
        writer.Tensor(
            t.name,
            tuple(int(n) for n in reversed(t.shape)),
            "F32",
            partial(gguf.dequantize, t.data, t.tensor_type),
        )
        for t in tensors_of(carried).values()
    ]
    twin = replace(carried, path=tmp_path / "twin")
    twin.path.mkdir()
    writer.write_gguf(
        twin.path / "model.gguf",
        "gpt2",
        lambda writer: llamacpp.write_metadata(writer, CanonicalWeights(packed), "f32", None),
        floats,
    )
    scores = []
    for engine in (twin, export(packed, "onnx", onnx.Params(accuracy_level=1), tmp_path / "onnx")):
        session = engine.open(2)
        scores.append(session.prefill(TOKENS, every=True).copy())
        session.close()
    assert np.abs(scores[0] - scores[1]).max() < 5e-3
    assert (scores[0].argmax(-1) == scores[1].argmax(-1)).mean() >= 0.995


def test_from_checkpoint_refuses_what_it_cannot_carry(model: Checkpoint, tmp_path: Path) -> None:
    ordered = packed_checkpoint(model, tmp_path / "ordered", 4, 128, order=True)
    with pytest.raises(EdgemedError, match="act-order"):
        export(ordered, "llamacpp", Params(from_checkpoint=True), tmp_path / "engine")
    uneven = packed_checkpoint(model, tmp_path / "uneven", 4, 128, zero=7)
    with pytest.raises(EdgemedError, match="asymmetric"):
        export(uneven, "llamacpp", Params(from_checkpoint=True), tmp_path / "engine")
    small = packed_checkpoint(model, tmp_path / "small", 4, 16)
    with pytest.raises(EdgemedError, match="groups of 16, not a multiple of 32"):
        export(small, "llamacpp", Params(from_checkpoint=True), tmp_path / "engine")
    with pytest.raises(EdgemedError, match="needs a GPTQ checkpoint"):
        export(model, "llamacpp", Params(from_checkpoint=True), tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(("outputs", "head"), [(1, "choice"), (3, "classes")])
def test_heads(model: Checkpoint, tmp_path: Path, outputs: int, head: str) -> None:
    (tmp_path / "model").mkdir()
    writer = Writer(tmp_path / "model", model.config)
    for key in model.tensors:
        writer.add(key, model.read(key))
    writer.add(
        "classifier.weight",
        torch.randn(outputs, 256, generator=torch.Generator().manual_seed(1)) * 0.1,
    )
    writer.add("classifier.bias", torch.arange(outputs) * 0.5 + 0.25)
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "model")
    engine = export(checkpoint, "llamacpp", Params("f32"), tmp_path / "engine")
    assert (engine.head, engine.width) == (head, outputs)
    right = expected(checkpoint, TOKENS[:600])
    session = engine.open(2)
    try:
        found = session.prefill(TOKENS[:600])
        assert found.shape == (1, outputs)
        assert np.abs(found[0] - right[-1]).max() < 5e-3
        session.rewind(20)
        assert np.abs(session.step(TOKENS[20]) - right[20]).max() < 5e-3
        session.rewind(0)
        assert np.abs(session.prefill(TOKENS[:600], every=True) - right).max() < 5e-3
    finally:
        session.close()


def test_weight_too_large_for_f16(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    source = make_random({**CONFIG, "n_layer": 1}, tmp_path / "source", dtype="float32")
    writer = Writer(tmp_path / "model", source.config)
    for key in source.tensors:
        tensor = source.read(key)
        if key.endswith("h.0.mlp.c_fc.weight"):
            tensor[0, 0] = 1e6
        writer.add(key, tensor)
    writer.close()
    with pytest.raises(EdgemedError, match="blk.0.ffn_up.weight: a weight does not fit into F16"):
        export(open_checkpoint(tmp_path / "model"), "llamacpp", Params("f16"), tmp_path / "engine")


def test_damaged_file_is_named(engine: Engine, tmp_path: Path) -> None:
    broken = replace(engine, path=tmp_path)
    data = (engine.path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(EdgemedError, match="model.gguf is truncated: tensor '.*' ends at"):
        broken.open(1)


def test_tokenizer_travels_in_the_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [
        "Aspirin reduces fever and pain in adults.",
        "The patient's blood pressure was 140/90 mmHg, 37.5 degrees.",
    ] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    source = make_random(CONFIG, tmp_path / "source", dtype="float32")
    (tmp_path / "model").mkdir()
    writer = Writer(
        tmp_path / "model",
        {k: v for k, v in source.config.items() if k != "edgemed_random_weights"},
    )
    for key in source.tensors:
        writer.add(key, source.read(key))
    writer.close()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    engine = export(
        open_checkpoint(tmp_path / "model"), "llamacpp", Params("q8_0"), tmp_path / "engine"
    )
    fields = gguf.GGUFReader(engine.path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 512
    session = engine.open(1)
    lib = session.lib
    text = "The adult's pressure: 37.5  mmHg\n and é"
    buffer = (ctypes.c_int * 200)()
    count = lib.llama_tokenize(
        lib.llama_model_get_vocab(session.model),
        text.encode(),
        len(text.encode()),
        buffer,
        200,
        False,
        False,
    )
    session.close()
    assert list(buffer[:count]) == tokenizer.encode(text).ids


def test_self_check_speaks() -> None:
    assert "decodes quantized prompts" in llamacpp.self_check()


def test_self_check_reports_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    # A child that dies as the gcc 12 + AMX build does.
    run = llamacpp.run_child
    crash = "import os, signal; print('q8_0', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(llamacpp, "run_child", lambda command: run([command[0], "-c", crash]))
    with pytest.raises(EdgemedError, match=r"dies with signal 11 .*q8_0.*mno-amx"):
        llamacpp.self_check()


def test_engine_opens_from_its_directory(engine: Engine) -> None:
    again = open_engine(engine.path, check=True)
    session = again.open()
    assert session.step(5).shape == (512,)
    session.close()
    session.close()


def test_carried_needs_scales_that_fit_float16() -> None:
    matrix = Packed(
        torch.zeros(2, 32, dtype=torch.uint8),
        torch.full((2, 1), 1e9),
        torch.full((2, 1), 8, dtype=torch.uint8),
        None,
        4,
        32,
        None,
    )
    with pytest.raises(EdgemedError, match="a scale does not fit"):
        preserved_integers.preserved(matrix, "m", matrix.bits)
