"""The distributions edgemed works with, and the extra of pyproject.toml that brings each.

What a target needs is said by the target itself; here is what no target owns. The doctor looks for
them, and every artifact records their versions.
"""

from __future__ import annotations

from edgemed import plugins

# The core's own are listed by `edgemed` being installed at all.
BUILD = {
    "torch": "build",
    "transformers": "build",
    "peft": "build",
    "safetensors": "build",
}
FURTHER = {
    "bitsandbytes": "bnb",
    "nvidia-ml-py": "nvml",
}


def of_targets() -> dict[str, str]:
    """Distribution -> extra of everything some target needs."""
    packages: dict[str, str] = {}
    for name in plugins.names("targets"):
        packages.update(plugins.load("targets", name).PACKAGES)
    return packages


def instead_of() -> dict[str, tuple[str, ...]]:
    """Distribution -> other distributions of the same package, such as a build for GPUs."""
    others: dict[str, tuple[str, ...]] = {}
    for name in plugins.names("targets"):
        others.update(plugins.load("targets", name).PACKAGES_INSTEAD)
    return others


def every_package() -> dict[str, str]:
    """Distribution -> extra, in the order in which a person reads them."""
    return {**BUILD, **of_targets(), **FURTHER}
