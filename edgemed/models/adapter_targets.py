"""Which modules an adapter's config asks for, and with which rank and alpha, as peft matches names.

peft matches the names of the model it has in hand. An adapter may be older than the model's names,
so edgemed matches the names the adapter was written with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# target_modules of this value are a rule about classes, not about names.
ALL_LINEAR = "all-linear"


def is_targeted(values: Mapping[str, Any], module: str) -> bool:
    """Whether a config asks for a change of a module (peft's check_target_module_exists)."""
    if _matches(values.get("exclude_modules"), module):
        return False
    saved = values.get("modules_to_save") or []
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    targets: Any = values.get("target_modules")
    if not _matches(targets, module):
        return False
    # Named in full, or by a pattern, a module is meant whatever its layer.
    if isinstance(targets, str) or module in targets or values.get("layers_to_transform") is None:
        return True
    return _in_layers(values, module)


def rank_of(values: Mapping[str, Any], module: str) -> int:
    """A module's rank: the first pattern's that matches its name, else the config's."""
    rank: int = _by_pattern(values.get("rank_pattern"), module, values.get("r", 8))
    return rank


def lora_scale(values: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023); alpha may
    differ by module, as peft matches its patterns.
    """
    alpha: float = alpha_of(values, module)
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def alpha_of(values: Mapping[str, Any], module: str) -> float:
    """A module's alpha: the first pattern's that matches its name, else the config's."""
    alpha: float = _by_pattern(values.get("alpha_pattern"), module, values.get("lora_alpha", 8))
    return alpha


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _matches(targets: Any, module: str) -> bool:
    """Whether a pattern matches a whole name, or a name of a list is the module's or its end."""
    if not targets:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return module in targets or any(module.endswith(f".{name}") for name in targets)


def _in_layers(values: Mapping[str, Any], module: str) -> bool:
    """Whether a module is in one of the layers that layers_to_transform names."""
    layers = values["layers_to_transform"]
    if layers == []:
        return True
    patterns = values.get("layers_pattern") or []
    match = None
    if patterns:
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module)
            if match:
                break
    else:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
    if match is None:
        return False
    index = int(match["idx"])
    return index == layers if isinstance(layers, int) else index in layers
