"""Devices as numbers, and what this machine is: every record carries the second, every plan reads the first.

A speed without the machine it was measured on says nothing, so the facts that change it (cores, instruction sets, governor,
power mode, GPUs) are read once here, and the memory bandwidth that bounds it is measured rather than believed.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgemed import jetson, params, plugins
from edgemed.errors import EdgemedError, nearest

GIB = 1 << 30
# Instruction sets that decide which kernels a runtime picks; the rest of /proc/cpuinfo is noise in a record.
FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
         "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")


@dataclass(frozen=True)
class Device:
    """One target device as published: memory_gb in GiB, bandwidth in 10^9 bytes/s. None and empty mean not known, not zero.

    shared_memory: weights share their memory with the operating system. tensorrt: JetPack release -> TensorRT version.
    recognise: 'device_tree' -> a part of the board's name, or 'gpu' -> the end of the card's name, by which such a machine is known.
    """

    name: str
    title: str
    shared_memory: bool
    source: tuple[str, ...]
    memory_gb: float | None = None
    memory: str = ""
    bandwidth_gb_s: float | None = None
    bandwidth_note: str = ""
    cpu: str = ""
    gpu: str = ""
    compute_capability: str = ""
    int8_tops_sparse: float | None = None
    power_modes: tuple[str, ...] = ()
    tensorrt: dict[str, str] = field(default_factory=dict)
    recognise: dict[str, str] = field(default_factory=dict)


def read_device(name: str) -> Device:
    """The device of devices/NAME.yaml. Raises EdgemedError for an unknown name or key, naming the nearest known one."""
    import yaml

    if name not in plugins.names("devices"):
        raise EdgemedError(f"unknown device '{name}'", nearest(name, plugins.names("devices")))
    file = plugins.ROOT / "devices" / f"{name}.yaml"
    return params.build(Device, {"name": name, **yaml.safe_load(file.read_text(encoding="utf-8"))}, file.name)


def machine() -> dict[str, Any]:
    """What this machine is, for records: no host name, no path, nothing about a person.

    Keys: label (short and stable, for file names), cpu, architecture, logical_cores, physical_cores, flags, cache_bytes (last level), memory_bytes,
    governor, power_mode, gpus [{name, memory_bytes, driver, compute_capability}], device (a name under devices/, or None), os.
    """
    return copy.deepcopy(_machine())


@functools.cache
def _machine() -> dict[str, Any]:
    import psutil

    cpu, logical = cpu_name(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = {
        "cpu": cpu, "architecture": platform.machine(), "logical_cores": logical,
        # Some Arm kernels do not tell cores from threads; there the two are the same.
        "physical_cores": min(psutil.cpu_count(logical=False) or logical, logical),
        "flags": cpu_flags(), "cache_bytes": last_level_cache(), "memory_bytes": psutil.virtual_memory().total,
        "governor": _line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"), "power_mode": power_mode(), "gpus": gpus()[0], "os": os_name(),
    }
    facts["device"] = recognised(facts["memory_bytes"], facts["gpus"], board())
    names = [facts["device"]] if facts["device"] else [cpu, f"{facts['physical_cores']}c", *(gpu["name"] for gpu in facts["gpus"][:1])]
    return {"label": slug(" ".join(names)), **facts}


def slug(text: str) -> str:
    """'AMD EPYC 9654 96-Core Processor 2c' -> 'amd-epyc-9654-2c'."""
    text = re.sub(r"\((R|TM|C)\)|\b\d+-Core\b|\b(CPU|Processor)\b|@.*?GHz", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_name() -> str:
    """The CPU's own name; lscpu knows it on Arm, where /proc/cpuinfo gives only part numbers."""
    if found := re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE):
        return found[1].strip()
    found = re.findall(r"^Model name:\s*(.+)$", _output(["lscpu"])[0], re.MULTILINE)
    return " + ".join(found) or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    known = set(found[1].split()) if found else set()
    return [flag for flag in FLAGS if flag in known]


