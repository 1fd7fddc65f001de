"""The TensorRT target without TensorRT: its graph against the source on ONNX Runtime, every node
against the parser tables, and what is refused.

The expected scores of a quantized engine are those of its own integers, so layout, block and scale
are checked and rounding is not.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CONTEXT, ROOT, cli, refused, tokens, write_model

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from edgemed import api
from edgemed.artifacts import store
from edgemed.engines.engine import Engine, export, open_engine
from edgemed.errors import EdgemedError
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import attention, logits
from edgemed.models.weights import CanonicalWeights, Dense, Packed
from edgemed.onnx.decoder_graph import Graph, Precision
from edgemed.quantization.grids import rtn
from edgemed.steps import quantize
from edgemed.targets.tensorrt import PROFILES, Params
from edgemed.tensorrt.dialect import NOWHERE, PlainDialect, rows_offered
from edgemed.tensorrt.parser_check import check_graph, read_table, versions

IDS = tokens(CONTEXT, seed=4)


def expected(weights: CanonicalWeights, ids: list[int] = IDS[:100]) -> np.ndarray:
    return logits(weights, torch.tensor([ids]))[0].numpy()


def scores(engine: Engine, ids: list[int] = IDS[:100]) -> np.ndarray:
    session = engine.open(1)
    try:
        return session.prefill(ids, every=True).copy()
    finally:
        session.close()


class Rounded(CanonicalWeights):
    """A float checkpoint as an int8 (one scale per output) or int4 engine sees it; tables and
    output matrix stay float.
    """

    bits = 4
    group = 32

    def matrix(self, name: str) -> Dense:
        matrix = super().matrix(name)
        if name in ("lm_head", "head") or isinstance(matrix, Packed):
            return Dense(matrix.dense(), matrix.bias)
        group = matrix.weight.shape[1] if self.bits == 8 else self.group
        q, scale = rtn(matrix.weight, self.bits, group)
        return Dense(
            (q.float() - (1 << self.bits - 1)) * scale.repeat_interleave(group, 1), matrix.bias
        )


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("fp16", 0.1), ("bf16", 0.6)])
def test_float_parity(tmp_path: Path, precision: str, bound: float, scaled: bool) -> None:
    checkpoint = open_checkpoint(
        write_model(tmp_path / "model", scale_attn_by_inverse_layer_idx=scaled)
    )
    right = expected(CanonicalWeights(checkpoint))
    engine = export(checkpoint, "tensorrt", Params(precision=precision), tmp_path / "engine")
    assert np.abs(scores(engine) - right).max() < bound
    assert engine.precision == precision
    other = replace(
        checkpoint, config={**checkpoint.config, "scale_attn_by_inverse_layer_idx": not scaled}
    )
    assert np.abs(expected(CanonicalWeights(other)) - right).max() > 0.2, (
        "the scale by layer makes no difference here, so nothing was tested"
    )


@pytest.mark.parametrize(
    ("precision", "bits", "group"), [("int8", 8, 128), ("int4", 4, 32), ("int4", 4, 64)]
)
def test_rounded_parity(model: Path, tmp_path: Path, precision: str, bits: int, group: int) -> None:
    weights = Rounded(open_checkpoint(model))
    weights.bits = bits
    weights.group = group
    engine = export(
        weights.checkpoint,
        "tensorrt",
        Params(precision=precision, group=group, activations="fp32"),
        tmp_path / "engine",
    )
    right = expected(weights)
    assert np.abs(scores(engine) - right).max() < 1e-3
    assert np.abs(right - expected(CanonicalWeights(weights.checkpoint))).max() > 0.05
    half = export(
        weights.checkpoint, "tensorrt", Params(precision=precision, group=group), tmp_path / "half"
    )
    assert np.abs(scores(half) - right).max() < 0.1
    assert half.precision == ("int8 per output" if bits == 8 else f"int4 g{group}")


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, -1), (8, -1)])
def test_packed_integers_are_carried_bit_for_bit(
    model: Path, tmp_path: Path, bits: int, group: int
) -> None:
    (tmp_path / "packed").mkdir()
    quantize.run(open_checkpoint(model), tmp_path / "packed", quantize.Params("rtn", bits, group))
    checkpoint = open_checkpoint(tmp_path / "packed")
    engine = export(checkpoint, "tensorrt", Params(activations="fp32"), tmp_path / "engine")
    weights = CanonicalWeights(checkpoint)
    stored = {
        t.name: onnx.numpy_helper.to_array(t, str(engine.path))
        for t in onnx.load(engine.path / "model.onnx").graph.initializer
    }
    for n in range(weights.decoder.layers):
        for name in weights.decoder.matrices(n):
            matrix = weights.matrix(f"layers.{n}.{name}")
            q = stored[f"layers.{n}.{name}.q"].astype(np.int32).T + (1 << bits - 1)
            assert (q == matrix.q.numpy()).all(), f"layer {n} {name}"
            scale = stored[f"layers.{n}.{name}.scales"]
            assert set(np.unique(scale)) == set(np.unique(matrix.scales.numpy()))
    assert np.abs(scores(engine) - expected(Rounded(checkpoint))).max() < 1e-3
    with pytest.raises(
        EdgemedError, match=f"holds {bits}-bit integers and precision int{12 - bits} asks"
    ):
        export(checkpoint, "tensorrt", Params(precision=f"int{12 - bits}"), tmp_path / "other")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("classes", [3, 1])
def test_heads(model: Path, tmp_path: Path, classes: int, precision: str) -> None:
    from conftest import rewrite

    head = torch.empty(classes, 64).normal_(generator=torch.Generator().manual_seed(1))
    checkpoint = open_checkpoint(
        rewrite(model, tmp_path / "head", lambda tensors: tensors | {"score.weight": head})
    )
    engine = export(
        checkpoint,
        "tensorrt",
        Params(precision=precision, group=32, activations="fp32"),
        tmp_path / "engine",
    )
    assert (engine.head, engine.width) == (("classes", 3) if classes == 3 else ("choice", 1))
    weights = CanonicalWeights(checkpoint) if precision == "fp32" else Rounded(checkpoint)
    session = engine.open(1)
    assert np.abs(session.prefill(IDS[:60])[0] - expected(weights, IDS[:60])[-1]).max() < 1e-3
    session.close()


def test_context_can_be_shorter_than_the_models(model: Path, tmp_path: Path) -> None:
    engine = export(
        open_checkpoint(model),
        "tensorrt",
        Params(precision="fp32", context=70),
        tmp_path / "engine",
    )
    session = engine.open(1)
    session.prefill(IDS[:69])
    assert engine.context == 70
    assert (
        np.abs(session.step(IDS[69]) - expected(CanonicalWeights(open_checkpoint(model)))[69]).max()
        < 1e-4
    )
    with pytest.raises(EdgemedError, match="71 tokens, 70 fit"):
        session.step(0)
    session.close()


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("floats", ["float32", "float16"])
def test_attention_with_fewer_key_heads(tmp_path: Path, kv_heads: int, floats: str) -> None:
    """One attention alone, past and new rows, against torch; rows behind the past are garbage that
    must not be seen.
    """
    from edgemed.models.architecture import all_families

    family = next(iter(all_families().values()))
    d = replace(
        family.decoder(family.reference_config, {}),
        hidden=64,
        layers=1,
        heads=8,
        kv_heads=kv_heads,
        head_dim=8,
        score_scale=(0.21,),
    )
    graph = Graph(tmp_path, Precision(floats, stream="float32"))
    dialect = PlainDialect(None)
    random = np.random.default_rng(0)
    for name in ("tokens", "positions"):
        graph.value("inputs", name, onnx.TensorProto.INT64, [1, "new"])
    dialect.inputs(graph, d)
    width = d.q_size + 2 * d.kv_size
    graph.value("inputs", "qkv", graph.float_type, [1, "new", width])
    dialect.attention(graph, d, 0, "qkv")
    graph.value("outputs", "layers.0.attention", graph.float_type, [1, "new", d.q_size])
    graph.save("attention", dialect)
    past = 70
    new = 5
    qkv = torch.tensor(random.normal(size=(1, past + new, width)), dtype=torch.float32)
    right = attention(d, 0, qkv)[0, past:].numpy()
    rows = rows_offered(past)
    keys, values = (np.full((1, rows, kv_heads, 8), 50, floats) for _ in range(2))
    for cache, part in zip(
        (keys, values), qkv[0, :past].split([d.q_size, d.kv_size, d.kv_size], -1)[1:], strict=True
    ):
        cache[0, :past] = part.reshape(past, kv_heads, 8).numpy()
    slots = np.where(np.arange(rows) < past, np.arange(rows), NOWHERE)
    feeds = {
        "slots": slots,
        "positions": np.arange(past, past + new)[None],
        "past.0.key": keys,
        "past.0.value": values,
        "qkv": qkv[:, past:].numpy().astype(floats),
    }
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {i.name: feeds.get(i.name, np.zeros((1, new), np.int64)) for i in session.get_inputs()}
    found = session.run(["layers.0.attention"], feeds)[0][0]
    assert np.abs(found - right).max() < (1e-5 if floats == "float32" else 1e-2)


def test_float16_scores_do_not_overflow(tmp_path: Path) -> None:
    """Queries and keys of size 200 in 64 dimensions: a plain product would be 2.5 million, float16
    ends at 65504.
    """
    d = CanonicalWeights(open_checkpoint(write_model(tmp_path / "model"))).decoder
    d = replace(
        d, hidden=64, layers=1, heads=1, kv_heads=1, head_dim=64, score_scale=(64**-0.5 / 32,)
    )
    graph = Graph(tmp_path, Precision("float16", stream="float32"))
    dialect = PlainDialect(None)
    for name in ("tokens", "positions"):
        graph.value("inputs", name, onnx.TensorProto.INT64, [1, "new"])
    dialect.inputs(graph, d)
    graph.value("inputs", "qkv", graph.float_type, [1, "new", 192])
    dialect.attention(graph, d, 0, "qkv")
    graph.value(
        "outputs", "layers.0.attention.present_scores", graph.float_type, [1, 1, "new", "new"]
    )
    graph.save("attention", dialect)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    qkv = np.full((1, 2, 192), 200, np.float16)
    zeros = {
        i.name: np.zeros(
            [64 if s == "past" else 2 if s == "new" else s for s in i.shape],
            np.int64 if "int64" in i.type else np.float16,
        )
        for i in session.get_inputs()
    }
    found = session.run(["layers.0.attention.present_scores"], zeros | {"qkv": qkv})[0]
    assert np.isfinite(found).all()
    assert found.max() > 1000


# --- the parser tables


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_every_profile_and_precision_passes_its_table(
    model: Path, tmp_path: Path, profile: str, precision: str
) -> None:
    engine = export(
        open_checkpoint(model), "tensorrt", Params(profile, precision, 32), tmp_path / "engine"
    )
    report = store.read_manifest(engine.path)["notes"]["parser"]
    assert report["tensorrt"] == PROFILES[profile]
    assert not report["problems"]
    assert report["nodes"] > 80
    assert report["opset"] == (21 if precision == "int4" else 20)
    assert report["dynamic_axes"] == [
        "new",
        "past",
        "selected",
    ]
    assert bool(report["inferred"]) is (profile != "jetpack6" or precision == "int4"), (
        "what no source states is said"
    )
    graph = onnx.load(engine.path / "model.onnx", load_external_data=False)
    assert {entry.domain for entry in graph.opset_import} == {""}
    kinds = {
        entry.elem_type
        for entry in (v.type.tensor_type for v in graph.graph.input if v.name.startswith("past."))
    }
    assert kinds == {{"fp32": 1, "bf16": 16}.get(precision, 10)}


@pytest.mark.parametrize("version", ["10.3", "10.16", "11"])
def test_tables_are_whole(version: str) -> None:
    table = read_table(version)
    assert versions() == ["10.3", "10.16", "11"]
    assert len(table.operators) >= 196
    for op in table.operators:
        rule = table.rule(op)
        assert rule.source in table.sources, f"{op}: its source is not named"
        (
            onnx.defs.get_schema(op)
            if op
            not in (
                "ImageScaler",
                "ParametricSoftplus",
                "ScaledTanh",
            )
            else None
        )
    assert not table.rule("MatMulInteger").types
    assert table.rule("MatMul").types
    assert bool(table.rule("TensorScatter")) is (version != "10.3")
    assert bool(table.rule("Attention")) is (version != "10.3")
    assert table.holds({"10.3": "10.3.0.26", "10.16": "10.16.1.11", "11": "11.4.0.4"}[version])
    assert not table.holds("8.6.1")


def graph_of(
    tmp_path: Path,
    nodes: list,
    inputs: dict[str, tuple[int, list]],
    outputs: dict[str, tuple[int, list]],
    tensors: list = (),
    opset: int = 20,
) -> Path:
    values = [
        [onnx.helper.make_tensor_value_info(name, *kind) for name, kind in group.items()]
        for group in (inputs, outputs)
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "test", *values, initializer=list(tensors)),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=10,
    )
    (
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        if any(n.domain for n in nodes)
        else None
    )
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


FLOAT = 1
INT64 = 7
INT8 = 3
INT4 = 22
node = onnx.helper.make_node


def tensor(name: str, kind: int, shape: list[int], values: list) -> object:
    return onnx.helper.make_tensor(name, kind, shape, values)


X = {"x": (FLOAT, [1, 8])}
CASES = {
    "unknown operator": (
        [node("Det", ["m"], ["y"])],
        {"m": (FLOAT, [2, 2])},
        {"y": (FLOAT, [])},
        [],
        20,
        "operator Det is not parsed",
    ),
    "no MatMulInteger": (
        [node("MatMulInteger", ["a", "b"], ["y"])],
        {"a": (INT8, [2, 2]), "b": (INT8, [2, 2])},
        {"y": (6, [2, 2])},
        [],
        20,
        "MatMulInteger is not parsed",
    ),
    "opset too new": (
        [node("Relu", ["x"], ["y"])],
        X,
        {"y": X["x"]},
        [],
        23,
        "opset 23 is outside 9 to 20",
    ),
    "type": (
        [node("Relu", ["x"], ["y"])],
        {"x": (11, [1, 8])},
        {"y": (11, [1, 8])},
        [],
        20,
        "DOUBLE",
    ),
    "TopK": (
        [node("TopK", ["x", "k"], ["y", "i"])],
        {"x": (FLOAT, [1, 9000])},
        {"y": (FLOAT, [1, 4000]), "i": (INT64, [1, 4000])},
        [tensor("k", INT64, [1], [4000])],
        20,
        "must be below 3840, it is 4000",
    ),
    "TopK unsorted": (
        [node("TopK", ["x", "k"], ["y", "i"], sorted=0)],
        X,
        {"y": (FLOAT, [1, 2]), "i": (INT64, [1, 2])},
        [tensor("k", INT64, [1], [2])],
        20,
        "TopK with sorted=0",
    ),
    "ScatterND reduction": (
        [node("ScatterND", ["x", "i", "u"], ["y"], reduction="add")],
        X | {"u": (FLOAT, [1, 8])},
        {"y": X["x"]},
        [tensor("i", INT64, [1, 1], [0])],
        17,
        "ScatterND with reduction=add",
    ),
    "ScatterND before 10.9": (
        [node("ScatterND", ["x", "i", "u"], ["y"])],
        X | {"u": (FLOAT, [1, 8])},
        {"y": X["x"]},
        [tensor("i", INT64, [1, 1], [0])],
        18,
        "parsed below opset 18 only",
    ),
    "zero point": (
        [node("DequantizeLinear", ["q", "s", "z"], ["y"])],
        {},
        {"y": (FLOAT, [2])},
        [tensor("q", INT8, [2], [1, 2]), tensor("s", FLOAT, [], [0.5]), tensor("z", INT8, [], [3])],
        20,
        "zero point 'z' must be 0",
    ),
    "scale not constant": (
        [node("DequantizeLinear", ["q", "s"], ["y"])],
        {"s": (FLOAT, [])},
        {"y": (FLOAT, [2])},
        [tensor("q", INT8, [2], [1, 2])],
        20,
        "'s' must be known when the engine is built",
    ),
    "axes not constant": (
        [node("Unsqueeze", ["x", "a"], ["y"])],
        X | {"a": (INT64, [1])},
        {"y": (FLOAT, [1, 1, 8])},
        [],
        20,
        "'a' must be known when the engine is built",
    ),
    "int4 elsewhere": (
        [
            node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=2),
            node("Add", ["x", "w"], ["y"]),
        ],
        {"x": (FLOAT, [2, 2])},
        {"y": (FLOAT, [2, 2])},
        [tensor("q", INT4, [2, 2], [1, 2, 3, 4]), tensor("s", FLOAT, [1, 2], [0.5, 0.5])],
        21,
        "int4 of rank 2 read by Add",
    ),
    "norm outputs": (
        [node("LayerNormalization", ["x", "w"], ["y", "m"])],
        X,
        {"y": X["x"], "m": (FLOAT, [1, 1])},
        [tensor("w", FLOAT, [8], [1.0] * 8)],
        20,
        "with 2 outputs; TensorRT gives 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_table_finds(tmp_path: Path, case: str) -> None:
    nodes, inputs, outputs, tensors, opset, said = CASES[case]
    problems = check_graph(
        graph_of(tmp_path, nodes, inputs, outputs, tensors, opset), read_table("10.3")
    )["problems"]
    assert any(said in problem for problem in problems), problems


def test_contrib_operators_are_found(model: Path, tmp_path: Path) -> None:
    from edgemed.targets.onnx import Params as Onnx

    engine = export(open_checkpoint(model), "onnx", Onnx("fp16"), tmp_path / "engine")
    problems = check_graph(engine.path / "model.onnx", read_table("11"))["problems"]
    assert any(
        "operator GroupQueryAttention belongs to com.microsoft" in problem for problem in problems
    )


# --- unbuilt


@pytest.fixture(scope="module")
def unbuilt(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(
        open_checkpoint(model),
        "tensorrt",
        Params(precision="fp16"),
        tmp_path_factory.mktemp("unbuilt") / "engine",
    ).path


def test_unbuilt_engine_says_so(unbuilt: Path) -> None:
    engine = open_engine(unbuilt)
    notes = store.read_manifest(unbuilt)["notes"]
    assert (
        engine.emulation
        == "ONNX Runtime on the same graph, not TensorRT"
        == json.loads((unbuilt / "engine.json").read_text())["unbuilt"]
    )
    assert "edgemed build" in (unbuilt / "build.sh").read_text()
    sizes = notes["expected_bytes"]
    weights = sum(file.stat().st_size for file in unbuilt.glob("model.onnx*"))
    assert weights <= sizes["plan"] < 1.1 * weights
    assert sizes["build_memory"] == 3 * weights + 1024 * 10**6
    assert sizes["cache"] == 2 * 2 * 192 * 64 * 2


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (["bench"], "nothing to bench"),
        (["generate", "--prompt", "a"], "nothing to generate from"),
        (["chat"], "nothing to talk to"),
        (["eval", "--task", "pubmedqa"], "nothing to evaluate"),
    ],
)
def test_nothing_is_measured_on_an_unbuilt_engine(
    unbuilt: Path, verb: list[str], said: str
) -> None:
    refused(
        cli(verb[0], unbuilt, *verb[1:], stdin=""),
        unbuilt,
        "is unbuilt",
        said,
        f"edgemed build {unbuilt}",
    )


def test_build_without_tensorrt(unbuilt: Path) -> None:
    refused(cli("build", unbuilt), "package 'tensorrt'", "JetPack", "edgemed[tensorrt]")
    assert not (unbuilt / "on-device" / "plan").exists()
    assert not store.check_manifest(unbuilt)


def test_verify_names_the_stand_in(model: Path, tmp_path: Path) -> None:
    from edgemed.verification.parity import Limits, verify

    engine = api.export(str(model), "tensorrt", tmp_path / "engine", precision="fp16")
    result = verify(engine, engine.reference(), Limits())
    assert result.passed
    assert result.ran_on == "ONNX Runtime on the same graph, not TensorRT"


def test_a_recipe_with_an_unbuilt_engine(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\nengines:\n  - tensorrt: {{precision: fp16}}\nverify: {{prompts:"
        " pubmedqa-abstracts, count: 2, width: 32, prompt: 8, new: 4}\nbench: {prompt: [8],"
        " generate: 4, runs: 2}\neval: {tasks: [pubmedqa], limit: 2}\n"
    )
    page = api.run(recipe, tmp_path / "run").read_text()
    document = json.loads((tmp_path / "run" / "report.json").read_text())
    (engine,) = document["engines"]
    assert engine["verify"]["passed"]
    assert not engine["records"]
    assert not engine["evals"]
    assert document["source_evals"]
    assert any("tensorrt-fp16: unbuilt" in line for line in document["not_measured"])
    assert "parity is that of ONNX Runtime on the same graph, not TensorRT" in page


# --- what it cannot take


@pytest.mark.parametrize(
    ("changes", "params", "said"),
    [
        ({}, Params(precision="int4", group=128), "group 128 does not divide"),
        ({}, Params(context=4096), "context 4096 is not between 1 and the model's 192"),
        ({}, Params(prefill=0), "must be above 0"),
    ],
)
def test_what_it_cannot_take(
    tmp_path: Path, changes: dict[str, int], params: Params, said: str
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model", **changes))
    with pytest.raises(EdgemedError, match=said):
        export(checkpoint, "tensorrt", params, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_checkpoints_it_cannot_carry(model: Path, tmp_path: Path) -> None:
    from gptq_checkpoints import old_checkpoint

    asymmetric = old_checkpoint(model, tmp_path / "asymmetric", 4, asymmetric=True, act_order=False)
    with pytest.raises(EdgemedError, match="quantized asymmetrically.*precision fp16"):
        export(asymmetric, "tensorrt", Params(), tmp_path / "engine")
    # A config that says otherwise is found where the zero points are read.
    lying = replace(
        asymmetric,
        config={
            **asymmetric.config,
            "quantization_config": {**asymmetric.config["quantization_config"], "sym": True},
        },
    )
    with pytest.raises(
        EdgemedError, match=r"sym: true, and the zero points of .* are not the middle"
    ):
        export(lying, "tensorrt", Params(), tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    # float16 weights expand the very same integers.
    engine = export(asymmetric, "tensorrt", Params(precision="fp16"), tmp_path / "half")
    assert np.abs(scores(engine) - expected(CanonicalWeights(asymmetric))).max() < 0.1
    grouped = old_checkpoint(model, tmp_path / "grouped", 8, asymmetric=False, act_order=False)
    with pytest.raises(
        EdgemedError, match="int8 with one scale per output, this checkpoint has groups of 32"
    ):
        export(grouped, "tensorrt", Params(), tmp_path / "int8")


def test_old_act_order_checkpoints(model: Path, tmp_path: Path) -> None:
    from gptq_checkpoints import old_checkpoint

    checkpoint = old_checkpoint(model, tmp_path / "old", 4, asymmetric=False, act_order=True)
    engine = export(checkpoint, "tensorrt", Params(activations="fp32"), tmp_path / "engine")
    assert np.abs(scores(engine) - expected(Rounded(checkpoint))).max() < 2e-3


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("precision=fp8", "'fp8' is not a known value"),
        ("profile=jetpack5", "Did you mean 'jetpack"),
    ],
)
def test_precision_and_profile_unknown(
    model: Path, tmp_path: Path, setting: str, said: str
) -> None:
    refused(
        cli(
            "export",
            model,
            "--target",
            "tensorrt",
            "--out",
            tmp_path / "out",
            "--prompts",
            "none",
            "--set",
            setting,
        ),
        said,
    )
    assert not (tmp_path / "out").exists()


# --- one quantization, many engines


def test_the_same_answers_as_the_onnx_engine(tmp_path: Path) -> None:
    from edgemed.data.text_sets import texts
    from edgemed.models.tokenizer import encode
    from edgemed.pipeline.recipe import Stage
    from edgemed.pipeline.runner import run_step
    from edgemed.targets.onnx import Params as Onnx

    source = ROOT / "recipes" / "quickstart" / "model"
    params = quantize.Params(
        method="gptq",
        bits=4,
        group=64,
        calibration="pubmedqa-abstracts",
        samples=16,
        length=128,
    )
    packed = run_step(
        Stage("quantize", params), open_checkpoint(source), tmp_path, tmp_path / "int4"
    )
    answers = {}
    for name, checkpoint, target, chosen in (
        ("onnx", packed, "onnx", Onnx(accuracy_level=1)),
        ("tensorrt", packed, "tensorrt", Params()),
        ("fp32", open_checkpoint(source), "onnx", Onnx("fp32")),
        ("tensorrt-fp32", open_checkpoint(source), "tensorrt", Params(precision="fp32")),
    ):
        engine = export(checkpoint, target, chosen, tmp_path / name)
        session = engine.open(1)
        tokenizer = engine.tokenizer()
        rows = []
        for text in texts("pubmedqa-abstracts", "heldout")[:12]:
            session.rewind(0)
            rows.append(session.prefill(encode(tokenizer, text)[:96], every=True).copy())
        answers[name] = np.concatenate(rows)
        session.close()
    assert np.abs(answers["fp32"] - answers["tensorrt-fp32"]).max() < 1e-3
    same = answers["onnx"].argmax(-1) == answers["tensorrt"].argmax(-1)
    best = np.sort(answers["onnx"], -1)
    # The output matrix is int8 in one and float in the other: they may part where the two best are
    # as good as equal (of 6,144 positions 29, at most 0.012 apart), and nowhere else.
    assert len(same) == 12 * 96
    assert same.mean() >= 0.99
    assert (same | (best[:, -1] - best[:, -2] < 0.05)).all()
