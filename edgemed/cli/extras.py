"""Every optional package that a command line needs, so that a person installs all of them at once.

It is asked only where one is found missing: what is installed is never looked at before a verb
runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgemed import plugins
from edgemed.errors import EdgemedError, is_installed

BUILDING = ("merge", "quantize", "distill", "export", "run", "experts", "ttt")
DOCUMENTING = ("export", "run", "card")


def absent(verb: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Module -> extra of what a verb with these options needs and this machine lacks."""
    return {module: extra for module, extra in needed(verb, values) if not is_installed(module)}


def needed(verb: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(module, extra) of every optional package, as far as the options tell."""
    if verb in BUILDING or values.get("source"):
        for module in ("torch", "transformers", "safetensors"):
            yield module, "build"
    if verb in DOCUMENTING:
        yield "cyclonedx", "bom"
    has_images = bool(values.get("image")) and verb == "generate"
    # What cannot be read is named by the verb itself.
    with contextlib.suppress(EdgemedError, OSError):
        for target, has_vision in engines_of(verb, values):
            yield plugins.load("targets", target).RUNTIME
            has_images = has_images or has_vision
    if has_images:
        yield "PIL", "vision"


def engines_of(verb: str, values: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """(target, whether it reads images) of every engine that a command line makes or runs."""
    from edgemed.artifacts.json_files import read_json_object
    from edgemed.pipeline.recipe import read_recipe

    if verb == "run":
        recipe = read_recipe(values["recipe"], values.get("sets") or ())
        config = Path(recipe.model) / "config.json"
        has_vision = config.is_file() and "vision_config" in read_json_object(config, "")
        return [(stage.plugin, has_vision) for stage in recipe.engines]
    if verb == "export":
        return [(values["target"], False)]
    file = Path(values.get("engine") or "") / "engine.json"
    if not file.is_file():
        return []
    content = read_json_object(file, "")
    return [(str(content.get("target")), bool(content.get("vision")))]
