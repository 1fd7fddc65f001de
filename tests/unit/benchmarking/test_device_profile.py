"""What doctor --measure writes is a device a plan can use, within physics, and what it cannot
measure it says.
"""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT

from edgemed.benchmarking import device_profile
from edgemed.errors import EdgemedError
from edgemed.hardware.device import SOURCE_OF, read_device
from edgemed.planning import planner


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("measure") / "here.yaml"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "edgemed",
            "doctor",
            "--measure",
            "--quick",
            "--out",
            str(out),
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return out, json.loads(done.stdout)


def test_a_measured_machine_is_a_device(quick):
    out, said = quick
    device = read_device(str(out))
    assert device.name == "here"
    assert said["file"] == str(out)
    assert any("GPU" in reason for reason in said["skipped"])
    assert 1 < device.achievable_gb_s < 5000
    assert 0.001 < device.achieved["fp32"] < 500
    assert 0 < device.launch_us < 1000
    assert 0 < device.usable_gb <= device.memory_gb
    assert "1: " in device.bandwidth_note
    for field, part in SOURCE_OF.items():
        assert not getattr(device, field) or "measured on the machine itself" in device.source[part]
    assert "numpy" in device.source["bandwidth"]
    assert "quick" in device.source["bandwidth"]


def test_a_plan_rests_on_the_measured_machine(quick):
    found = planner.plan(
        "random:biomedlm", str(quick[0]), planner.Wishes(context=1024, precision="int4")
    )
    assert found.device == "here"
    assert found.recommended.target == "onnx"
    assert not any("data sheet" in note for note in found.notes)
    device = read_device(str(quick[0]))
    bound = device.achievable_gb_s * 1e9 / (found.recommended.weights_mb * 0.85e6)
    assert found.recommended.tokens_per_s < bound


def test_out_is_checked_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(device_profile, "measure", lambda quick: pytest.fail("measured first"))
    (tmp_path / "there.yaml").write_text("")
    for out, message in (
        (tmp_path / "x.txt", "does not end in .yaml"),
        (tmp_path / "there.yaml", "is there already"),
        (tmp_path / "no" / "x.yaml", "is no directory"),
    ):
        with pytest.raises(EdgemedError, match=message):
            device_profile.measured(out, True)


