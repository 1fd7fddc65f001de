"""Devices as numbers, and what this machine is: every record carries the second, every plan reads
the first.

A speed without the machine it was measured on says nothing, so the facts that change it (cores,
instruction sets, governor, power mode, GPUs) are read once here, and the memory bandwidth that
bounds it is measured rather than believed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from edgemed import params, plugins
from edgemed.documents.yaml_files import read_yaml_mapping
from edgemed.errors import EdgemedError, nearest
from edgemed.hardware import jetson
from edgemed.hardware.threads import check_threads

GIB = 1 << 30
# A figure of hardware; none reaches 10^9 in its unit.
Positive = Annotated[float, params.Range(above=0, high=1e9)]
# Instruction sets that decide which kernels a runtime picks; the rest of /proc/cpuinfo is noise in
# a record.
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


# What an operating system, the runtime and its work buffers are assumed to hold beside the engine:
# an assumption, not a measurement.
RESERVE_SHARED = int(1.5 * GIB)
RESERVE_OWN = GIB // 2
# First compute capability whose instructions do arithmetic in a precision (CUDA C++ Programming
# Guide). int4 here is a storage format that kernels widen before they multiply, so every GPU has
# it.
SINCE = {"fp16": 5.3, "int8": 6.1, "bf16": 8.0, "fp8": 8.9, "fp4": 10.0}
# The part of a device file that says where a number is from.
SOURCE_OF = {
    "memory_gb": "memory",
    "usable_gb": "memory",
    "bandwidth_gb_s": "bandwidth",
    "achievable_gb_s": "bandwidth",
    "compute_capability": "compute",
    "gpu_mhz": "compute",
    "compute": "compute",
    "achieved": "compute",
    "sparse": "compute",
    "launch_us": "compute",
    "power_modes": "power",
    "tensorrt": "software",
    "cuda": "software",
}


@dataclass(frozen=True)
class PowerMode:
    """One power mode. watts: what the whole module or card may draw; bandwidth_gb_s, gpu_mhz: what
    it leaves; None: not known.

    gpu_share: share of the GPU's processors that are switched on.
    """

    name: str
    watts: Positive | None = None
    bandwidth_gb_s: Positive | None = None
    gpu_mhz: Positive | None = None
    gpu_share: Annotated[float, params.Range(above=0, high=1)] = 1.0


@dataclass(frozen=True)
class Device:
    """One target device as published or measured: memory in GiB, bandwidth in 10^9 bytes/s. None
    and empty mean not known, not zero.

    source: where the numbers are from, by part ('memory', 'bandwidth', 'compute', 'power',
    'software'); see SOURCE_OF. usable_gb: what is left for an engine, where measured.
    shared_memory: weights share their memory with the operating system. bandwidth_gb_s: the limit
    on paper, achievable_gb_s: what a benchmark that only reads reached. compute: precision -> 10^12
    operations/s of dense matrices on paper at gpu_mhz; sparse: figures that count skipped zeros,
    for comparison only; achieved: the same measured. launch_us: measured time of starting one
    kernel or call. power_modes: from the least to the most. tensorrt, cuda: JetPack release (or
    'since') -> version. recognise: 'device_tree' -> a part of the board's name, 'gpu' -> the end of
    the card's name, 'cpu' -> a part of the CPU's name, by which such a machine is known.
    """

    name: str
    title: str
    shared_memory: bool
    source: dict[str, str]
    memory_gb: Positive | None = None
    usable_gb: Positive | None = None
    memory: str = ""
    bandwidth_gb_s: Positive | None = None
    achievable_gb_s: Positive | None = None
    bandwidth_note: str = ""
    cpu: str = ""
    gpu: str = ""
    compute_capability: str = ""
    gpu_mhz: Positive | None = None
    compute: dict[str, Positive] = field(default_factory=dict)
    achieved: dict[str, Positive] = field(default_factory=dict)
    compute_note: str = ""
    sparse: dict[str, Positive] = field(default_factory=dict)
    launch_us: Positive | None = None
    power_modes: tuple[PowerMode, ...] = ()
    tensorrt: dict[str, str] = field(default_factory=dict)
    cuda: dict[str, str] = field(default_factory=dict)
    recognise: dict[str, str] = field(default_factory=dict)


def read_device(name: str) -> Device:
    """The device of devices/NAME.yaml, or of a file that `edgemed doctor --measure` or a person
    wrote.

    Raises EdgemedError for an unknown name or key, naming the nearest known one, for a file that is
    missing or is no mapping, and for a value of the wrong type or out of its range.
    """
    device_names = plugins.names("devices")
    file = Path(name)
    if name in device_names:
        file = plugins.ROOT / "devices" / f"{name}.yaml"
    elif file.suffix != ".yaml":
        raise EdgemedError(
            f"unknown device '{name}'",
            f"{nearest(name, device_names)}. A file of your own ends in .yaml",
        )
    if not file.is_file():
        raise EdgemedError(
            f"device file {name} does not exist",
            "Write one with: edgemed doctor --measure --out DEVICE.yaml",
        )
    values = read_yaml_mapping(file, "Correct it: see docs/add-a-device.md")
    device = params.build(Device, {"name": file.stem, **values}, file.name)
    capability = device.compute_capability
    if capability and not re.fullmatch(r"[1-9]\d?\.\d", capability):
        raise EdgemedError(
            f"{file.name}.compute_capability: '{capability}' is no version", "For example '8.7'"
        )
    return device


def power_mode_of(device: Device, name: str | None) -> PowerMode:
    """The power mode called `name` ('30W' is also MODE_30W); without a name the highest, or one
    that changes nothing.

    Raises EdgemedError for a name the device does not have.
    """
    if name is None:
        return device.power_modes[-1] if device.power_modes else PowerMode("as it is")
    for mode in device.power_modes:
        if _plain_mode(mode.name) == _plain_mode(name):
            return mode
    raise EdgemedError(
        f"{device.name} has no power mode '{name}'",
        nearest(name, [mode.name for mode in device.power_modes]),
    )


def _plain_mode(name: str) -> str:
    return re.sub(r"[\s_]+", "", name.upper()).removeprefix("MODE")


def lacks(device: Device, precision: str) -> str | None:
    """Why a device cannot do arithmetic in 'fp16', 'bf16', 'int8', 'fp8' or 'fp4', or None. int4
    and fp32 run everywhere.
    """
    if precision not in SINCE:
        return None
    if not device.compute_capability:
        return (
            f"{device.title} runs engines on its CPU, and no CPU does arithmetic in {precision}"
            if precision in ("fp8", "fp4")
            else None
        )
    if float(device.compute_capability) >= SINCE[precision]:
        return None
    return (
        f"{device.title} has no {precision} arithmetic: it came with compute capability"
        f" {SINCE[precision]}, this GPU has {device.compute_capability}"
    )


def fits(needed: int, device: Device) -> bool | None:
    """Whether an engine of `needed` bytes (weights and KV cache) leaves a device its reserve; None
    where its memory is not known.
    """
    room = usable(device)
    return None if room is None else needed <= room


def usable(device: Device) -> int | None:
    """Bytes left for an engine: as measured, or memory less 1.5 GiB where the system shares it,
    less 0.5 GiB on a card of its own; None: not known.
    """
    if device.usable_gb is not None:
        return int(device.usable_gb * GIB)
    if device.memory_gb is None:
        return None
    return int(device.memory_gb * GIB) - (RESERVE_SHARED if device.shared_memory else RESERVE_OWN)


def machine() -> dict[str, Any]:
    """What this machine is, for records: no host name, no path, nothing about a person.

    Keys: label (short and stable, for file names), cpu, architecture, logical_cores,
    physical_cores, flags, cache_bytes (last level), memory_bytes, governor, power_mode, gpus
    [{name, memory_bytes, driver, compute_capability}], device (a name under devices/, or None), os.
    """
    return copy.deepcopy(_machine())


@functools.cache
def _machine() -> dict[str, Any]:
    import psutil

    cpu = cpu_name()
    logical = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    facts: dict[str, Any] = {
        "cpu": cpu,
        "architecture": platform.machine(),
        "logical_cores": logical,
        # Some Arm kernels do not tell cores from threads; there the two are the same.
        "physical_cores": min(psutil.cpu_count(logical=False) or logical, logical),
        "flags": cpu_flags(),
        "cache_bytes": last_level_cache(),
        "memory_bytes": psutil.virtual_memory().total,
        "governor": _line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "power_mode": power_mode(),
        "gpus": gpus()[0],
        "os": os_name(),
    }
    facts["device"] = recognised(facts["memory_bytes"], facts["gpus"], board_name(), cpu)
    names = (
        [facts["device"]]
        if facts["device"]
        else [cpu, f"{facts['physical_cores']}c", *(gpu["name"] for gpu in facts["gpus"][:1])]
    )
    return {"label": slug(" ".join(names)), **facts}


def slug(text: str) -> str:
    """'AMD EPYC 9654 96-Core Processor 2c' -> 'amd-epyc-9654-2c'."""
    text = re.sub(
        r"\((R|TM|C)\)|\b\d+-Core\b|\b(CPU|Processor)\b|@.*?GHz", " ", text, flags=re.IGNORECASE
    )
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_name() -> str:
    """The CPU's own name; lscpu knows it on Arm, where /proc/cpuinfo gives only part numbers, and
    sysctl on a Mac.
    """
    own_name = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    if own_name:
        return own_name[1].strip()
    listed = re.findall(r"^Model name:\s*(.+)$", _output(["lscpu"])[0], re.MULTILINE)
    return (
        " + ".join(listed)
        or _output(["sysctl", "-n", "machdep.cpu.brand_string"])[0].strip()
        or platform.processor()
        or platform.machine()
    )


def cpu_flags() -> list[str]:
    line = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    flags = set(line[1].split()) if line else set()
    return [flag for flag in FLAGS if flag in flags]


def board_name() -> str:
    """The board's name from the device tree ('NVIDIA Jetson Orin Nano ...', 'Raspberry Pi 5 ...'),
    empty on a PC.
    """
    return _text("/proc/device-tree/model").strip("\0\n ")


def os_name() -> str:
    line = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text("/etc/os-release"), re.MULTILINE)
    return line[1] if line else f"{platform.system()} {platform.release()}"


def power_mode() -> str | None:
    """The Jetson's nvpmodel mode, which alone makes a factor of 1.6 in speed; None elsewhere."""
    line = re.search(r"NV Power Mode:\s*(.+)", _output(["nvpmodel", "-q"])[0])
    return line[1].strip() if line else jetson.nvpmodel_mode(Path("/"))


