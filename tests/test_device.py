"""Devices are numbers a person can check, a machine describes itself without telling who it is, and bandwidth is bounded by physics."""

import json
import platform
import re
import subprocess

import pytest

from edgemed import device, doctor, params, plugins
from edgemed.errors import EdgemedError


@pytest.mark.parametrize("name", plugins.names("devices"))
def test_every_device_file_is_strict_and_has_a_source(name):
    found = device.read_device(name)
    assert found.name == name and found.title and found.source
    if name != "cpu":
        assert 1 < found.memory_gb <= 1024 and 5 < found.bandwidth_gb_s < 2000
        assert set(found.recognise) in ({"device_tree"}, {"gpu"})
    for versions in found.tensorrt.items():
        assert all(isinstance(v, str) for v in versions), "a version such as 10.10 must be quoted, or YAML makes it 10.1"


def test_unknown_device_names_the_nearest():
    with pytest.raises(EdgemedError, match="Did you mean 'jetson-orin-nano-8gb'"):
        device.read_device("jetson-orin-nano")


def test_unknown_key_in_a_device_is_refused():
    with pytest.raises(EdgemedError, match="unknown key 'memory_gib'.*memory_gb"):
        params.build(device.Device, {"name": "x", "title": "x", "shared_memory": True, "source": ["x"], "memory_gib": 8}, "x.yaml")


def test_machine_has_the_facts_and_no_identity():
    facts = device.machine()
    assert facts["physical_cores"] >= 1 and facts["logical_cores"] >= facts["physical_cores"]
    assert facts["memory_bytes"] > 1 << 28 and facts["architecture"] == platform.machine()
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", facts["label"])
    # No host name, address, user or path can hide in these.
    assert set(facts) == {"label", "cpu", "architecture", "logical_cores", "physical_cores", "flags", "cache_bytes", "memory_bytes", "governor",
                          "power_mode", "gpus", "device", "os"}
    assert json.loads(json.dumps(facts)) == facts
    facts["gpus"].append("changed")
    assert "changed" not in device.machine()["gpus"]


@pytest.mark.parametrize(("text", "label"), [
    ("AMD EPYC 9654 96-Core Processor 2c", "amd-epyc-9654-2c"),
    ("Intel(R) Xeon(R) Platinum 8480+ 8c", "intel-xeon-platinum-8480-8c"),
    ("Intel(R) Core(TM) i7-8550U CPU @ 1.80GHz 4c", "intel-core-i7-8550u-4c"),
    ("Cortex-A76 4c", "cortex-a76-4c"),
])
def test_label(text, label):
    assert device.slug(text) == label


@pytest.mark.parametrize(("board", "gib", "gpus", "expected"), [
    ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7.4, [], "jetson-orin-nano-8gb"),
    ("NVIDIA Orin Nano Developer Kit", 3.6, [], None),
    ("NVIDIA Jetson AGX Orin Developer Kit", 61.4, [], "jetson-agx-orin-64gb"),
    ("Raspberry Pi 5 Model B Rev 1.0", 7.9, [], "raspberry-pi-5-8gb"),
    ("", 32, [("NVIDIA GeForce RTX 4060", 8)], "rtx-4060-8gb"),
    ("", 32, [("NVIDIA GeForce RTX 4060 Ti", 8)], None),
    ("", 8, [], None),
])
def test_a_device_is_recognised_by_board_or_card_and_memory(board, gib, gpus, expected):
    cards = [{"name": name, "memory_bytes": size * device.GIB} for name, size in gpus]
    assert device.recognised(int(gib * device.GIB), cards, board) == expected


def test_gpus_are_read_from_nvidia_smi(monkeypatch):
    output = "NVIDIA H200, 143771, 570.86.15, 9.0\nOrin (nvgpu), [N/A], 540.4.0, 8.7\n"
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(device.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, output, ""))
    found, problem = device.gpus()
    assert problem is None and [gpu["memory_bytes"] for gpu in found] == [143771 << 20, None]
    assert found[1]["compute_capability"] == "8.7"
    monkeypatch.setattr(device.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 9, "", "driver mismatch\n"))
    assert device.gpus() == ([], "nvidia-smi: driver mismatch")
    [finding] = doctor.graphics()
    assert finding.state == "broken" and "driver mismatch" in finding.detail and finding.fix


def test_read_bandwidth_is_plausible():
    # A cache would give hundreds; a lazily mapped zero page too.
    assert 1 < device.read_bandwidth(1, rounds=5) < 400
    with pytest.raises(EdgemedError, match="too few"):
        device.read_bandwidth(1, rounds=1)


def test_doctor_sees_what_is_missing_and_what_is_broken(monkeypatch):
    missing = doctor.package("edgemed-no-such-package", "bnb")
    assert (missing.state, missing.fix) == ("missing", "pip install 'edgemed[bnb]'")
    assert doctor.package("numpy", "build").state == "ok"

    class Target:
        RUNTIME = ("numpy", "onnx")

        @staticmethod
        def self_check():
            raise EdgemedError("wrong products", "reinstall it")

    monkeypatch.setattr(doctor.plugins, "load", lambda kind, name: Target)
    assert doctor.self_check("any") == doctor.Finding("target any", "broken", "wrong products", "reinstall it")
    Target.RUNTIME = ("edgemed_no_such_module", "onnx")
    assert doctor.self_check("any").state == "missing" and "edgemed[onnx]" in doctor.self_check("any").fix
    Target.RUNTIME, Target.self_check = ("numpy", "onnx"), staticmethod(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        doctor.self_check("any")


def test_doctor_covers_hardware_packages_and_every_target(monkeypatch):
    monkeypatch.setattr(doctor, "self_check", lambda name: doctor.Finding(f"target {name}", "ok", "not run here"))
    names = {finding.name for finding in doctor.examine()}
    assert {"cpu", "memory", "disk", "gpu", "python", *doctor.PACKAGES} <= names
    assert {f"target {name}" for name in plugins.names("targets")} <= names
