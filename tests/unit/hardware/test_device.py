"""Devices are numbers a person can check, a machine describes itself without telling who it is, and
bandwidth is bounded by physics.
"""

import json
import platform
import re
import subprocess

import pytest

from edgemed import params, plugins
from edgemed.errors import EdgemedError
from edgemed.hardware import device, doctor


@pytest.mark.parametrize("name", [name for name in plugins.names("devices") if name != "cpu"])
def test_every_device_is_complete_and_consistent(name):
    found = device.read_device(name)
    assert found.name == name
    assert found.title
    assert found.memory
    assert 1 < found.memory_gb <= 1024
    assert 5 < found.bandwidth_gb_s < 6000
    assert 0 < device.usable(found) < found.memory_gb * device.GIB
    assert found.compute["fp32"] > 0
    assert found.compute_note
    assert set(found.compute) <= {"fp32", "fp16", "bf16", "int8", "fp8", "fp4"}
    assert len(found.recognise) == 1
    assert set(found.recognise) <= {"device_tree", "gpu", "cpu"}
    assert (found.achievable_gb_s or 0) < found.bandwidth_gb_s
    # Marketing figures count zeros that are skipped: twice the dense ones at most, or with
    # accelerators of other kinds besides.
    assert all(value >= 1.9 * found.compute[precision] for precision, value in found.sparse.items())
    for versions in (*found.tensorrt.items(), *found.cuda.items()):
        assert all(isinstance(v, str) for v in versions), (
            "a version such as 10.10 must be quoted, or YAML makes it 10.1"
        )
    if found.gpu:
        assert found.gpu_mhz
        assert not [precision for precision in found.compute if device.lacks(found, precision)]


@pytest.mark.parametrize("name", [name for name in plugins.names("devices") if name != "cpu"])
def test_power_modes_ascend_and_end_at_what_the_device_is(name):
    found = device.read_device(name)
    modes = found.power_modes
    watts = [mode.watts for mode in modes if mode.watts]
    assert watts == sorted(watts)
    assert len({mode.name for mode in modes}) == len(modes)
    for mode in modes:
        assert 0 < mode.gpu_share <= 1
        assert (mode.bandwidth_gb_s or 0) <= found.bandwidth_gb_s
        assert (mode.gpu_mhz or 0) <= (found.gpu_mhz or 0)
    if found.gpu:
        last = device.power_mode_of(found, None)
        assert last.gpu_mhz == found.gpu_mhz
        assert last.bandwidth_gb_s in (None, found.bandwidth_gb_s)


def test_float32_is_cores_times_two_times_clock():
    for name in plugins.names("devices"):
        found = device.read_device(name)
        if found.gpu:
            cores = int(re.match(r"(\d+)-core", found.gpu)[1])
            assert found.compute["fp32"] == pytest.approx(
                cores * 2 * found.gpu_mhz * 1e-6, rel=0.02
            ), name


@pytest.mark.parametrize(
    ("name", "precision", "missing"),
    [
        ("jetson-nano-4gb", "int8", True),
        ("jetson-nano-4gb", "fp16", False),
        ("jetson-agx-orin-64gb", "fp8", True),
        ("jetson-agx-orin-64gb", "int8", False),
        ("jetson-xavier-nx-8gb", "bf16", True),
        ("rtx-4060-8gb", "fp8", False),
        ("rtx-4060-8gb", "fp4", True),
        ("jetson-thor", "fp4", False),
        ("raspberry-pi-5-8gb", "fp8", True),
        ("raspberry-pi-5-8gb", "int8", False),
        ("jetson-nano-4gb", "int4", False),
        ("t4", "bf16", True),
    ],
)
def test_what_a_device_lacks_is_computed(name, precision, missing):
    said = device.lacks(device.read_device(name), precision)
    assert (said is not None) is missing
    assert not missing or precision in said