def test_options_of_measure_want_measure():
    done = subprocess.run(
        [sys.executable, "-m", "edgemed", "doctor", "--quick"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "belong to --measure" in done.stderr


def test_without_onnxruntime_float32_is_measured_by_numpy(monkeypatch):
    monkeypatch.setattr(device_profile.importlib.util, "find_spec", lambda name: None)
    skipped: list[str] = []
    [(name, run)] = list(device_profile._products(2, skipped))
    assert name == "fp32"
    assert sum(block.shape[1] for block in run()) == device_profile.SIZE
    assert "edgemed[onnx]" in skipped[0]
    assert device_profile.best(device_profile._call(), 0.01) < 0.01


def test_the_shipped_probes_are_what_the_script_writes(monkeypatch):
    onnx = pytest.importorskip("onnx")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    make_probes = importlib.import_module("make_probes")
    shipped = {file.stem: file for file in device_profile.PROBES.iterdir()}
    assert set(shipped) == set(make_probes.GRAPHS)
    for name, file in shipped.items():
        assert file.stat().st_size < 2048
        model = onnx.load_from_string(file.read_bytes())
        assert model == make_probes.graph(make_probes.GRAPHS[name])
        if name in device_profile.OPERATORS:
            assert model.graph.node[0].op_type == device_profile.OPERATORS[name]


def probe_operands(name):
    """(x of three rows, weights, the product in float64) of one precision; scales that are powers
    of two."""
    random = np.random.default_rng(1)
    size = device_profile.SIZE
    group = device_profile.GROUP
    if name == "call":
        x = np.full((1, 1), 3, np.float32)
        return x, {"b": x}, x @ x
    if name in ("fp32", "fp16"):
        dtype = np.float32 if name == "fp32" else np.float16
        x = random.random((3, size)).astype(dtype)
        w = random.random((size, size)).astype(dtype)
        return x, {"b": w}, x.astype(float) @ w.astype(float)
    if name == "int8":
        x = random.integers(0, 255, (3, size), np.uint8)
        w = random.integers(-128, 127, (size, size), np.int8)
        return x, {"b": w}, x.astype(float) @ w.astype(float)
    # Two values a byte, the lower half first; the zero point is 8.
    x = random.integers(-127, 128, (3, size)).astype(np.float32)
    packed = random.integers(0, 255, (size, size // group, group // 2), np.uint8)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(size, size // group, group)
    scales = np.exp2(random.integers(-3, 3, (size, size // group))).astype(np.float32)
    w = ((values.astype(float) - 8) * scales[..., None]).reshape(size, size)
    return x, {"b": packed, "scales": scales}, x.astype(float) @ w.T


@pytest.mark.parametrize(
    ("name", "share"),
    [("call", 0), ("fp32", 1e-6), ("fp16", 1e-3), ("int8", 0), ("int4", 0.01)],
)
def test_probes_are_what_onnxruntime_computes(name, share):
    pytest.importorskip("onnxruntime")
    x, weights, product = probe_operands(name)
    result = device_profile.open_probe(name, x, weights, 1)()
    assert result.dtype == (np.int32 if name == "int8" else x.dtype)
    assert np.abs(result - product).max() <= share * np.abs(product).max()


def test_best_is_the_shortest_of_enough_rounds(monkeypatch):
    ticks = iter([0, 0, 3, 3, 4, 4, 6, 9])
    monkeypatch.setattr(device_profile.time, "perf_counter", lambda: next(ticks))
    assert device_profile.best(lambda: None, 1.0) == 1


@dataclass
class Tensor:
    """Stands in for a CUDA tensor; what is done to it costs nothing."""

    nbytes: int = 1 << 30

    def __matmul__(self, other):
        return self

    def to(self, dtype):
        return self

    def sum(self):
        return self

    def add_(self, value):
        return self

    T = property(lambda self: self)


def fake_torch(major):
    properties = SimpleNamespace(
        name="NVIDIA Test",
        major=major,
        minor=7,
        is_integrated=1,
        clock_rate=1300000,
    )
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_properties=lambda n: properties,
        mem_get_info=lambda: (5 << 30, 8 << 30),
        synchronize=lambda: None,
    )
    made = {name: lambda *a, **k: Tensor() for name in ("ones", "randn", "randint", "_int_mm")}
    return SimpleNamespace(
        cuda=cuda,
        float32=1,
        float16=2,
        bfloat16=3,
        int8=4,
        **made,
    )


def test_a_gpu_is_measured_through_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(device_profile, "need", lambda name, extra: fake_torch(8))
    values = device_profile.gpu_values(0.0, [])
    assert values["compute_capability"] == "8.7"
    assert values["shared_memory"]
    assert values["gpu_mhz"] == 1300
    assert set(values["achieved"]) == {"fp32", "fp16", "bf16", "int8"}
    file = tmp_path / "gpu.yaml"
    device_profile.write_device({"source": {"memory": "m"}, **values}, file)
    assert yaml.safe_load(file.read_text())["usable_gb"] == 5.0
    assert read_device(str(file)).gpu == "NVIDIA Test"
    monkeypatch.setattr(device_profile, "need", lambda name, extra: fake_torch(7))
    assert "int8" not in device_profile.gpu_values(0.0, [])["achieved"]


@pytest.mark.gpu
def test_a_real_gpu_is_within_physics():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    values = device_profile.gpu_values(0.5, [])
    assert 10 < values["achievable_gb_s"] < 20000
    assert values["achieved"]["fp16"] > 0.5 * values["achieved"]["fp32"]
    assert 0 < values["launch_us"] < 1000