def gpus() -> tuple[list[dict[str, Any]], str | None]:
    """NVIDIA GPUs as nvidia-smi tells them, and what is wrong where it is there but fails."""
    if not shutil.which("nvidia-smi"):
        return [], None
    text, problem = _output(
        [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version,compute_cap",
            "--format=csv,noheader,nounits",
        ]
    )
    if problem:
        return [], problem
    rows = [
        [part.strip() for part in line.split(",")]
        for line in text.splitlines()
        if line.count(",") == 3
    ]
    # Jetsons share their memory and answer [N/A] for it.
    return [
        {
            "name": name,
            "memory_bytes": int(mib) << 20 if mib.isdigit() else None,
            "driver": driver,
            "compute_capability": capability,
        }
        for name, mib, driver, capability in rows
    ], None


def gpu_clock() -> float | None:
    """Highest clock of the first GPU's processors in MHz, as nvidia-smi tells it."""
    megahertz = re.match(
        r"\d+",
        _output(["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"])[0],
    )
    return float(megahertz[0]) if megahertz else None


def recognised(
    memory_bytes: int, gpus: list[dict[str, Any]], board: str, cpu: str = ""
) -> str | None:
    """The name under devices/ of a machine with this memory, these GPUs, this board and this CPU,
    or None.

    A board's or CPU's name is shared by its memory sizes, so the memory must match besides;
    firmware keeps up to a fifth for itself.
    """
    for name in plugins.names("devices"):
        device = read_device(name)
        # Whole words: 'Apple M1' is not an 'Apple M1 Pro', but 'Ryzen 7 5800U' is followed by the
        # words 'with Radeon Graphics'.
        by_cpu = "cpu" in device.recognise and re.search(
            rf"\b{re.escape(device.recognise['cpu'])}\b(?! (?:Pro|Max|Ultra)\b)", cpu
        )
        by_board = "device_tree" in device.recognise and device.recognise["device_tree"] in board
        sizes = []
        if by_cpu or by_board:
            sizes.append(memory_bytes)
        if "gpu" in device.recognise:
            sizes += [
                gpu["memory_bytes"] or 0
                for gpu in gpus
                if gpu["name"].endswith(device.recognise["gpu"])
            ]
        if device.memory_gb and any(
            0.8 * device.memory_gb <= size / GIB <= 1.02 * device.memory_gb for size in sizes
        ):
            return name
    return None