def test_power_modes_are_found_by_the_names_people_use():
    orin = device.read_device("jetson-agx-orin-64gb")
    assert device.power_mode_of(orin, "30w").gpu_mhz == 612
    assert device.power_mode_of(orin, "MODE_30W").watts == 30
    assert (
        device.power_mode_of(device.read_device("jetson-orin-nano-8gb"), "MAXN SUPER").name
        == "MAXN_SUPER"
    )
    with pytest.raises(EdgemedError, match="no power mode '35W'.*MODE_30W"):
        device.power_mode_of(orin, "35W")


def test_unknown_device_names_the_nearest():
    with pytest.raises(
        EdgemedError,
        match="unknown device 'jetson-orin-nano8gb'. Did you mean 'jetson-orin-nano-8gb'",
    ):
        device.read_device("jetson-orin-nano8gb")


def test_a_device_of_your_own_is_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    with pytest.raises(EdgemedError, match="does not exist.*doctor --measure"):
        device.read_device(str(file))
    file.write_text(
        "title: Mine\nshared_memory: true\nusable_gb: 3.5\nmemory_gb: 8\nsource: {memory:"
        " measured}\npower_modes: [{name: A, watts: 5}]\n"
    )
    found = device.read_device(str(file))
    assert found.name == "mine"
    assert found.power_modes == (device.PowerMode("A", 5.0),)
    assert device.usable(found) == int(3.5 * device.GIB)
    for text, message in (
        ("- a list", "not a mapping"),
        ("a: [", "not valid YAML"),
        ("title: x\npower_modes: [{nam: A}]\n", "unknown key 'nam'.*name"),
        (
            "title: x\nshared_memory: true\nsource: {}\ncompute: {fp32: fast}\n",
            "fp32: 'fast' is not a number",
        ),
    ):
        file.write_text(text)
        with pytest.raises(EdgemedError, match=message):
            device.read_device(str(file))


def test_a_recipe_may_name_a_device_file_beside_it(tmp_path):
    from edgemed.pipeline.recipe import read_recipe

    (tmp_path / "mine.yaml").write_text(
        "title: Mine\nshared_memory: true\nsource: {memory: measured}\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: random:gpt2\ndevice: mine.yaml\nengines: [onnx]\n")
    assert device.read_device(read_recipe(recipe).device).title == "Mine"
    recipe.write_text("model: random:gpt2\ndevice: yours.yaml\nengines: [onnx]\n")
    with pytest.raises(EdgemedError, match="yours.yaml does not exist"):
        read_recipe(recipe)


def test_unknown_key_in_a_device_is_refused():
    with pytest.raises(EdgemedError, match="unknown key 'memory_gib'.*memory_gb"):
        params.build(
            device.Device,
            {
                "name": "x",
                "title": "x",
                "shared_memory": True,
                "source": {"memory": "x"},
                "memory_gib": 8,
            },
            "x.yaml",
        )


def test_machine_has_the_facts_and_no_identity():
    facts = device.machine()
    assert facts["physical_cores"] >= 1
    assert facts["logical_cores"] >= facts["physical_cores"]
    assert facts["memory_bytes"] > 1 << 28
    assert facts["architecture"] == platform.machine()
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", facts["label"])
    # No host name, address, user or path can hide in these.
    assert set(facts) == {
        "label",
        "cpu",
        "architecture",
        "logical_cores",
        "physical_cores",
        "flags",
        "cache_bytes",
        "memory_bytes",
        "governor",
        "power_mode",
        "gpus",
        "device",
        "os",
    }
    assert json.loads(json.dumps(facts)) == facts
    facts["gpus"].append("changed")
    assert "changed" not in device.machine()["gpus"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("AMD EPYC 9654 96-Core Processor 2c", "amd-epyc-9654-2c"),
        ("Intel(R) Xeon(R) Platinum 8480+ 8c", "intel-xeon-platinum-8480-8c"),
        ("Intel(R) Core(TM) i7-8550U CPU @ 1.80GHz 4c", "intel-core-i7-8550u-4c"),
        ("Cortex-A76 4c", "cortex-a76-4c"),
    ],
)
def test_label(text, label):
    assert device.slug(text) == label


