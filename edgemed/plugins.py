"""The folder is the registry: a file families/gpt2.py is the family 'gpt2', and nothing else has to
be edited.

Kept this small on purpose, so that adding a family, step, target, task, quantization method or
device is one new file and the contract tests find it by walking the same folders.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from edgemed.errors import EdgemedError, extras_named, nearest

ROOT = Path(__file__).parent
CODE_KINDS = ("families", "steps", "targets", "tasks")
# Folders of plug-ins inside of a package.
INNER_KINDS = {"quantization/methods": "quantization method"}


def names(kind: str) -> list[str]:
    """Names of all plug-ins of a kind: 'families', 'steps', 'targets', 'tasks',
    'quantization/methods' (modules) or 'devices' (YAML files).
    """
    suffix = ".py" if kind in CODE_KINDS or kind in INNER_KINDS else ".yaml"
    return sorted(f.stem for f in (ROOT / kind).glob(f"*{suffix}") if not f.stem.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """The module behind a name. Raises EdgemedError with the nearest known name."""
    if name not in names(kind):
        singular = {"families": "family", **INNER_KINDS}.get(kind, kind.rstrip("s"))
        raise EdgemedError(f"unknown {singular} '{name}'", nearest(name, names(kind)))
    with extras_named():
        return importlib.import_module(f"edgemed.{kind.replace('/', '.')}.{name}")


def shared(folder: str) -> Path:
    """A data folder ('recipes', 'calibration'): inside an installed package, or beside it in a
    source checkout.
    """
    inside = ROOT / folder
    return inside if inside.is_dir() else ROOT.parent / folder
