"""Whether the experts of a layer are of one make: the signs that a file's headers give that one of
them came from another model.

Weights alone do not tell: trained experts of one model have little in common, so no statistic of
theirs would be evidence. What can be seen is that one expert has another size, number format or set
of biases than its siblings, or lies in a file that names another base model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from edgemed.errors import EdgemedError
from edgemed.models.architecture import ParamSpec
from edgemed.models.checkpoint import Checkpoint, metadata

NAME = re.compile(r"layers\.(\d+)\.experts\.(\d+)\.(.+)")
# What tools call the model that weights were made from, in the metadata of a safetensors file.
BASE = ("base_model", "base_model_name_or_path")


def check(
    checkpoint: Checkpoint, parts: Mapping[str, ParamSpec], keys: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise EdgemedError naming layer and expert for the first expert that differs from most of its
    layer's in a way other than its numbers.

    keys: canonical part -> the checkpoint's modules. Packed matrices are compared among themselves
    in biases and named bases only: bits may differ by design.
    """
    known: dict[str, str | None] = {}
    # (layer, matrix, what) -> expert -> (value, tensor)
    found: dict[tuple[int, str, str], dict[int, tuple[str, str]]] = {}
    for name, part in parts.items():
        if not (match := NAME.fullmatch(name)):
            continue
        layer = int(match[1])
        expert = int(match[2])
        last = match[3]
        for number, key in enumerate(keys[name]):
            for what, value in _facts(checkpoint, part.weight(key), key, known).items():
                found.setdefault((layer, f"{last} {number}", what), {})[expert] = (
                    value,
                    part.weight(key),
                )
    for (layer, _, what), experts in sorted(found.items()):
        usual = Counter(value for value, _ in experts.values()).most_common(1)[0][0]
        odd = next(
            (expert for expert, (value, _) in sorted(experts.items()) if value != usual), None
        )
        if odd is not None:
            value, tensor = experts[odd]
            problem = (
                f"{checkpoint.path}: layer {layer}, expert {odd}: '{tensor}' {what} {value}, its"
                f" siblings' {usual}"
            )
            raise EdgemedError(
                problem,
                "The experts come from different models; download the checkpoint again, or put"
                " together what belongs together",
            )


def _facts(
    checkpoint: Checkpoint, tensor: str, key: str, known: dict[str, str | None]
) -> dict[str, str]:
    entry = checkpoint.tensors.get(tensor)
    held = entry or checkpoint.tensors.get(f"{key}.qweight")
    if held is None:
        return {}
    file = str(held.file)
    if file not in known:
        said = metadata(held.file)
        known[file] = next((str(said[name]) for name in BASE if name in said), None)
    found = {"has": "a bias" if f"{key}.bias" in checkpoint.tensors else "no bias"} | (
        {"is made from": known[file]} if known[file] else {}
    )
    return found | ({"is": f"{entry.dtype} {list(entry.shape)}"} if entry else {})
