"""Building and running on TensorRT, against a fake of its documented interface that computes with
ONNX Runtime on host memory.

What is tested is ours: which calls are made with what, where every byte of the cache goes, when
graphs are captured, and what happens when a machine is not the right one. TensorRT itself is not
here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from conftest import CONTEXT, tokens, write_model

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgemed import api
from edgemed.artifacts import records, store
from edgemed.engines.engine import Engine, export, finish, open_engine
from edgemed.engines.reference import make_reference
from edgemed.errors import EdgemedError
from edgemed.evaluation.option_scoring import PrefixReader
from edgemed.inference.decoding import Sampling, generate
from edgemed.models.checkpoint import open_checkpoint
from edgemed.models.torch_decoder import logits
from edgemed.models.weights import CanonicalWeights
from edgemed.targets.tensorrt import Params

IDS = tokens(CONTEXT, seed=3)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unbuilt engines, copied by each test."""
    folder = tmp_path_factory.mktemp("made")
    checkpoint = open_checkpoint(model)
    from edgemed.models.torch_decoder import TorchSession

    reference = make_reference(
        TorchSession(CanonicalWeights(checkpoint)), np.array([IDS[:48], IDS[48:96]]), 16, 8
    )
    for name, params in (
        ("fp32", Params(precision="fp32", prefill=40)),
        ("fp16", Params(precision="fp16")),
        ("bf16", Params(precision="bf16")),
    ):
        export(checkpoint, "tensorrt", params, folder / name, reference)
    return {name: folder / name for name in ("fp32", "fp16", "bf16")}


def engine_of(made: dict[str, Path], name: str, tmp_path: Path) -> Engine:
    return open_engine(shutil.copytree(made[name], tmp_path / name))


