"""Finds what measures power on this machine, and adds it up to joules while something runs.

Energy is that of a whole package, card or board, never of one process: which parts were counted is
said beside every number. A sensor that is missing or may not be read is a reason, not an error:
speed can be measured without it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from edgemed.errors import EdgemedError
from edgemed.hardware import jetson, nvml
from edgemed.hardware.sysfs import forbidden, in_order, number, text

ROOT = Path("/")
INTERVAL = 0.1
NONE_FOUND = (
    "no power sensor found (looked for INA3221 and INA238 on Jetson boards, RAPL under"
    " /sys/class/powercap, NVML; virtual machines usually have none)"
)
RAPL_FIX = (
    "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj allows it until the next start; the"
    " kernel keeps it to root since 2020 because energy tells other users something about what runs"
    " (CVE-2020-8694)"
)


@dataclass(frozen=True)
class Sensor:
    """One source of energy or power.

    part: what it covers: 'board' (a whole module), 'cpu' or 'gpu'. read: joules counted so far
    ('energy') or watts now ('power'); raises OSError where the sensor fails. wrap: joules at which
    a counter starts again at 0. settle: seconds of past power in a reading. problem: why it cannot
    be read ('' where it can), with `fix` the way out.
    """

    name: str
    part: Literal["board", "cpu", "gpu"]
    kind: Literal["energy", "power"]
    how: str
    read: Callable[[], float | None] | None = None
    wrap: float | None = None
    settle: float = 0.0
    problem: str = ""
    fix: str = ""
    close: Callable[[], None] | None = None


def find_sensors(root: Path | str = ROOT) -> list[Sensor]:
    """Every power sensor of this machine, those that may not be read included. The GPU and
    tegrastats are asked only with root '/'.
    """
    root = Path(root)
    sensors = [*board_sensors(root), *rapl(root)]
    return [*sensors, *gpu_sensors()] if root == ROOT else sensors


def board_sensors(root: Path) -> list[Sensor]:
    """The rails of a Jetson that together are its module, each a sensor; tegrastats where their
    files are not visible.
    """
    rails = jetson.whole(jetson.rails(root))
    sensors = [
        Sensor(
            rail.name,
            "board",
            "power",
            "INA power monitor",
            rail.watts,
            settle=rail.settle,
        )
        for rail in rails
    ]
    voltages = (root / "sys/bus/i2c/drivers/ina3221").glob("*-*/hwmon/hwmon*/in*_input")
    if blocked := [
        file for file in voltages if not sensors and jetson.is_board(root) and forbidden(file)
    ]:
        return [
            Sensor(
                "INA3221",
                "board",
                "power",
                "INA power monitor",
                problem=f"no permission: /{blocked[0].relative_to(root)} is not readable",
                fix="Run with sudo",
            )
        ]
    if not sensors and root == ROOT and shutil.which("tegrastats"):
        return [Tegra().sensor]
    return sensors


class Tegra:
    """tegrastats as a sensor: the program runs only while something is measured."""

    def __init__(self) -> None:
        self.running: jetson.Tegrastats | None = None
        self.sensor = Sensor(
            "tegrastats",
            "board",
            "power",
            "tegrastats",
            self.read,
            settle=0.5,
            close=self.close,
        )

    def read(self) -> float:
        self.running = self.running or jetson.Tegrastats()
        return self.running.watts()

    def close(self) -> None:
        if self.running:
            self.running.close()
            self.running = None


def rapl(root: Path) -> list[Sensor]:
    """CPU packages and the memory they drive, by RAPL's counters (Intel since Sandy Bridge, AMD
    since Zen).

    Cores and uncore are parts of their package, psys holds the package too, and intel-rapl-mmio is
    the same counter again: left out.
    """
    sensors = []
    for zone in in_order(list((root / "sys/class/powercap").glob("intel-rapl:*"))):
        name = text(zone / "name") or ""
        counter = zone / "energy_uj"
        if not name.startswith(("package", "dram")):
            continue
        label = (
            name if name.startswith("package") else f"{name} of package {zone.name.split(':')[1]}"
        )
        if forbidden(counter):
            problem = f"no permission: /{counter.relative_to(root)} is readable by root only"
            sensors.append(
                Sensor(
                    label,
                    "cpu",
                    "energy",
                    "RAPL counter",
                    problem=problem,
                    fix=RAPL_FIX,
                )
            )
        elif number(counter) is not None:
            wrap = (number(zone / "max_energy_range_uj") or 0) / 1e6 or None
            sensors.append(
                Sensor(
                    label,
                    "cpu",
                    "energy",
                    "RAPL counter",
                    partial(counter_joules, counter),
                    wrap,
                )
            )
    return sensors


def counter_joules(counter: Path) -> float:
    """A counter file of microjoules."""
    return int(counter.read_text()) / 1e6


def gpu_sensors() -> list[Sensor]:
    """The GPU a CUDA program would take: its energy counter where it has one, else its power.
    Nothing where there is no NVIDIA driver.
    """
    if not shutil.which("nvidia-smi"):
        return []
    try:
        card = nvml.first_card()
        name = f"GPU {card.index} ({card.name})"
        if card.energy() is not None:
            return [
                Sensor(
                    name,
                    "gpu",
                    "energy",
                    "NVML energy counter",
                    card.energy,
                )
            ]
        if card.watts() is not None:
            return [
                Sensor(
                    name,
                    "gpu",
                    "power",
                    "NVML power",
                    card.watts,
                    settle=1.0,
                )
            ]
    except EdgemedError as error:
        return [
            Sensor(
                "GPU",
                "gpu",
                "power",
                "NVML",
                problem=error.problem,
                fix=error.fix,
            )
        ]
    except OSError as error:
        return [
            Sensor(
                "GPU",
                "gpu",
                "power",
                "NVML",
                problem=str(error),
                fix="Run nvidia-smi: it says what is wrong with the driver",
            )
        ]
    return [
        Sensor(
            name,
            "gpu",
            "power",
            "NVML",
            problem=f"{name} reports neither energy nor power",
        )
    ]


def choose_sensors(sensors: Sequence[Sensor], on_gpu: bool = False) -> tuple[list[Sensor], str]:
    """(the sensors whose sum is the energy of the work, why there are none). A board sensor holds
    everything, so it is used alone.

    on_gpu: the work is done by the GPU: without its sensor there is no number, and its energy is
    left out where it is idle.
    """
    wanted = ("cpu", "gpu") if on_gpu else ("cpu",)
    if any(s.part == "board" for s in sensors):
        wanted = ("board",)
    concerned = [s for s in sensors if s.part in wanted]
    usable = [s for s in concerned if not s.problem]
    needed = "gpu" if on_gpu and wanted != ("board",) else wanted[0]
    if any(s.part == needed for s in usable):
        return usable, ""
    problems = list(
        dict.fromkeys(
            f"{s.problem}. {s.fix}" if s.fix else s.problem for s in concerned if s.problem
        )
    )
    return [], "; ".join(problems) or NONE_FOUND


class Meter:
    """with Meter() as meter: ...   then meter.joules, meter.watts_mean, meter.seconds, meter.parts
    (sensor -> joules), meter.how.

    joules is None where nothing could measure, and meter.reason says why. Counters are read at both
    ends and often enough between that they cannot wrap twice; power is read every 0.1 s in a thread
    and integrated by the trapezoid rule.
    """

    def __init__(self, sensors: Sequence[Sensor] | None = None, on_gpu: bool = False):
        self.sensors, self.reason = choose_sensors(
            find_sensors() if sensors is None else sensors, on_gpu
        )
        self.joules: float | None = None
        self.watts_mean: float | None = None
        self.seconds = 0.0
        self.parts: dict[str, float] = {}
        self.how = ", ".join(
            f"{s.name} ({s.how}{', read every 0.1 s' if s.kind == 'power' else ''})"
            for s in self.sensors
        )
        # A rail's reading holds this much of the past: run the load that long before measuring it.
        self.settle = max((s.settle for s in self.sensors), default=0.0)

    def __enter__(self) -> Meter:
        self.parts = dict.fromkeys((s.name for s in self.sensors), 0.0)
        self._last: dict[str, tuple[float, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._sample()
        self._started = time.perf_counter()
        if self.sensors:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        if self.sensors:
            self._thread.join()
        self.seconds = time.perf_counter() - self._started
        self._sample()
        for sensor in self.sensors:
            if sensor.close:
                sensor.close()
        if self.sensors and not self.reason:
            self.joules = sum(self.parts.values())
            self.watts_mean = self.joules / self.seconds

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL) and not self.reason:
            self._sample()

    def _sample(self) -> None:
        for sensor in self.sensors:
            try:
                value = reading(sensor)
                now = time.perf_counter()
                then, before = self._last.get(sensor.name, (now, value))
                if sensor.kind == "power":
                    joules = (now - then) * (before + value) / 2
                else:
                    joules = counted(before, value, sensor.wrap)
                self.parts[sensor.name] += joules
            except (OSError, ValueError) as error:
                self.reason = f"{sensor.name} failed while it was read: {error}"
                return
            self._last[sensor.name] = now, value


def reading(sensor: Sensor) -> float:
    """What a sensor says now. Raises OSError where it says nothing."""
    value = sensor.read() if sensor.read else None
    if value is None:
        raise OSError("it gives no value")
    return value


def counted(before: float, now: float, wrap: float | None) -> float:
    """Joules between two readings of a counter that starts again at 0 after `wrap` joules.

    Raises ValueError for a counter that went back and has no wrap: it was reset.
    """
    if now >= before:
        return now - before
    if wrap is None:
        raise ValueError(f"an energy counter went back from {before:g} to {now:g} J")
    return now - before + wrap
