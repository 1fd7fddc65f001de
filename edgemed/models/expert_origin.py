"""Whether the experts of a layer come from one model: what the headers of a checkpoint's files tell
about it.

Weights alone do not tell: trained experts of one model have little in common, so no statistic of
theirs would be evidence. What can be seen is that one expert has another size, number format or set
of biases than the others, or lies in a file that names another base model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from edgemed.errors import EdgemedError
from edgemed.models.architecture import ParamSpec
from edgemed.models.checkpoint import Checkpoint
from edgemed.models.safetensors_file import metadata

NAME = re.compile(r"layers\.(\d+)\.experts\.(\d+)\.(.+)")
# What tools call the model that weights were made from, in the metadata of a safetensors file.
BASE = ("base_model", "base_model_name_or_path")


def check_expert_origins(
    checkpoint: Checkpoint, parts: Mapping[str, ParamSpec], keys: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise EdgemedError naming layer and expert for the first expert that differs from most of its
    layer's in a way other than its numbers.

    keys: canonical part -> the checkpoint's modules. Packed matrices are compared among themselves
    in biases and named bases only: bits may differ by design.
    """
    base_of: dict[str, str | None] = {}  # file -> the base model that its metadata names
    # (layer, matrix, property) -> expert -> (value, tensor)
    properties: dict[tuple[int, str, str], dict[int, tuple[str, str]]] = {}
    for name, part in parts.items():
        match = NAME.fullmatch(name)
        if match is None:
            continue
        layer = int(match[1])
        expert = int(match[2])
        matrix = match[3]
        for number, key in enumerate(keys[name]):
            tensor = part.weight(key)
            for what, value in _properties(checkpoint, tensor, key, base_of).items():
                experts = properties.setdefault((layer, f"{matrix} {number}", what), {})
                experts[expert] = (value, tensor)
    for (layer, _, what), experts in sorted(properties.items()):
        usual = Counter(value for value, _ in experts.values()).most_common(1)[0][0]
        for expert, (value, tensor) in sorted(experts.items()):
            if value != usual:
                raise EdgemedError(
                    f"{checkpoint.path}: layer {layer}, expert {expert}: '{tensor}' {what} {value},"
                    f" the other experts' {usual}",
                    "The experts come from different models; download the checkpoint again, or put"
                    " together what belongs together",
                )


def _properties(
    checkpoint: Checkpoint, tensor: str, key: str, base_of: dict[str, str | None]
) -> dict[str, str]:
    # verb -> value, of one expert's module; base_of is filled on the way
    entry = checkpoint.tensors.get(tensor)
    stored = entry or checkpoint.tensors.get(f"{key}.qweight")
    if stored is None:
        return {}
    file = str(stored.file)
    if file not in base_of:
        words = metadata(stored.file)
        base_of[file] = next((str(words[name]) for name in BASE if name in words), None)
    properties = {"has": "a bias" if f"{key}.bias" in checkpoint.tensors else "no bias"}
    base = base_of[file]
    if base:
        properties["is made from"] = base
    if entry is not None:
        properties["is"] = f"{entry.dtype} {list(entry.shape)}"
    return properties