# A server's cache of half a gigabyte wants a buffer of two: thirty rounds would take minutes there.
BANDWIDTH_SECONDS = 4.0


def read_bandwidth(threads: int, rounds: int = 30) -> float:
    """Measured memory read bandwidth in 10^9 bytes/s with `threads` threads: the best of `rounds`
    rounds of each way of reading, fewer (5 at least) where they would take more than
    BANDWIDTH_SECONDS.

    The buffer is far larger than the last-level cache, and its parts are handed out as threads
    become free, so that one slow core does not lower the result; rounds are many and short, so that
    some fall between what else the machine does. Three reductions that write nothing are tried,
    since which is fastest depends on the CPU; none uses BLAS, which would start threads of its own.
    """
    import psutil

    if rounds < 5:
        raise EdgemedError(f"{rounds} rounds are too few to measure bandwidth", "Use 5 or more")
    check_threads(threads)
    size = min(max(256 << 20, 4 * last_level_cache()), psutil.virtual_memory().available // 4)
    # Written once: pages never written would all be the one zero page, which stays in the cache.
    buffer = np.ones(size // 8, np.int64)
    ways: list[tuple[Callable[[np.ndarray], Any], type]] = [
        (np.bitwise_or.reduce, np.int64),
        (np.max, np.uint8),
        (np.max, np.float64),
    ]
    best = float("inf")
    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds):
            if number >= 5 and time.perf_counter() - begun > BANDWIDTH_SECONDS:
                break
            for way, dtype in ways:
                pieces: list[np.ndarray] = np.array_split(buffer.view(dtype), 16 * threads)
                started = time.perf_counter()
                for _ in pool.map(way, pieces):
                    pass
                best = min(best, time.perf_counter() - started)
    return buffer.nbytes / best / 1e9


def last_level_cache() -> int:
    """Bytes of the largest cache the kernel lists for the first core, 0 where it lists none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if size := re.fullmatch(r"(\d+)([KMG])", _text(str(file)).strip()):
            sizes.append(int(size[1]) * units[size[2]])
    return max(sizes)


def _text(path: str) -> str:
    # These files exist on some kernels and boards only; where one is missing, the fact is not
    # known.
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def _line(path: str) -> str | None:
    return _text(path).strip() or None


def _output(command: list[str]) -> tuple[str, str | None]:
    """(standard output, what went wrong); a program that is not there gives ('', None)."""
    if not shutil.which(command[0]):
        return "", None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} does not answer within 20 s"
    message = (
        done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
    ).splitlines()[0]
    return done.stdout, f"{command[0]}: {message}" if done.returncode else None
