"""Which JetPack a Jetson runs, and with it which TensorRT it has: read from the files NVIDIA's
releases leave behind.

An engine is exported on another desk, so a person must be told which profile to choose before the
first file is copied.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from edgemed.hardware.jetson import GENERATION, JETPACK, release

# (JetPack from here on, TensorRT it carries, profile of target tensorrt), newest first.
TENSORRT = (
    ((7, 2, 2), "11.4", "trt11"),
    ((7, 2), "10.16", "jetpack7"),
    ((7,), "10.13", "jetpack6"),
    ((6, 1), "10.3", "jetpack6"),
)


@dataclass(frozen=True)
class Jetson:
    """l4t: '36.4.3'. jetpack: '6.2.1', only its first number where the package is not installed, ''
    where unknown. tensorrt: what that JetPack carries.
    """

    l4t: str
    jetpack: str
    package: bool
    tensorrt: str
    profile: str


def read_jetson(root: Path = Path("/")) -> Jetson | None:
    """The release of this Jetson, None on anything else."""
    if (l4t := release(root)) is None:
        return None
    version = installed_jetpack()
    jetpack = version or JETPACK.get(l4t) or GENERATION.get(l4t.split(".")[0], "")
    numbers = tuple(int(part) for part in jetpack.split(".") if part.isdigit())
    # JetPack 6 without a second number is 6.1 or later on any current image.
    numbers = (6, 1) if numbers == (6,) else numbers
    tensorrt, profile = next(
        ((trt, profile) for since, trt, profile in TENSORRT if numbers >= since), ("", "")
    )
    return Jetson(
        l4t,
        jetpack,
        bool(version),
        tensorrt,
        profile,
    )


def installed_jetpack() -> str:
    """The version of the package nvidia-jetpack without its build number ('6.2.1+b38' -> '6.2.1'),
    '' where it is not installed.
    """
    if not shutil.which("dpkg-query"):
        return ""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", "nvidia-jetpack"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    return re.split(r"[+-]", done.stdout.strip())[0] if done.returncode == 0 else ""


def describe(found: Jetson) -> tuple[str, str]:
    """(what is here, the command that adds what is missing or '')."""
    text = f"JetPack {found.jetpack or 'unknown'}, L4T {found.l4t}"
    if found.jetpack.startswith("5"):
        return (
            f"{text}: its TensorRT 8 is too old for target tensorrt; use llamacpp or onnx",
            "Flash JetPack 6.2 or later",
        )
    if not found.profile:
        return f"{text}: no TensorRT profile is known for it", ""
    text += f" with TensorRT {found.tensorrt}: export engines with --set profile={found.profile}"
    if not found.package:
        return (
            f"{text}; the package nvidia-jetpack, which brings TensorRT, is not installed",
            "sudo apt install nvidia-jetpack",
        )
    if util.find_spec("tensorrt") is None:
        return (
            f"{text}; this Python does not see its module tensorrt",
            "Use the system's Python, or a venv made with --system-site-packages",
        )
    return text, ""
