"""Looks at a machine the way a run will use it: what is here, what is missing, and the command that adds it.

A package that imports is not a runtime that works (one compiler bug crashes llama.cpp on quantized prompts only), so every target's
own self-check runs here. Nothing missing is a failure: a device needs one runtime, a build machine others.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from edgemed import plugins
from edgemed.device import gpus, machine, read_device
from edgemed.errors import EdgemedError
from edgemed.jetson import describe, read_jetson

# Distributions, and the extra of pyproject.toml that brings each. The core's own are listed by `edgemed` being installed at all.
PACKAGES = {
    "torch": "build", "transformers": "build", "peft": "build", "safetensors": "build", "onnx": "build", "gguf": "build",
    "onnxruntime": "onnx", "llama-cpp-python": "llamacpp", "tensorrt": "tensorrt", "bitsandbytes": "bnb",
}
# Other distributions of the same package: the GPU build of ONNX Runtime is installed instead of the plain one.
ALSO = {"onnxruntime": ("onnxruntime-gpu",)}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. state: 'ok', 'missing' (optional, not there) or 'broken' (there, and does not work). fix: a command, or ''."""

    name: str
    state: Literal["ok", "missing", "broken"]
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at CPU, memory, disk, GPUs, Python, packages, and run every target's self-check. Takes seconds; fails for nothing missing."""
    found = [*hardware(), *jetpack(), Finding("python", "ok", platform.python_version())]
    found += [package(name, extra) for name, extra in PACKAGES.items()]
    return found + [self_check(name) for name in plugins.names("targets")]


def hardware() -> list[Finding]:
    """CPU with the instruction sets that matter, memory, free disk here, GPUs, and the known device this machine is."""
    import psutil

    facts = machine()
    cores = f"{facts['physical_cores']} cores" + (f", {facts['logical_cores']} threads" if facts["logical_cores"] != facts["physical_cores"] else "")
    governor = f"; governor {facts['governor']}" if facts["governor"] else ""
    mode = f"; power mode {facts['power_mode']}" if facts["power_mode"] else ""
    known = [Finding("device", "ok", f"{read_device(facts['device']).title} ({facts['device']})")] if facts["device"] else []
    return [
        *known,
        Finding("cpu", "ok", f"{facts['cpu']}, {cores}; {' '.join(facts['flags']) or 'no known vector instructions'}{governor}{mode}"),
        Finding("memory", "ok", f"{facts['memory_bytes'] / 1e9:.1f} GB, {psutil.virtual_memory().available / 1e9:.1f} GB available"),
        Finding("disk", "ok", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB free in the current directory"),
        *graphics(),
    ]


def jetpack() -> list[Finding]:
    """On a Jetson: its JetPack, L4T and TensorRT, and what is missing of them; nothing elsewhere."""
    if (found := read_jetson()) is None:
        return []
    detail, fix = describe(found)
    return [Finding("jetpack", "missing" if fix else "ok", detail, fix)]


def graphics() -> list[Finding]:
    """One finding per NVIDIA GPU, or that there is none, or what is wrong with its driver."""
    cards, problem = gpus()
    if problem:
        return [Finding("gpu", "broken", problem, "Reinstall the NVIDIA driver, then restart")]
    if not cards:
        return [Finding("gpu", "missing", "no NVIDIA GPU found (no nvidia-smi); engines run on the CPU")]
    details = []
    for card in cards:
        size = f", {card['memory_bytes'] / 1e9:.1f} GB" if card["memory_bytes"] else ""
        details.append(f"{card['name']}{size}, driver {card['driver']}, compute capability {card['compute_capability']}")
    return [Finding("gpu", "ok", detail) for detail in details]


def package(name: str, extra: str) -> Finding:
    """Whether a distribution is installed, and its version; nothing is imported."""
    for distribution in (name, *ALSO.get(name, ())):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return Finding(name, "ok", version if distribution == name else f"{version} ({distribution})")
    return Finding(name, "missing", "not installed", install(extra))


def install(extra: str) -> str:
    return f"pip install 'edgemed[{extra}]'"


def self_check(target: str) -> Finding:
    """Run a target's own check of its runtime; 'missing' where the runtime is not installed.

    An exception other than EdgemedError is a bug in the target, and is not hidden.
    """
    module, name = plugins.load("targets", target), f"target {target}"
    package, extra = module.RUNTIME
    if util.find_spec(package) is None:
        return Finding(name, "missing", f"its runtime '{package}' is not installed", install(extra))
    try:
        return Finding(name, "ok", module.self_check())
    except EdgemedError as error:
        return Finding(name, "broken", error.problem, error.fix)
