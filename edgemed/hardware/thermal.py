"""How hot a machine is, how fast its clocks run, and whether something holds them down.

A speed measured while the clocks fall is the speed of a hot machine, so every bench looks before,
under load and after. All readers take a root, so that they are tested on recorded files; what a
machine does not tell is left out and never taken for 'all is well'.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemed.hardware import jetson
from edgemed.hardware.nvml import Card
from edgemed.hardware.sysfs import in_order, number, text

ROOT = Path("/")
# hwmon chips that measure a CPU where it has no thermal zone (AMD) or has better names there.
CPU_CHIPS = ("coretemp", "k10temp", "zenpower")
# Raspberry Pi firmware, /sys/devices/platform/soc*/soc*firmware/get_throttled, the bits of this
# moment.
PI_FLAGS = {
    0x1: "under-voltage",
    0x2: "clock capped",
    0x4: "throttled",
    0x8: "soft temperature limit",
}
CORES_READ = 8
CLOCK_DROP = 0.9


@dataclass(frozen=True)
class State:
    """One look. celsius: sensor -> degrees; cpu_mhz: median of the cores this process may use;
    events: counters since the machine started; flags: what holds clocks down at this moment. None
    and empty mean not told.
    """

    celsius: dict[str, float] = field(default_factory=dict)
    cpu_mhz: float | None = None
    gpu_mhz: float | None = None
    events: dict[str, int] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.celsius or self.cpu_mhz or self.gpu_mhz or self.events)


def read_state(root: Path = ROOT, card: Card | None = None) -> State:
    """Read temperatures, clocks, throttling counters and flags now; a card adds its own.
    Milliseconds; raises nothing for what is missing.
    """
    celsius = temperatures(root)
    gpu = jetson.gpu_clock_directory(root)
    gpu_mhz = hertz / 1e6 if gpu and (hertz := number(gpu / "cur_freq")) else None
    flags = pi_flags(root)
    if card:
        # A GPU that stops answering ends the energy measurement with a reason; here it only tells
        # nothing.
        with contextlib.suppress(OSError):
            degrees = card.celsius()
            gpu_mhz = card.mhz() or gpu_mhz
            if degrees is not None:
                celsius[f"gpu {card.index}"] = float(degrees)
            flags += card.held_down()
    return State(
        celsius,
        cpu_clock(root),
        gpu_mhz,
        events(root),
        flags,
    )


def zones(root: Path) -> dict[str, Path]:
    """Thermal zones by name; zones of one name are told apart by their number. Some zones of
    Jetsons never give a number: they are left out.
    """
    directories: dict[str, Path] = {}
    for zone in in_order(list((root / "sys/class/thermal").glob("thermal_zone*"))):
        if number(zone / "temp") is not None:
            name = text(zone / "type") or zone.name
            directories[
                name
                if name not in directories
                else f"{name} {zone.name.removeprefix('thermal_zone')}"
            ] = zone
    return directories


def temperatures(root: Path) -> dict[str, float]:
    """Degrees Celsius of every thermal zone and of the CPU's own sensors; the kernel gives
    millidegrees.
    """
    millidegrees = {name: number(zone / "temp") for name, zone in zones(root).items()}
    for chip in in_order(list((root / "sys/class/hwmon").glob("hwmon*"))):
        if (name := text(chip / "name")) in CPU_CHIPS:
            for file in in_order(list(chip.glob("temp*_input"))):
                label = text(
                    chip / file.name.replace("_input", "_label")
                ) or file.name.removesuffix("_input")
                millidegrees[f"{name} {label}"] = number(file)
    return {
        name: value / 1e3
        for name, value in millidegrees.items()
        if value is not None and -40_000 < value < 150_000
    }


def trip_points(root: Path) -> dict[str, float]:
    """Zone -> the lowest temperature from which the kernel lowers clocks ('passive' or 'hot' trip
    points; unset ones are outside 40 to 130).
    """
    lowest = {}
    for name, zone in zones(root).items():
        kinds = [
            (text(kind), number(zone / kind.name.replace("_type", "_temp")))
            for kind in zone.glob("trip_point_*_type")
        ]
        points = [
            degrees / 1e3
            for kind, degrees in kinds
            if kind in ("passive", "hot") and degrees is not None and 40_000 < degrees < 130_000
        ]
        if points:
            lowest[name] = min(points)
    return lowest


def cpu_clock(root: Path) -> float | None:
    """Median clock in MHz over the cores this process may use (at most 8 of them, evenly spaced: on
    some CPUs reading one wakes it).
    """
    cores = clocked_cores(root)
    step = -(-len(cores) // CORES_READ) or 1
    readings = [
        number(root / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq")
        for core in cores[::step]
    ]
    megahertz = [kilohertz / 1e3 for kilohertz in readings if kilohertz]
    return statistics.median(megahertz) if megahertz else None


def clocked_cores(root: Path) -> list[int]:
    """Cores with a cpufreq directory; on the running machine only those this process may use."""
    cores = [
        int(re.findall(r"\d+", p.parent.name)[0])
        for p in in_order(list((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")))
    ]
    allowed = (
        os.sched_getaffinity(0) if root == ROOT and hasattr(os, "sched_getaffinity") else set(cores)
    )
    return [core for core in cores if core in allowed]


def clusters(root: Path = ROOT) -> list[list[int]]:
    """Cores of about one highest clock, fastest first: [[4, 5, 6, 7], [0, 1, 2, 3]] on big.LITTLE,
    one group or none on other machines.

    Highest clocks within a tenth of each other are one group: many PCs let a favoured core of the
    same kind run a little faster.
    """
    top = {
        core: number(root / f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq")
        for core in clocked_cores(root)
    }
    groups: list[list[int]] = []
    fastest = 0
    for core, clock in sorted(
        ((c, k) for c, k in top.items() if k), key=lambda pair: (-pair[1], pair[0])
    ):
        if not groups or clock < CLOCK_DROP * fastest:
            groups.append([])
            fastest = clock
        groups[-1].append(core)
    return [sorted(group) for group in groups]


def events(root: Path) -> dict[str, int]:
    """Throttling counted since the machine started: over-current on Jetsons, heat on Intel CPUs
    (the highest count of any core).
    """
    highest = jetson.over_current(root)
    for kind in ("core", "package"):
        counts = [
            number(p)
            for p in (root / "sys/devices/system/cpu").glob(
                f"cpu[0-9]*/thermal_throttle/{kind}_throttle_count"
            )
        ]
        if readable := [count for count in counts if count is not None]:
            highest[f"CPU {kind} slowed because of heat"] = max(readable)
    return highest


def pi_flags(root: Path) -> tuple[str, ...]:
    for file in (root / "sys/devices/platform").glob("soc*/soc*firmware/get_throttled"):
        # The file holds hexadecimal digits without 0x.
        digits = text(file) or "0"
        bits = int(digits, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]+", digits) else 0
        return tuple(
            f"Raspberry Pi firmware: {reason}" for bit, reason in PI_FLAGS.items() if bits & bit
        )
    return ()


def throttling(
    before: State,
    early: Sequence[State],
    late: Sequence[State],
    after: State,
    top: dict[str, float],
) -> list[str]:
    """What held the clocks down between `before` and `after`, one sentence each; empty where
    nothing seen did.

    early, late: looks under load, when it began and when it ended; a clock lower by more than a
    tenth counts. top: limits().
    """
    reasons = [
        f"{name}: {after.events[name] - count} events"
        for name, count in before.events.items()
        if after.events.get(name, 0) > count
    ]
    reasons += sorted({flag for state in (*early, *late) for flag in state.flags})
    for name, limit in top.items():
        hottest = max(
            (state.celsius[name] for state in (*early, *late, after) if name in state.celsius),
            default=None,
        )
        if hottest is not None and hottest >= limit:
            reasons.append(
                f"{name} reached {hottest:.0f} °C, clocks are lowered from {limit:.0f} °C"
            )
    for what in ("cpu_mhz", "gpu_mhz"):
        first = median(early, what)
        last = median(late, what)
        if first and last and last < CLOCK_DROP * first:
            reasons.append(
                f"{what[:3].upper()} clock fell from {first:.0f} to {last:.0f} MHz under load"
            )
    return reasons


def median(states: Sequence[State], what: str) -> float | None:
    values = [value for state in states if (value := getattr(state, what))]
    return statistics.median(values) if values else None


def thermal_record(
    before: State, early: Sequence[State], late: Sequence[State], after: State, root: Path = ROOT
) -> dict[str, Any]:
    """The looks as plain values for a record: hottest sensor, clocks, throttling. 'throttled' is
    None where the machine tells nothing.
    """
    looks = {"before": [before], "early": early, "late": late, "after": [after]}
    hot = {
        when: max((max(s.celsius.values()) for s in states if s.celsius), default=None)
        for when, states in looks.items()
    }
    reasons = throttling(before, early, late, after, trip_points(root))
    silent = all(state.empty for states in looks.values() for state in states)
    return {
        "celsius": {when: degrees for when, degrees in hot.items() if degrees is not None},
        "hottest": max(after.celsius, key=lambda zone: after.celsius[zone])
        if after.celsius
        else None,
        **{
            what: {when: value for when, states in looks.items() if (value := median(states, what))}
            for what in ("cpu_mhz", "gpu_mhz")
        },
        "throttled": bool(reasons) if reasons or not silent else None,
        "throttling": reasons,
    }