def board() -> str:
    """The board's name from the device tree ('NVIDIA Jetson Orin Nano ...', 'Raspberry Pi 5 ...'), empty on a PC."""
    return _text("/proc/device-tree/model").strip("\0\n ")


def os_name() -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text("/etc/os-release"), re.MULTILINE)
    return found[1] if found else f"{platform.system()} {platform.release()}"


def power_mode() -> str | None:
    """The Jetson's nvpmodel mode, which alone makes a factor of 1.6 in speed; None elsewhere."""
    found = re.search(r"NV Power Mode:\s*(.+)", _output(["nvpmodel", "-q"])[0])
    return found[1].strip() if found else jetson.power_mode(Path("/"))


def gpus() -> tuple[list[dict[str, Any]], str | None]:
    """NVIDIA GPUs as nvidia-smi tells them, and what is wrong where it is there but fails."""
    if not shutil.which("nvidia-smi"):
        return [], None
    text, problem = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"])
    if problem:
        return [], problem
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.count(",") == 3]
    # Jetsons share their memory and answer [N/A] for it.
    return [
        {"name": name, "memory_bytes": int(mib) << 20 if mib.isdigit() else None, "driver": driver, "compute_capability": capability}
        for name, mib, driver, capability in rows
    ], None


def recognised(memory_bytes: int, gpus: list[dict[str, Any]], board: str) -> str | None:
    """The name under devices/ of a machine with this memory, these GPUs and this board, or None.

    A board's name is shared by its memory sizes, so the memory must match besides; firmware keeps up to a fifth for itself.
    """
    for name in plugins.names("devices"):
        device = read_device(name)
        found = [memory_bytes] if "device_tree" in device.recognise and device.recognise["device_tree"] in board else []
        if "gpu" in device.recognise:
            found += [gpu["memory_bytes"] or 0 for gpu in gpus if gpu["name"].endswith(device.recognise["gpu"])]
        if device.memory_gb and any(0.8 * device.memory_gb <= size / GIB <= 1.02 * device.memory_gb for size in found):
            return name
    return None


def read_bandwidth(threads: int, rounds: int = 30) -> float:
    """Measured memory read bandwidth in 10^9 bytes/s with `threads` threads: the best of `rounds` rounds of each way of reading.

    The buffer is far larger than the last-level cache, and its parts are handed out as threads become free, so that one slow core
    does not lower the result; rounds are many and short, so that some fall between what else the machine does. Three reductions
    that write nothing are tried, since which is fastest depends on the CPU; none uses BLAS, which would start threads of its own.
    """
    import psutil

    if rounds < 5:
        raise EdgemedError(f"{rounds} rounds are too few to measure bandwidth", "Use 5 or more")
    size = min(max(256 << 20, 8 * last_level_cache()), psutil.virtual_memory().available // 4)
    # Written once: pages never written would all be the one zero page, which stays in the cache.
    buffer = np.ones(size // 8, np.int64)
    ways = [(np.bitwise_or.reduce, np.int64), (np.max, np.uint8), (np.max, np.float64)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            for way, dtype in ways:
                pieces = np.array_split(buffer.view(dtype), 16 * threads)
                started = time.perf_counter()
                for _ in pool.map(way, pieces):
                    pass
                best = min(best, time.perf_counter() - started)
    return buffer.nbytes / best / 1e9


def last_level_cache() -> int:
    """Bytes of the largest cache the kernel lists for the first core, 0 where it lists none."""
    units, sizes = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}, [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KMG])", _text(str(file)).strip()):
            sizes.append(int(found[1]) * units[found[2]])
    return max(sizes)


def _text(path: str) -> str:
    # These files exist on some kernels and boards only; where one is missing, the fact is not known.
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
    message = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[0]
    return done.stdout, f"{command[0]}: {message}" if done.returncode else None
