"""Sensors are read right from the files real machines have, energy adds up, and what cannot be read
is a reason with a way out.
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from edgemed.benchmarking import machine_state, thread_sweep
from edgemed.benchmarking.spec import BenchSpec
from edgemed.documents.bench import MachineState
from edgemed.errors import EdgemedError
from edgemed.hardware import device, doctor, jetson, nvml, power_sensors, thermal
from edgemed.hardware.sysfs import number
from edgemed.pipeline.engine_run import EngineRun
from edgemed.pipeline.recipe import Recipe
from edgemed.pipeline.report_document import not_measured

DATA = ROOT / "tests" / "data" / "sensors"


@pytest.fixture
def machine(tmp_path):
    """machine(name) -> a root with the files of tests/data/sensors/NAME.tsv; a directory stands
    where reading fails.
    """

    def make(name: str) -> Path:
        root = tmp_path / name
        for line in (DATA / f"{name}.tsv").read_text(encoding="utf-8").splitlines():
            path, value = line.split("\t")
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if value == "!error":
                file.mkdir()
            else:
                file.write_text(f"{value}\n", encoding="utf-8")
        return root

    return make


def set_to(root: Path, path: str, value: object) -> None:
    (root / path).write_text(f"{value}\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "rails", "watts"),
    [
        # Only VDD_IN: the other two rails are parts of it.
        ("jetson-orin-nano-super", ["VDD_IN"], 5.016 * 2.085),
        # No rail holds everything, NC channels fail, and VDDQ is a part of VIN_SYS_5V0.
        (
            "jetson-agx-orin",
            ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"],
            19.856 * 0.240 + 19.856 * 0.040 + 5.040 * 0.768,
        ),
        ("jetson-nano", ["POM_5V_IN"], 1.750),
        ("jetson-agx-thor", ["VIN"], 40.95),
    ],
)
def test_jetson_power_counts_every_part_once(machine, name, rails, watts):
    found = power_sensors.find_sensors(machine(name))
    assert [(s.name, s.part, s.kind, s.problem) for s in found] == [
        (rail, "board", "power", "") for rail in rails
    ]
    assert sum(s.read() for s in found) == pytest.approx(watts, rel=1e-9)


def test_the_old_driver_without_power_files_multiplies(machine):
    root = machine("jetson-nano")
    for file in (root / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0").glob("in_power*"):
        file.unlink()
    assert [s.read() for s in power_sensors.find_sensors(root)] == [pytest.approx(5.0 * 0.350)]


def test_the_same_chip_on_another_board_is_not_taken_for_its_module(machine):
    root = machine("jetson-agx-thor")
    (root / "etc/nv_tegra_release").unlink()
    set_to(root, "proc/device-tree/compatible", "some,carrier")
    assert power_sensors.find_sensors(root) == []


@pytest.mark.parametrize(
    ("line", "rails"),
    [
        (
            (
                "RAM 5246/7771MB (lfb 7x4MB) SWAP 983/20269MB (cached 280MB) CPU"
                " [47%@1420,23%@1420,32%@1420,22%@1420,31%@1420,96%@1420] EMC_FREQ 2%@1600"
                " GR3D_FREQ 0%@1109 APE 150 MTS fg 1% bg 9% AO@29C GPU@31.5C PMIC@100C AUX@30C"
                " CPU@33.5C thermal@31.35C VDD_IN 6140/5510 VDD_CPU_GPU_CV 2706/2119 VDD_SOC"
                " 1074/1051"
            ),
            {"VDD_IN": 6.14, "VDD_CPU_GPU_CV": 2.706, "VDD_SOC": 1.074},
        ),
        (
            (
                "07-09-2024 13:31:31 RAM 3168/6851MB (lfb 2x4MB) SWAP 161/3426MB (cached 0MB) CPU"
                " [23%@1397,17%@1192,16%@1190,13%@1190,23%@1190,10%@1190] EMC_FREQ 2%@204 GR3D_FREQ"
                " 0%@[114] VIC_FREQ 115 APE 150 AUX@45C CPU@46.5C thermal@45.6C AO@45C GPU@45.5C"
                " PMIC@50C VDD_IN 2763mW/2846mW VDD_CPU_GPU_CV 650mW/670mW VDD_SOC 650mW/711mW"
            ),
            {"VDD_IN": 2.763, "VDD_CPU_GPU_CV": 0.65, "VDD_SOC": 0.65},
        ),
        (
            (
                "RAM 1923/3964MB (lfb 2x2MB) SWAP 191/1982MB (cached 6MB) IRAM 0/252kB(lfb 252kB)"
                " CPU [5%@1224,4%@1224,3%@1224,6%@1224] EMC_FREQ 0%@1600 GR3D_FREQ 0%@76 APE 25"
                " PLL@37C CPU@40C PMIC@50C GPU@40C AO@45C thermal@40C POM_5V_IN 1750/1628"
                " POM_5V_GPU 0/0 POM_5V_CPU 366/406"
            ),
            {"POM_5V_IN": 1.75, "POM_5V_GPU": 0.0, "POM_5V_CPU": 0.366},
        ),
    ],
)
def test_tegrastats_lines(line, rails):
    assert jetson.parse_tegrastats(line) == pytest.approx(rails)
    program = jetson.Tegrastats([sys.executable, "-c", f"print({line!r}, flush=True); input()"])
    try:
        assert program.watts() == pytest.approx(max(rails.values()))
    finally:
        program.close()
    assert program.process.returncode is not None


def test_tegrastats_that_ends_is_an_error():
    program = jetson.Tegrastats([sys.executable, "-c", ""])
    with pytest.raises(OSError, match="no line"):
        program.watts()
    program.close()


def test_rapl_counts_packages_and_their_memory_once(machine):
    one = power_sensors.find_sensors(machine("intel-i5-13500"))
    assert [(s.name, s.kind, s.read(), s.wrap) for s in one] == [
        ("package-0", "energy", pytest.approx(65997.277274), pytest.approx(262143.328850))
    ]
    two = power_sensors.find_sensors(machine("intel-xeon-2s"))
    assert {s.name: s.read() for s in two} == {
        "package-0": 100.0,
        "dram of package 0": 50.0,
        "package-1": 200.0,
        "dram of package 1": 60.0,
    }


def test_a_counter_that_wraps_while_measured(machine):
    root = machine("amd-ryzen")
    counter = "sys/class/powercap/intel-rapl:0/energy_uj"
    with power_sensors.Meter(power_sensors.find_sensors(root)) as meter:
        set_to(root, counter, 65_500_000_000)
        time.sleep(0.25)
        set_to(root, counter, 1_000_000)
    # From 64930.873566 J up to the end of the range 65532.610987, and 1 J more.
    assert meter.joules == pytest.approx(65532.610987 - 64930.873566 + 1)
    assert meter.watts_mean == pytest.approx(meter.joules / meter.seconds)
    assert meter.reason == ""
    assert "package-0" in meter.how


def test_counter_arithmetic():
    assert power_sensors.counted(5, 8, None) == 3
    assert power_sensors.counted(98, 3, 100) == 5
    with pytest.raises(ValueError, match="went back"):
        power_sensors.counted(8, 5, None)


def test_power_is_integrated_over_time():
    level = [10.0]
    sensor = power_sensors.Sensor("rail", "board", "power", "test", lambda: level[0], settle=0.5)
    with power_sensors.Meter([sensor]) as meter:
        time.sleep(0.35)
        level[0] = 30.0
        time.sleep(0.35)
    assert meter.seconds >= 0.7
    assert meter.settle == 0.5
    # Half the time at 10 W, half at 30 W, with one reading interval between them; a busy machine
    # stretches either half.
    assert 14 < meter.watts_mean < 26
    assert meter.joules == pytest.approx(meter.watts_mean * meter.seconds)


def test_a_sensor_that_fails_gives_a_reason_and_no_number():
    readings = iter([1.0])

    def read() -> float:
        try:
            return next(readings)
        except StopIteration:
            raise OSError("no such device") from None

    with power_sensors.Meter(
        [power_sensors.Sensor("rail", "board", "power", "test", read)]
    ) as meter:
        time.sleep(0.15)
    assert meter.joules is None
    assert "rail failed while it was read: no such device" in meter.reason


def test_no_permission_is_a_reason_with_the_fix(machine, monkeypatch):
    root = machine("intel-i5-13500")
    read = Path.read_bytes

    def refuse(self):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with power_sensors.Meter(power_sensors.find_sensors(root)) as meter:
        pass
    assert meter.joules is None
    assert meter.reason.startswith(
        "no permission: /sys/class/powercap/intel-rapl:0/energy_uj is readable by root only"
    )
    assert "sudo chmod a+r" in meter.reason
    assert "CVE-2020-8694" in meter.reason
    [finding] = doctor.sensor_findings(power_sensors.find_sensors(root))
    assert finding.state == "missing"
    assert "no permission" in finding.detail
    assert "chmod" in finding.fix


def test_a_jetson_that_hides_its_rails_is_a_reason(machine, monkeypatch):
    root = machine("jetson-orin-nano-super")
    texts = Path.read_text
    raw = Path.read_bytes

    def refuse(read):
        def call(self, *arguments, **named):
            if self.name.endswith("_input") and "ina3221" in str(self):
                raise PermissionError(13, "Permission denied", str(self))
            return read(self, *arguments, **named)

        return call

    monkeypatch.setattr(Path, "read_text", refuse(texts))
    monkeypatch.setattr(Path, "read_bytes", refuse(raw))
    chosen, reason = power_sensors.choose_sensors(power_sensors.find_sensors(root))
    assert chosen == []
    assert reason.startswith("no permission: /sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/in")
    assert reason.endswith("Run with sudo")


def test_no_sensor_is_a_reason(tmp_path):
    with power_sensors.Meter(power_sensors.find_sensors(tmp_path)) as meter:
        pass
    assert meter.joules is None
    assert meter.reason == power_sensors.NONE_FOUND
    assert doctor.sensor_findings([])[0].detail == power_sensors.NONE_FOUND


def fixed(name: str, part: str, joules: float, **facts: str) -> power_sensors.Sensor:
    return power_sensors.Sensor(name, part, "energy", "test", lambda: joules, **facts)


def test_which_sensors_are_the_energy_of_the_work():
    cpu = fixed("package-0", "cpu", 1)
    gpu = fixed("GPU 0", "gpu", 1)
    board = fixed("VDD_IN", "board", 1)
    assert power_sensors.choose_sensors([cpu, gpu]) == ([cpu], "")
    assert power_sensors.choose_sensors([cpu, gpu], on_gpu=True) == ([cpu, gpu], "")
    assert power_sensors.choose_sensors([cpu, gpu, board], on_gpu=True) == ([board], "")
    assert power_sensors.choose_sensors([gpu], on_gpu=True) == ([gpu], "")
    # A number that leaves out where the work is done would mislead.
    refused = fixed("GPU", "gpu", 1, problem="no permission: NVML", fix="Run nvidia-smi")
    assert power_sensors.choose_sensors([cpu, refused], on_gpu=True) == (
        [],
        "no permission: NVML. Run nvidia-smi",
    )
    assert power_sensors.choose_sensors([gpu])[1] == power_sensors.NONE_FOUND


class FakeNvml(types.ModuleType):
    """The names and units of nvidia-ml-py; values are set by the test."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_FunctionNotFound(NVMLError):
        pass

    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1

    def __init__(self, **answers):
        super().__init__("pynvml")
        self.asked = []
        defaults = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetName": b"NVIDIA H100",
            "nvmlDeviceGetIndex": 0,
        }
        for name, value in {**defaults, **answers}.items():
            setattr(self, name, self.answer(name, value))

    def answer(self, name, value):
        def call(*arguments):
            self.asked.append((name, arguments))
            if isinstance(value, type) and issubclass(value, Exception):
                raise value("Not Supported")
            return value

        return call