def test_build_makes_the_documented_calls(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fake_tensorrt.install(monkeypatch)
    engine = engine_of(made, "fp32", tmp_path)
    assert engine.emulation
    assert open_engine(engine.path, check=True)
    plan = finish(engine, 300)
    assert here.log[0] == ("network", 2), "strongly typed"
    assert ("pool", "WORKSPACE", 300 * 10**6) in here.log
    assert ("clear", "TF32") in here.log
    assert ("timing cache", b"") in here.log
    (profiles,) = [entry[1] for entry in here.log if entry[0] == "profiles"]
    prefill, decode = profiles
    assert prefill["tokens"] == ((1, 1), (1, 40), (1, 40))
    assert prefill["select"][2] == (40,)
    assert prefill["past.1.value"] == ((1, 64, 4, 16), (1, 64, 4, 16), (1, 192, 4, 16))
    assert decode["tokens"] == ((1, 1),) * 3
    assert decode["slots"][2] == (192,)
    assert plan["params"] == {
        "runtime": "tensorrt",
        "tensorrt": "10.3.0.30",
        "gpu": "Orin",
        "compute_capability": "8.7",
        "workspace_mb": 300,
    }
    assert plan["notes"]["build_seconds"] >= 0
    assert "peak_gpu_memory_bytes" in plan["notes"]
    assert list(plan["files"]) == ["model.plan"]
    built = open_engine(engine.path, check=True)
    assert not built.emulation, "the exported engine stays what it was"
    assert built.key == engine.key, "the exported engine stays what it was"
    # The same again is found finished; the kernel timings are used when another TensorRT builds
    # anew.
    count = len(here.log)
    assert finish(built, 300)["created"] == plan["created"]
    assert len(here.log) == count
    assert (engine.path / "on-device" / "timing-10.3.0.30-8.7.cache").read_bytes() == b"timings"
    here.trt.__version__ = "10.4.0.1"
    assert finish(built, 300)["params"]["tensorrt"] == "10.4.0.1"


def test_session_computes_what_the_source_computes(
    made: dict[str, Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fake_tensorrt.install(monkeypatch)
    engine = engine_of(made, "fp32", tmp_path)
    finish(engine)
    right = logits(CanonicalWeights(open_checkpoint(model)), torch.tensor([IDS]))[0].numpy()
    session = engine.open()
    assert (session.head, session.width, session.context, session.position) == (
        "lm",
        288,
        CONTEXT,
        0,
    )
    # 100 tokens in parts of 40, then all scores in parts, then steps across the end of a block of
    # 64 rows.
    assert np.abs(session.prefill(IDS[:100])[0] - right[99]).max() < 1e-3
    session.rewind(10)
    assert np.abs(session.prefill(IDS[10:115], every=True) - right[10:115]).max() < 1e-3
    assert session.position == 115
    for position in range(115, 140):
        assert np.abs(session.step(IDS[position]) - right[position]).max() < 1e-3
    session.rewind(50)
    assert np.abs(session.step(IDS[50]) - right[50]).max() < 1e-3
    session.prefill(IDS[51:-1])
    assert np.abs(session.step(IDS[-1]) - right[-1]).max() < 1e-3
    assert session.position == CONTEXT
    for append in (lambda: session.step(1), lambda: session.prefill([1])):
        with pytest.raises(EdgemedError, match="longer than the context"):
            append()
    session.close()
    assert not here.driver.blocks, "everything is given back"
    assert not here.driver.graphs, "everything is given back"


def test_decoding_replays_one_graph_per_shape(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fake_tensorrt.install(monkeypatch)
    engine = engine_of(made, "fp32", tmp_path)
    finish(engine)
    session = engine.open()
    session.prefill(IDS[:30])
    here.log.clear()
    here.driver.calls.clear()
    list(generate_from(session, 60))
    executed = [entry for entry in here.log if entry[0] == "execute"]
    # Rows 64 up to position 64, then 128: run once, captured once, replayed for the rest.
    assert [(kind, past) for _, kind, past, _ in executed] == [
        ("run", 64),
        ("captured", 64),
        ("run", 128),
        ("captured", 128),
    ]
    assert here.driver.calls.count("cuGraphLaunch") == 58
    # Nothing but the new rows moves: one strided copy per step.
    assert here.driver.calls.count("cuMemcpy2DAsync_v2") == 60
    assert here.driver.calls.count("cuMemAlloc_v2") == 0
    session.close()


def generate_from(session, count: int):
    for _ in range(count):
        yield session.step(5)


def test_an_engine_that_cannot_be_captured_still_runs(
    made: dict[str, Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fake_tensorrt.install(monkeypatch)
    engine = engine_of(made, "fp32", tmp_path)
    finish(engine)
    here.driver.capturable = False
    session = engine.open()
    plain = logits(CanonicalWeights(open_checkpoint(model)), torch.tensor([IDS]))[0].numpy()
    session.prefill(IDS[:20])
    for position in range(20, 24):
        assert np.abs(session.step(IDS[position]) - plain[position]).max() < 1e-3
    assert here.driver.calls.count("cuStreamBeginCapture_v2") == 1
    session.close()


def test_build_verb_verifies_and_measures(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(monkeypatch)
    # The bandwidth of this machine's memory takes long to measure and says nothing about a GPU.
    monkeypatch.setattr("edgemed.benchmarking.bench.read_bandwidth", lambda threads: 10.0)
    engine = engine_of(made, "fp16", tmp_path)
    found = api.build(engine.path)
    assert found.verify.passed
    assert found.verify.ran_on == "tensorrt"
    names = {record.name for record in found.records}
    assert {"decode_tokens_per_second", "first_token_seconds"} <= names
    assert records.read_records(engine.path)[0]["target"] == "tensorrt"
    assert not store.check_manifest(engine.path)
    session = open_engine(engine.path).open()
    assert len(list(generate(session, IDS[:10], Sampling(max_tokens=5)))) == 5
    assert np.isfinite(PrefixReader(session).options(IDS[:20], [[1, 2], [3]])).all()
    session.close()


# --- bad input


def test_no_tensorrt_and_no_driver(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(made, "fp32", tmp_path)
    with pytest.raises(
        EdgemedError,
        match="package 'tensorrt', which is not installed. On a Jetson it comes with JetPack",
    ):
        finish(engine)
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module("10.3.0.30", None, []))
    with pytest.raises(EdgemedError, match="no NVIDIA driver here"):
        finish(engine)
    assert not (engine.path / "on-device" / "plan").exists()


def test_driver_without_a_gpu(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fake_tensorrt.install(monkeypatch)
    engine = engine_of(made, "fp32", tmp_path)
    here.driver.cuInit = lambda flags: 100
    with pytest.raises(EdgemedError, match="finds no GPU it can use"):
        finish(engine)


def test_another_tensorrt_than_exported_for(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(monkeypatch, version="10.16.1.11")
    with pytest.raises(
        EdgemedError,
        match=(
            r"TensorRT 10.16.1.11 is installed, and this engine was checked for 10.3 up to, not"
            r" including, 10.15.*profile=jetpack6"
        ),
    ):
        finish(engine_of(made, "fp32", tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "10.3.0.31"}, "was built by TensorRT 10.3.0.30, and 10.3.0.31 is installed"),
        (
            {"gpu": "NVIDIA GeForce RTX 4060", "capability": (8, 9)},
            (
                r"was built for Orin \(compute capability 8.7\), this is NVIDIA GeForce RTX 4060"
                r" \(8.9\)"
            ),
        ),
    ],
)
def test_a_plan_of_another_machine(
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    said: str,
) -> None:
    fake_tensorrt.install(monkeypatch)
    engine = engine_of(made, "fp32", tmp_path)
    finish(engine)
    fake_tensorrt.install(monkeypatch, **change)
    with pytest.raises(EdgemedError, match=f"{said}. Build it again here: edgemed build"):
        engine.open()
    finish(engine)
    engine.open().close()


def test_altered_onnx_and_altered_plan(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(monkeypatch)
    engine = engine_of(made, "fp32", tmp_path)
    data = engine.path / "model.onnx.data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    with pytest.raises(EdgemedError, match="model.onnx.data was altered"):
        api.build(engine.path)
    engine = engine_of(made, "fp16", tmp_path)
    finish(engine)
    (engine.path / "on-device" / "plan" / "model.plan").write_bytes(b"{}")
    with pytest.raises(EdgemedError, match="model.plan was altered"):
        open_engine(engine.path, check=True)


def test_too_little_memory_is_said_before_the_driver_fails(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = fake_tensorrt.install(monkeypatch, memory=1 << 30)
    engine = engine_of(made, "fp32", tmp_path)
    with pytest.raises(
        EdgemedError,
        match=(
            r"building model.onnx needs about 14\d\d MB of GPU memory and 1074 MB are free: 3\d\d"
            r" MB too little"
        ),
    ):
        finish(engine)
    assert not [entry for entry in here.log if entry[0] == "network"]
    finish(engine, 100)
    here.driver.memory = 600_000
    with pytest.raises(
        EdgemedError, match=r"cache and activations need \d.\d MB of GPU memory and 0.6 MB are free"
    ):
        engine.open()


def test_memory_that_cpu_and_gpu_share(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    fake_tensorrt.install(monkeypatch, integrated=True)
    free = psutil.virtual_memory()._replace(available=10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(
        EdgemedError,
        match=r"building model.onnx needs about 14\d\d MB of memory and 1000 MB are free",
    ):
        finish(engine_of(made, "fp32", tmp_path))


def test_bfloat16_before_ampere(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(monkeypatch, gpu="Tesla T4", capability=(7, 5))
    with pytest.raises(EdgemedError, match=r"compute capability 7.5\) has no bfloat16"):
        finish(engine_of(made, "bf16", tmp_path))


@pytest.mark.parametrize(
    ("flag", "said"),
    [("refuses", "does not parse .*no importer for that"), ("fails", "could not build")],
)
def test_tensorrt_says_no(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, said: str
) -> None:
    here = fake_tensorrt.install(monkeypatch)
    engine = engine_of(made, "fp32", tmp_path)
    setattr(here.trt, flag, True)
    with pytest.raises(EdgemedError, match=said):
        finish(engine)
    assert not (engine.path / "on-device" / "plan").exists()
    assert engine.emulation
    assert not here.driver.blocks, "GPU memory is given back"


def test_an_engine_of_another_target_needs_no_building(model: Path, tmp_path: Path) -> None:
    from edgemed.targets.onnx import Params as Onnx

    engine = export(open_checkpoint(model), "onnx", Onnx(), tmp_path / "engine")
    with pytest.raises(EdgemedError, match="target onnx needs no building"):
        finish(engine)
    assert "unbuilt" not in json.loads((engine.path / "engine.json").read_text())


def test_self_check_names_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemed.targets import tensorrt

    assert "TensorRT is not installed" in tensorrt.self_check()
    fake_tensorrt.install(monkeypatch)
    assert tensorrt.self_check() == "TensorRT 10.3.0.30 on Orin, compute capability 8.7"


def test_heads_run_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import rewrite

    fake_tensorrt.install(monkeypatch)
    head = torch.empty(3, 64).normal_(generator=torch.Generator().manual_seed(1))
    checkpoint = open_checkpoint(
        rewrite(model, tmp_path / "head", lambda t: t | {"score.weight": head})
    )
    engine = export(checkpoint, "tensorrt", Params(precision="fp32"), tmp_path / "engine")
    finish(engine)
    session = engine.open()
    assert (
        np.abs(
            session.prefill(IDS[:30])[0]
            - logits(CanonicalWeights(checkpoint), torch.tensor([IDS[:30]]))[0, -1].numpy()
        ).max()
        < 1e-3
    )
    session.close()


def test_int4_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(monkeypatch)
    engine = export(
        open_checkpoint(write_model(tmp_path / "model")),
        "tensorrt",
        Params(precision="int4", group=32),
        tmp_path / "engine",
    )
    emulation = engine.open(1)
    right = emulation.prefill(IDS[:90], every=True)
    finish(engine)
    session = engine.open()
    assert np.abs(session.prefill(IDS[:90], every=True) - right).max() < 0.05
    session.close()


def test_a_signed_engine_is_signed_again_after_building(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    from edgemed.provenance import signature

    fake_tensorrt.install(monkeypatch)
    engine = engine_of(made, "fp32", tmp_path)
    signature.keygen(tmp_path / "keys")
    private = tmp_path / "keys" / signature.PRIVATE
    public = tmp_path / "keys" / signature.PUBLIC
    signature.sign(engine.path, private)
    finish(engine)
    problems = signature.check_signature(engine.path, public)["problems"]
    assert any(
        "on-device/plan/model.plan was added after signing: sign again if you built it" in problem
        for problem in problems
    )
    signature.sign(engine.path, private)
    assert not signature.check_signature(engine.path, public)["problems"]
