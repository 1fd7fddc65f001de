"""Looks at a machine the way a run will use it: what is here, what is missing, and the command that
adds it.

A package that imports is not a runtime that works (one compiler bug crashes llama.cpp on quantized
prompts only), so every target's own self-check runs here. Nothing missing is a failure: a device
needs one runtime, a build machine others.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from edgemed import plugins
from edgemed.errors import EdgemedError, install_command
from edgemed.hardware import jetson, packages, power_sensors, thermal
from edgemed.hardware.device import gpus, machine, read_device
from edgemed.hardware.jetson import jetpack_state, read_jetson
from edgemed.hardware.sysfs import text


@dataclass(frozen=True)
class Finding:
    """One thing looked at. state: 'ok', 'missing' (optional, not there) or 'broken' (there, and
    does not work). fix: a command, or ''.
    """

    name: str
    state: Literal["ok", "missing", "broken"]
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at CPU, memory, disk, GPUs, Python, packages, and run every target's self-check. Takes
    seconds; fails for nothing missing.
    """
    findings = [
        *hardware(),
        *jetpack_findings(),
        Finding("python", "ok", platform.python_version()),
    ]
    findings += [package(name, extra) for name, extra in packages.every_package().items()]
    return findings + [self_check(name) for name in plugins.names("targets")]


def hardware() -> list[Finding]:
    """CPU with the instruction sets that matter, memory, free disk here, GPUs, and the known device
    this machine is.
    """
    import psutil

    facts = machine()
    cores = f"{facts['physical_cores']} cores" + (
        f", {facts['logical_cores']} threads"
        if facts["logical_cores"] != facts["physical_cores"]
        else ""
    )
    governor = f"; governor {facts['governor']}" if facts["governor"] else ""
    mode = f"; power mode {facts['power_mode']}" if facts["power_mode"] else ""
    known_device = []
    if facts["device"]:
        title = read_device(facts["device"]).title
        known_device.append(Finding("device", "ok", f"{title} ({facts['device']})"))
    return [
        *known_device,
        Finding(
            "cpu",
            "ok",
            f"{facts['cpu']}, {cores};"
            f" {' '.join(facts['flags']) or 'no known vector instructions'}{governor}{mode}",
        ),
        Finding(
            "memory",
            "ok",
            f"{facts['memory_bytes'] / 1e9:.1f} GB, {psutil.virtual_memory().available / 1e9:.1f}"
            " GB available",
        ),
        Finding(
            "disk",
            "ok",
            f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free in the current directory",
        ),
        *jetson_board(),
        *graphics(),
        *sensor_findings(power_sensors.find_sensors()),
        temperature(thermal.read_state()),
    ]


def jetpack_findings(root: Path = power_sensors.ROOT) -> list[Finding]:
    """On a Jetson: its JetPack, L4T and TensorRT, and what is missing of them; nothing
    elsewhere.
    """
    if (board := read_jetson(root)) is None:
        return []
    detail, fix = jetpack_state(board)
    return [
        Finding(
            "jetpack",
            "missing" if fix else "ok",
            detail,
            fix,
        )
    ]


def graphics(root: Path = power_sensors.ROOT) -> list[Finding]:
    """One finding per NVIDIA GPU, or that there is none, or what is wrong with its driver: not
    there, failing, or without CUDA.
    """
    cards, problem = gpus()
    if problem:
        return [
            Finding(
                "gpu",
                "broken",
                problem,
                "Reinstall the NVIDIA driver, then restart",
            )
        ]
    if not cards and jetson.gpu_clock_directory(root):
        return [
            Finding("gpu", "ok", "the Jetson's own GPU (this release has no nvidia-smi)"),
            *cuda(),
        ]
    if not cards and nvidia_hardware(root):
        fix = "Install the NVIDIA driver, then restart; in a container, start it with --gpus all"
        return [
            Finding(
                "gpu",
                "broken",
                "an NVIDIA GPU is on the PCI bus, and there is no driver here (no nvidia-smi)",
                fix,
            )
        ]
    if not cards:
        return [
            Finding("gpu", "missing", "no NVIDIA GPU found (no nvidia-smi); engines run on the CPU")
        ]
    details = []
    for card in cards:
        size = f", {card['memory_bytes'] / 1e9:.1f} GB" if card["memory_bytes"] else ""
        details.append(
            f"{card['name']}{size}, driver {card['driver']}, compute capability"
            f" {card['compute_capability']}"
        )
    return [*(Finding("gpu", "ok", detail) for detail in details), *cuda()]