def with_nvml(monkeypatch, **answers) -> FakeNvml:
    fake = FakeNvml(**answers)
    monkeypatch.setattr(nvml, "need", lambda module, extra: fake)
    monkeypatch.setattr(
        power_sensors.shutil,
        "which",
        lambda name: f"/usr/bin/{name}" if name == "nvidia-smi" else None,
    )
    return fake


def test_nvml_counter_power_and_clocks(monkeypatch):
    fake = with_nvml(
        monkeypatch,
        nvmlDeviceGetTotalEnergyConsumption=123456,
        nvmlDeviceGetPowerUsage=70250,
        nvmlDeviceGetTemperature=41,
        nvmlDeviceGetClockInfo=1980,
        nvmlDeviceGetCurrentClocksThrottleReasons=0x1 | 0x4 | 0x40,
    )
    [sensor] = power_sensors.gpu_sensors()
    assert (sensor.kind, sensor.part, sensor.name, sensor.read()) == (
        "energy",
        "gpu",
        "GPU 0 (NVIDIA H100)",
        123.456,
    )
    state = thermal.read_state(Path("/nowhere"), nvml.first_card())
    assert state.celsius == {"gpu 0": 41.0}
    assert state.gpu_mhz == 1980
    assert state.flags == (
        "GPU held down by its power limit",
        "GPU slowed by its hardware because of heat",
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234,0")
    nvml.first_card()
    assert ("nvmlDeviceGetHandleByUUID", ("GPU-1234",)) in fake.asked


def test_nvml_without_a_counter_samples_power(monkeypatch):
    with_nvml(
        monkeypatch,
        nvmlDeviceGetTotalEnergyConsumption=FakeNvml.NVMLError_NotSupported,
        nvmlDeviceGetPowerUsage=70250,
    )
    [sensor] = power_sensors.gpu_sensors()
    assert (sensor.kind, sensor.settle, sensor.read()) == ("power", 1.0, 70.25)


def test_nvml_that_fails_is_a_reason(monkeypatch):
    with_nvml(monkeypatch, nvmlInit=FakeNvml.NVMLError)
    assert "NVML does not answer: Not Supported" in power_sensors.gpu_sensors()[0].problem
    with_nvml(
        monkeypatch,
        nvmlDeviceGetTotalEnergyConsumption=FakeNvml.NVMLError_NotSupported,
        nvmlDeviceGetPowerUsage=FakeNvml.NVMLError,
    )
    [sensor] = power_sensors.gpu_sensors()
    assert "nvmlDeviceGetPowerUsage" in sensor.problem
    assert sensor.fix
    monkeypatch.setattr(
        nvml,
        "need",
        lambda module, extra: (_ for _ in ()).throw(
            EdgemedError("package missing", "pip install 'edgemed[nvml]'")
        ),
    )
    assert power_sensors.choose_sensors(power_sensors.gpu_sensors(), on_gpu=True) == (
        [],
        "package missing. pip install 'edgemed[nvml]'",
    )
    monkeypatch.setattr(power_sensors.shutil, "which", lambda name: None)
    assert power_sensors.gpu_sensors() == []


def test_state_of_a_jetson(machine):
    state = thermal.read_state(machine("jetson-orin-nano-super"))
    # cv0-thermal cannot be read while its part of the chip sleeps: it is left out, not taken for 0.
    assert state.celsius == {"cpu-thermal": 50.5, "gpu-thermal": 49.812, "tj-thermal": 50.5}
    assert (state.cpu_mhz, state.gpu_mhz, state.flags) == (1728.0, 1020.0, ())
    assert state.events == {
        "under-voltage (oc1)": 0,
        "average over-current (oc2)": 0,
        "instantaneous over-current (oc3)": 27390,
    }
    assert thermal.trip_points(machine("jetson-agx-orin")) == {"CPU-therm": 99.0}


@pytest.mark.parametrize(
    ("name", "gpu", "celsius"),
    [
        ("jetson-agx-orin", 306.0, "CPU-therm"),
        ("jetson-nano", 76.8, "AO-therm"),
        ("jetson-agx-thor", 1575.0, None),
        ("amd-ryzen", None, "k10temp Tctl"),
        ("intel-i5-13500", None, "coretemp Package id 0"),
        ("raspberry-pi-5", None, "cpu-thermal"),
    ],
)
def test_clocks_and_temperatures_elsewhere(machine, name, gpu, celsius):
    state = thermal.read_state(machine(name))
    assert state.gpu_mhz == (None if gpu is None else pytest.approx(gpu))
    assert celsius in state.celsius if celsius else not state.celsius


def test_trip_points_nobody_set_are_no_limit(machine):
    assert thermal.trip_points(machine("intel-i5-13500")) == {}
    assert thermal.trip_points(machine("rk3588")) == {"package-thermal": 75.0}


def test_unlike_cores_are_told_apart_and_favoured_ones_are_not(machine, tmp_path):
    assert thermal.clusters(machine("rk3588")) == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert thermal.clusters(machine("intel-i5-13500")) == [list(range(12)), list(range(12, 20))]
    assert thermal.clusters(machine("raspberry-pi-5")) == [[0, 1, 2, 3]]
    assert thermal.clusters(tmp_path) == []


def test_throttling_is_seen_by_events_heat_flags_and_clocks(machine):
    root = machine("jetson-orin-nano-super")
    before = thermal.read_state(root)
    assert thermal.thermal_record(before, [before], [before], before, root)["throttled"] is False
    set_to(root, "sys/class/hwmon/hwmon3/oc3_event_cnt", 27402)
    set_to(root, "sys/class/thermal/thermal_zone0/temp", 99500)
    for core in range(6):
        set_to(root, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", 1113600)
    after = thermal.read_state(root)
    told = thermal.thermal_record(before, [before], [after], after, root)
    assert told["throttled"] is True
    assert told["hottest"] == "cpu-thermal"
    assert told["celsius"] == {"before": 50.5, "early": 50.5, "late": 99.5, "after": 99.5}
    assert told["throttling"] == [
        "instantaneous over-current (oc3): 12 events",
        "cpu-thermal reached 100 °C, clocks are lowered from 99 °C",
        "CPU clock fell from 1728 to 1114 MHz under load",
    ]
    assert json.loads(json.dumps(told)) == told


def test_throttling_elsewhere(machine, tmp_path):
    pi = machine("raspberry-pi-5")
    assert thermal.read_state(pi).flags == (
        "Raspberry Pi firmware: under-voltage",
        "Raspberry Pi firmware: throttled",
    )
    set_to(pi, "sys/devices/platform/soc/soc:firmware/get_throttled", "50000")
    assert thermal.read_state(pi).flags == (), "bits of the past say nothing about now"
    intel = machine("intel-i5-13500")
    before = thermal.read_state(intel)
    set_to(intel, "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count", 45)
    assert thermal.thermal_record(before, [], [], thermal.read_state(intel), intel)[
        "throttling"
    ] == ["CPU package slowed because of heat: 3 events"]
    nothing = thermal.read_state(tmp_path)
    assert nothing.empty, "a machine that tells nothing is not known to run freely"
    assert thermal.thermal_record(nothing, [], [], nothing, tmp_path)["throttled"] is None, (
        "a machine that tells nothing is not known to run freely"
    )


@pytest.mark.parametrize(
    ("name", "said", "mode", "clocks"),
    [
        (
            "jetson-orin-nano-super",
            "JetPack 6.2.1 (L4T 36.4.4)",
            "MAXN_SUPER",
            "CPU 1728 MHz, GPU 1020 MHz: held by jetson_clocks",
        ),
        (
            "jetson-agx-orin",
            "JetPack 5.1.2 (L4T 35.4.1)",
            "MAXN",
            "CPU 730 to 2202 MHz, GPU 306 to 1300 MHz: free to change",
        ),
        ("jetson-nano", "JetPack 4.6.1 (L4T 32.7.1)", None, "GPU 77 to 922 MHz: free to change"),
        (
            "jetson-agx-thor",
            "JetPack 7.0 (L4T 38.2.0)",
            None,
            "GPU 315 to 1575 MHz: free to change",
        ),
    ],
)
def test_doctor_knows_a_jetson(machine, name, said, mode, clocks):
    root = machine(name)
    board, power, speed = doctor.jetson_board(root)
    assert board.detail == said
    assert speed.detail.startswith(clocks)
    assert (power.state, power.detail) == (
        ("ok", mode) if mode else ("missing", "nvpmodel's mode cannot be read")
    )
    assert jetson.nvpmodel_mode(root) == mode


def test_releases_that_are_not_in_the_table_are_not_guessed():
    assert jetson.jetpack_name("36.9.1") == "JetPack 6, which release is not known (L4T 36.9.1)"
    assert jetson.jetpack_name("41.0.0") == "JetPack not known (L4T 41.0.0)"


def test_a_mode_without_a_name_is_its_number(machine):
    root = machine("jetson-orin-nano-super")
    set_to(root, "var/lib/nvpmodel/status", "pmode:0009")
    assert jetson.nvpmodel_mode(root) == "mode 9"


def test_doctor_elsewhere_says_nothing_about_jetsons(machine):
    assert doctor.jetson_board(machine("amd-ryzen")) == []


def test_doctor_tells_no_driver_from_a_driver_without_cuda(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "gpus", lambda: ([], None))
    [finding] = doctor.graphics(machine("amd-ryzen"))
    assert finding.state == "broken"
    assert "on the PCI bus" in finding.detail
    assert "driver" in finding.fix
    assert doctor.graphics(tmp_path)[0].state == "missing"

    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(doctor.ctypes, "CDLL", absent)
    card = {
        "name": "NVIDIA L4",
        "memory_bytes": 24 << 30,
        "driver": "570.1",
        "compute_capability": "8.9",
    }
    monkeypatch.setattr(doctor, "gpus", lambda: ([card], None))
    gpu, cuda = doctor.graphics(tmp_path)
    assert gpu.state == "ok"
    assert cuda.state == "broken"
    assert "driver without CUDA" in cuda.detail
    assert "compute" in cuda.fix
    monkeypatch.setattr(doctor, "gpus", lambda: ([], None))
    assert doctor.graphics(machine("jetson-nano"))[0].detail.startswith("the Jetson's own GPU")
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: object())
    assert doctor.cuda() == []


class Busy:
    """A session that takes a millisecond per token and counts."""

    head = "lm"
    width = 4
    context = 64
    position = 0

    def __init__(self):
        self.prefilled = self.stepped = 0

    def prefill(self, tokens, every=False):
        assert self.position + len(tokens) <= self.context
        self.position += len(tokens)
        self.prefilled += len(tokens)
        time.sleep(0.001 * len(tokens))
        return np.zeros((1, self.width), np.float32)

    def step(self, token):
        assert self.position < self.context
        self.position += 1
        self.stepped += 1
        time.sleep(0.001)
        return np.zeros(self.width, np.float32)

    def rewind(self, position):
        assert position <= self.position
        self.position = position


@pytest.fixture
def quick(monkeypatch):
    for name in ("EARLY", "LOAD", "REST"):
        monkeypatch.setattr(machine_state, name, 0.2)
    monkeypatch.setattr(machine_state, "LOOK", 0.05)


def test_conditions_measure_energy_per_token(machine, monkeypatch, quick):
    root = machine("jetson-orin-nano-super")
    monkeypatch.setattr(
        power_sensors,
        "find_sensors",
        lambda: [
            power_sensors.Sensor(
                "VDD_IN", "board", "power", "INA power monitor", lambda: 10.0, settle=0.1
            )
        ],
    )
    monkeypatch.setattr(
        machine_state.thermal, "read_state", lambda card=None, look=thermal.read_state: look(root)
    )
    session = Busy()
    watch = machine_state.Conditions()
    watch.begin(session, [1] * 8)
    assert session.prefilled >= 8
    assert watch.early
    rows = {
        name: (unit, values, how)
        for name, unit, values, how in [*watch.end(session, [1] * 8, [1] * 4, 16), *watch.rest()]
    }
    assert set(rows) == {
        "prefill_joules_per_token",
        "prefill_watts",
        "decode_joules_per_token",
        "decode_watts",
        "rest_watts",
    }
    for phase in ("prefill", "decode"):
        unit, [joules], how = rows[f"{phase}_joules_per_token"]
        # 10 W over at least 1 ms per token.
        assert unit == "J/tok"
        assert joules == pytest.approx(10 * how["seconds"] / how["tokens"], rel=0.02)
        assert 0.01 <= joules < 0.05
        assert how["parts_joules"] == {"VDD_IN": pytest.approx(10 * how["seconds"], rel=0.02)}
        assert "VDD_IN (INA power monitor, read every 0.1 s)" in how["what"]
        assert rows[f"{phase}_watts"][1] == [pytest.approx(10, rel=0.02)]
    assert rows["prefill_watts"][2]["prompt"] == 8
    assert (
        rows["decode_watts"][2]["prompt"],
        rows["decode_watts"][2]["generate"],
    ) == (4, 16)
    state = watch.state()
    assert state["energy_reason"] is None
    assert "VDD_IN" in state["energy"]
    assert state["cpu_mhz"]["late"] == 1728.0
    assert json.loads(json.dumps(state)) == state


def test_conditions_cost_nothing_where_nothing_is_told(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(power_sensors, "find_sensors", list)
    monkeypatch.setattr(
        machine_state.thermal,
        "read_state",
        lambda card=None, look=thermal.read_state: look(tmp_path),
    )
    session = Busy()
    watch = machine_state.Conditions()
    watch.begin(session, [1])
    assert watch.end(session, [1], [1], 4) == []
    assert watch.rest() == []
    assert session.prefilled == session.stepped == 0
    state = watch.state()
    assert state["energy"] is None
    assert state["energy_reason"] == power_sensors.NONE_FOUND
    assert state["throttled"] is None


def test_a_sensor_failing_in_the_middle_leaves_the_bench_standing(tmp_path, monkeypatch, quick):
    def broken():
        raise OSError("I/O error")

    monkeypatch.setattr(
        power_sensors,
        "find_sensors",
        lambda: [power_sensors.Sensor("VDD_IN", "board", "power", "INA power monitor", broken)],
    )
    monkeypatch.setattr(
        machine_state.thermal,
        "read_state",
        lambda card=None, look=thermal.read_state: look(tmp_path),
    )
    watch = machine_state.Conditions()
    assert watch.end(Busy(), [1], [1], 4) == []
    assert watch.rest() == []
    assert watch.state()["energy_reason"] == "VDD_IN failed while it was read: I/O error"


def test_every_reader_works_on_this_machine():
    assert isinstance(thermal.read_state(), thermal.State)
    assert all(isinstance(s, power_sensors.Sensor) for s in power_sensors.find_sensors())
    found = number(Path("/proc/self/stat"))
    assert found
    assert found > 0


def test_points_of_a_thread_sweep():
    assert [p.threads for p in thread_sweep.points(4, 2, [[0, 1, 2, 3]])] == [
        1,
        2,
        3,
        4,
    ], "one kind of core needs no pinning"
    unlike = thread_sweep.points(4, 4, [[2, 3], [0, 1]])
    assert [(p.threads, p.label) for p in unlike] == [
        *((n, "all") for n in range(1, 5)),
        (1, "2-3"),
        (2, "2-3"),
        (1, "0-1"),
        (2, "0-1"),
    ]
    many = [p.threads for p in thread_sweep.points(128, 64, [])]
    assert many == [*range(1, 17), 32, 48, 64, 80, 96, 112, 128]
    assert thread_sweep.Point(1, (0, 2)).label == "0,2"
    assert thread_sweep.Point(1, (5,)).label == "5"


def test_waiting_is_set_before_a_process_starts(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    assert thread_sweep.environment("auto")["GOMP_SPINCOUNT"] == "1000"
    passive = thread_sweep.environment("passive")
    assert passive["OMP_WAIT_POLICY"] == "passive"
    assert "GOMP_SPINCOUNT" not in passive
    with pytest.raises(EdgemedError, match="Did you mean 'passive'"):
        thread_sweep.environment("pasive")


def test_a_sweep_runs_in_turns_and_marks_the_best(tmp_path, monkeypatch):
    order = []

    def one(path, point, plan, variables):
        order.append(point.threads)
        return {
            "decode_tokens_per_second": 10.0 * point.threads,
            "prefill_tokens_per_second": 100.0 / point.threads + len(order),
            "busy": False,
            "busy_reason": None,
        }

    monkeypatch.setattr(thread_sweep, "one", one)
    monkeypatch.setattr(
        thread_sweep, "open_engine", lambda path, check: types.SimpleNamespace(context=64)
    )
    monkeypatch.setattr(thread_sweep, "machine", lambda: {"logical_cores": 3, "physical_cores": 3})
    monkeypatch.setattr(thread_sweep.thermal, "clusters", list)
    rows = thread_sweep.sweep("threads", tmp_path, BenchSpec((8,), 4, 2))
    assert order == [1, 2, 3, 3, 2, 1]
    assert [(row["threads"], row["best"]) for row in rows] == [
        (1, "prefill"),
        (2, ""),
        (3, "decode"),
    ]
    assert rows[0]["prefill_tokens_per_second"] == 103.5
    assert (
        rows[0]["prefill_tokens_per_second_min"],
        rows[0]["prefill_tokens_per_second_max"],
    ) == (101, 106)
    with pytest.raises(EdgemedError, match="does not fit"):
        thread_sweep.sweep("threads", tmp_path, BenchSpec((64,), 4, 1))


def test_a_point_that_fails_is_named(tmp_path):
    with pytest.raises(EdgemedError, match=r"2 threads on cores 0-1 failed: .*does not exist"):
        thread_sweep.one(
            tmp_path / "none",
            thread_sweep.Point(2, (0, 1)),
            BenchSpec((8,), 4, 1),
            thread_sweep.environment("auto"),
        )


def test_a_report_says_why_there_is_no_energy_and_what_held_the_clocks_down():
    def benched(reason, throttling):
        state = MachineState(energy_reason=reason, throttling=tuple(throttling))
        return [types.SimpleNamespace(state=state)]

    recipe = Recipe("model", (), (), bench=BenchSpec())
    engines = [
        types.SimpleNamespace(name=name, random_weights=False, emulation="")
        for name in ("a", "b", "c")
    ]
    measured = [benched("no permission", []), benched("no permission", ["GPU slowed"]), []]
    runs = [
        EngineRun(engine, records=records)
        for engine, records in zip(engines, measured, strict=True)
    ]
    said = not_measured(recipe, runs)
    assert [line for line in said if "Energy" in line] == [
        "Energy was not measured: no permission."
    ]
    assert "b: not measured at full clocks: GPU slowed." in said
    assert not [
        line
        for line in not_measured(recipe, [EngineRun(engines[0], records=benched(None, []))])
        if "Energy" in line
    ]
    assert "Energy was not measured." in not_measured(recipe, [EngineRun(engines[0])])


def test_power_mode_of_a_jetson_without_nvpmodel(monkeypatch):
    monkeypatch.setattr(device, "_output", lambda command: ("", None))
    monkeypatch.setattr(jetson, "nvpmodel_mode", lambda root: "25W")
    assert device.power_mode() == "25W"
    monkeypatch.setattr(device, "_output", lambda command: ("NV Power Mode: MAXN_SUPER\n2\n", None))
    assert device.power_mode() == "MAXN_SUPER"


def test_the_real_package_has_what_is_asked_of_it():
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    asked = [
        "nvmlInit",
        "nvmlDeviceGetHandleByIndex",
        "nvmlDeviceGetHandleByUUID",
        "nvmlDeviceGetName",
        "nvmlDeviceGetIndex",
        "nvmlDeviceGetTotalEnergyConsumption",
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetTemperature",
        "nvmlDeviceGetClockInfo",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        "NVML_TEMPERATURE_GPU",
        "NVML_CLOCK_SM",
        "NVMLError_NotSupported",
        "NVMLError_FunctionNotFound",
    ]
    assert not [name for name in asked if not hasattr(real, name)]
    assert set(nvml.HELD_DOWN) == {
        real.nvmlClocksThrottleReasonSwPowerCap,
        real.nvmlClocksThrottleReasonHwSlowdown,
        real.nvmlClocksThrottleReasonSwThermalSlowdown,
        real.nvmlClocksThrottleReasonHwThermalSlowdown,
        real.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    if not device.shutil.which("nvidia-smi"):
        with pytest.raises(EdgemedError, match="NVML does not answer"):
            nvml.first_card()