@pytest.mark.parametrize(
    ("board", "cpu", "gib", "gpus", "expected"),
    [
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            "",
            7.4,
            [],
            "jetson-orin-nano-8gb",
        ),
        ("NVIDIA Orin Nano Developer Kit", "", 3.6, [], "jetson-orin-nano-4gb"),
        ("NVIDIA Jetson Nano Developer Kit", "", 3.9, [], "jetson-nano-4gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "", 61.4, [], "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin", "", 29.8, [], "jetson-agx-orin-32gb"),
        ("Raspberry Pi 5 Model B Rev 1.0", "", 7.9, [], "raspberry-pi-5-8gb"),
        ("", "", 32, [("NVIDIA GeForce RTX 4060", 8)], "rtx-4060-8gb"),
        ("", "", 32, [("NVIDIA GeForce RTX 4060 Ti", 8)], None),
        ("", "", 32, [("Tesla T4", 15)], "t4"),
        ("", "AMD Ryzen 7 7840U w/ Radeon 780M Graphics", 14.9, [], "laptop-avx512-16gb"),
        ("", "Apple M1", 8, [], "apple-m1-8gb"),
        ("", "Apple M1 Pro", 8, [], None),
        ("", "Intel(R) N100", 15.4, [], "n100-mini-pc-16gb"),
        ("", "", 8, [], None),
    ],
)
def test_a_device_is_recognised_by_board_card_or_cpu_and_memory(board, cpu, gib, gpus, expected):
    cards = [{"name": name, "memory_bytes": size * device.GIB} for name, size in gpus]
    assert device.recognised(int(gib * device.GIB), cards, board, cpu) == expected


def test_gpus_are_read_from_nvidia_smi(monkeypatch):
    output = "NVIDIA H200, 143771, 570.86.15, 9.0\nOrin (nvgpu), [N/A], 540.4.0, 8.7\n"
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        device.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0, output, ""),
    )
    found, problem = device.gpus()
    assert problem is None
    assert [gpu["memory_bytes"] for gpu in found] == [143771 << 20, None]
    assert found[1]["compute_capability"] == "8.7"
    monkeypatch.setattr(
        device.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 9, "", "driver mismatch\n"),
    )
    assert device.gpus() == ([], "nvidia-smi: driver mismatch")
    [finding] = doctor.graphics()
    assert finding.state == "broken"
    assert "driver mismatch" in finding.detail
    assert finding.fix


def test_read_bandwidth_is_plausible():
    # A cache would give hundreds; a lazily mapped zero page too.
    assert 1 < device.read_bandwidth(1, rounds=5) < 400
    with pytest.raises(EdgemedError, match="too few"):
        device.read_bandwidth(1, rounds=1)


def test_doctor_sees_what_is_missing_and_what_is_broken(monkeypatch):
    missing = doctor.package("edgemed-no-such-package", "bnb")
    assert missing.state == "missing"
    assert missing.fix.startswith("edgemed[bnb]: pip install -e")
    assert doctor.package("numpy", "build").state == "ok"

    class Target:
        RUNTIME = ("numpy", "onnx")

        @staticmethod
        def self_check():
            raise EdgemedError("wrong products", "reinstall it")

    monkeypatch.setattr(doctor.plugins, "load", lambda kind, name: Target)
    assert doctor.self_check("any") == doctor.Finding(
        "target any", "broken", "wrong products", "reinstall it"
    )
    Target.RUNTIME = ("edgemed_no_such_module", "onnx")
    assert doctor.self_check("any").state == "missing"
    assert "edgemed[onnx]" in doctor.self_check("any").fix
    Target.RUNTIME = ("numpy", "onnx")
    Target.self_check = staticmethod(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        doctor.self_check("any")


def test_doctor_covers_hardware_packages_and_every_target(monkeypatch):
    monkeypatch.setattr(
        doctor, "self_check", lambda name: doctor.Finding(f"target {name}", "ok", "not run here")
    )
    names = {finding.name for finding in doctor.examine()}
    assert {"cpu", "memory", "disk", "gpu", "python", *doctor.packages.every_package()} <= names
    assert {f"target {name}" for name in plugins.names("targets")} <= names