def nvidia_hardware(root: Path) -> bool:
    """Whether a display or 3D controller (class 0x03) of NVIDIA (vendor 0x10de) is on the PCI bus,
    driver or not.
    """
    devices = (root / "sys/bus/pci/devices").glob("*")
    return any(
        text(d / "vendor") == "0x10de" and (text(d / "class") or "").startswith("0x03")
        for d in devices
    )


def cuda() -> list[Finding]:
    """Nothing where the driver brings CUDA, else what is missing: nvidia-smi works without libcuda,
    and no engine does.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        fix = (
            "Install the driver's compute libraries (Debian and Ubuntu: libnvidia-compute or"
            " libcuda1); in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )
        return [
            Finding(
                "cuda",
                "broken",
                "driver without CUDA: the GPU is there and libcuda.so.1 cannot be loaded"
                f" ({error})",
                fix,
            )
        ]
    return []


def jetson_board(root: Path = power_sensors.ROOT) -> list[Finding]:
    """JetPack and L4T release, nvpmodel mode, clocks; nothing on anything but a Jetson."""
    release = jetson.release(root)
    if not release:
        return []
    mode = jetson.nvpmodel_mode(root)
    clocks = jetson.clock_ranges(root)
    fix = "" if mode else "sudo nvpmodel -q says it; speeds differ by a factor of 1.6 between modes"
    findings = [
        Finding("jetson", "ok", jetson.jetpack_name(release)),
        Finding(
            "power mode",
            "ok" if mode else "missing",
            mode or "nvpmodel's mode cannot be read",
            fix,
        ),
    ]
    if clocks:
        findings.append(Finding("clocks", "ok", clocks))
    return findings


def sensor_findings(sensors: list[power_sensors.Sensor]) -> list[Finding]:
    """What measures power here, and what might and may not."""
    usable = [f"{s.name} ({s.how})" for s in sensors if not s.problem]
    refused = dict.fromkeys((s.problem, s.fix) for s in sensors if s.problem)
    if not sensors:
        return [Finding("power sensors", "missing", power_sensors.NONE_FOUND)]
    findings = [Finding("power sensors", "missing", *facts) for facts in refused]
    if usable:
        findings.insert(0, Finding("power sensors", "ok", ", ".join(usable)))
    return findings


def temperature(state: thermal.State) -> Finding:
    """The hottest sensor now, and the clocks."""
    if state.empty:
        return Finding(
            "temperature",
            "missing",
            "no thermal zone, no clock: throttling cannot be seen here (usual in virtual machines)",
        )
    hottest = max(state.celsius, key=lambda zone: state.celsius[zone], default=None)
    parts = [f"{hottest} {state.celsius[hottest]:.0f} °C" if hottest else "no temperature"]
    if state.cpu_mhz:
        parts += [f"CPU {state.cpu_mhz:.0f} MHz"]
    if state.gpu_mhz:
        parts += [f"GPU {state.gpu_mhz:.0f} MHz"]
    return Finding("temperature", "ok", ", ".join([*parts, *state.flags]))


def package(name: str, extra: str) -> Finding:
    """Whether a distribution is installed, and its version; nothing is imported."""
    for distribution in (name, *packages.instead_of().get(name, ())):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return Finding(
            name, "ok", version if distribution == name else f"{version} ({distribution})"
        )
    return Finding(
        name,
        "missing",
        "not installed",
        install(extra),
    )


def install(extra: str) -> str:
    return f"edgemed[{extra}]: {install_command(extra)}"


def self_check(target: str) -> Finding:
    """Run a target's own check of its runtime; 'missing' where the runtime is not installed.

    An exception other than EdgemedError is a bug in the target, and is not hidden.
    """
    module = plugins.load("targets", target)
    name = f"target {target}"
    package, extra = module.RUNTIME
    if util.find_spec(package) is None:
        return Finding(
            name,
            "missing",
            f"its runtime '{package}' is not installed",
            install(extra),
        )
    try:
        return Finding(name, "ok", module.self_check())
    except EdgemedError as error:
        return Finding(
            name,
            "broken",
            error.problem,
            error.fix,
        )
